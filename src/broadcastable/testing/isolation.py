"""A `DurableStreams` of a test's own: a stream server in memory, a key pair made for it, the default of the process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context
from datetime import datetime
from itertools import chain, repeat
from typing import Any

from broadcastable.durable_streams import DurableStreams, current, discard
from broadcastable.errors import UsageError
from broadcastable.events import pinning
from broadcastable.settings import current_settings, pinned
from broadcastable.tokens import generate_key_pair

from .memory import MemoryStreams
from .recorder import recorder


@contextmanager
def isolated_durable_streams(memory: MemoryStreams | None = None, **changes: Any) -> Iterator[DurableStreams]:
    """Make an instance that needs no server, no Redis, no key and no worker process the default, for all threads.

    The model-free verbs, capture and `broadcastable.aio` use it until the end of the block, whatever `configure()` says
    meanwhile. No worker runs: what is deferred waits for `drain`, and is in *memory* after it. Everything else is as
    the application sets it: the `gid_app` of its gids, `keys_as_strings`, the life of its tokens.

    Args:
        memory: The streams; new ones when None.
        changes: Settings to change, `server_url` among them.
    """
    streams = memory if memory is not None else MemoryStreams()
    with streams.reachable(), recorder.held():
        alone = {
            "server_url": streams.url,
            "client_url": None,
            "signing_key": generate_key_pair().private_pem,
            "signing_kid": None,
            "verify_keys": (),
            "outbox": "memory",
            "redis_url": None,
            "database_url": None,
        }
        with pinned(current_settings().replace(**{**alone, **changes})):
            # In an empty context, where no `override()` of the test's own stands before the pinned settings.
            instance = Context().run(current)
            try:
                yield instance
            finally:
                discard(instance)


@contextmanager
def freeze_txid(
    txid: str | Iterable[str] = "txid", *, clock: datetime | Callable[[], datetime] | None = None
) -> Iterator[None]:
    """Give every transaction a known id, for tests that compare whole events.

    >>> with freeze_txid("tx-1", clock=datetime(2026, 1, 1, tzinfo=UTC)), capture_broadcasts(room) as seen:
    ...     session.add(Message(room=room, body="Hi"))
    ...     session.commit()
    >>> seen[0].payload["headers"]
    {'operation': 'insert', 'txid': 'tx-1', 'timestamp': '2026-01-01T00:00:00.000Z'}

    Ids that come from somewhere else stay: `session.info["txid"]`, an argument, `txid_from="postgres"`.

    Args:
        txid: One id for all, or several, of which each transaction takes the next and the last ones share the last.
        clock: The time on the events: one moment, or a function that tells it. The clock goes on when None.

    Raises:
        UsageError: *clock* or an id is none; of several ids, each but the first is looked at when its turn comes.
    """
    if not isinstance(txid, Iterable):
        raise UsageError(f"freeze_txid() takes one id, or several; got {txid!r}")
    ids = map(_checked, [txid] if isinstance(txid, str) else txid)
    first = next(ids, None)
    if first is None:
        raise UsageError("freeze_txid() needs at least one id")
    following = _then_the_last(first, ids)
    with pinning(txid=lambda: next(following), clock=_clock(clock)):
        yield


def _checked(txid: object) -> str:
    if not (isinstance(txid, str) and txid):
        raise UsageError(f"freeze_txid() takes ids that are text and not empty; got {txid!r}")
    return txid


def _clock(clock: datetime | Callable[[], datetime] | None) -> Callable[[], datetime] | None:
    if isinstance(clock, datetime):
        return lambda: clock
    if clock is not None and not callable(clock):
        raise UsageError(f"freeze_txid(clock=...) is a datetime, or a function that returns one; got {clock!r}")
    return clock


def _then_the_last(first: str, ids: Iterator[str]) -> Iterator[str]:
    last = first
    for last in chain([first], ids):
        yield last
    yield from repeat(last)
