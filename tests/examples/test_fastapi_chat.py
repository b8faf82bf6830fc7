"""examples/fastapi_chat on PostgreSQL and Valkey, with the application and its workers in processes of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from broadcastable.server.embedded import EmbeddedServer, embedded_server
from broadcastable.settings import Settings
from tests.services import free_port

from .processes import EXAMPLES, answers, running, until

HERE = EXAMPLES / "fastapi_chat"


class Chat:
    """The application's address, and its workers."""

    def __init__(self, environ: dict[str, str], log: Path, holding: ExitStack) -> None:
        self.environ = environ
        self.log = log
        self._holding = holding
        port = free_port()
        self._run("uvicorn", "chat.app:app", "--port", str(port), "--no-access-log")
        self.client = holding.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}"))
        until(lambda: answers(self.client, "/snapshot"), log)

    def _run(self, *command: str) -> Any:
        return self._holding.enter_context(running(*command, directory=HERE, environ=self.environ, log=self.log))

    def start_worker(self) -> int:
        """A worker; its process id."""
        return int(self._run("dramatiq", "chat.worker", "--processes", "1", "--threads", "4").pid)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        response = self.client.post(path, json=body)
        assert response.status_code == 201, response.text
        return response.json()

    def get(self, path: str) -> Any:
        return self.client.get(path).raise_for_status().json()

    def follow(self, snapshot: dict[str, Any], count: int) -> list[dict[str, Any]]:
        """The events after *snapshot*, once there are *count* of them."""

        def read() -> list[dict[str, Any]] | None:
            params = {"offset": snapshot["offset"], "token": snapshot["token"]}
            events = httpx.get(snapshot["url"], params=params).raise_for_status().json()
            assert len(events) <= count
            return events if len(events) == count else None

        return until(read, self.log)


@pytest.fixture
def streams() -> Iterator[EmbeddedServer]:
    with embedded_server(settings=Settings()) as server:
        yield server


@pytest.fixture
def chat(streams: EmbeddedServer, postgres_url: str, valkey_url: str, tmp_path: Path) -> Iterator[Chat]:
    environ = {
        "BROADCASTABLE_SERVER_URL": streams.url,
        "BROADCASTABLE_SIGNING_KEY": str(streams.settings.signing_key),
        "BROADCASTABLE_REDIS_URL": valkey_url,
        "BROADCASTABLE_DATABASE_URL": sa.make_url(postgres_url)
        .set(drivername="postgresql+asyncpg")
        .render_as_string(hide_password=False),
    }
    with ExitStack() as holding:
        yield Chat(environ, tmp_path / "log", holding)


def test_what_is_posted_edited_moved_and_removed_follows_the_snapshot(chat: Chat):
    chat.start_worker()
    garden, kitchen = chat.post("/rooms", name="garden")["id"], chat.post("/rooms", name="kitchen")["id"]
    first = chat.post(f"/rooms/{garden}/messages", author="Ada", text="Hello")["id"]
    here, there = chat.get(f"/rooms/{garden}/snapshot"), chat.get(f"/rooms/{kitchen}/snapshot")

    second = chat.post(f"/rooms/{garden}/messages", author="Bob", text="Hi")
    chat.client.patch(f"/messages/{first}", json={"text": "Hello, all"}).raise_for_status()
    moved = chat.client.patch(f"/messages/{second['id']}", json={"room_id": kitchen}).raise_for_status().json()
    chat.client.delete(f"/messages/{first}").raise_for_status()

    assert [event["value"]["text"] for event in here["events"]] == ["Hello"]
    # From the beginning: whether the first message lies before the offset too depends on how fast it was delivered.
    events = chat.follow(here | {"offset": "-1"}, 5)
    assert [(event["headers"]["operation"], event["key"]) for event in events] == [
        ("insert", str(first)),
        ("insert", str(second["id"])),
        ("update", str(first)),
        ("delete", str(second["id"])),
        ("delete", str(first)),
    ]
    (arrived,) = chat.follow(there, 1)
    assert arrived["headers"]["operation"] == "insert"
    assert arrived["value"]["room_id"] == str(kitchen)
    assert arrived["headers"]["txid"] == events[3]["headers"]["txid"] == moved["txid"]


