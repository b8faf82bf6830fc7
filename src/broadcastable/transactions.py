"""What waits for a transaction's end: one buffer for each transaction and savepoint of a session.

A released savepoint's buffer goes into its parent's; a rolled-back one is dropped, and so is that of a session closed
without commit. The root's commit hands what is left to the delivery, once. SQLAlchemy fires `after_commit` for
savepoints too; only the root's counts here. Nothing in this module raises out of a commit once the rows are stored.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapper, Session, SessionTransaction, UOWTransaction, scoped_session
from sqlalchemy.util.concurrency import in_greenlet

from . import unsent
from .counters import counters
from .errors import ConfigurationError, UsageError
from .events import TXID_MARKER_TYPE, Batch, ChangeEvent, Operation, encode_json, new_txid, utc_timestamp
from .handoff import Turn
from .names import Streamable, stream_name_from
from .settings import Settings
from .tracing import current_trace

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

log = logging.getLogger(__name__)

TXID_KEY: Final = "txid"
"""`session.info["txid"]`: the caller's own id for the session's next transaction that uses one. Used once."""

_BUFFERS_KEY: Final = "_broadcastable_buffers"

_A_WRITE: Final = sa.update(sa.table("broadcastable_outbox"))
"""What a session is asked for a bind for: one with replicas may go by the statement, and reads elsewhere."""

Bind: TypeAlias = "sa.Engine | sa.Connection"


class Delivery(Protocol):
    """Where committed batches go; `DurableStreams` is one."""

    @property
    def settings(self) -> Settings: ...

    @property
    def transactional(self) -> bool:
        """Whether batches are written in the caller's own transaction (`stage`)."""
        ...

    def stage(self, connection: sa.Connection, batches: Sequence[Batch]) -> None:
        """Before the root commit, after its flush: write *batches* through *connection*. Raising aborts the commit."""
        ...

    def announce(self, streams: Collection[str]) -> Turn | None:
        """Before the root commit, with its locks held, where not transactional: take the next turn on *streams*."""
        ...

    def withdraw(self, turn: Turn) -> None:
        """The announced transaction has nothing to hand over after all. Does nothing after `committed`."""
        ...

    def committed(self, batches: Sequence[Batch], *, turn: Turn | None = None, joined: bool = False) -> None:
        """After the root commit. Never raises, never blocks an event loop.

        Args:
            batches: What the transaction has for this delivery, one for each stream; those staged before included.
            turn: From `announce`, if the transaction was announced.
            joined: The session's root transaction was joined into an outer one on a connection that it was given
                (`join_transaction_mode`), so nothing is committed yet, and in a test nothing ever will be.
        """
        ...


class Unread:
    """Stands for the beginning of an event whose row was not known whole in the flush; read before the commit.

    Attributes:
        body: The event in JSON up to its closing brace, that brace included; None while it is not read, and for
            good when the row is gone or has no JSON form.
        is_missing: It was looked for and not found.
    """

    __slots__ = ("body", "identity", "is_missing")

    def __init__(self, identity: tuple[Any, ...]) -> None:
        self.identity = identity
        self.body: bytes | None = None
        self.is_missing = False


class Reader(Protocol):
    """Completes what was captured incompletely, with as few statements as it can."""

    def read(self, session: Session, level: Level, waiting: list[Any]) -> None:
        """Called after the last flush, before the root commit; *waiting* is what was given to `Level.wait_for`."""
        ...


EntityKey: TypeAlias = tuple[str, str]
"""`type` and `key` of an event."""

Change: TypeAlias = tuple[bool, bool, "bytes | Unread | None", "bytes | None", "Collection[str] | None"]
"""A captured change of one row on one stream, as a plain tuple since there are many: whether the row was there before,
whether it is there now, the event in JSON up to and with its closing brace, the old value in JSON, and the operations
that are wanted (None for all)."""

Changes: TypeAlias = dict[EntityKey, Change]


def coalesce(changes: Changes, key: EntityKey, change: Change) -> None:
    """Add *change* to *changes* so that each key has one: what was before the first, and what is after the last.

    insert + update = insert, insert + delete = nothing, update + delete = delete, delete + insert = update. The old
    value is the first one's, and so is the place among the other keys.
    """
    earlier = changes.get(key)
    if earlier is None:
        changes[key] = change
    elif not earlier[0] and not change[1]:
        del changes[key]
    else:
        changes[key] = (earlier[0], change[1], change[2], earlier[3], change[4])


