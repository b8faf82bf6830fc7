"""The verbs: everything that an application does with streams, once with a thread's means and once with asyncio's.

`DurableStreams` and `AsyncDurableStreams` have the same methods; the second one's are awaited. What a verb does is
written once, as a flow (see `provisioner`); the two classes perform it. The deferred verbs never wait for the network:
they hand their event to the outbox.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar
from urllib.parse import quote

import httpx
import sqlalchemy as sa
from sqlalchemy.orm import InstanceState, Session

from . import metrics, snapshots, transactions
from .client import AsyncStreamClient, StreamClient
from .counters import counters
from .errors import BlankStreamables, ConfigurationError, StreamNotFound, UnknownPermission, UsageError
from .events import ABSENT, Batch, ChangeEvent, Operation, encode_json, frame_body, new_txid, utc_timestamp
from .handoff import Handoff, Turn
from .names import Streamable, flattened, shard_of, stream_name_from, stream_path
from .outbox import Outbox
from .protocol import (
    StreamResponse,
    append_request,
    close_request,
    delete_request,
    head_request,
    read_appended,
    read_closed,
    read_deleted,
    read_head,
)
from .provisioner import Flow, StreamProvisioner, arun, run
from .relay import Relay
from .settings import OutboxKind, Settings, current_settings, seconds
from .snapshots import Snapshot
from .tokens import PERMISSIONS, Gatekeeper
from .values import event_key, to_json_value

if TYPE_CHECKING:
    import dramatiq
    from sqlalchemy.ext.asyncio import AsyncSession

    from .actors import Wakeups

T = TypeVar("T")

log = logging.getLogger(__name__)


class Interceptor(Protocol):
    """Stands between the verbs and the network, for tests; see `intercepting`."""

    def intercept(self, batches: Sequence[Batch], *, sender: DurableStreams, deferred: bool, joined: bool) -> bool:
        """Look at *batches* on their way out.

        Args:
            sender: Whose batches they are; of an `AsyncDurableStreams`, its synchronous twin.
            deferred: They were on their way to the outbox rather than straight to the server.
            joined: Their session was joined into an outer transaction that nobody here commits.

        Returns:
            True to keep them: nothing is sent.
        """
        ...


_interceptors: list[Interceptor] = []


@contextmanager
def intercepting(interceptor: Interceptor) -> Iterator[None]:
    """Show everything that is broadcast in this process, from any thread, to *interceptor* first."""
    _interceptors.append(interceptor)
    try:
        yield
    finally:
        _interceptors.remove(interceptor)


def _intercepted(batches: Sequence[Batch], *, sender: DurableStreams, deferred: bool, joined: bool = False) -> bool:
    # The innermost is asked first; one that keeps the batches ends it.
    return any(
        each.intercept(batches, sender=sender, deferred=deferred, joined=joined) for each in reversed(_interceptors)
    )


class _Verbs:
    """What both twins know: names, tokens, and each verb's flow."""

    settings: Settings
    gatekeeper: Gatekeeper
    provisioner: StreamProvisioner

    def stream_name_from(self, *streamables: Streamable) -> str:
        """The stream name of *streamables*; the empty string when all are blank. See `names.stream_name_from`."""
        return stream_name_from(*streamables, app=self.settings.gid_app)

    def _needed_name(self, streamables: Sequence[Streamable]) -> str:
        name = self.stream_name_from(*streamables)
        if not name:
            raise BlankStreamables("All streamables are blank. Name a stream: a record, a text, or a list of those")
        return name

    def client_url_of(self, *streamables: Streamable) -> str:
        """The URL by which a client reaches the stream, without a token. No I/O."""
        name = self._needed_name(streamables)
        urls = self.settings.client_urls
        return f"{urls[shard_of(name, len(urls))]}/{stream_path(name)}"

    def _ensure(self, name: str) -> Flow[None]:
        yield from self.provisioner.ensure(name)

    def _append(self, name: str, body: bytes) -> Flow[str | None]:
        yield from self.provisioner.ensure(name)
        for last in (False, True):
            response = yield append_request(name, body)
            assert isinstance(response, StreamResponse)
            try:
                return read_appended(response, name, produced=False).offset
            except StreamNotFound:
                if last:
                    raise
                # Deleted, expired, or the server lost its memory: make it again, once.
                counters.increment("streams_healed")
                yield from self.provisioner.forget(name)
                yield from self.provisioner.ensure(name)
        raise AssertionError("unreachable")

    def _offset(self, name: str) -> Flow[str]:
        yield from self.provisioner.ensure(name)
        for last in (False, True):
            response = yield head_request(name)
            assert isinstance(response, StreamResponse)
            try:
                return read_head(response, name)
            except StreamNotFound:
                if last:
                    raise
                yield from self.provisioner.forget(name)
                yield from self.provisioner.ensure(name)
        raise AssertionError("unreachable")

    def _delete(self, name: str) -> Flow[bool]:
        response = yield delete_request(name)
        assert isinstance(response, StreamResponse)
        deleted = read_deleted(response, name)
        yield from self.provisioner.forget(name)
        return deleted

    def _close_stream(self, name: str) -> Flow[str | None]:
        response = yield close_request(name)
        assert isinstance(response, StreamResponse)
        return read_closed(response, name)

    def _sign(
        self,
        streamables: Sequence[Streamable],
        permissions: Iterable[str],
        identity: object,
        expires_in: timedelta | float | None,
    ) -> Flow[tuple[str, str]]:
        # In this order: a wrong permission costs no request, and nobody gets a token for a stream that is not there.
        granted = _known_permissions(permissions)
        name = self._needed_name(streamables)
        url = self.client_url_of(name)
        claims: dict[str, Any] = {"stream": name, "permissions": granted}
        if identity is not None:
            claims["identity"] = str(identity)
        life = self.settings.signed_stream_url_expires_in if expires_in is None else expires_in
        token = self.gatekeeper.encode(claims, expires_in=seconds(life))
        yield from self._ensure(name)
        return url, token


