"""A demo in a process of its own, and windows of a real Chromium that look at it.

`CHROMIUM` names another binary than Debian's. With `KEEP_IMAGES=1` the pictures of the documentation are made anew.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.services import free_port

# Without these Chromium calls home, and a closed network refuses it many times a second.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
IMAGES = Path(__file__).parents[2] / "docs" / "images"
PATIENCE = 20_000


class Demo:
    """`broadcastable demo` on ports that stay the same over restarts; its data too, when *data_dir* is given."""

    def __init__(self, directory: Path, data_dir: Path | None, environment: dict[str, str]) -> None:
        self._log = directory / "demo.log"
        self._environment = environment
        self._data_dir = data_dir
        self.port, self.stream_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        options = ["--no-open", "--port", str(self.port), "--stream-port", str(self.stream_port)]
        if self._data_dir is not None:
            options += ["--data-dir", str(self._data_dir)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from broadcastable.cli import main; main()", "demo", *options],
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment},
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                self.call("GET", "rooms")
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(self._log.read_text()) from None
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """A request to the demo's application, as another user's page would make it."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def bodies(self, room: int = 1) -> list[str]:
        """The texts of the messages in the database, in order."""
        return [event["value"]["body"] for event in self.call("GET", f"rooms/{room}/snapshot")["events"]]


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    demos: list[Demo] = []

    def start(*, keep: bool = False, **environment: str) -> Demo:
        demos.append(Demo(tmp_path, tmp_path / "data" if keep else None, environment))
        return demos[-1]

    yield start
    for demo in demos:
        demo.stop()


@pytest.fixture
def demo(start_demo: Callable[..., Demo]) -> Demo:
    return start_demo()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=ARGUMENTS
        )
        yield browser
        browser.close()


class Window:
    """One window of the demo's page."""

    def __init__(self, page: Page, demo: Demo, room: int) -> None:
        self.page = page
        self.errors: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(f"{demo.url}#{room}")
        self.wait_for_state("live")
        page.evaluate("""() => {
          globalThis.states = [];
          const badge = document.getElementById("badge");
          const note = () => states.push(badge.dataset.state);
          new MutationObserver(note).observe(badge, { attributeFilter: ["data-state"] });
        }""")

    def wait_for_state(self, state: str) -> None:
        self.page.locator(f"#badge[data-state={state}]").wait_for()

    def states(self) -> list[str]:
        """The states that the badge has shown since the page was first live."""
        shown: list[str] = self.page.evaluate("states")
        return shown

    def hurry(self) -> None:
        """Do not sit out the pause between two attempts."""
        self.page.evaluate("subscription.reconnect()")

    def say(self, text: str) -> None:
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def message(self, text: str) -> Any:
        """The list item of the message that says exactly *text*, as the stream brought it."""
        return self.page.locator("li.message:not(.sending):not(.leaving)").filter(
            has=self.page.get_by_text(text, exact=True)
        )

    def bodies(self) -> list[str]:
        """The texts of the messages on the page, in order, without those that are on their way."""
        texts: list[str] = self.page.locator("li.message:not(.sending):not(.leaving) .body").all_inner_texts()
        return texts

    def watch(self, condition: str) -> None:
        """Note the moment at which the JavaScript *condition* on the list of texts comes true; see `moment`."""
        self.page.evaluate(
            """(condition) => {
              const holds = new Function("texts", `return ${condition}`);
              globalThis.moment = new Promise((resolve) => {
                const look = () => {
                  const shown = document.querySelectorAll("li.message:not(.sending):not(.leaving) .body");
                  if (holds([...shown].map((each) => each.textContent))) resolve(Date.now());
                };
                const changes = { subtree: true, childList: true, characterData: true, attributes: true };
                new MutationObserver(look).observe(document.getElementById("messages"), changes);
                look();
              });
            }""",
            condition,
        )

    def moment(self) -> float:
        """When what `watch` waits for came true, in Unix milliseconds."""
        when: float = self.page.evaluate("moment")
        return when

    def choose(self, text: str, entry: str) -> float:
        """Open the menu of a message and choose; the Unix milliseconds of the choice."""
        self.message(text).locator("button.icon").click()
        chosen: float = self.page.get_by_role("menuitem", name=entry).evaluate(
            "(button) => { const now = Date.now(); button.click(); return now; }"
        )
        return chosen


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    yield context
    context.close()


@pytest.fixture
def open_window(context: BrowserContext) -> Iterator[Callable[..., Window]]:
    """Opens windows; at the end none of them may have an error in its console, but for `expected` ones."""
    windows: list[tuple[Window, tuple[str, ...]]] = []

    def open_(demo: Demo, room: int = 1, *, expected: tuple[str, ...] = ()) -> Window:
        windows.append((Window(context.new_page(), demo, room), expected))
        return windows[-1][0]

    yield open_
    for window, expected in windows:
        assert [error for error in window.errors if not any(each in error for each in expected)] == []


_latencies = pytest.StashKey[dict[str, float]]()


@pytest.fixture
def report_latency(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """Notes how long something took to be seen in another window, for the summary."""
    table = request.config.stash.setdefault(_latencies, {})
    return lambda what, milliseconds: table.update({what: milliseconds})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    table = config.stash.get(_latencies, {})
    if table:
        terminalreporter.section("seen in another window after")
        for what, milliseconds in table.items():
            terminalreporter.write_line(f"{what:30} {milliseconds:6.0f} ms")
