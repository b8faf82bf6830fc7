"""Change events against the State Protocol, and batches."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broadcastable.errors import UnencodableValue, UsageError
from broadcastable.events import (
    ABSENT,
    Batch,
    ChangeEvent,
    Operation,
    encode_json,
    frame_body,
    txid_marker,
    utc_timestamp,
)
from tests import state_protocol

text = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)
change_events = st.builds(
    ChangeEvent,
    type=text.filter(bool),
    key=text.filter(bool),
    operation=st.sampled_from(Operation),
    value=json_values.filter(lambda value: value is not None),
    old_value=st.just(ABSENT) | json_values,
    txid=st.none() | text.filter(bool),
    timestamp=st.none() | st.builds(utc_timestamp),
)


def message(**changes: Any) -> dict[str, Any]:
    """A message of the protocol with *changes*; a field set to ABSENT is left out."""
    fields = {"type": "user", "key": "1", "value": {"name": "Alice"}, "headers": {"operation": "insert"}} | changes
    return {name: value for name, value in fields.items() if value is not ABSENT}


ALLOWED = [
    message(),
    message(value="dark"),
    message(value=None),
    message(old_value={"name": "Al"}, headers={"operation": "update"}),
    message(value=ABSENT, headers={"operation": "delete"}),
    message(value=None, old_value=3, headers={"operation": "delete", "txid": "7"}),
    message(headers={"operation": "insert", "timestamp": "2025-01-15T10:30:00Z"}),
    message(headers={"operation": "insert", "timestamp": "2025-01-15T10:30:00.125+05:30"}),
    {"headers": {"control": "reset"}},
    {"headers": {"control": "snapshot-start", "offset": "123456_000"}},
]

REFUSED: list[Any] = [
    [],
    {},
    "insert",
    message(type=ABSENT),
    message(type=""),
    message(key=ABSENT),
    message(key=""),
    message(key=1),
    message(value=ABSENT),
    message(value=ABSENT, headers={"operation": "update"}),
    message(headers=ABSENT),
    message(headers={}),
    message(headers={"operation": "upsert"}),
    message(headers={"operation": "insert", "txid": ""}),
    message(headers={"operation": "insert", "txid": 7}),
    message(headers={"operation": "insert", "txid": ["7"]}),
    message(headers={"operation": "insert", "timestamp": "2025-01-15 10:30:00Z"}),
    message(headers={"operation": "insert", "timestamp": "2025-01-15T10:30:00"}),
    message(headers={"operation": "insert", "timestamp": "2025-02-30T10:30:00Z"}),
    message(headers={"operation": "insert", "offset": "1_2"}),
    message(id="1"),
    {"headers": {"control": "restart"}},
    {"headers": {"control": "reset", "offset": ""}},
    {"headers": {"control": "reset"}, "type": "user"},
]


@pytest.mark.parametrize("allowed", ALLOWED)
def test_the_schema_takes_what_the_protocol_text_shows(allowed: dict[str, Any]) -> None:
    assert state_protocol.faults(allowed) == []


@pytest.mark.parametrize("refused", REFUSED)
def test_the_schema_refuses_what_the_protocol_text_forbids(refused: Any) -> None:
    assert state_protocol.faults(refused)


@pytest.mark.parametrize("body", [b'{"key": NaN}', b'{"key": "1", "key": "2"}', b'{"key": "\xff"}', b"{"])
def test_the_tap_refuses_what_is_not_strict_json(body: bytes) -> None:
    assert state_protocol.faults_of_change(body)


def test_the_tap_hears_every_event_and_fails_the_test_of_a_wrong_one() -> None:
    tap = state_protocol.Tap()
    encode = tap.listening(lambda event: encode_json({"type": event.type, "key": event.key, "headers": {}}))
    encode(txid_marker("7"))
    assert tap.seen == 1
    with pytest.raises(pytest.fail.Exception, match="'operation' is a required property"):
        tap.check()
    tap.check()


def test_every_test_has_the_tap_behind_encode(every_event_follows_the_state_protocol: state_protocol.Tap) -> None:
    before = every_event_follows_the_state_protocol.seen
    txid_marker("7").encode()
    assert every_event_follows_the_state_protocol.seen == before + 1


@given(change_events)
def test_every_change_event_is_a_message_of_the_protocol_and_loses_nothing(event: ChangeEvent) -> None:
    body = event.encode()
    assert state_protocol.faults_of_change(body) == []
    read = json.loads(body)
    assert (read["type"], read["key"]) == (event.type, event.key)
    assert read["headers"].get("txid") == event.txid
    assert read["headers"].get("timestamp") == event.timestamp
    if event.operation is not Operation.DELETE:
        assert read["value"] == event.value
    assert ("old_value" in read) == (event.old_value is not ABSENT)
    assert event.old_value is ABSENT or read["old_value"] == event.old_value


def test_an_upsert_travels_as_an_update() -> None:
    """The published schema knows no upsert; clients take the update of an unknown key as a new row."""
    event = ChangeEvent(type="user", key="1", operation=Operation.UPSERT, value={"name": "Alice"})
    assert json.loads(event.encode())["headers"] == {"operation": "update"}


def test_a_delete_carries_no_value() -> None:
    event = ChangeEvent(type="user", key="1", operation=Operation.DELETE, value={"name": "Alice"})
    assert "value" not in json.loads(event.encode())


def test_an_old_value_of_null_is_told_from_none_at_all() -> None:
    event = ChangeEvent(type="user", key="1", operation=Operation.UPDATE, value={}, old_value=None)
    assert json.loads(event.encode())["old_value"] is None


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"type": ""}, "type"),
        ({"key": ""}, "key"),
        ({"key": 1}, "key"),
        ({"txid": ""}, "txid"),
        ({"txid": 7}, "txid"),
        ({"value": None}, "no value"),
        ({"value": None, "operation": Operation.UPDATE}, "no value"),
        ({"value": None, "operation": Operation.UPSERT}, "no value"),
    ],
)
def test_an_event_that_clients_would_choke_on_is_refused(wrong: dict[str, Any], named: str) -> None:
    fields: dict[str, Any] = {"type": "user", "key": "1", "operation": Operation.INSERT, "value": {}} | wrong
    with pytest.raises(UsageError, match=named):
        ChangeEvent(**fields).encode()


def itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize("value", [object(), {"a": object()}, {(1, 2): 3}, "\ud800", itself()])
def test_a_value_without_a_json_form_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UnencodableValue, match="to_json_value"):
        encode_json(value)


def test_a_txid_marker_names_the_transaction_and_touches_no_row() -> None:
    read = json.loads(txid_marker("7").encode())
    assert read.pop("headers").pop("timestamp")
    assert read == {"type": "$tx", "key": "7"}
    assert json.loads(txid_marker("7").encode())["headers"] | {"timestamp": ""} == {
        "operation": "delete",
        "txid": "7",
        "timestamp": "",
    }


def test_a_timestamp_is_in_utc_with_milliseconds() -> None:
    stamp = utc_timestamp()
    assert stamp.endswith("Z")
    assert len(stamp) == len("2025-01-15T10:30:00.125Z")
    assert datetime.fromisoformat(stamp).utcoffset() == timedelta(0)


@given(st.lists(change_events.map(ChangeEvent.encode), min_size=1, max_size=5))
def test_a_frame_is_the_json_array_of_its_events(events: list[bytes]) -> None:
    assert json.loads(frame_body(events)) == [json.loads(event) for event in events]
    assert len(frame_body(events)) == Batch(stream="s", events=tuple(events), txid="7").size + len(events) + 1


def test_two_batches_never_share_an_id() -> None:
    batches = [Batch(stream="s", events=(b"{}",), txid="7") for _ in range(100)]
    assert len({batch.id for batch in batches}) == 100
