"""Whether the streams of a model still say what its table says, and the events that make it so again.

A stream and its table drift apart when rows change where nobody looks: raw SQL, triggers, ON DELETE CASCADE, restored
backups. `find_drift` folds each stream as a reader does and compares it, key by key, with what the table would put
there. It holds the encoded rows of one model in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.orm import Session

from .declarations import Plan, Route, RowTarget, plan_for
from .errors import StreamNotFound, UsageError
from .events import Operation, new_txid
from .protocol import BEGINNING
from .recording import NOWHERE, Notes, Recording
from .transactions import Level

if TYPE_CHECKING:
    from .durable_streams import DurableStreams

_PATIENCE: Final = 5.0
"""Seconds for which a stream that differs is looked at again while events for it are still underway."""

_PAUSE: Final = 0.1

Progress = Callable[[int, int], None]
"""Told how many streams have been compared, and how many there are."""

Values = dict[str, Any]
"""Values by the events' key."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Where one stream and the table differ, for one type of event.

    Attributes:
        missing: Rows that the stream does not have, with the value they should have there.
        stale: Rows that the stream has otherwise, with the value they should have there.
        extra: Keys on the stream that no row stands for.
    """

    stream: str
    type: str
    missing: Values = field(default_factory=dict)
    stale: Values = field(default_factory=dict)
    extra: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.missing or self.stale or self.extra)

    def __len__(self) -> int:
        return len(self.missing) + len(self.stale) + len(self.extra)


def find_drift(
    session: Session,
    model: type,
    *,
    durable_streams: DurableStreams | None = None,
    progress: Progress | None = None,
) -> Iterator[Drift]:
    """Compare every stream that rows of *model* belong to, and every parent's stream, with the table.

    Read-only. One SELECT of the table, one of each parent's keys, and one or more GETs a stream. A difference is
    reported only if it stays while the outbox has nothing more for that stream, for at most five seconds.

    The stream of a row that is gone cannot be found through the table: a deleted record's own stream is not looked at.

    Args:
        session: In no transaction, since each look begins a new one; and a look ends it with a rollback.
        durable_streams: The session's when None.

    Raises:
        UsageError: The model declares no streams, or the session has changes.
        StreamError: The stream server cannot be read.
    """
    from .durable_streams import durable_streams_for  # it stands on the capture, which this is part of

    plan = plan_for(sa.inspect(model))
    if plan is None:
        raise UsageError(f"{model.__name__} declares no streams, so there is nothing to compare")
    if session.new or session.dirty or session.deleted:
        raise UsageError("The session has changes that are not committed. Give one of its own to find_drift()")
    reader = _Reader(durable_streams or durable_streams_for(session))
    expected = _expected(session, plan, reader.durable_streams)
    for done, ((stream, type_), values) in enumerate(sorted(expected.items()), start=1):
        drift = _compare(stream, type_, values, reader.fold(stream, type_))
        if drift:
            drift = _look_again(session, plan, reader, drift)
        if progress is not None:
            progress(done, len(expected))
        if drift:
            yield drift


def repair(drift: Drift, durable_streams: DurableStreams) -> str:
    """Append, through the outbox, the events that mend *drift*; the txid that they carry.

    In order with the stream's other events. Where the row changed since, its own later event follows and wins.
    """
    txid = new_txid()
    events = [
        *((key, Operation.DELETE, None) for key in sorted(drift.extra)),
        *((key, Operation.INSERT, value) for key, value in drift.missing.items()),
        *((key, Operation.UPDATE, value) for key, value in drift.stale.items()),
    ]
    for key, operation, value in events:
        durable_streams.broadcast_event_later_to(
            drift.stream, type=drift.type, key=key, value=value, operation=operation.value, txid=txid
        )
    return txid


def _compare(stream: str, type_: str, expected: Values, found: Values) -> Drift:
    return Drift(
        stream,
        type_,
        missing={key: value for key, value in expected.items() if key not in found},
        stale={key: value for key, value in expected.items() if key in found and found[key] != value},
        extra=frozenset(found.keys() - expected.keys()),
    )


def _look_again(session: Session, plan: Plan, reader: _Reader, drift: Drift) -> Drift:
    """The same comparison until nothing is underway any more; rows and events may have come since the first look."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        underway = reader.durable_streams.outbox.pending(drift.stream)
        expected = _expected(session, plan, reader.durable_streams)
        values = expected.get((drift.stream, drift.type), {})
        again = _compare(drift.stream, drift.type, values, reader.fold(drift.stream, drift.type))
        parked = any(each.parked is not None for each in underway)
        if not again or not underway or parked or time.monotonic() > deadline:
            return again
        time.sleep(_PAUSE)


