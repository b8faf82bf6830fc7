"""`demo --once`, and what the demo says when it cannot start. Its page is tested in a browser."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import typer

from broadcastable.cli.demo.chat import Chat
from broadcastable.cli.demo.scenario import Arrival, Inbox, Reader, Story
from broadcastable.cli.demo.web import web_app
from broadcastable.tokens import generate_key_pair

from .conftest import Command

Start = Callable[..., Command]


def test_once_plays_everything_to_a_reader_that_is_not_ours(start: Start) -> None:
    """108 events on three streams through the published client, over an outage too."""
    code, out, err = start("demo", "--once").end()
    assert code == 0, out + err
    assert "All arrived: 107 commits, 108 events on 3 streams, each once and in order" in out
    assert "nothing came" in out
    assert "Traceback" not in err


def test_it_goes_on_with_the_data_of_the_last_time(start: Start, tmp_path: Any) -> None:
    for _ in range(2):
        code, out, err = start("demo", "--once", "--data-dir", str(tmp_path / "kept")).end()
        assert code == 0, out + err


def arrival(operation: str, key: int, stream: str = "room") -> Arrival:
    event = {"type": "message", "key": str(key), "headers": {"operation": operation, "txid": "0" * 36}}
    return Arrival(stream, event, "0", 1e12)


@pytest.mark.parametrize(
    "arrived",
    [
        [],
        [arrival("insert", 1)],
        [arrival("insert", 2), arrival("insert", 1)],
        [arrival("insert", 1), arrival("insert", 1), arrival("insert", 2)],
        [arrival("insert", 1), arrival("insert", 2), arrival("update", 2)],
        [arrival("insert", 1), arrival("insert", 2, "other")],
    ],
    ids=["nothing", "one missing", "out of order", "one twice", "one too many", "on another stream"],
)
def test_the_scenario_fails_unless_all_arrive_once_and_in_order(
    arrived: list[Arrival], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broadcastable.cli.demo.scenario.PATIENCE", 0.05)
    inbox = Inbox()
    story = Story(inbox)
    due = [("room", "insert", "message/1"), ("room", "insert", "message/2")]

    def tell() -> None:
        inbox.put(arrived)

    if arrived:
        story.tell("Two messages", tell, lambda _: due)
        assert story.sum_up() is False
    else:
        with pytest.raises(typer.Exit):
            story.tell("Two messages", tell, lambda _: due)


@pytest.mark.parametrize(
    ("arrived", "says"),
    [
        ([1], "2 events were due on 1 streams and 1 came; 1 are missing, 0 came twice"),
        ([1, 1, 2], "2 events were due on 1 streams and 3 came; 0 are missing, 1 came twice or were not due."),
        ([1, 1], "and 2 came; 1 are missing, 1 came twice"),
        ([2, 1], "0 are missing, 0 came twice or were not due, and their order is another."),
    ],
)
def test_what_is_missing_and_what_came_twice_is_counted(
    arrived: list[int], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("broadcastable.cli.demo.scenario.PATIENCE", 0.05)
    inbox = Inbox()
    story = Story(inbox)
    story.tell(
        "Two messages",
        lambda: inbox.put([arrival("insert", key) for key in arrived]),
        lambda _: [("room", "insert", "message/1"), ("room", "insert", "message/2")],
    )
    story.sum_up()
    assert says in capsys.readouterr().out


def test_a_reader_that_is_given_nothing_says_why_and_ends_the_scenario(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("broadcastable.cli.demo.scenario.PATIENCE", 0.5)
    inbox = Inbox()
    with Chat() as chat:
        reader = Reader(chat, chat.stream_name(chat.rooms()[0]), inbox)
        chat.let_stream_server_run(False)
        with pytest.raises(typer.Exit), reader:
            pass
    assert "Connection refused" in capsys.readouterr().err
    with pytest.raises(typer.Exit):
        Story(inbox).tell("A message", lambda: None, lambda _: [("room", "insert", "message/1")])
    assert "Connection refused" in capsys.readouterr().err


def test_neither_a_proxy_nor_settings_that_it_replaces_stop_it(start: Start) -> None:
    code, out, err = start(
        "demo",
        "--once",
        HTTP_PROXY="http://127.0.0.1:9",
        BROADCASTABLE_OUTBOX="redis",
        BROADCASTABLE_SERVER_URL="one,two",
        BROADCASTABLE_STREAM_TTL="never",
    ).end()
    assert code == 0, out + err


def test_a_directory_that_cannot_be_is_one_sentence(start: Start) -> None:
    code, _, err = start("demo", "--once", "--data-dir", "/dev/null/x").end()
    assert code == 1
    assert "/dev/null/x cannot be a directory for --data-dir" in err
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def chat() -> Iterator[Chat]:
    with Chat() as chat:
        yield chat


def ask(chat: Chat, method: str, path: str, **request: Any) -> httpx.Response:
    """An answer of the demo's HTTP interface; 500 is an error that nobody caught."""

    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(web_app(chat), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://demo") as client:
            return await client.request(method, path, **request)

    return asyncio.run(answer())


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", f"/rooms/{2**63}/snapshot", None, 404),
        ("GET", f"/rooms/{2**70}/token", None, 404),
        ("POST", f"/rooms/{2**63}/messages", '{"author": "Ada", "body": "Hello"}', 404),
        ("DELETE", f"/messages/{2**63}", "{}", 404),
        ("PATCH", "/messages/1", f'{{"room_id": {2**63}}}', 404),
        ("PATCH", "/messages/1", f'{{"room_id": {-(2**70)}}}', 404),
        ("PATCH", "/messages/1", '{"body": "half a \\ud83d"}', 400),
        ("POST", "/rooms/1/messages", '{"author": "\\udc00", "body": "Hello"}', 400),
        ("POST", "/rooms", '{"name": ' + "[" * 100_000, 400),
        ("PATCH", "/messages/1", '{"body": "whole \\ud83d\\ude00"}', 200),
    ],
)
def test_the_page_s_interface_refuses_what_makes_no_sense(
    chat: Chat, method: str, path: str, body: str | None, status: int
) -> None:
    response = ask(chat, method, path, content=body)
    assert response.status_code == status
    assert ("error" in response.json()) == (status != 200)