class _Explicit:
    """An event that the application made itself: keeps its place, is never coalesced.

    A marker goes out only where its stream has nothing else to carry the txid.
    """

    __slots__ = ("event", "marker", "unstamped")

    def __init__(self, event: bytes, *, unstamped: bool = False, marker: bool = False) -> None:
        self.event = event
        self.unstamped = unstamped
        self.marker = marker


class StreamChanges:
    """What one transaction level has for one stream.

    Captured changes of one key are coalesced, but not across an explicit event: that one was made between them, and a
    reader must see it there.
    """

    __slots__ = ("_closed", "changes")

    def __init__(self) -> None:
        self._closed: list[tuple[EntityKey, Change] | _Explicit] = []
        self.changes: Changes = {}

    def append(self, explicit: _Explicit) -> None:
        self._closed.extend(self.changes.items())
        self._closed.append(explicit)
        self.changes.clear()  # in place: the capture holds on to this dict

    def take_over(self, later: StreamChanges) -> None:
        """Add what a released savepoint has."""
        for item in later:
            if isinstance(item, _Explicit):
                self.append(item)
            else:
                coalesce(self.changes, *item)

    @property
    def explicit(self) -> int:
        return sum(isinstance(item, _Explicit) for item in self._closed)

    @property
    def count(self) -> int:
        return len(self._closed) + len(self.changes)

    def __iter__(self) -> Iterator[tuple[EntityKey, Change] | _Explicit]:
        yield from self._closed
        yield from self.changes.items()

    def events(self, stamp: _Stamp) -> tuple[bytes, ...]:
        """Everything as JSON, in order."""
        if not self._closed:
            captured = stamp.captured
            return tuple([each for item in self.changes.items() if (each := captured(item)) is not None])
        events = []
        marker = None
        for item in self:
            if isinstance(item, _Explicit):
                if item.marker:
                    marker = item
                else:
                    events.append(stamp.explicit(item))
            else:
                encoded = stamp.captured(item)
                if encoded is not None:
                    events.append(encoded)
        if not events and marker is not None:
            events.append(stamp.explicit(marker))
        return tuple(events)


def report_missing(missing: Sequence[EntityKey]) -> None:
    """Count events that were due and cannot be made, since their rows are not found; log the first."""
    counters.increment("events_failed", len(missing))
    log.error(
        "%s %s is not found before the commit, so its event is not sent (%d in all): it was deleted past the session, "
        "or the database hides it from whoever wrote it",
        *missing[0],
        len(missing),
    )


class _Stamp:
    """Ends the events of one transaction: operation, txid, timestamp.

    Attributes:
        missing: Whose events were due, but for their rows, which were not found.
    """

    def __init__(self, txid: str) -> None:
        self.missing: list[EntityKey] = []
        rest = b',"txid":' + encode_json(txid) + b',"timestamp":"' + utc_timestamp().encode() + b'"}}'
        self._rest = rest
        self._insert = b',"headers":{"operation":"insert"' + rest
        self._update = b',"headers":{"operation":"update"' + rest
        self._delete = b',"headers":{"operation":"delete"' + rest

    def captured(self, item: tuple[EntityKey, Change]) -> bytes | None:
        (type_, key), (existed, exists, body, old_value, on) = item
        if on is not None and _operation(existed, exists) not in on:
            return None
        if isinstance(body, Unread):
            if body.is_missing:
                self.missing.append((type_, key))
            body = body.body
        if exists:
            if body is None:
                return None
            if not existed:
                return body[:-1] + self._insert
            if old_value is None:
                return body[:-1] + self._update
            return body[:-1] + b',"old_value":' + old_value + self._update
        head = b'{"type":' + encode_json(type_) + b',"key":' + encode_json(key)
        if old_value is not None:
            head += b',"old_value":' + old_value
        return head + self._delete

    def explicit(self, explicit: _Explicit) -> bytes:
        # The headers come last and hold the operation alone: the two braces give way to the rest.
        return explicit.event[:-2] + self._rest if explicit.unstamped else explicit.event


def _operation(existed: bool, exists: bool) -> Operation:
    if not exists:
        return Operation.DELETE
    return Operation.UPDATE if existed else Operation.INSERT