def _expected(session: Session, plan: Plan, durable_streams: DurableStreams) -> dict[tuple[str, str], Values]:
    """What the table would put on each stream, for each type."""
    session.rollback()  # a snapshot no older than now
    found: dict[tuple[str, str], Values] = {}
    level = Level()
    recording = Recording(session, Notes(), level, durable_streams)
    statement = sa.select(plan.mapper.class_).execution_options(yield_per=1000, populate_existing=True)
    with session.no_autoflush:
        for record in session.scalars(statement):
            own_plan = plan_for(sa.inspect(type(record)))
            for route in own_plan.routes if own_plan is not None else ():
                _put(recording, route, record)
        for route in plan.routes:
            for name in _streams_of_parents(session, route, durable_streams.settings.gid_app):
                found[name, route.type] = {}
        level.read_all(session)
    for stream, changes in level.streams(durable_streams):
        for (type_, key), change in changes.items():
            body = change[2]
            assert isinstance(body, bytes)
            found.setdefault((stream, type_), {})[key] = msgspec.json.decode(body)["value"]
    session.rollback()
    return found


def _put(recording: Recording, route: Route, record: Any) -> None:
    row = sa.inspect(record).dict
    handle, entity = recording.place(route, record, row)
    if handle is NOWHERE:
        return
    if route.value_of is not None:
        value = route.value_of(record, row, recording.keys_as_strings)
    else:
        value = route.plan.reader(keys_as_strings=recording.keys_as_strings)(row)
    recording.add(route, handle, entity, (False, True, route.encode(entity[1], value), None, None))


def _streams_of_parents(session: Session, route: Route, app: str) -> Iterable[str]:
    """The streams of all parents there are, those without rows included: they may have rows too many."""
    target = route.target
    if not isinstance(target, RowTarget):
        return
    if target.mapper is None:
        name = target.name((), app)
        if name is not None:
            yield name
    elif target.attributes != route.plan.key or target.suffix:
        keys = [
            getattr(target.mapper.class_, target.mapper.get_property_by_column(each).key)
            for each in target.mapper.primary_key
        ]
        for identity in session.execute(sa.select(*keys)):
            name = target.name(tuple(identity), app)
            if name is not None:
                yield name


class _Reader:
    """Folds streams; reads each once, and then only what has come since."""

    def __init__(self, durable_streams: DurableStreams) -> None:
        self.durable_streams = durable_streams
        self._states: dict[str, tuple[str, dict[str, Values]]] = {}

    def fold(self, stream: str, type_: str) -> Values:
        offset, state = self._states.pop(stream, (BEGINNING, {}))
        try:
            while True:
                page = self.durable_streams.client.read(stream, offset)
                for body in page.events:
                    _apply(state, msgspec.json.decode(body))
                offset = page.next_offset
                if page.up_to_date:
                    break
        except StreamNotFound:
            offset, state = BEGINNING, {}
        # Only the last stream is kept, for a second look: there may be many.
        self._states = {stream: (offset, state)}
        return state.get(type_, {})


def _apply(state: dict[str, Values], event: Any) -> None:
    headers = event.get("headers") if isinstance(event, dict) else None
    if not isinstance(headers, dict) or "type" not in event or "key" not in event:
        return  # free JSON, or a control message
    if headers.get("operation") == "delete":
        state.get(event["type"], {}).pop(event["key"], None)
    elif headers.get("operation") in {"insert", "update", "upsert"}:
        state.setdefault(event["type"], {})[event["key"]] = event.get("value")
