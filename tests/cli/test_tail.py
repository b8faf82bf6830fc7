"""`tail`: every event once, from wherever one says, also over an outage."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from broadcastable.cli.tail import _lines, _server_sent
from broadcastable.durable_streams import DurableStreams
from broadcastable.server.embedded import EmbeddedServer, embedded_server
from broadcastable.settings import Settings, override

from .conftest import Command

Run = Callable[..., Any]
Start = Callable[..., Command]


@pytest.fixture
def durable_streams(stream_server: EmbeddedServer) -> Iterator[DurableStreams]:
    changes = {"server_url": stream_server.url, "signing_key": stream_server.settings.signing_key}
    with override(**changes), DurableStreams() as durable_streams:
        yield durable_streams


@pytest.fixture
def stream() -> str:
    return f"tail/{uuid.uuid4().hex}"


def change(durable_streams: DurableStreams, stream: str, key: int, operation: str = "insert") -> None:
    durable_streams.broadcast_event_to(stream, type="row", key=key, value={"n": key}, operation=operation)


def events(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def environment(server: EmbeddedServer) -> dict[str, str]:
    assert server.settings.signing_key is not None
    return {"BROADCASTABLE_SERVER_URL": server.url, "BROADCASTABLE_SIGNING_KEY": server.settings.signing_key}


def test_from_the_first_event_to_the_present_end(durable_streams: DurableStreams, stream: str, run: Run) -> None:
    for key in range(3):
        change(durable_streams, stream, key)
    result = run("tail", stream, "--offset", "-1", "--no-follow", "--json")
    assert [line["event"]["key"] for line in events(result.stdout)] == ["0", "1", "2"]


def test_it_goes_on_from_the_offset_that_it_printed(durable_streams: DurableStreams, stream: str, run: Run) -> None:
    change(durable_streams, stream, 1)
    offset = events(run("tail", stream, "--offset", "-1", "--no-follow", "--json").stdout)[-1]["offset"]
    change(durable_streams, stream, 2, "update")
    result = run("tail", stream, "--offset", offset, "--no-follow", "--json")
    assert [line["event"]["key"] for line in events(result.stdout)] == ["2"]


def test_for_people_it_prints_a_line_an_event(durable_streams: DurableStreams, stream: str, run: Run) -> None:
    for key, operation in ((1, "insert"), (1, "update"), (1, "delete")):
        change(durable_streams, stream, key, operation)
    durable_streams.broadcast_to(stream, typing="Ada")
    lines = run("tail", stream, "--offset", "-1", "--no-follow").stdout.splitlines()
    for line, wanted in zip(lines, ("insert", "update", "delete", "event"), strict=True):
        assert wanted in line
    assert 'row/1 {"n":1}' in lines[0].replace('": ', '":')
    assert '{"typing": "Ada"}' in lines[3]


@pytest.mark.parametrize(
    "event",
    [
        {"headers": "foo"},
        {"headers": {"a": 1}},
        {"headers": {"operation": "insert"}},
        {"headers": None, "type": "row", "key": "1"},
    ],
)
def test_an_event_that_only_looks_like_a_change_is_printed_as_it_is(
    durable_streams: DurableStreams, stream: str, run: Run, event: dict[str, Any]
) -> None:
    durable_streams.broadcast_to(stream, **event)
    result = run("tail", stream, "--offset", "-1", "--no-follow")
    assert result.exit_code == 0
    assert json.dumps(event) in result.stdout


def test_an_event_cannot_command_the_terminal(durable_streams: DurableStreams, stream: str, run: Run) -> None:
    """Whoever may append chooses type, key and text."""
    durable_streams.broadcast_event_to(
        stream, type="row\x1b[2J", key="1\x9b2J\n", value={"says": "\x7f\x1b"}, operation="insert"
    )
    durable_streams.broadcast_to(stream, says="\x1b]0;title\x07\x9b")
    result = run("tail", stream, "--offset", "-1", "--no-follow")
    assert len(result.stdout.splitlines()) == 2
    assert all(each.isprintable() for each in result.stdout.splitlines())
    assert "row\\u001b[2J/1\\u009b2J\\u000a" in result.stdout


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_of_an_event_stream_ends_nowhere_else(end: str) -> None:
    """HTML, 9.2.5; a server may write JSON as it is, and any byte may be the last of a piece."""
    text = '{"body":"a\u2028b\u2029c\u0085d\u000be"}'
    lines = ["event: data", f"data: {text}", "", ": a comment", "event: control", "data: {", "data: }", ""]
    sent = "".join(line + end for line in lines).encode()
    for cut in range(len(sent)):
        pieces = [piece for piece in (sent[:cut], sent[cut:]) if piece]
        assert list(_server_sent(_lines(pieces))) == [("data", text), ("control", "{\n}")]
    assert list(_server_sent(_lines(sent[at : at + 1] for at in range(len(sent))))) == [
        ("data", text),
        ("control", "{\n}"),
    ]


def test_it_follows_and_ctrl_c_tells_how_to_go_on(
    durable_streams: DurableStreams, stream_server: EmbeddedServer, stream: str, start: Start
) -> None:
    durable_streams.ensure_stream_exists(stream)
    tail = start("tail", stream, "--json", "--offset", "-1", **environment(stream_server))
    for key in range(3):
        change(durable_streams, stream, key)
        assert json.loads(tail.line())["event"]["key"] == str(key)
    tail.process.send_signal(signal.SIGINT)
    code, _, err = tail.end()
    assert code == 0
    assert "Traceback" not in err


def test_an_outage_costs_nothing(start: Start) -> None:
    """The server stops and returns; what was appended afterwards comes, and nothing twice."""
    with embedded_server(settings=Settings()) as server, DurableStreams(server.settings) as durable_streams:
        change(durable_streams, "room", 0)
        tail = start("tail", "room", "--offset", "-1", "--json", **environment(server))
        assert json.loads(tail.line())["event"]["key"] == "0"
        server.stop()
        while "away" not in tail.line(of="stderr"):
            assert tail.process.poll() is None
        server.start()
        for key in (1, 2):
            change(durable_streams, "room", key)
            assert json.loads(tail.line())["event"]["key"] == str(key)


def test_it_ends_with_its_stream(durable_streams: DurableStreams, stream: str, run: Run) -> None:
    change(durable_streams, stream, 1)
    durable_streams.close_stream(stream)
    result = run("tail", stream, "--offset", "-1", "--json")
    assert result.exit_code == 0
    assert len(events(result.stdout)) == 1


@pytest.mark.parametrize(
    ("given", "means"),
    [("Room/1/messages", "gid://app/Room/1/messages"), ("gid://x/Room/1", "gid://x/Room/1"), ("lobby/1", "lobby/1")],
)
def test_a_model_and_id_name_its_stream(durable_streams: DurableStreams, run: Run, given: str, means: str) -> None:
    result = run("tail", given, "--no-follow")
    assert result.exit_code == 1
    assert f"There is no stream {means!r}" in result.stderr.replace("\n", "")


@pytest.mark.parametrize("name", ["", "a//b", "Room/../1", "__ds/x"])
def test_what_no_stream_can_be_called_is_one_sentence(durable_streams: DurableStreams, run: Run, name: str) -> None:
    result = run("tail", name)
    assert result.exit_code == 1
    assert "Not done." in result.stderr