class Level:
    """The buffer of one transaction or savepoint.

    Attributes:
        lookups: For the capture: whatever it wants to find again within this level.
        staged: What was written within this level, to be handed over if it lasts.
    """

    __slots__ = ("_binds", "_deliveries", "_unread", "lookups", "staged")

    def __init__(self) -> None:
        self._deliveries: dict[int, tuple[Delivery, dict[str, StreamChanges]]] = {}
        self._unread: dict[Reader, list[Any]] = {}
        self._binds: dict[Mapper[Any], Bind] = {}
        self.lookups: dict[Any, dict[Any, Any]] = {}
        self.staged: list[tuple[Delivery, list[Batch]]] = []

    def stream(self, delivery: Delivery, name: str) -> StreamChanges:
        """The buffer of stream *name*; made when there is none."""
        _, streams = self._deliveries.setdefault(id(delivery), (delivery, {}))
        found = streams.get(name)
        if found is None:
            found = streams[name] = StreamChanges()
        return found

    def remember_bind(self, session: Session, mapper: Mapper[Any], bind: Bind | None = None) -> None:
        """Rows of *mapper* are being written, to *bind* or where the flush under way writes them.

        Outside of the flush the session may name another database, as one does that reads from replicas.
        """
        if mapper.base_mapper not in self._binds:
            try:
                self._binds[mapper.base_mapper] = bind if bind is not None else session.get_bind(mapper.base_mapper)
            except Exception as error:  # of the application's own function: one that shards goes by the record
                log.debug("%s: where it is written is not known by its class (%s)", mapper.class_.__name__, error)

    @property
    def first_bind(self) -> Bind | None:
        """Where the first captured row was written."""
        return next(iter(self._binds.values()), None)

    def connection(self, session: Session, mapper: Mapper[Any]) -> sa.Connection:
        """The connection on which rows of *mapper* are as this transaction has written them, or would."""
        bind = self._binds.get(mapper.base_mapper)
        if bind is None:
            bind = session.get_bind(mapper, clause=sa.update(mapper.tables[0]))
        return session.connection(bind_arguments={"bind": bind})

    def wait_for(self, reader: Reader, waiting: Any) -> None:
        """Have *reader* read *waiting* before the commit."""
        self._unread.setdefault(reader, []).append(waiting)

    def waiting_for(self, reader: Reader) -> list[Any]:
        """What was given to `wait_for` for *reader*; may be changed in place."""
        return self._unread.get(reader, [])

    def take_over(self, released: Level) -> None:
        for delivery, streams in released._deliveries.values():
            for name, changes in streams.items():
                self.stream(delivery, name).take_over(changes)
        for reader, waiting in released._unread.items():
            self._unread.setdefault(reader, []).extend(waiting)
        for mapper, bind in released._binds.items():
            self._binds.setdefault(mapper, bind)
        self.staged.extend(released.staged)

    def read_all(self, session: Session) -> None:
        """Read what was captured incompletely. What one reader finds may give another one something to read."""
        while self._unread:
            reader = next(iter(self._unread))
            waiting = self._unread.pop(reader)
            try:
                reader.read(session, self, waiting)
            except DBAPIError:
                raise
            except Exception:
                counters.increment("events_failed", len(waiting))
                log.exception(
                    "%d rows are stored, but their events could not be completed and are not sent", len(waiting)
                )

    def take_batches(self, txid: str, *, transactional: bool | None = None) -> Iterator[tuple[Delivery, list[Batch]]]:
        """Remove what waits here, as batches for each delivery; only for those that are *transactional*, or not."""
        self.lookups.clear()
        stamp = _Stamp(txid)
        trace, now = current_trace(), time.time_ns() // 1_000_000
        unique, number = os.urandom(16).hex(), itertools.count()
        for key, (delivery, streams) in list(self._deliveries.items()):
            if transactional is None or delivery.transactional is transactional:
                del self._deliveries[key]
                batches = []
                for name, changes in streams.items():
                    events = changes.events(stamp)
                    if events:
                        identity = f"{unique}{next(number):x}"
                        batches.append(
                            Batch(stream=name, events=events, txid=txid, id=identity, created_at=now, trace=trace)
                        )
                if batches:
                    yield delivery, batches
        if stamp.missing:
            report_missing(stamp.missing)

    def streams(self, delivery: Delivery) -> Iterator[tuple[str, Changes]]:
        """What was captured for each stream of *delivery*."""
        _, streams = self._deliveries.get(id(delivery), (delivery, {}))
        for name, stream in streams.items():
            yield name, stream.changes

    def deliveries(self) -> list[tuple[Delivery, Collection[str]]]:
        """Each delivery with the names of its streams."""
        return [
            (delivery, [name for name, changes in streams.items() if changes.count])
            for delivery, streams in self._deliveries.values()
        ]

    @property
    def explicit(self) -> int:
        """How many events the application made itself."""
        return sum(each.explicit for _, streams in self._deliveries.values() for each in streams.values())

    def waiting(self) -> Counter[str]:
        """How many events wait here, by stream. May be asked from another thread than the session's."""
        counts: Counter[str] = Counter()
        # Copies first: they are made at a stroke, while a loop would trip over what the session's thread adds.
        for _, streams in list(self._deliveries.values()):
            for name, changes in list(streams.items()):
                counts[name] += changes.count
        return counts

    def note_unsent(self, reason: unsent.Reason) -> None:
        for stream, count in self.waiting().items():
            unsent.note(reason, stream=stream, count=count)

    def __bool__(self) -> bool:
        return bool(self._deliveries or self._unread)


