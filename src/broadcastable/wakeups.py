"""Telling the workers that streams have something to deliver: one Dramatiq message for many streams.

A wake-up carries names only; the events wait in the outbox. So it may be lost (the sweeper finds the stream within a
second or two), repeated (the second finds nothing) or arrive in any order, and every broker will do.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import dramatiq
import redis

from .errors import ConfigurationError

log = logging.getLogger(__name__)

STREAMS_PER_MESSAGE = 256
"""A fan-out to 10,000 streams is 40 messages of some 10 kB, which several worker threads share."""

MARKER_LIFE = 10.0
"""Seconds after which a stream may be woken again although no worker has taken its wake-up."""

MARKED_AT_MOST = 64
"""Streams in one call that are looked up among the markers. For more, the few messages are cheaper than the look."""

# A broker that fails may block for seconds first (redis-py and pika retry by themselves), so it is asked again only
# after ten times what the failure took: commits are slowed by a tenth at most.
_PAUSE_FACTOR = 10.0
_SHORTEST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0

_QUEUE_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9._-]*")


def queue_name(namespace: str) -> str:
    """The Dramatiq queue of *namespace*: the namespace itself.

    Raises:
        ConfigurationError: Dramatiq could not have a queue of that name.
    """
    if not _QUEUE_NAME.fullmatch(namespace) or namespace.endswith((".DQ", ".XQ")):
        raise ConfigurationError(
            f"namespace is also the name of a Dramatiq queue: a letter or underscore, then letters, digits, dots, "
            f"dashes or underscores, and neither .DQ nor .XQ at the end; got {namespace!r}"
        )
    return namespace


def actor_name(namespace: str) -> str:
    """The name of the actor that delivers the streams of *namespace*."""
    return f"{namespace}.deliver"


def enqueue(broker: dramatiq.Broker, namespace: str, streams: Sequence[str]) -> int:
    """Put wake-ups for *streams* on the queue of *namespace*; how many messages it took. No actor is needed here.

    Whatever the broker raises when it cannot be reached comes through; some of the messages may be queued then.
    """
    queue = queue_name(namespace)
    broker.declare_queue(queue)  # only remembers the name; StubBroker refuses messages without it
    messages = 0
    for chunk in _chunks(streams, STREAMS_PER_MESSAGE):
        broker.enqueue(
            dramatiq.Message(
                queue_name=queue, actor_name=actor_name(namespace), args=(list(chunk),), kwargs={}, options={}
            )
        )
        messages += 1
    return messages


def _chunks(streams: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(streams), size):
        yield streams[start : start + size]


class Markers(Protocol):
    """Which streams have a wake-up queued, for an outbox that cannot tell (the database outbox)."""

    def mark(self, streams: Sequence[str]) -> list[str]:
        """Mark *streams*; those that were not marked before."""
        ...

    def unmark(self, streams: Sequence[str]) -> None:
        """A worker has taken the wake-up of *streams*. To be called before it looks into the outbox."""
        ...


class ProcessMarkers:
    """`Markers` where the streams are delivered by a worker in the same process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._marked: dict[str, float] = {}

    def mark(self, streams: Sequence[str]) -> list[str]:
        now = time.monotonic()
        with self._lock:
            fresh = [stream for stream in streams if self._marked.get(stream, 0.0) <= now]
            self._marked.update(dict.fromkeys(fresh, now + MARKER_LIFE))
        return fresh

    def unmark(self, streams: Sequence[str]) -> None:
        with self._lock:
            for stream in streams:
                self._marked.pop(stream, None)


class RedisMarkers:
    """`Markers` shared by all processes of a namespace: one key for each marked stream, one round trip a call."""

    def __init__(self, client: redis.Redis, namespace: str) -> None:
        self._client = client
        self._prefix = f"{namespace}:woken:"

    def mark(self, streams: Sequence[str]) -> list[str]:
        pipeline = self._client.pipeline(transaction=False)
        for stream in streams:
            pipeline.set(self._prefix + stream, b"", nx=True, px=int(MARKER_LIFE * 1000))
        return [stream for stream, fresh in zip(streams, pipeline.execute(), strict=True) if fresh]

    def unmark(self, streams: Sequence[str]) -> None:
        self._client.unlink(*(self._prefix + stream for stream in streams))


class Waker:
    """Enqueues wake-ups, and forgets about them while the broker is away. Thread safe, and safe after a fork.

    Args:
        broker: Asked at every wake-up, so that it may be declared late.
        namespace: `Settings.namespace`.
        markers: Only for an outbox that names every stream instead of those that need a wake-up.
    """

    def __init__(
        self, broker: Callable[[], dramatiq.Broker], namespace: str, *, markers: Markers | None = None
    ) -> None:
        self._broker = broker
        self._namespace = queue_name(namespace)
        self._markers = markers
        self._pause_ends = 0.0

    def wake(self, streams: Sequence[str]) -> int:
        """Queue a wake-up for *streams*, and return the number of messages. Never raises.

        After a failure nothing is sent for a while; then one caller tries. The sweepers find what was not sent.
        """
        wanted = list(dict.fromkeys(streams))
        began = time.monotonic()
        if not wanted or began < self._pause_ends:
            return 0
        if self._pause_ends:
            self._pause_ends = began + _SHORTEST_PAUSE  # one caller tries; the others pass by meanwhile
        try:
            messages = enqueue(self._broker(), self._namespace, self._unmarked(wanted))
        except Exception as error:  # every broker has errors of its own, and a commit must not see them
            now = time.monotonic()
            pause = min(max((now - began) * _PAUSE_FACTOR, _SHORTEST_PAUSE), _LONGEST_PAUSE)
            self._pause_ends = now + pause
            log.warning(
                "%d streams could not be woken through Dramatiq (%s: %s). The sweepers of the workers find them; "
                "the broker is tried again in %.0f s",
                len(wanted),
                type(error).__name__,
                error,
                pause,
            )
            return 0
        if self._pause_ends:
            self._pause_ends = 0.0
            log.info("Streams are woken through Dramatiq again")
        return messages

    def taken(self, streams: Sequence[str]) -> None:
        """A worker has taken the wake-up of *streams*: from here on a commit to them queues another. Never raises."""
        if self._markers is None:
            return
        try:
            self._markers.unmark(streams)
        except redis.RedisError as error:
            log.warning("The markers of %d streams stay for up to %.0f s (%s)", len(streams), MARKER_LIFE, error)

    def _unmarked(self, streams: list[str]) -> list[str]:
        if self._markers is None or len(streams) > MARKED_AT_MOST:
            return streams
        try:
            return self._markers.mark(streams)
        except redis.RedisError:
            return streams  # markers only save work
