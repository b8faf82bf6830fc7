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
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapper, Session, SessionTransaction, scoped_session
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
    """

    __slots__ = ("body", "identity")

    def __init__(self, identity: tuple[Any, ...]) -> None:
        self.identity = identity
        self.body: bytes | None = None


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


class _Stamp:
    """Ends the events of one transaction: operation, txid, timestamp."""

    def __init__(self, txid: str) -> None:
        rest = b',"txid":' + encode_json(txid) + b',"timestamp":"' + utc_timestamp().encode() + b'"}}'
        self._rest = rest
        self._insert = b',"headers":{"operation":"insert"' + rest
        self._update = b',"headers":{"operation":"update"' + rest
        self._delete = b',"headers":{"operation":"delete"' + rest

    def captured(self, item: tuple[EntityKey, Change]) -> bytes | None:
        (type_, key), (existed, exists, body, old_value, on) = item
        if isinstance(body, Unread):
            body = body.body
        if on is not None and _operation(existed, exists) not in on:
            return None
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
        mapper: Of the first captured row: the database whose transaction this is, where a session has several.
    """

    __slots__ = ("_deliveries", "_unread", "lookups", "mapper")

    def __init__(self) -> None:
        self._deliveries: dict[int, tuple[Delivery, dict[str, StreamChanges]]] = {}
        self._unread: dict[Reader, list[Any]] = {}
        self.lookups: dict[Any, dict[Any, Any]] = {}
        self.mapper: Mapper[Any] | None = None

    def stream(self, delivery: Delivery, name: str) -> StreamChanges:
        """The buffer of stream *name*; made when there is none."""
        _, streams = self._deliveries.setdefault(id(delivery), (delivery, {}))
        found = streams.get(name)
        if found is None:
            found = streams[name] = StreamChanges()
        return found

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
        self.mapper = self.mapper or released.mapper

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
    # The root's commit has begun: what a flush adds now is handed over at once, no other hook follows.
    committing = False
    # Commits that were announced by before_commit and have neither happened nor failed.
    _announced = 0
    _released: SessionTransaction | None = None
    _rolled_back = False

    def __init__(self) -> None:
        self.levels: dict[SessionTransaction, Level] = {}
        self._staged: list[tuple[Delivery, list[Batch]]] = []
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

    def finish(self, session: Session) -> None:
        """Read, and stage or announce, what the root has so far; again after each flush within the commit."""
        for level in self.levels.values():
            level.read_all(session)
            transactional = False
            for delivery, streams in level.deliveries():
                txid(session)  # the commit is too late to ask the database for it, or to say that it cannot be used
                if delivery.transactional:
                    transactional = True
                elif not session.twophase:  # between its two phases lies a time without bound
                    self._announce(delivery, streams)
            if transactional:
                connection = session.connection(bind_arguments={"mapper": level.mapper} if level.mapper else None)
                for delivery, batches in level.take_batches(txid(session), transactional=True):
                    delivery.stage(connection, batches)
                    self._staged.append((delivery, batches))

    def _announce(self, delivery: Delivery, streams: Collection[str]) -> None:
        _, earlier = self._turns.pop(id(delivery), (delivery, None))
        if earlier is not None:
            delivery.withdraw(earlier)  # a later turn on all streams will do: the locks are still held
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
        staged, self._staged = self._staged, []
        if not levels and not staged:
            return
        try:
            handed = staged
            joined = False
            for level in levels.values():
                handed.extend(level.take_batches(txid(session)))
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
        if self.txid is not None and session.info.get(TXID_KEY) == self.txid:
            del session.info[TXID_KEY]

    def rolled_back(self, session: Session) -> None:
        self._announced = 0
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


def _is_joined(session: Session, levels: dict[SessionTransaction, Level]) -> bool:
    """Whether the commit that just ended left its connection inside a transaction that somebody else began."""
    bind = session.bind
    if bind is None:
        mapper = next((level.mapper for level in levels.values() if level.mapper is not None), None)
        if mapper is None:
            return False
        bind = session.get_bind(mapper)
    return isinstance(bind, sa.Connection) and bind.in_transaction()


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
    return not session.get_bind(mapper).dialect.is_async or in_greenlet()


def _find_txid(session: Session, buffers: Buffers) -> str:
    own = session.info.get(TXID_KEY)
    if own is not None:
        if not isinstance(own, str) or not own:
            raise UsageError(f'session.info["{TXID_KEY}"] is text that is not empty; got {own!r}')
        return own
    if buffers.delivery_for(session).settings.txid_from == "uuid":
        return new_txid()
    mapper = next((level.mapper for level in buffers.levels.values() if level.mapper is not None), None)
    if not may_do_io(session, mapper):
        raise UsageError(
            'With txid_from="postgres" the txid is asked from the database. Under asyncio call '
            "`await session.run_sync(broadcastable.txid)` first; after that it is known"
        )
    connection = session.connection(bind_arguments={"mapper": mapper} if mapper else None)
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
    buffers_of(session).level(session).stream(delivery, stream).append(explicit)


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


def _after_rollback(session: Session) -> None:
    buffers: Buffers | None = session.info.get(_BUFFERS_KEY)
    if buffers is not None:
        buffers.rolled_back(session)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    buffers: Buffers | None = session.info.get(_BUFFERS_KEY)
    if buffers is not None:
        buffers.transaction_ended(session, transaction)


_HOOKS = (
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
