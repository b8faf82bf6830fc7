"""The hand-off: the rows as they are, and the offset from which every later change follows. No gap, no lost update.

The offset comes first, the rows second, in a transaction that begins after it. An append comes after its commit: if
the commit is not in the rows, its append lies after the offset and will be read. If it is in the rows, it is read
again or not at all, and since every event is a whole row under its key, reading it again changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.orm import InstanceState, Session

from .declarations import PathTarget, RecordTarget, Route, plan_for, stream_type
from .errors import StaleSnapshotError, UsageError
from .events import ChangeEvent, Operation, encode_json, new_txid, utc_timestamp
from .settings import Settings
from .transactions import waiting
from .values import event_key, key_text, row_attributes, row_reader

CHUNK_ROWS = 1_000
"""Rows held in memory at a time while a snapshot is streamed."""

_FRESH_AT_EVERY_STATEMENT = frozenset({"READ COMMITTED", "READ UNCOMMITTED", "AUTOCOMMIT"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a page needs to show a stream's rows and to follow them.

    Attributes:
        offset: Tail from here, once the events are applied.
        events: The rows, as insert events (State Protocol, 4.1.1).
        url: The stream's URL for clients.
        token: Grants what was asked for on that stream.
    """

    offset: str
    events: tuple[dict[str, Any], ...]
    url: str
    token: str

    def as_dict(self) -> dict[str, Any]:
        """The snapshot as JSON values, as `broadcastable.js` takes it."""
        return {"offset": self.offset, "url": self.url, "token": self.token, "events": list(self.events)}

    def json(self) -> bytes:
        """`as_dict` as JSON."""
        return encode_json(self.as_dict())


# Objects that the session holds already are refreshed: what they remember may be older than the offset.
_AS_STORED = {"populate_existing": True}

EncodeRow = Callable[[Any], bytes]


def read_events(session: Session, statement: sa.Select[Any], encode: EncodeRow) -> tuple[dict[str, Any], ...]:
    """The rows of *statement* as events, read in a transaction that is not older than this call."""
    with _Reading(session, statement):
        records = session.scalars(statement, execution_options=_AS_STORED).unique().all()
        return tuple(msgspec.json.decode(encode(record)) for record in records)


def stream_events(session: Session, statement: sa.Select[Any], encode: EncodeRow) -> Generator[list[bytes], None, None]:
    """`read_events` in chunks of `CHUNK_ROWS`, each event as JSON bytes.

    The session keeps no row that it did not have before.
    """
    with _Reading(session, statement):
        kept = set(session.identity_map.all_states())
        result = session.scalars(statement, execution_options={**_AS_STORED, "yield_per": CHUNK_ROWS})
        for partition in result.partitions():
            chunk = [encode(record) for record in partition]
            for record in partition:
                if sa.inspect(record) not in kept:
                    session.expunge(record)
            yield chunk


def row_encoder(stream: str, settings: Settings) -> EncodeRow:
    """From a loaded record to its insert event as *stream* has it: with the type, key and value of that declaration.

    A class that does not declare the stream is sent as it would be by default.
    """
    txid, timestamp = new_txid(), utc_timestamp()

    def encode(record: Any) -> bytes:
        state: InstanceState[Any] = sa.inspect(record)
        route = _route_to(stream, state, record, settings.gid_app)
        if route is not None and route.key_of is not None:
            key = event_key(route.key_of(record))
        else:
            key = key_text(state.mapper.primary_key_from_instance(record))
        if route is not None and route.value_of is not None:
            value = route.value_of(record, state.dict, settings.keys_as_strings)
        elif route is not None:
            value = route.plan.reader(keys_as_strings=settings.keys_as_strings)(state.dict)
        else:
            attributes = row_attributes(state.mapper)
            value = row_reader(attributes, keys_as_strings=settings.keys_as_strings)(state.dict)
        return ChangeEvent(
            type=route.type if route is not None else stream_type(type(record)),
            key=key,
            operation=Operation.INSERT,
            value=value,
            txid=txid,
            timestamp=timestamp,
        ).encode()

    return encode


def _route_to(stream: str, state: InstanceState[Any], record: Any, app: str) -> Route | None:
    plan = plan_for(state.mapper)
    maybe: Route | None = None
    for route in plan.routes if plan is not None else ():
        if isinstance(route.target, PathTarget):
            # Its name would cost a query; it serves when no other declaration names the stream.
            maybe = maybe or route
        elif isinstance(route.target, RecordTarget):
            if route.target.name(record, app) == stream:
                return route
        elif route.target.name([state.dict.get(name) for name in route.target_attributes], app) == stream:
            return route
    return maybe


class _Reading:
    """A transaction on *session* for reading: one that begins now, and ends with the block; or the open one, if it sees
    what was committed until now."""

    def __init__(self, session: Session, statement: sa.Select[Any]) -> None:
        self._session = session
        self._statement = statement
        self._began = False

    def __enter__(self) -> None:
        session = self._session
        if session.new or session.dirty or session.deleted or waiting(session):
            raise StaleSnapshotError(
                "The session has changes that are not committed, which a snapshot must not show. "
                "Commit or roll back first, or give snapshot() a session of its own"
            )
        if not session.in_transaction():
            self._began = True
            return
        mapper = self._statement.column_descriptions[0].get("entity") if self._statement.column_descriptions else None
        connection = session.connection(bind_arguments={"mapper": sa.inspect(mapper)} if mapper is not None else None)
        if not sees_the_present(connection):
            raise StaleSnapshotError(
                "The session is in a transaction that may see the database as it was before the offset: "
                f"{connection.get_isolation_level()} on {connection.dialect.name}. Rows committed in between would be "
                "neither in the snapshot nor after it. Call session.rollback() or commit() first, or give snapshot() "
                "a session of its own"
            )

    def __exit__(self, *exc_info: object) -> None:
        if self._began:
            # Read only: nothing is lost, and a connection is not kept busy by a page that was rendered.
            self._session.rollback()


def sees_the_present(connection: sa.Connection) -> bool:
    """Whether the next statement on *connection* sees everything that is committed now."""
    if connection.dialect.name == "sqlite":
        # The driver may not have begun although SQLAlchemy has: until it does, each statement sees the present.
        return not connection.connection.driver_connection.in_transaction  # type: ignore[union-attr]
    return connection.get_isolation_level().upper() in _FRESH_AT_EVERY_STATEMENT


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Poll *condition* for up to *timeout* seconds; what it was at the end."""
    deadline = time.monotonic() + timeout
    pause = 0.002
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    return True


def check_statement(statement: Any) -> None:
    """Refuse what is not a SELECT of one mapped class."""
    descriptions = getattr(statement, "column_descriptions", None)
    if not descriptions or len(descriptions) != 1 or descriptions[0].get("entity") is not descriptions[0].get("expr"):
        raise UsageError("snapshot() takes a select() of one mapped class, such as select(Message).where(...)")