def _known_permissions(permissions: Iterable[str]) -> list[str]:
    wanted = [permissions] if isinstance(permissions, str) or not isinstance(permissions, Iterable) else [*permissions]
    unknown = [str(each) for each in wanted if each not in PERMISSIONS]
    if unknown or not wanted:
        raise UnknownPermission(f"permissions are some of {', '.join(PERMISSIONS)}; got {', '.join(unknown) or 'none'}")
    return [each for each in PERMISSIONS if each in wanted]


def _event(*, type: str, key: object, value: Any, operation: str, old_value: Any, txid: str) -> ChangeEvent:
    try:
        known = Operation(operation)
    except ValueError:
        raise UsageError(f"operation is one of {', '.join(Operation)}; got {operation!r}") from None
    return ChangeEvent(
        type=type,
        key=event_key(key),
        operation=known,
        value=to_json_value(value),
        old_value=ABSENT if old_value is None else to_json_value(old_value),
        txid=txid,
        timestamp=utc_timestamp(),
    )


def _in_transaction(session: Any, streamables: Iterable[Streamable]) -> Session | None:
    """The session whose commit a deferred event waits for: *session*, else that of the first record that is in one."""
    if session is None:
        states = (sa.inspect(each, raiseerr=False) for each in flattened(streamables))
        sessions = (state.session for state in states if isinstance(state, InstanceState))
        found = next((each for each in sessions if each is not None), None)
    else:
        try:
            found = transactions.sync_session(session)
        except (AttributeError, TypeError):
            found = session
        if not isinstance(found, Session):
            raise UsageError(
                f"session= is the Session or AsyncSession whose commit to wait for; got {session!r}. A payload has no "
                "field of that name: call it something else"
            )
    return found if found is not None and found.in_transaction() else None


