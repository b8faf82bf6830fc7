"""The published clients on State Protocol events that were appended by hand: what the rest of these tests stands on."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests import state_protocol
from tests.interop.conftest import Page, Writer
from tests.interop.node import HERE, NodeError
from tests.test_events import ALLOWED, REFUSED

MESSAGES = {"messages": ("message", "id")}


def change(
    operation: str, key: str, value: Any = None, *, type: str = "message", txid: str | None = None
) -> dict[str, Any]:
    event: dict[str, Any] = {"type": type, "key": key, "headers": {"operation": operation}}
    if txid is not None:
        event["headers"]["txid"] = txid
    return event if value is None else event | {"value": value}


def test_rows_come_and_go_as_events_say(page: Page, writer: Writer, stream: str) -> None:
    writer.create(stream)
    writer.append(stream, change("insert", "1", {"body": "hello"}), change("insert", "2", {"body": "away"}))
    page.open(stream, MESSAGES)
    assert page.rows("messages") == [{"id": "1", "body": "hello"}, {"id": "2", "body": "away"}]
    writer.append(stream, change("update", "1", {"body": "hello you"}), change("delete", "2", txid="t1"))
    page.await_txid("t1")
    assert page.rows("messages") == [{"id": "1", "body": "hello you"}]


def test_an_update_of_an_unknown_key_becomes_a_row(page: Page, writer: Writer, stream: str) -> None:
    """Why an upsert may travel as an update."""
    writer.create(stream)
    page.open(stream, MESSAGES)
    writer.append(stream, change("update", "1", {"body": "hello"}, txid="t1"))
    page.await_txid("t1")
    assert page.rows("messages") == [{"id": "1", "body": "hello"}]


def test_a_txid_marker_resolves_and_shows_nothing(page: Page, writer: Writer, stream: str) -> None:
    writer.create(stream)
    page.open(stream, MESSAGES)
    writer.append(stream, change("delete", "t1", type="$tx", txid="t1"))
    page.await_txid("t1")
    assert page.rows("messages") == []


def test_a_txid_that_never_comes_times_out(page: Page, writer: Writer, stream: str) -> None:
    writer.create(stream)
    page.open(stream, MESSAGES)
    with pytest.raises(NodeError, match="t1"):
        page.await_txid("t1", timeout=0.2)


def test_a_stream_that_does_not_exist_ends_the_session_at_once(page: Page, stream: str) -> None:
    """Why a stream is provisioned before its URL is handed out."""
    with pytest.raises(NodeError, match=r"404|not found"):
        page.open(stream, MESSAGES)


def test_rows_are_joined_on_keys_that_are_text(page: Page, writer: Writer, stream: str) -> None:
    """A foreign key that is a number joins nothing, since the primary key becomes text: why keys travel as text."""
    writer.create(stream)
    writer.append(
        stream,
        change("insert", "1", {"name": "Lobby"}, type="room"),
        change("insert", "7", {"body": "as text", "room_id": "1"}),
        change("insert", "8", {"body": "as a number", "room_id": 1}),
    )
    page.open(stream, MESSAGES | {"rooms": ("room", "id")})
    page.node.do("join", name="by_room", **{"from": "db.messages"}, to="db.rooms", by="room_id")
    assert [one["body"] for one, _ in page.node.do("joined", name="by_room")] == ["as text"]


def test_the_schema_of_the_tests_agrees_with_the_published_one() -> None:
    """But for timestamps, whose form the published one leaves to an optional check."""
    published = jsonschema.Draft7Validator(
        json.loads((HERE / "node_modules/@durable-streams/state/state-protocol.schema.json").read_text())
    )
    for message in [message for message in ALLOWED + REFUSED if "timestamp" not in str(message)]:
        assert bool(state_protocol.faults(message)) == bool(list(published.iter_errors(message))), message