class Buffers:
    """All that a session has waiting; lives in `session.info` until the root transaction ends."""

    # Defaults on the class: each commit of any session makes one of these.
    delivery: Delivery | None = None
    txid: str | None = None
    # For the capture: whatever it wants to remember until the root transaction ends.
    notes: Any = None
    # The root's commit has begun: what is added now is handed over at once where no other hook follows.
    committing = False
    # A flush has begun, and its end is to come.
    is_flushing = False
    _finishing = False
    # Commits that were announced by before_commit and have neither happened nor failed.
    _announced = 0
    _released: SessionTransaction | None = None
    _rolled_back = False

    def __init__(self) -> None:
        self.levels: dict[SessionTransaction, Level] = {}
        self._turns: dict[int, tuple[Delivery, Turn]] = {}

    def delivery_for(self, session: Session) -> Delivery:
        """The delivery of the session's captured changes, the same for the whole transaction."""
        if self.delivery is None:
            self.delivery = _durable_streams_for()(session)
        return self.delivery

    def level(self, session: Session) -> Level:
        """The buffer of the innermost open transaction or savepoint."""
        transaction = session.get_nested_transaction() or session.get_transaction()
        if transaction is None:
            raise UsageError("The session is in no transaction. Call session.begin() or execute something first")
        found = self.levels.get(transaction)
        if found is None:
            found = self.levels[transaction] = Level()
        return found

    # In the order in which they happen to a transaction

    def before_commit(self, session: Session) -> None:
        self._announced += 1
        if not session.in_nested_transaction():
            self.prepare(session)
        # Else a savepoint is released, or an outer transaction commits and releases its savepoints on the way:
        # `transaction_ended` will tell.

    def prepare(self, session: Session) -> None:
        """The root commits: have everything flushed, read and, where the delivery is transactional, staged."""
        if not self.levels:
            self.committing = True
            return
        session.flush()
        self.committing = True
        self.finish(session)

    def finish(self, session: Session, *, has_locked: bool = True) -> None:
        """Read, and stage or announce, what the root has so far; again after whatever is added within the commit.

        Args:
            has_locked: Rows may have been locked since the last time, for which other transactions had to wait. Without
                them there is nothing to keep a place for: events by themselves go in the order of their arrival.
        """
        if self._finishing:
            return  # what follows calls the application, which adds something: that is seen to below
        self._finishing = True
        try:
            for level in list(self.levels.values()):
                self._finish(session, level, has_locked)
        finally:
            self._finishing = False

    def _finish(self, session: Session, level: Level, has_locked: bool) -> None:
        level.read_all(session)
        transactional = False
        for delivery, streams in level.deliveries():
            txid(session)  # the commit is too late to ask the database for it, or to say that it cannot be used
            if delivery.transactional:
                transactional = True
            elif has_locked and not session.twophase:  # between its two phases lies a time without bound
                self._announce(delivery, streams)
        if transactional:
            connection = session.connection(bind_arguments={"bind": _needed_bind(session, self.levels.values())})
            for delivery, batches in level.take_batches(txid(session), transactional=True):
                delivery.stage(connection, batches)
                level.staged.append((delivery, batches))

    def added(self, session: Session, *, has_locked: bool) -> None:
        """The application added something itself: an event, or the rows of a bulk statement."""
        if not self.committing or not session.is_active or self._is_seen_to(session):
            return
        # A commit that another hook refused leaves the session usable, an asynchronous one outside of its calls too.
        bind = _bind_of(session, self.levels.values())
        if bind is None or _allows_io(bind):
            self.finish(session, has_locked=has_locked)

    def _is_seen_to(self, session: Session) -> bool:
        """Whether `finish` is to come: at the end of the flush under way, or of the one that the commit makes yet."""
        if session._flushing:
            return session._warn_on_events or self.is_flushing
        return not session._is_clean()

    def _announce(self, delivery: Delivery, streams: Collection[str]) -> None:
        _, earlier = self._turns.pop(id(delivery), (delivery, None))
        if earlier is not None:
            delivery.withdraw(earlier)  # a later turn on all streams will do: the locks are still held
            streams = earlier.streams.union(streams)
        turn = delivery.announce(streams)
        if turn is not None:
            self._turns[id(delivery)] = delivery, turn

    def _withdraw(self) -> None:
        turns, self._turns = self._turns, {}
        for delivery, turn in turns.values():
            delivery.withdraw(turn)

    def savepoint_released(self, session: Session, savepoint: SessionTransaction) -> None:
        self._announced -= 1
        self._released = savepoint
        level = self.levels.pop(savepoint, None)
        if level is None:
            return
        parent = savepoint.parent
        while parent is not None and not parent.nested and parent.parent is not None:
            parent = parent.parent  # a flush's own subtransaction
        assert parent is not None
        self.levels.setdefault(parent, Level()).take_over(level)

    def root_committed(self, session: Session) -> None:
        """Hand everything over. Never raises: the rows are stored."""
        levels, self.levels = self.levels, {}
        if not levels:
            return
        try:
            handed = [each for level in levels.values() for each in level.staged]
            joined = False
            for level in levels.values():
                for delivery, batches in level.take_batches(txid(session)):
                    if delivery.transactional:
                        _report_late(batches)
                    else:
                        handed.append((delivery, batches))
            if handed:
                joined = _is_joined(session, levels)
            for delivery, batches in handed:
                counters.increment("events_committed", sum(len(batch.events) for batch in batches))
                _, turn = self._turns.get(id(delivery), (delivery, None))
                delivery.committed(batches, turn=turn, joined=joined)
        except Exception:
            counters.increment("transactions_lost")
            log.exception("A transaction is stored, but its events could not be handed over")
        finally:
            self._withdraw()

    def use_up_txid(self, session: Session) -> None:
        """The root has committed: the caller's own id was its, also where only a view has asked for it."""
        if self.txid is not None and session.info.get(TXID_KEY) == self.txid:
            del session.info[TXID_KEY]

    def rolled_back(self, session: Session) -> None:
        self._announced = 0
        self.is_flushing = False
        if self.notes is not None:
            self.notes.forget_flush()  # a flush that fails does not reach its end
        if not session.in_nested_transaction():
            self._rolled_back = True

    def transaction_ended(self, session: Session, transaction: SessionTransaction) -> None:
        released, self._released = self._released is transaction, None
        if transaction.nested:
            level = self.levels.pop(transaction, None)
            if level is not None and unsent.listeners:
                level.note_unsent(unsent.Reason.SAVEPOINT_ROLLED_BACK)
            if released and self._announced > 0 and not session.in_nested_transaction():
                # The root's commit was announced before it released this, its last savepoint.
                self.prepare(session)
        elif transaction.parent is None:
            session.info.pop(_BUFFERS_KEY, None)
            self._withdraw()
            if self.levels:
                self._account_for_dropped()

    def _account_for_dropped(self) -> None:
        explicit = sum(level.explicit for level in self.levels.values())
        if explicit and not self._rolled_back:
            log.warning(
                "%d deferred events are dropped: their session was closed without commit. Commit it, or roll it back "
                "if that is meant",
                explicit,
            )
        if explicit:
            counters.increment("events_dropped_with_transaction", explicit)
        if unsent.listeners:
            for level in self.levels.values():
                level.note_unsent(unsent.Reason.ROLLED_BACK if self._rolled_back else unsent.Reason.CLOSED)