class DurableStreams(_Verbs):
    """Streams for one stream server, one signing key and one outbox. Thread safe.

    `current()` gives the one that `configure()` describes; make your own to serve several at once, and let a session
    choose with `session.info["durable_streams"]`. A context manager, or `close()` it.

    Args:
        settings: `current_settings()` when None.
        broker: The Dramatiq broker for wake-ups; see also `actors.declare`.
        outbox: The name of a store, as the setting, or a store.
        transport: An httpx transport in place of the network.
        changes: Settings to change.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        broker: dramatiq.Broker | None = None,
        outbox: Outbox | OutboxKind | None = None,
        transport: httpx.BaseTransport | None = None,
        **changes: Any,
    ) -> None:
        if isinstance(outbox, str):
            changes["outbox"], outbox = outbox, None
        self.settings = (settings or current_settings()).replace(**changes)
        self.gatekeeper = Gatekeeper(self.settings)
        self.provisioner = StreamProvisioner(self.settings)
        self.client = StreamClient(self.settings, self.gatekeeper, transport=transport)
        self._lock = threading.RLock()
        self._outbox: Outbox | None = outbox
        self._broker = broker
        self._wakeups: Wakeups | None = None
        self._relay: Relay | None = None
        self._handoff: Handoff | None = None

    # --- the parts, made when first needed ---

    @property
    def outbox(self) -> Outbox:
        """Where undelivered events wait."""
        if self._outbox is None:
            with self._lock:
                if self._outbox is None:
                    self._outbox = self._make_outbox()
        return self._outbox

    def _make_outbox(self) -> Outbox:
        settings = self.settings
        match settings.outbox:
            case "memory":
                from .outbox.memory import MemoryOutbox

                return MemoryOutbox.from_settings(settings)
            case "redis":
                from .outbox.redis import RedisOutbox

                return RedisOutbox.from_settings(settings, wake=lambda streams: self.wakeups.commands(streams))
            case "database":
                if settings.database_url is None:
                    raise ConfigurationError(
                        'outbox="database" needs database_url (BROADCASTABLE_DATABASE_URL), where the relay reads it'
                    )
                from .outbox.database import DatabaseOutbox

                return DatabaseOutbox.from_settings(settings)

    @property
    def relay(self) -> Relay:
        """Sends what waits in the outbox; workers call it."""
        if self._relay is None:
            with self._lock:
                if self._relay is None:
                    if "prometheus_client" in sys.modules:
                        metrics.install()
                    self._relay = Relay(self.outbox, self.client, self.provisioner, self.settings)
        return self._relay

    @property
    def wakeups(self) -> Wakeups:
        """Tells workers which streams have something to send: through the broker, or a worker in this process."""
        if self._wakeups is None:
            with self._lock:
                if self._wakeups is None:
                    from .actors import wakeups_for  # the actors stand on the verbs, so this looks up late

                    self._wakeups = wakeups_for(self, self._broker)
        return self._wakeups

    @property
    def handoff(self) -> Handoff:
        """Takes committed batches to the outbox."""
        if self._handoff is None:
            with self._lock:
                if self._handoff is None:
                    blocking = self.settings.outbox != "memory" or self._broker is not None
                    self._handoff = Handoff(
                        self.outbox,
                        lambda streams: self.wakeups.wake(streams),
                        max_bytes=self.settings.memory_outbox_bytes,
                        blocking=blocking,
                    )
        return self._handoff

    def use_broker(self, broker: dramatiq.Broker) -> None:
        """Send wake-ups through *broker* from now on; `actors.declare` calls this."""
        with self._lock:
            if broker is not self._broker:
                previous, self._wakeups = self._wakeups, None
                self._broker = broker
                self._handoff = None
                if previous is not None:
                    previous.close()

    # --- the delivery that `transactions` hands over to ---

    @property
    def transactional(self) -> bool:
        """Whether batches are written in the application's own transaction."""
        return self.outbox.transactional

    def stage(self, connection: sa.Connection, batches: Sequence[Batch]) -> None:
        """Before commit: write *batches* in the transaction of *connection*. Only where `transactional`."""
        if not _interceptors:
            self.outbox.stage(connection, batches)

    def announce(self, streams: Collection[str]) -> Turn | None:
        """Before commit, with its locks held: take the next turn on *streams*. Only where not `transactional`."""
        return None if _interceptors else self.handoff.announce(streams)

    def withdraw(self, turn: Turn) -> None:
        """After a commit that failed, or has nothing for *turn*'s streams."""
        self.handoff.withdraw(turn)

    def committed(self, batches: Sequence[Batch], *, turn: Turn | None = None, joined: bool = False) -> None:
        """After commit: hand *batches* over and wake the workers. Never raises, never blocks an event loop."""
        if _intercepted(batches, sender=self, deferred=True, joined=joined):
            return
        if joined:
            if self.transactional:
                return  # staged in the outer transaction: a sweeper finds them once that is committed
            counters.increment("batches_refused", len(batches))
            log.warning(
                "%d batches are not sent, the first for stream %s: the session is joined into an outer transaction "
                "that it does not commit. In tests, look at them with broadcastable.testing",
                len(batches),
                batches[0].stream,
            )
            return
        self.handoff.submit(batches, turn)

    def append_now(self, stream: str, events: Sequence[bytes], *, txid: str | None = None) -> str | None:
        """Provision *stream* and append *events* in one POST; the offset after them."""
        batch = Batch(stream=stream, events=tuple(events), txid=txid or new_txid())
        if _interceptors and _intercepted([batch], sender=self, deferred=False):
            return None
        return self._run(self._append(stream, frame_body(events)))

    def _run(self, flow: Flow[T]) -> T:
        return run(flow, self.client, self.provisioner)

    # --- verbs ---

    def broadcast_event_to(
        self,
        *streamables: Streamable,
        type: str,
        key: object,
        value: Any = None,
        operation: str,
        old_value: Any = None,
        txid: str | None = None,
    ) -> str | None:
        """Append one change event now: one POST, inside or outside any transaction.

        Args:
            type: The entity type (State Protocol, 4.1).
            key: The entity's key; sent as text.
            value: The whole row as it is now; ignored on delete.
            operation: insert, update, upsert (sent as update) or delete.
            old_value: The row as it was; None leaves it out.
            txid: The transaction id; a new one when None.

        Returns:
            The txid, or None when all *streamables* are blank and nothing was sent.

        Raises:
            StreamTimeout: No answer; the event may or may not be stored.
            StreamError: Any other failure; nothing was stored.
        """
        name = self.stream_name_from(*streamables)
        if not name:
            return None
        txid = txid or new_txid()
        event = _event(type=type, key=key, value=value, operation=operation, old_value=old_value, txid=txid)
        self.append_now(name, [event.encode()], txid=txid)
        return txid

    def broadcast_event_later_to(
        self,
        *streamables: Streamable,
        type: str,
        key: object,
        value: Any = None,
        operation: str,
        old_value: Any = None,
        txid: str | None = None,
        session: Any = None,
    ) -> str | None:
        """Append one change event through the outbox: no request here, in order with the stream's other events.

        Inside an open transaction of *session*, or of the first record's session, the event waits for the commit and
        dies with the rollback. The value is taken now.

        Args:
            session: The `Session` or `AsyncSession` whose transaction to wait for; needed where only plain names are
                given. The rest as in `broadcast_event_to`.

        Returns:
            The txid: the transaction's, where there is one. None when all *streamables* are blank.
        """
        streamables = flattened(streamables)
        waiting = _in_transaction(session, streamables)
        name = self.stream_name_from(*streamables)
        if not name:
            return None
        if txid is None:
            txid = new_txid() if waiting is None else transactions.txid(waiting)
        event = _event(type=type, key=key, value=value, operation=operation, old_value=old_value, txid=txid)
        self._later(waiting, name, event.encode(), txid)
        return txid

    def broadcast_to(self, /, *streamables: Streamable, **payload: Any) -> bool | None:
        """Append the JSON object *payload* now. True, or None when all *streamables* are blank."""
        name = self.stream_name_from(*streamables)
        if not name:
            return None
        self.append_now(name, [encode_json(to_json_value(payload))])
        return True

    def broadcast_later_to(self, /, *streamables: Streamable, session: Any = None, **payload: Any) -> bool | None:
        """Append the JSON object *payload* through the outbox; see `broadcast_event_later_to`.

        Args:
            session: As there; no field of the payload.
            payload: The fields.
        """
        streamables = flattened(streamables)
        waiting = _in_transaction(session, streamables)
        name = self.stream_name_from(*streamables)
        if not name:
            return None
        txid = new_txid() if waiting is None else transactions.txid(waiting)
        self._later(waiting, name, encode_json(to_json_value(payload)), txid)
        return True

    def _later(self, session: Session | None, name: str, event: bytes, txid: str) -> None:
        if session is not None:
            transactions.defer(session, self, name, event)
            return
        batch = Batch(stream=name, events=(event,), txid=txid)
        if not self.transactional:
            self.committed([batch])
        elif not _intercepted([batch], sender=self, deferred=True):
            # No transaction to be part of: a short one of the outbox's own.
            self.wakeups.wake(self.outbox.put([batch]))

    def signed_stream_primitives(
        self,
        *streamables: Streamable,
        permissions: Iterable[str] = ("read",),
        identity: object = None,
        expires_in: timedelta | float | None = None,
    ) -> tuple[str, str]:
        """The stream's URL and a token for it; the stream exists when this returns.

        The URL is stable and the token short-lived: hand a page the URL and a function that fetches a new token.

        Args:
            permissions: Some of `PERMISSIONS`.
            identity: Who the client is, as a claim; None leaves it out.
            expires_in: A `timedelta` or seconds; `Settings.signed_stream_url_expires_in` when None.

        Raises:
            UnknownPermission, BlankStreamables, InvalidStreamName: Before any request.
            ConfigurationError: No signing key.
            StreamError: The stream could not be provisioned.
        """
        return self._run(self._sign(streamables, permissions, identity, expires_in))

    def signed_stream_url(
        self,
        *streamables: Streamable,
        permissions: Iterable[str] = ("read",),
        identity: object = None,
        expires_in: timedelta | float | None = None,
    ) -> str:
        """`signed_stream_primitives` as one text: the URL with `?token=`."""
        url, token = self.signed_stream_primitives(
            *streamables, permissions=permissions, identity=identity, expires_in=expires_in
        )
        return f"{url}?token={quote(token)}"

    def stream_offset(self, *streamables: Streamable) -> str:
        """The stream's tail offset, opaque: a reader that starts there gets everything appended from now on.

        One HEAD at every call, never cached: a stale tail would make a reader skip events.
        """
        return self._run(self._offset(self._needed_name(streamables)))

    def ensure_stream_exists(self, *streamables: Streamable) -> str:
        """Make the stream unless it exists; its name. At most one PUT in a process, and with Redis one for all."""
        name = self._needed_name(streamables)
        self._run(self._ensure(name))
        return name

    def snapshot(
        self,
        session: Session,
        statement: sa.Select[Any],
        *streamables: Streamable,
        permissions: Iterable[str] = ("read",),
        identity: object = None,
        expires_in: timedelta | float | None = None,
        wait: timedelta | float = 0.0,
    ) -> Snapshot:
        """The rows of *statement* and the offset from which every later change of them follows.

        One HEAD, then *statement* in a transaction that begins after it. A client applies the events, then tails the
        stream from the offset.

        Args:
            session: In no transaction, or in one that sees the present at every statement (READ COMMITTED).
            statement: A `select()` of one mapped class, of the rows that belong to the stream.
            wait: How long, at most, to wait first until the outbox has nothing undelivered for the stream: a client
                then does not see a row go back to an older state for a moment.

        Raises:
            StaleSnapshotError: The session's transaction may be older than the offset, or has uncommitted changes.
            UsageError: Not such a statement. And whatever `signed_stream_primitives` and `stream_offset` raise.
        """
        snapshots.check_statement(statement)
        name = self._needed_name(streamables)
        url, token = self.signed_stream_primitives(
            name, permissions=permissions, identity=identity, expires_in=expires_in
        )
        self._wait_for_outbox(name, seconds(wait))
        offset = self.stream_offset(name)
        events = snapshots.read_events(session, statement, snapshots.row_encoder(name, self.settings))
        return Snapshot(offset=offset, events=events, url=url, token=token)

    def stream_snapshot(
        self,
        session: Session,
        statement: sa.Select[Any],
        *streamables: Streamable,
        permissions: Iterable[str] = ("read",),
        identity: object = None,
        expires_in: timedelta | float | None = None,
        wait: timedelta | float = 0.0,
    ) -> Iterator[bytes]:
        """`snapshot` for results that do not fit into memory: its JSON text piece by piece, a response's body."""
        snapshots.check_statement(statement)
        name = self._needed_name(streamables)
        url, token = self.signed_stream_primitives(
            name, permissions=permissions, identity=identity, expires_in=expires_in
        )
        self._wait_for_outbox(name, seconds(wait))
        head = encode_json({"offset": self.stream_offset(name), "url": url, "token": token})
        yield head[:-1] + b',"events":['
        comma = b""
        for chunk in snapshots.stream_events(session, statement, snapshots.row_encoder(name, self.settings)):
            yield comma + b",".join(chunk)
            comma = b","
        yield b"]}"

    def _wait_for_outbox(self, name: str, timeout: float) -> None:
        if timeout > 0:
            snapshots.wait_until(lambda: all(each.parked for each in self.outbox.pending(name)), timeout)

    def close_stream(self, *streamables: Streamable) -> str | None:
        """Let nothing be appended any more; the final offset. Readers learn it. Cannot be undone."""
        return self._run(self._close_stream(self._needed_name(streamables)))

    def delete_stream(self, *streamables: Streamable) -> bool:
        """Delete the stream and all its events; False when there was none."""
        return self._run(self._delete(self._needed_name(streamables)))

    def drain(self, timeout: float = 5.0) -> bool:
        """Wait until everything broadcast so far is on the stream server; False when *timeout* seconds were not enough.

        For the end of scripts and tests. Parked streams do not count.
        """
        return self.handoff.flush(timeout) and self.wakeups.drain(timeout)

    def close(self) -> None:
        """Close connections and stop the worker inside this process, if there is one. May be used again."""
        with self._lock:
            wakeups, self._wakeups = self._wakeups, None
        if self._handoff is not None:
            self._handoff.close(2.0)
        if wakeups is not None:
            wakeups.close()
        if self._outbox is not None:
            self._outbox.close()
        self.client.close()
        self.provisioner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncDurableStreams(_Verbs):
    """`DurableStreams` for asyncio: the same verbs, awaited. Safe in any number of tasks and event loops.

    Args:
        durable_streams: The synchronous twin that holds the outbox and the wake-ups; one is made when None.
        transport: An httpx transport in place of the network.
        changes: Settings to change, where the twin is made here.
    """

    def __init__(
        self,
        durable_streams: DurableStreams | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        **changes: Any,
    ) -> None:
        if durable_streams is not None and changes:
            raise UsageError("Give either a DurableStreams or settings to change, not both")
        self.sync = durable_streams if durable_streams is not None else DurableStreams(**changes)
        self.settings = self.sync.settings
        self.gatekeeper = self.sync.gatekeeper
        self.provisioner = self.sync.provisioner
        self.client = AsyncStreamClient(self.settings, self.gatekeeper, transport=transport)

    async def _run(self, flow: Flow[T]) -> T:
        return await arun(flow, self.client, self.provisioner)

    async def append_now(self, stream: str, events: Sequence[bytes], *, txid: str | None = None) -> str | None:
        """See `DurableStreams.append_now`."""
        batch = Batch(stream=stream, events=tuple(events), txid=txid or new_txid())
        if _interceptors and _intercepted([batch], sender=self.sync, deferred=False):
            return None
        return await self._run(self._append(stream, frame_body(events)))

    async def broadcast_event_to(
        self,
        *streamables: Streamable,
        type: str,
        key: object,
        value: Any = None,
        operation: str,
        old_value: Any = None,
        txid: str | None = None,
    ) -> str | None:
        """See `DurableStreams.broadcast_event_to`."""
        name = self.stream_name_from(*streamables)
        if not name:
            return None
        txid = txid or new_txid()
        event = _event(type=type, key=key, value=value, operation=operation, old_value=old_value, txid=txid)
        await self.append_now(name, [event.encode()], txid=txid)
        return txid

    async def broadcast_event_later_to(
        self,
        *streamables: Streamable,
        type: str,
        key: object,
        value: Any = None,
        operation: str,
        old_value: Any = None,
        txid: str | None = None,
        session: Any = None,
    ) -> str | None:
        """See `DurableStreams.broadcast_event_later_to`. Does no I/O on the event loop."""
        streamables = flattened(streamables)
        return await self._later(
            lambda: self.sync.broadcast_event_later_to(
                *streamables,
                type=type,
                key=key,
                value=value,
                operation=operation,
                old_value=old_value,
                txid=txid,
                session=session,
            ),
            _in_transaction(session, streamables),
        )

    async def broadcast_to(self, /, *streamables: Streamable, **payload: Any) -> bool | None:
        """See `DurableStreams.broadcast_to`."""
        name = self.stream_name_from(*streamables)
        if not name:
            return None
        await self.append_now(name, [encode_json(to_json_value(payload))])
        return True

    async def broadcast_later_to(self, /, *streamables: Streamable, session: Any = None, **payload: Any) -> bool | None:
        """See `DurableStreams.broadcast_later_to`."""
        streamables = flattened(streamables)
        return await self._later(
            lambda: self.sync.broadcast_later_to(*streamables, session=session, **payload),
            _in_transaction(session, streamables),
        )

    async def _later(self, verb: Callable[[], T], waiting: Session | None) -> T:
        if waiting is None and self.sync.transactional:
            # The outbox's own short transaction would block the event loop.
            return await asyncio.to_thread(verb)
        return verb()

    async def signed_stream_primitives(
        self,
        *streamables: Streamable,
        permissions: Iterable[str] = ("read",),
        identity: object = None,
        expires_in: timedelta | float | None = None,
    ) -> tuple[str, str]:
        """See `DurableStreams.signed_stream_primitives`."""
        return await self._run(self._sign(streamables, permissions, identity, expires_in))

    async def signed_stream_url(
        self,
        *streamables: Streamable,
        permissions: Iterable[str] = ("read",),
        identity: object = None,
        expires_in: timedelta | float | None = None,
    ) -> str:
        """See `DurableStreams.signed_stream_url`."""
        url, token = await self.signed_stream_primitives(
            *streamables, permissions=permissions, identity=identity, expires_in=expires_in
        )
        return f"{url}?token={quote(token)}"

    async def stream_offset(self, *streamables: Streamable) -> str:
        """See `DurableStreams.stream_offset`."""
        return await self._run(self._offset(self._needed_name(streamables)))

    async def ensure_stream_exists(self, *streamables: Streamable) -> str:
        """See `DurableStreams.ensure_stream_exists`."""
        name = self._needed_name(streamables)
        await self._run(self._ensure(name))
        return name

    async def snapshot(
        self,
        session: AsyncSession,
        statement: sa.Select[Any],
        *streamables: Streamable,
        permissions: Iterable[str] = ("read",),
        identity: object = None,
        expires_in: timedelta | float | None = None,
        wait: timedelta | float = 0.0,
    ) -> Snapshot:
        """See `DurableStreams.snapshot`."""
        snapshots.check_statement(statement)
        name = self._needed_name(streamables)
        url, token = await self.signed_stream_primitives(
            name, permissions=permissions, identity=identity, expires_in=expires_in
        )
        await self._wait_for_outbox(name, seconds(wait))
        offset = await self.stream_offset(name)
        encode = snapshots.row_encoder(name, self.settings)
        events = await session.run_sync(lambda inner: snapshots.read_events(inner, statement, encode))
        return Snapshot(offset=offset, events=events, url=url, token=token)

    async def stream_snapshot(
        self,
        session: AsyncSession,
        statement: sa.Select[Any],
        *streamables: Streamable,
        permissions: Iterable[str] = ("read",),
        identity: object = None,
        expires_in: timedelta | float | None = None,
        wait: timedelta | float = 0.0,
    ) -> AsyncIterator[bytes]:
        """See `DurableStreams.stream_snapshot`."""
        snapshots.check_statement(statement)
        name = self._needed_name(streamables)
        url, token = await self.signed_stream_primitives(
            name, permissions=permissions, identity=identity, expires_in=expires_in
        )
        await self._wait_for_outbox(name, seconds(wait))
        head = encode_json({"offset": await self.stream_offset(name), "url": url, "token": token})
        yield head[:-1] + b',"events":['
        chunks = snapshots.stream_events(session.sync_session, statement, snapshots.row_encoder(name, self.settings))
        comma = b""
        try:
            while (chunk := await session.run_sync(lambda _: next(chunks, None))) is not None:
                yield comma + b",".join(chunk)
                comma = b","
        finally:
            # A reader that left: what the generator holds can be given back only where the driver may be awaited.
            await session.run_sync(lambda _: chunks.close())
        yield b"]}"

    async def _wait_for_outbox(self, name: str, timeout: float) -> None:
        if timeout > 0:
            await asyncio.to_thread(self.sync._wait_for_outbox, name, timeout)

    async def close_stream(self, *streamables: Streamable) -> str | None:
        """See `DurableStreams.close_stream`."""
        return await self._run(self._close_stream(self._needed_name(streamables)))

    async def delete_stream(self, *streamables: Streamable) -> bool:
        """See `DurableStreams.delete_stream`."""
        return await self._run(self._delete(self._needed_name(streamables)))

    async def drain(self, timeout: float = 5.0) -> bool:
        """See `DurableStreams.drain`."""
        return await asyncio.to_thread(self.sync.drain, timeout)

    async def close(self) -> None:
        """Close this event loop's connections. The synchronous twin is left open: others may use it."""
        await self.client.close()
        await self.provisioner.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


