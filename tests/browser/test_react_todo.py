"""examples/react_todo in a browser: built with Vite, served by its own application."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.examples.processes import EXAMPLES, answers, running, until
from tests.services import free_port

HERE = EXAMPLES / "react_todo"


@pytest.fixture(scope="module")
def built() -> Path:
    """The example with its page built; `npm install` and `npm run build` come before the tests."""
    assert (HERE / "dist" / "index.html").exists(), "Build the page first: npm install && npm run build"
    return HERE


class Application:
    """`todo.py`, on ports and with data that stay the same over restarts."""

    def __init__(self, directory: Path, data: Path) -> None:
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        self._directory = directory
        self._log = data / "log"
        self._environ = {"PORT": str(port), "STREAM_PORT": str(free_port()), "TODO_DATA": str(data)}
        self._holding = ExitStack()

    def start(self) -> None:
        self._holding.enter_context(running("todo", directory=self._directory, environ=self._environ, log=self._log))
        with httpx.Client(base_url=self.address) as client:
            until(lambda: answers(client, "/api/snapshot"), self._log)

    def stop(self) -> None:
        self._holding.close()


@pytest.fixture
def application(built: Path, tmp_path: Path) -> Iterator[Application]:
    application = Application(built, tmp_path)
    application.start()
    yield application
    application.stop()


@pytest.fixture
def address(application: Application) -> str:
    return application.address


class Window:
    """A page in a browser of its own, and what its console said."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.context = browser.new_context()
        self.page: Page = self.context.new_page()
        self.faults: list[str] = []
        self.page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(address)
        expect(self.page.get_by_role("heading", name="Todos")).to_be_visible()

    def add(self, text: str) -> None:
        self.page.get_by_label("What is to be done").fill(text)
        self.page.get_by_role("button", name="Add").click()

    def sees(self, *texts: str) -> None:
        expect(self.page.locator("li label")).to_have_text(list(texts))


@pytest.fixture
def windows(browser: Browser, address: str) -> Iterator[tuple[Window, Window]]:
    both = Window(browser, address), Window(browser, address)
    yield both
    for window in both:
        window.context.close()


def test_what_one_window_changes_the_other_shows(windows: tuple[Window, Window]):
    here, there = windows
    here.add("Water the plants")
    there.sees("Water the plants")
    there.add("Feed the cat")
    here.sees("Water the plants", "Feed the cat")

    here.page.get_by_label("Water the plants", exact=True).check()
    expect(there.page.get_by_label("Water the plants", exact=True)).to_be_checked()
    there.page.get_by_role("button", name="Clear what is done").click()

    here.sees("Feed the cat")
    there.sees("Feed the cat")
    assert (here.faults, there.faults) == ([], [])


def test_a_page_that_is_opened_later_begins_with_the_rows(browser: Browser, address: str):
    """The rows come from the snapshot: the stream is never read from its beginning."""
    first = Window(browser, address)
    for text in ("one", "two", "three"):
        first.add(text)
        first.page.locator("li", has_text=text).wait_for()
    first.sees("one", "two", "three")
    until_stored(address, 3)

    asked: list[str] = []
    context = browser.new_context()
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url) if "/v1/streams/" in request.url else None)
    page.goto(address)

    expect(page.locator("li label")).to_have_text(["one", "two", "three"])
    first.add("four")
    expect(page.locator("li label")).to_have_text(["one", "two", "three", "four"])
    assert asked
    assert not [url for url in asked if "offset=-1" in url]
    context.close()
    first.context.close()


def test_a_change_that_the_server_refuses_is_taken_back(windows: tuple[Window, Window]):
    here, there = windows
    here.page.route("**/api/todos", lambda route: route.fulfill(status=503, body="{}"))

    here.add("Never stored")

    expect(here.page.get_by_role("alert")).to_contain_text("503")
    here.sees()
    there.sees()


def test_a_change_shows_before_the_server_has_answered(windows: tuple[Window, Window]):
    here, there = windows
    held = []
    here.page.route("**/api/todos", lambda route: held.append(route))

    here.add("At once")

    here.sees("At once")
    there.sees()
    held[0].continue_()
    there.sees("At once")
    here.sees("At once")


def test_an_expired_token_is_renewed_unseen(windows: tuple[Window, Window]):
    here, there = windows
    refused: list[str] = []

    def refuse_once(route) -> None:
        if refused:
            return route.continue_()
        refused.append(route.request.url)
        return route.fulfill(status=401, headers={"Access-Control-Allow-Origin": "*"})

    here.page.route("**/v1/streams/**", refuse_once)
    there.add("Before")  # ends the wait of the request that runs
    here.sees("Before")

    there.add("After")

    here.sees("Before", "After")
    assert refused


def test_pages_go_on_after_a_restart_with_other_keys(windows: tuple[Window, Window], application: Application):
    here, there = windows
    here.add("Before")
    there.sees("Before")

    application.stop()
    application.start()
    here.add("After")

    here.sees("Before", "After")
    there.sees("Before", "After")


def until_stored(address: str, count: int) -> None:
    with httpx.Client(base_url=address) as client:
        until(lambda: len(client.get("/api/snapshot").json()["events"]) == count, Path("/dev/null"))