def test_a_row_that_a_worker_commits_is_streamed_too(chat: Chat):
    chat.start_worker()
    room = chat.post("/rooms", name="games")["id"]
    snapshot = chat.get(f"/rooms/{room}/snapshot")

    chat.post(f"/rooms/{room}/messages", author="Ada", text="/dice")

    asked, thrown = chat.follow(snapshot, 2)
    assert asked["value"]["text"] == "/dice"
    assert thrown["value"]["author"] == "dice"
    assert thrown["value"]["text"].startswith("Ada throws ")


def test_messages_of_a_time_without_workers_come_in_order_once_there_is_one(chat: Chat):
    """The worker is killed without warning, and everything that was committed meanwhile is delivered by the next."""
    worker = chat.start_worker()
    room = chat.post("/rooms", name="night")["id"]
    snapshot = chat.get(f"/rooms/{room}/snapshot")
    chat.post(f"/rooms/{room}/messages", author="Ada", text="0")
    chat.follow(snapshot, 1)
    os.killpg(worker, signal.SIGKILL)
    for number in range(1, 20):
        chat.post(f"/rooms/{room}/messages", author="Ada", text=str(number))

    chat.start_worker()

    assert [event["value"]["text"] for event in chat.follow(snapshot, 20)] == [str(number) for number in range(20)]


def test_a_token_is_given_for_rooms_that_there_are_and_for_nothing_else(chat: Chat):
    """Whoever gets a token gets the stream as well, so a visitor must not choose names."""
    room = chat.post("/rooms", name="garden")["id"]
    given = chat.get(f"/streams/token?stream=gid://app/Room/{room}/messages")

    assert given["url"].endswith(f"/gid://app/Room/{room}/messages")
    assert given["token"]
    assert chat.get("/streams/token?stream=rooms")["token"]
    for name in (
        "gid://app/User/1",
        f"gid://app/Room/{room}",
        f"gid://app/Room/{room}/messages/anything",
        f"gid://app/Room/0{room}/messages",
        f"gid://app/Room/{room},{room}/messages",
        f"gid://app/Room/{room + 1}/messages",
        f"gid://app/Room/{10**20}/messages",
        f"gid://other/Room/{room}/messages",
        f"rooms/{room}",
    ):
        assert chat.client.get("/streams/token", params={"stream": name}).status_code == 403, name


def test_what_cannot_be_stored_or_found_is_refused(chat: Chat):
    """Each with an answer that says so, and none with a 500."""
    room = chat.post("/rooms", name="garden")["id"]
    message = chat.post(f"/rooms/{room}/messages", author="Ada", text="Hello")["id"]
    text = {"author": "Ada", "text": "Hello"}

    for method, path, body, status in (
        ("POST", "/rooms", {"name": "garden"}, 409),
        ("POST", "/rooms", {"name": "a\0b"}, 422),
        ("GET", "/rooms/424242/snapshot", {}, 404),
        ("GET", f"/rooms/{10**20}/snapshot", {}, 422),
        ("POST", "/rooms/424242/messages", text, 404),
        ("POST", f"/rooms/{10**20}/messages", text, 422),
        ("POST", f"/rooms/{room}/messages", text | {"text": "a\0b"}, 422),
        ("PATCH", f"/messages/{message}", {"text": "a\0b"}, 422),
        ("PATCH", f"/messages/{message}", {"room_id": 424242}, 404),
        ("PATCH", f"/messages/{message}", {"room_id": 10**20}, 422),
        ("PATCH", f"/messages/{10**20}", {"text": "Hi"}, 422),
        ("DELETE", f"/messages/{10**20}", {}, 422),
    ):
        assert chat.client.request(method, path, json=body).status_code == status, (method, path, body)

    assert [event["value"]["name"] for event in chat.get("/snapshot")["events"]] == ["garden"]


def test_the_page_and_its_module_are_served(chat: Chat):
    page = chat.client.get("/")
    module = chat.client.get("/static/broadcastable.js")

    assert "broadcastable.js" in page.text
    assert module.headers["content-type"].startswith(("text/javascript", "application/javascript"))
