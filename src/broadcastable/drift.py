"""Whether the streams of a model still say what its table says, and the events that make it so again.

A stream and its table drift apart when rows change where nobody looks: raw SQL, triggers, ON DELETE CASCADE, restored
backups. `find_drift` folds each stream as a reader does and compares it, key by key, with what the table would put
there. It holds the encoded rows of one model in memory. What cannot be judged is no drift: a declaration that does not
send updates leaves old values on its stream, and one that does not send deletes leaves rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapper, Session, lazyload, with_polymorphic

from .declarations import ALL_OPERATIONS, PathTarget, Plan, RecordTarget, Route, RowTarget, plan_for
from .errors import StreamNotFound, UsageError
from .events import Operation, new_txid
from .protocol import BEGINNING
from .recording import NOWHERE, Notes, Recording
from .transactions import Change, EntityKey, Level
from .values import key_text

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
        unknown: Rows of which a function of the application raised, with what it raised. They are in none of the
            others. Where not even the stream is known, the declaration stands in place of its name.
    """

    stream: str
    type: str
    missing: Values = field(default_factory=dict)
    stale: Values = field(default_factory=dict)
    extra: frozenset[str] = frozenset()
    unknown: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.missing or self.stale or self.extra or self.unknown)

    def __len__(self) -> int:
        """How many events mend it."""
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

    The stream of a row that is gone cannot be found through the table: a deleted record's own stream is not looked at,
    nor one that a function names and no row is on any more.

    Args:
        session: In no transaction, since each look begins a new one; and a look ends it with a rollback.
        durable_streams: The session's when None.

    Raises:
        UsageError: It is no model or declares no streams, or the session has changes.
        StreamError: The stream server cannot be read.
    """
    from .durable_streams import durable_streams_for  # it stands on the capture, which this is part of

    mapper: Any = sa.inspect(model, raiseerr=False)
    if not isinstance(mapper, Mapper):
        raise UsageError(f"{model!r} is no mapped class, so it has no table to compare with. Give a model")
    plan = plan_for(mapper)
    if plan is None:
        raise UsageError(f"{model.__name__} declares no streams, so there is nothing to compare")
    if session.new or session.dirty or session.deleted:
        raise UsageError("The session has changes that are not committed. Give one of its own to find_drift()")
    reader = _Reader(durable_streams or durable_streams_for(session))
    expected = _Expected(session, plan, reader.durable_streams)
    for done, (stream, type_) in enumerate(sorted(expected.streams), start=1):
        drift = expected.compare(stream, type_, reader.fold(stream, type_))
        if drift:
            drift = _look_again(session, plan, reader, drift)
        if progress is not None:
            progress(done, len(expected.streams))
        if drift:
            yield drift
    yield from expected.placeless()


def repair(drift: Drift, durable_streams: DurableStreams) -> str:
    """Append, through the outbox, the events that mend *drift*; the txid that they carry.

    They say what the look has seen, so send them at once, as each drift is found: where a row changes afterwards, its
    own event follows and wins. Between the two lies a moment in which a change is written over, so look again.
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