def test_another_origin_may_change_nothing(chat: Chat) -> None:
    for origin, status in (("http://demo", 200), ("http://[", 400), ("https://a.example", 400), ("null", 400)):
        response = ask(chat, "POST", "/rooms", json={"name": "Attic"}, headers={"origin": origin})
        assert response.status_code == status, origin


def test_a_port_in_use_is_one_sentence(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = start("demo", "--no-open", "--port", str(port)).end()
    assert code == 1
    assert f"Port {port} on 127.0.0.1 is in use" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("missing", ["rakaia", "uvicorn", "starlette"])
def test_a_missing_extra_is_one_sentence(missing: str, start: Start, tmp_path: Any) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None\n")
    code, _, err = start("demo", "--no-open", PYTHONPATH=str(tmp_path)).end()
    assert code == 1
    assert "pip install 'broadcastable[" in err
    assert "Traceback" not in err


def test_a_missing_reader_is_one_sentence(start: Start, tmp_path: Any) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['durable_streams'] = None\n")
    code, _, err = start("demo", "--once", PYTHONPATH=str(tmp_path)).end()
    assert code == 1
    assert "pip install 'broadcastable[demo]'" in err


@pytest.mark.parametrize("key", ["nowhere.pem", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"])
def test_a_key_that_is_of_no_use_is_one_sentence(key: str, start: Start) -> None:
    code, _, err = start("demo", "--no-open", BROADCASTABLE_SIGNING_KEY=key).end()
    assert code == 1
    assert "keys generate" in err
    assert "Traceback" not in err


def test_a_key_of_the_environment_is_used(start: Start) -> None:
    code, out, err = start("demo", "--once", BROADCASTABLE_SIGNING_KEY=generate_key_pair().private_pem).end()
    assert code == 0, out + err