def _report_late(batches: Sequence[Batch]) -> None:
    counters.increment("transactions_lost")
    log.error(
        "%d events are not sent, the first for stream %s: they were made when their transaction had just been "
        "committed, too late for the outbox in its database. Make them before, or when it has ended",
        sum(len(batch.events) for batch in batches),
        batches[0].stream,
    )


def _is_joined(session: Session, levels: dict[SessionTransaction, Level]) -> bool:
    """Whether the commit that just ended left its connection inside a transaction that somebody else began."""
    bind = session.bind if session.bind is not None else _bind_of(session, levels.values())
    return isinstance(bind, sa.Connection) and bind.in_transaction()


def _bind_of(session: Session, levels: Iterable[Level]) -> Bind | None:
    """The database whose transaction the events of *levels* belong to: that of the first captured row.

    Without any, where the session would write; None if it has several databases, and does not use exactly one of them.
    """
    for level in levels:
        if (bind := level.first_bind) is not None:
            return bind
    try:
        chosen: Bind = session.get_bind(clause=_A_WRITE)
    except Exception:  # UnboundExecutionError, or whatever a session's own function raises
        transaction = session.get_transaction()
        used = {connection for connection, *_ in transaction._connections.values()} if transaction is not None else ()
        return next(iter(used)) if len(used) == 1 else None
    return chosen