def _look_again(session: Session, plan: Plan, reader: _Reader, drift: Drift) -> Drift:
    """The same comparison until nothing is underway any more; rows and events may have come since the first look."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        underway = reader.durable_streams.outbox.pending(drift.stream)
        expected = _Expected(session, plan, reader.durable_streams)
        again = expected.compare(drift.stream, drift.type, reader.fold(drift.stream, drift.type))
        parked = any(each.parked is not None for each in underway)
        if not again or not underway or parked or time.monotonic() > deadline:
            return again
        time.sleep(_PAUSE)


@dataclass
class _Stream:
    """What the table would have on one stream, for one type.

    Attributes:
        failed: Rows whose value could not be made, with what was raised.
        judged: The operations that every declaration sends which leads here.
        others: Keys of other models' rows that are here with the same type.
    """

    values: Values = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    judged: set[str] = field(default_factory=lambda: set(ALL_OPERATIONS))
    others: set[str] = field(default_factory=set)

    def sends(self, operations: Collection[str] | None) -> None:
        if operations is not None:
            self.judged.intersection_update(operations)


class _Expected:
    """What one look at the table says of each stream of a model."""

    def __init__(self, session: Session, plan: Plan, durable_streams: DurableStreams) -> None:
        self.streams: dict[tuple[str, str], _Stream] = {}
        # By declaration: rows of which not even the stream is known.
        self._placeless: dict[tuple[str, str], dict[str, str]] = {}
        app = durable_streams.settings.gid_app
        session.rollback()  # a snapshot no older than now
        with session.no_autoflush:
            self._add_rows(_Rows(session, durable_streams, [plan.mapper]))
            routes = [route for each in _plans_of(plan.mapper.self_and_descendants) for route in each.routes]
            for route in routes:
                for name in _streams_of_parents(session, route, app):
                    self.streams.setdefault((name, route.type), _Stream()).sends(route.on)
            others = {
                route: each.mapper
                for each in _plans_of(plan.mapper.registry.mappers)
                for route in each.routes
                if not each.mapper.isa(plan.mapper) and any(_may_meet(route, own) for own in routes)
            }
            self._add_others(_Rows(session, durable_streams, _topmost(others.values()), others))
        session.rollback()

    def compare(self, stream: str, type_: str, found: Values) -> Drift:
        expected = self.streams.get((stream, type_), _Stream())
        extra = found.keys() - expected.values.keys() - expected.failed.keys() - expected.others
        placeless = {
            key: error
            for (_, of_type), failed in self._placeless.items()
            for key, error in failed.items()
            if of_type == type_ and key in extra
        }
        missing, stale = {}, {}
        for key, value in expected.values.items():
            if key not in found:
                missing[key] = value
            elif found[key] != value:
                stale[key] = value
        return Drift(
            stream,
            type_,
            missing=missing if Operation.INSERT in expected.judged else {},
            stale=stale if Operation.UPDATE in expected.judged else {},
            extra=frozenset(extra - placeless.keys() if Operation.DELETE in expected.judged else ()),
            unknown=expected.failed | placeless,
        )

    def placeless(self) -> Iterator[Drift]:
        for (declaration, type_), failed in self._placeless.items():
            yield Drift(declaration, type_, unknown=failed)

    def _add_rows(self, rows: _Rows) -> None:
        for stream, (type_, key), change in rows.placed():
            here = self.streams.setdefault((stream, type_), _Stream())
            here.sends(change[4])
            assert isinstance(change[2], bytes)
            if change[2]:
                here.values[key] = msgspec.json.decode(change[2])["value"]
            else:
                here.failed[key] = rows.failed[type_, key]
        self._placeless |= rows.placeless

    def _add_others(self, rows: _Rows) -> None:
        for stream, (type_, key), _ in rows.placed():
            if (stream, type_) in self.streams:
                self.streams[stream, type_].others.add(key)
        self._placeless |= rows.placeless


class _Rows:
    """All rows of some classes, and where each of them belongs.

    Attributes:
        failed: Where the value could not be made: what was raised, for each type and key.
        placeless: What was raised where not even the stream could be told, for each declaration and type, by key.
    """

    def __init__(
        self,
        session: Session,
        durable_streams: DurableStreams,
        mappers: Iterable[Mapper[Any]],
        routes: Collection[Route] | None = None,
    ) -> None:
        self.failed: dict[EntityKey, str] = {}
        self.placeless: dict[tuple[str, str], dict[str, str]] = {}
        self._durable_streams = durable_streams
        self._level = Level()
        self._recording = Recording(session, Notes(), self._level, durable_streams)
        for mapper in mappers:
            for record in _records(session, mapper):
                own_plan = plan_for(sa.inspect(type(record)))
                for route in own_plan.routes if own_plan is not None else ():
                    if routes is None or route in routes:
                        self._put(route, record)
        self._level.read_all(session)

    def placed(self) -> Iterator[tuple[str, EntityKey, Change]]:
        """Each row with each of its streams; the change's body is empty where the value could not be made."""
        for stream, changes in self._level.streams(self._durable_streams):
            for entity, change in changes.items():
                yield stream, entity, change

    def _put(self, route: Route, record: Any) -> None:
        recording = self._recording
        row = _row(route.plan, record)
        try:
            handle, entity = recording.place(route, record, row)
        except DBAPIError:
            raise
        except Exception as error:
            self.placeless.setdefault((str(route), route.type), {})[_key(route, record)] = _told(error)
            return
        if handle is NOWHERE:
            return
        body = b""
        try:
            if route.value_of is not None:
                value = route.value_of(record, row, recording.keys_as_strings)
            else:
                value = route.plan.reader(keys_as_strings=recording.keys_as_strings)(row)
            body = route.encode(entity[1], value)
        except DBAPIError:
            raise
        except Exception as error:
            self.failed[entity] = _told(error)
        try:
            recording.add(route, handle, entity, (False, True, body, None, route.on))
        except DBAPIError:
            raise
        except Exception as error:
            self.placeless.setdefault((str(route), route.type), {})[entity[1]] = _told(error)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _key(route: Route, record: Any) -> str:
    """The event's key, or the primary key where that is what cannot be told."""
    if route.key_of is not None:
        try:
            return str(route.key_of(record))
        except Exception:
            return str(sa.inspect(record).identity)
    try:
        return key_text(sa.inspect(record).identity)
    except Exception:
        return repr(sa.inspect(record).identity)


