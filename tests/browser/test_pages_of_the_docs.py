"""The pages of docs/quickstart.md and docs/browser.md in a browser, served by the applications beside them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect

from tests.examples.processes import EXAMPLES, answers, running, until
from tests.services import free_port

DOCS = EXAMPLES.parent / "docs"
Opened = Callable[[str], Page]
# What the browser itself writes when an application says no.
REFUSED = "403"
# What the quickstart's step before leaves in the database.
ROOM = """
Base.metadata.create_all(engine)
with Session() as made:
    made.add(Room(id=1, name="garden"))
    made.commit()
"""


def block(page: str, language: str, with_text: str) -> str:
    """The one code block of a page of the documentation in *language* that has *with_text*."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    (found,) = [each for each in blocks if with_text in each]
    return str(found)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Saves the files of a page of the documentation as it says, runs them, and gives the address."""
    with ExitStack() as holding:

        def serve(page: str) -> str:
            shutil.copy(DOCS / "samples" / "chat.py", tmp_path)
            application = block(page, "python", "app = FastAPI(")
            if page == "quickstart.md":
                application += ROOM
            (tmp_path / "app.py").write_text(application)
            (tmp_path / "page.html").write_text(block(page, "html", "<!doctype html>"))
            port = free_port()
            log = tmp_path / "log"
            # Tokens that end while the test runs.
            environ = {"BROADCASTABLE_SIGNED_STREAM_URL_EXPIRES_IN": "2"}
            holding.enter_context(
                running("uvicorn", "app:app", "--port", str(port), directory=tmp_path, environ=environ, log=log)
            )
            client = holding.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}"))
            until(lambda: answers(client, "/"), log)
            return f"http://127.0.0.1:{port}/"

        yield serve


@pytest.fixture
def open_window(browser: Browser) -> Iterator[Opened]:
    """Opens a page in a browser of its own; its console may say of errors only that the application said no."""
    faults: list[str] = []
    with ExitStack() as holding:

        def open_window(address: str) -> Page:
            context: BrowserContext = browser.new_context()
            holding.callback(context.close)
            page = context.new_page()
            page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(address)
            return page

        yield open_window
    assert [fault for fault in faults if REFUSED not in fault] == []


def say(page: Page, text: str) -> None:
    page.locator("[name=text]").fill(text)
    page.get_by_role("button", name="Send").click()


def test_the_quickstart_s_page_shows_in_one_window_what_the_other_wrote(
    serve: Callable[[str], str], open_window: Opened
) -> None:
    address = serve("quickstart.md")
    here, there = open_window(address), open_window(address)
    for page in (here, there):
        expect(page.locator("#state")).to_have_text("live", timeout=15_000)
    here.locator("[name=author]").fill("Ada")

    say(here, "Hello")

    for page in (here, there):
        expect(page.locator("#messages li")).to_have_text(["Ada: Hello"])


def test_the_full_page_shows_what_was_written_and_waits_for_it(
    serve: Callable[[str], str], open_window: Opened
) -> None:
    """Also after the token was renewed, which nobody sees."""
    address = serve("browser.md")
    here, there = open_window(address), open_window(address + "?user=grace")
    renewed: list[str] = []
    there.on("request", lambda request: renewed.append(request.url) if "/streams/token" in request.url else None)
    expect(there.locator("#state")).to_have_text("Live", timeout=15_000)

    say(here, "Hello")
    expect(here.get_by_role("button", name="Send")).to_be_enabled()
    expect(here.locator("#messages li")).to_have_text(["ada: Hello"])
    until(lambda: there.wait_for_timeout(50) or len(renewed) >= 2, Path("/dev/null"))
    say(there, "Hi")

    for page in (here, there):
        expect(page.locator("#messages li")).to_have_text(["ada: Hello", "grace: Hi"])
    expect(there.locator("#state")).to_have_text("Live")


def test_a_reader_that_the_application_refuses_a_token_is_told_so_and_asks_no_more(
    serve: Callable[[str], str], open_window: Opened
) -> None:
    """`stream_routes` says 403 with nothing in it. The page ends by that, before its token does."""
    page = open_window(serve("browser.md"))
    expect(page.locator("#state")).to_have_text("Live", timeout=15_000)

    page.context.clear_cookies()

    expect(page.locator("#state")).to_have_text("You may not read this room")
    assert nothing_is_asked_any_more(page)
    expect(page.locator("form")).to_have_count(0)


def test_a_reader_that_was_never_welcome_is_told_so_and_asks_no_more(
    serve: Callable[[str], str], open_window: Opened
) -> None:
    page = open_window(serve("browser.md") + "?user=mallory")

    expect(page.locator("#state")).to_have_text("You may not read this room")
    assert nothing_is_asked_any_more(page)


def nothing_is_asked_any_more(page: Page) -> bool:
    """Nothing in a time in which a page that tries again, however slowly at first, would have done so twice."""
    asked: list[Request] = []
    page.on("request", lambda request: asked.append(request))
    page.wait_for_timeout(1_000)
    return asked == []