def _needed_bind(session: Session, levels: Iterable[Level]) -> Bind:
    bind = _bind_of(session, levels)
    if bind is None:
        raise UsageError(
            "This session has several databases, and its transaction has changed no row of a model with streams, so "
            "nothing tells which of them its events belong to. Give the session a bind= of its own"
        )
    return bind


def waiting(session: Session) -> Counter[str]:
    """How many events wait for the end of *session*'s transaction, by stream. No I/O; from any thread."""
    buffers: Buffers | None = session.info.get(_BUFFERS_KEY)
    levels = list(buffers.levels.values()) if buffers is not None else []
    return sum((level.waiting() for level in levels), Counter())


@functools.cache
def _durable_streams_for() -> Callable[[Session], Delivery]:
    from .durable_streams import durable_streams_for  # stands on this module

    return durable_streams_for


def buffers_of(session: Session) -> Buffers:
    """What *session* has waiting; made when there is nothing yet."""
    found: Buffers | None = session.info.get(_BUFFERS_KEY)
    if found is None:
        found = session.info[_BUFFERS_KEY] = Buffers()
    return found


AnySession: TypeAlias = "Session | scoped_session[Any] | AsyncSession | async_scoped_session[Any]"


def sync_session(session: AnySession) -> Session:
    """The `Session` itself, or the one behind an `AsyncSession` or a scoped session."""
    if isinstance(session, Session):
        return session
    if isinstance(session, scoped_session):
        registered: Session = session()
        return registered
    # The registry of async sessions has no `sync_session`; what it gives does.
    of_async: Any = session
    sync: Session = (of_async if hasattr(session, "sync_session") else of_async()).sync_session
    return sync


def txid(session: AnySession) -> str:
    """The id that every event of *session*'s present transaction carries; known before the commit.

    Before the first statement it is the id of the transaction that begins next. No I/O, except with
    `txid_from="postgres"`: there one SELECT asks for it (under asyncio: `await session.run_sync(broadcastable.txid)`).

    Raises:
        UsageError: `session.info["txid"]` is no text, or the SELECT was tried outside a greenlet.
        ConfigurationError: `txid_from="postgres"` on another database.
    """
    sync = sync_session(session)
    buffers = buffers_of(sync)
    if buffers.txid is None:
        buffers.txid = _find_txid(sync, buffers)
    return buffers.txid


def may_do_io(session: Session, mapper: Mapper[Any] | None = None) -> bool:
    """Whether *session* can execute something here: that of an `AsyncSession` can only in the latter's own calls."""
    return _allows_io(session.get_bind(mapper))


def _allows_io(bind: Bind) -> bool:
    return not bind.dialect.is_async or in_greenlet()


def _find_txid(session: Session, buffers: Buffers) -> str:
    own = session.info.get(TXID_KEY)
    if own is not None:
        if not isinstance(own, str) or not own:
            raise UsageError(f'session.info["{TXID_KEY}"] is text that is not empty; got {own!r}')
        return own
    if buffers.delivery_for(session).settings.txid_from == "uuid":
        return new_txid()
    bind = _needed_bind(session, buffers.levels.values())
    if not _allows_io(bind):
        raise UsageError(
            'With txid_from="postgres" the txid is asked from the database. Under asyncio call '
            "`await session.run_sync(broadcastable.txid)` first; after that it is known"
        )
    connection = session.connection(bind_arguments={"bind": bind})
    if connection.dialect.name != "postgresql":
        raise ConfigurationError(
            f'txid_from="postgres" needs PostgreSQL, but this session is on {connection.dialect.name}. Use "uuid"'
        )
    return str(connection.scalar(sa.select(sa.cast(sa.func.pg_current_xact_id(), sa.Text))))