_instances: dict[Settings, DurableStreams] = {}
_async_instances: dict[Settings, AsyncDurableStreams] = {}
_instances_lock = threading.Lock()


def current() -> DurableStreams:
    """The `DurableStreams` of the settings in force here: `override()`, else `configure()`, else the environment."""
    settings = current_settings()
    found = _instances.get(settings)
    if found is None:
        with _instances_lock:
            found = _instances.setdefault(settings, DurableStreams(settings))
    return found


def is_default(durable_streams: object) -> bool:
    """Whether `current()` made *durable_streams*: then `actors.declare()` without one means it too."""
    return any(each is durable_streams for each in _instances.values())


def discard(durable_streams: DurableStreams) -> None:
    """Close *durable_streams* and forget it as a default: the next `current()` for its settings makes another."""
    with _instances_lock:
        _instances.pop(durable_streams.settings, None)
        _async_instances.pop(durable_streams.settings, None)
    durable_streams.close()


def current_async() -> AsyncDurableStreams:
    """The asynchronous twin of `current()`."""
    twin = current()
    found = _async_instances.get(twin.settings)
    if found is None:
        with _instances_lock:
            found = _async_instances.setdefault(twin.settings, AsyncDurableStreams(twin))
    return found


DURABLE_STREAMS_KEY = "durable_streams"


def durable_streams_for(session: Session) -> DurableStreams:
    """The `DurableStreams` of *session*: its `info["durable_streams"]`, else `current()`."""
    chosen = session.info.get(DURABLE_STREAMS_KEY)
    if chosen is None:
        return current()
    return chosen.sync if isinstance(chosen, AsyncDurableStreams) else chosen


__all__ = [
    "AsyncDurableStreams",
    "DurableStreams",
    "Interceptor",
    "current",
    "current_async",
    "discard",
    "durable_streams_for",
    "intercepting",
    "is_default",
]
