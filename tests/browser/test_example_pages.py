"""The pages of examples/fastapi_chat and examples/flask_board, in two windows each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from playwright.sync_api import Browser, Page, expect

from broadcastable.server.embedded import EmbeddedServer
from tests.examples.processes import EXAMPLES, answers, running, until
from tests.services import free_port

Opened = Callable[[str], Page]


@pytest.fixture
def open_window(browser: Browser) -> Iterator[Opened]:
    """Opens a page in a browser of its own; its console may say of errors only that a test refused something."""
    faults: list[str] = []
    with ExitStack() as holding:

        def open_window(address: str) -> Page:
            context = browser.new_context()
            holding.callback(context.close)
            page = context.new_page()
            page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(address)
            expect(page.locator("#state")).to_have_text("live", timeout=15_000)
            return page

        yield open_window
    assert [fault for fault in faults if "403" not in fault] == []


@pytest.fixture
def board(tmp_path: Path) -> Iterator[str]:
    directory = tmp_path / "board"
    shutil.copytree(EXAMPLES / "flask_board", directory, ignore=shutil.ignore_patterns("board.db*", "streams"))
    port = free_port()
    environ = {
        "PORT": str(port),
        "STREAM_PORT": str(free_port()),
        # Tokens that end while the test runs.
        "BROADCASTABLE_SIGNED_STREAM_URL_EXPIRES_IN": "2",
    }
    with (
        running("board", directory=directory, environ=environ, log=tmp_path / "log"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        until(lambda: answers(client, "/snapshot"), tmp_path / "log")
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def chat(stream_server: EmbeddedServer, postgres_url: str, valkey_url: str, tmp_path: Path) -> Iterator[str]:
    port = free_port()
    environ = {
        "BROADCASTABLE_SERVER_URL": stream_server.url,
        "BROADCASTABLE_SIGNING_KEY": str(stream_server.settings.signing_key),
        "BROADCASTABLE_REDIS_URL": valkey_url,
        "BROADCASTABLE_DATABASE_URL": sa.make_url(postgres_url)
        .set(drivername="postgresql+asyncpg")
        .render_as_string(hide_password=False),
        "BROADCASTABLE_SIGNED_STREAM_URL_EXPIRES_IN": "2",
    }
    with ExitStack() as holding:
        for command in (
            ("uvicorn", "chat.app:app", "--port", str(port), "--no-access-log"),
            ("dramatiq", "chat.worker", "--processes", "1", "--threads", "4"),
        ):
            holding.enter_context(
                running(*command, directory=EXAMPLES / "fastapi_chat", environ=environ, log=tmp_path / "log")
            )
        client = holding.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}"))
        until(lambda: answers(client, "/snapshot"), tmp_path / "log")
        client.post("/rooms", json={"name": "garden"}).raise_for_status()
        client.post("/rooms", json={"name": "kitchen"}).raise_for_status()
        yield f"http://127.0.0.1:{port}"


def test_a_card_moves_in_both_windows(board: str, open_window: Opened):
    here, there = open_window(board), open_window(board)

    here.get_by_label("New card").fill("Water the plants")
    here.get_by_role("button", name="Add").click()
    there.get_by_role("button", name="Water the plants: on to doing").click()

    for page in (here, there):
        expect(page.get_by_role("button", name="Water the plants: on to done")).to_be_visible()


def test_a_room_fills_in_both_windows_also_with_a_new_token(chat: str, open_window: Opened):
    here, there = open_window(chat), open_window(chat)
    tokens: list[str] = []
    there.on("request", lambda request: tokens.append(request.url) if "/streams/token" in request.url else None)

    def say(page: Page, name: str, text: str) -> None:
        page.get_by_label("Name", exact=True).fill(name)
        page.get_by_label("Message").fill(text)
        page.get_by_role("button", name="Send").click()

    say(here, "Ada", "Hello")
    expect(there.locator("#messages li")).to_have_text(["Ada: Hello"])
    until(lambda: there.wait_for_timeout(50) or len(tokens) >= 2, Path("/dev/null"))
    say(here, "Ada", "Still there?")
    expect(there.locator("#messages li")).to_have_text(["Ada: Hello", "Ada: Still there?"])

    there.get_by_label("New room").fill("attic")
    there.get_by_label("New room").press("Enter")
    here.get_by_role("button", name="attic").click()
    say(here, "Ada", "Dusty")
    expect(here.locator("#messages li")).to_have_text(["Ada: Dusty"])


@pytest.mark.parametrize("example", ["board", "chat"])
def test_a_page_whose_reader_is_refused_a_token_ends_and_asks_no_more(
    example: str, open_window: Opened, request: pytest.FixtureRequest
):
    """As `stream_routes` and `streams_blueprint` refuse one: 403, and nothing in it."""
    page = open_window(request.getfixturevalue(example))
    # The chat also follows the list of its rooms, which shows no state, and ends when its own token does.
    asked: list[str] = []
    page.on("request", lambda asking: asked.append(asking.url))

    page.route("**/streams/token*", lambda route: route.fulfill(status=403, body=""))

    expect(page.locator("#state")).to_have_text("gone")
    page.wait_for_timeout(2_000)
    asked.clear()
    page.wait_for_timeout(1_000)
    assert asked == []
