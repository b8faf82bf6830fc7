"""A delivery that keeps what it is given, and a reader of streams that knows nothing of how they were made."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa

from broadcastable.events import Batch
from broadcastable.handoff import Turn
from broadcastable.settings import Settings
from tests.state_protocol import faults_of_change

Row = dict[str, Any]
Fold = dict[str, dict[tuple[str, str], Row]]


@dataclass
class Recorder:
    """Stands where `DurableStreams` does: `Session(info={"durable_streams": Recorder()})`."""

    settings: Settings = field(default_factory=Settings)
    transactional: bool = False
    batches: list[Batch] = field(default_factory=list)
    joined: list[Batch] = field(default_factory=list)
    staged: list[Batch] = field(default_factory=list)
    staged_in: list[sa.Engine] = field(default_factory=list)
    """The databases of what was staged."""
    turns: list[Turn] = field(default_factory=list)
    """Announced, and neither committed nor withdrawn."""
    without_turn: set[str] = field(default_factory=set)
    """Streams of which nothing was captured, only said."""

    def stage(self, connection: sa.Connection, batches: Sequence[Batch]) -> None:
        assert connection.in_transaction()
        self.staged.extend(batches)
        self.staged_in.append(connection.engine)

    def announce(self, streams: Collection[str]) -> Turn:
        assert not self.transactional
        turn = Turn(len(self.turns), frozenset(streams), None, "")
        self.turns.append(turn)
        return turn

    def withdraw(self, turn: Turn) -> None:
        if turn in self.turns:
            self.turns.remove(turn)

    def committed(self, batches: Sequence[Batch], *, turn: Turn | None = None, joined: bool = False) -> None:
        if self.transactional:
            assert all(batch in self.staged for batch in batches)
        elif turn is not None:
            assert {batch.stream for batch in batches} - self.without_turn <= turn.streams
            self.withdraw(turn)
        (self.joined if joined else self.batches).extend(batches)

    def clear(self) -> None:
        self.batches.clear()
        self.joined.clear()
        self.staged.clear()
        self.staged_in.clear()

    # What tests ask

    @property
    def streams(self) -> list[str]:
        return [batch.stream for batch in self.batches]

    def events(self, stream: str | None = None) -> list[Row]:
        """All events of *stream* (of all streams when None), parsed."""
        return parsed(self.batches, stream)

    def summary(self, stream: str | None = None) -> list[tuple[str, str, str]]:
        """Each event as (operation, type, key)."""
        return [(event["headers"]["operation"], event["type"], event["key"]) for event in self.events(stream)]

    def by_stream(self) -> dict[str, list[tuple[str, str]]]:
        """Each stream's events as (operation, key)."""
        found: dict[str, list[tuple[str, str]]] = {}
        for batch in self.batches:
            for event in parsed([batch]):
                found.setdefault(batch.stream, []).append((event["headers"]["operation"], event["key"]))
        return found


def parsed(batches: Sequence[Batch], stream: str | None = None) -> list[Row]:
    events = []
    for batch in batches:
        if stream is None or batch.stream == stream:
            for body in batch.events:
                wrong = faults_of_change(body)
                if wrong:
                    pytest.fail(f"{body!r} breaks the State Protocol: {'; '.join(wrong)}")
                events.append(json.loads(body))
    return events


def fold(batches: Sequence[Batch], *, lenient: Callable[[str], bool] = lambda key: False) -> Fold:
    """Each stream as a reader has it who read everything; strict where a client would be lenient.

    An insert of a key that is there, an update or a delete of one that is not: each is a phantom or a lost event.

    Args:
        lenient: Whether a key is that of a row of which readers may have missed something.
    """
    state: Fold = {}
    for batch in batches:
        rows = state.setdefault(batch.stream, {})
        for event in parsed([batch]):
            key = (event["type"], event["key"])
            operation = event["headers"]["operation"]
            assert lenient(event["key"]) or (key in rows) is (operation != "insert"), (
                f"{operation} of {key} on {batch.stream}; it has {list(rows)}"
            )
            assert event["headers"]["txid"] == batch.txid
            if operation == "delete":
                rows.pop(key, None)
            else:
                rows[key] = event["value"]
    return {stream: rows for stream, rows in state.items() if rows}