def defer(session: Session, delivery: Delivery, stream: str, event: ChangeEvent | bytes) -> None:
    """Send *event* when the present transaction of *session* commits; drop it with the rollback.

    It keeps its place: after the changes flushed so far, before those flushed later, and nothing is coalesced across
    it. Inside a savepoint it shares that savepoint's fate.

    Args:
        stream: The stream's name.
        event: A change event, encoded now; a missing txid and timestamp are the transaction's. Or ready JSON.

    Raises:
        UsageError: The session is in no transaction, or the event cannot be encoded.
    """
    install()
    if isinstance(event, bytes):
        explicit = _Explicit(event)
    elif event.txid is not None:
        explicit = _Explicit(event.encode())
    else:
        explicit = _Explicit(dataclasses.replace(event, timestamp=None).encode(), unstamped=True)
    buffers = buffers_of(session)
    buffers.level(session).stream(delivery, stream).append(explicit)
    buffers.added(session, has_locked=False)


def confirm_txid(session: AnySession, *streamables: Streamable) -> str:
    """See to it that readers of the stream *streamables* see the transaction's txid even if it changes nothing there.

    For a request that may turn out to change nothing, while a browser awaits its txid: when the transaction commits
    without another event for that stream, a marker goes out that changes no row
    (`{"type": "$tx", "key": <txid>, "headers": {"operation": "delete", ...}}`).

    Returns:
        The txid.

    Raises:
        UsageError: The session is in no transaction.
    """
    install()
    sync = sync_session(session)
    buffers = buffers_of(sync)
    delivery = buffers.delivery_for(sync)
    transaction_id = txid(sync)
    name = stream_name_from(*streamables, app=delivery.settings.gid_app)
    if name:
        marker = ChangeEvent(type=TXID_MARKER_TYPE, key=transaction_id, operation=Operation.DELETE)
        buffers.level(sync).stream(delivery, name).append(_Explicit(marker.encode(), unstamped=True, marker=True))
        buffers.added(sync, has_locked=False)
    return transaction_id


# Hooks


def _before_commit(session: Session) -> None:
    buffers_of(session).before_commit(session)


def _after_commit(session: Session) -> None:
    buffers: Buffers | None = session.info.get(_BUFFERS_KEY)
    if buffers is None:
        return
    savepoint = session.get_nested_transaction()
    if savepoint is not None:
        buffers.savepoint_released(session, savepoint)
    else:
        buffers.root_committed(session)
        buffers.use_up_txid(session)


def _before_flush(session: Session, context: UOWTransaction, instances: object) -> None:
    buffers: Buffers | None = session.info.get(_BUFFERS_KEY)
    if buffers is not None:
        buffers.is_flushing = True


def _after_flush(session: Session, context: UOWTransaction) -> None:
    """Comes after the capture, which puts itself first: what it made of the rows is in the buffers."""
    buffers: Buffers | None = session.info.get(_BUFFERS_KEY)
    if buffers is not None:
        buffers.is_flushing = False
        if buffers.committing:
            buffers.finish(session)


def _after_rollback(session: Session) -> None:
    buffers: Buffers | None = session.info.get(_BUFFERS_KEY)
    if buffers is not None:
        buffers.rolled_back(session)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    buffers: Buffers | None = session.info.get(_BUFFERS_KEY)
    if buffers is not None:
        buffers.transaction_ended(session, transaction)


_HOOKS = (
    ("before_flush", _before_flush),
    ("after_flush", _after_flush),
    ("before_commit", _before_commit),
    ("after_commit", _after_commit),
    ("after_rollback", _after_rollback),
    ("after_transaction_end", _after_transaction_end),
)


def install() -> None:
    """Listen to all sessions; does nothing when it is done already."""
    for name, hook in _HOOKS:
        if not event.contains(Session, name, hook):
            event.listen(Session, name, hook)


def remove() -> None:
    """Listen no more."""
    for name, hook in _HOOKS:
        if event.contains(Session, name, hook):
            event.remove(Session, name, hook)