def _row(plan: Plan, record: Any) -> Any:
    row = sa.inspect(record).dict
    for name in plan.names:
        if name not in row:
            getattr(record, name)  # a deferred foreign key, or a column of a concrete subclass
    return row


# Which rows


def _plans_of(mappers: Iterable[Mapper[Any]]) -> Iterator[Plan]:
    for mapper in mappers:
        plan = plan_for(mapper)
        if plan is not None:
            yield plan


def _may_meet(one: Route, other: Route) -> bool:
    """Whether both may send the same type to the same stream."""
    if one.type != other.type:
        return False
    here, there = one.target, other.target
    if isinstance(here, RecordTarget) or isinstance(there, RecordTarget):
        return True
    return here.suffix == there.suffix and _hierarchy(here.mapper) is _hierarchy(there.mapper)


def _hierarchy(mapper: Mapper[Any] | None) -> Mapper[Any] | None:
    return None if mapper is None else mapper.base_mapper


def _topmost(mappers: Iterable[Mapper[Any]]) -> list[Mapper[Any]]:
    """Without those whose rows come with another one's."""
    found = set(mappers)
    return [each for each in found if not any(each is not other and each.isa(other) for other in found)]


def _records(session: Session, mapper: Mapper[Any]) -> Iterator[Any]:
    for entity, wide in _entities(mapper):
        options = [lazyload("*")] if wide else []
        statement = sa.select(entity).options(*options)
        yield from session.scalars(statement.execution_options(yield_per=1000, populate_existing=True))


def _entities(mapper: Mapper[Any]) -> Iterator[tuple[Any, bool]]:
    """What to select to have all rows of *mapper* and its subclasses, each once and with all of its columns.

    With each, whether it has collections that come with the row, which do not go with reading by portions.
    """
    if not any(each.concrete for each in mapper.self_and_descendants if each is not mapper) or mapper.with_polymorphic:
        concrete = [mapper]
    else:
        concrete = [each for each in mapper.self_and_descendants if each is mapper or each.concrete]
    for root in concrete:
        below = [each for each in root.self_and_descendants if each is root or not each.concrete]
        wide = any(
            relationship.uselist and relationship.lazy in {"joined", False, "subquery"}
            for each in below
            for relationship in each.relationships
        )
        plain = len(below) == 1 or root.with_polymorphic
        yield root.class_ if plain else with_polymorphic(root.class_, [each.class_ for each in below]), wide


def _streams_of_parents(session: Session, route: Route, app: str) -> Iterable[str]:
    """The streams of all parents there are, those without rows included: they may have rows too many."""
    target = route.target
    if route.declaration.target is None or not isinstance(target, RowTarget | PathTarget):
        return
    if target.mapper is None:
        name = target.name((), app)
        if name is not None:
            yield name
        return
    columns: list[Any] = list(target.mapper.primary_key)
    if isinstance(target, PathTarget) and target.polymorphic:
        columns.append(target.mapper.polymorphic_on)
    attributes = [getattr(target.mapper.class_, target.mapper.get_property_by_column(each).key) for each in columns]
    for identity in session.execute(sa.select(*attributes)):
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
