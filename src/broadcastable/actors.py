"""Dramatiq: where wake-ups go, and the application's own broker as their carrier.

Importing this touches no broker and leaves Dramatiq's process-wide encoder alone. `declare()` puts our middleware on a
broker; when a worker of that broker boots (`dramatiq myapp.tasks`, or a `dramatiq.Worker` in the process) it
declares the actor, lets a Redis consumer block instead of poll, and starts the sweeper.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from redis.backoff import NoBackoff
from redis.retry import Retry

from .delivery import Delivering, DeliveryMiddleware, declare_actor
from .dispatch import Command, commands_of
from .in_process import InProcessWorker
from .settings import Settings
from .wakeups import Markers, ProcessMarkers, RedisMarkers, Waker, enqueue

__all__ = ["Delivering", "DeliveryMiddleware", "Wakeups", "declare", "declared_broker", "wakeups_for"]

_declared: dramatiq.Broker | None = None


def declared_broker() -> dramatiq.Broker | None:
    """The broker that `declare()` was given for the default `DurableStreams`, whichever that is or becomes."""
    return _declared


def declare(
    broker: dramatiq.Broker | None = None,
    durable_streams: Delivering | None = None,
    *,
    low_latency: bool | Literal["all"] = True,
) -> None:
    """Let *broker* carry the wake-ups of *durable_streams*, and its workers deliver them.

    Call it where the broker is made, in a module that the web processes and the workers import alike. No network I/O.
    May be repeated. Several `DurableStreams` may share a broker when their `namespace` differs.

    With the memory outbox only this process can deliver, so a broker whose workers are elsewhere carries nothing then.

    Args:
        broker: The application's broker; `dramatiq.get_broker()` when None.
        durable_streams: None means the default one, looked up when it is first needed, so `configure()` may come later.
        low_latency: See `DeliveryMiddleware`; the last call decides.

    Raises:
        ConfigurationError: Its namespace cannot be the name of a queue.
    """
    global _declared
    broker = broker or dramatiq.get_broker()
    if durable_streams is None:
        _declared = broker
    else:
        durable_streams.use_broker(broker)
    for middleware in broker.middleware:
        if isinstance(middleware, DeliveryMiddleware):
            fresh = middleware.serve(durable_streams)
            middleware.low_latency = low_latency
            break
    else:
        middleware = DeliveryMiddleware(durable_streams, low_latency=low_latency)
        broker.add_middleware(middleware)
        fresh = True
    if durable_streams is not None and fresh:
        declare_actor(broker, durable_streams, middleware.is_stopping)


def wakeups_for(durable_streams: Delivering, broker: dramatiq.Broker | None = None) -> Wakeups:
    """The wake-ups of *durable_streams*. Neither connects nor starts anything before the first one.

    Args:
        broker: Its own broker. When None: what `declare()` was given, if this is a default `DurableStreams`; else
            the queue in Redis that `dramatiq broadcastable.worker` serves, where the settings have a `redis_url` and
            an outbox that workers can share; else a worker in this process.
    """
    if broker is not None:
        return Wakeups(durable_streams, lambda: broker)
    return Wakeups(durable_streams, lambda: _declared if _is_default(durable_streams) else None)


def _is_default(durable_streams: Delivering) -> bool:
    from .durable_streams import is_default  # stands on this module

    return is_default(durable_streams)


class Wakeups:
    """Tells workers which streams of a `DurableStreams` have something to deliver. Thread safe, and safe after a fork.

    Args:
        broker: The broker chosen for them, asked at every wake-up; None leaves the choice to the settings.
    """

    def __init__(self, durable_streams: Delivering, broker: Callable[[], dramatiq.Broker | None]) -> None:
        self._durable_streams = durable_streams
        self._chosen = broker
        settings = durable_streams.settings
        self._namespace = settings.namespace
        self._redis = _redis_client(settings.redis_url) if settings.redis_url and settings.outbox != "memory" else None
        self._shared = _producing_broker(self._redis) if self._redis is not None else None
        self._in_process = InProcessWorker(durable_streams)
        self._elsewhere, self._here = self._wakers(settings)

    def _wakers(self, settings: Settings) -> tuple[Waker, Waker]:
        elsewhere: Markers | None = None
        here: Markers | None = None
        if self._durable_streams.outbox.transactional:
            elsewhere = RedisMarkers(self._redis, settings.namespace) if self._redis is not None else None
            here = elsewhere or ProcessMarkers()
        return (
            Waker(self._broker_elsewhere, settings.namespace, markers=elsewhere),
            Waker(lambda: self._in_process.broker, settings.namespace, markers=here),
        )

    def _broker_elsewhere(self) -> dramatiq.Broker:
        broker = self._carrier()
        assert broker is not None
        return broker

    def _carrier(self) -> dramatiq.Broker | None:
        """The broker that carries wake-ups; None for the worker in this process."""
        chosen = self._chosen()
        if self._durable_streams.settings.outbox == "memory":
            return chosen if isinstance(chosen, StubBroker) else None
        return chosen if chosen is not None else self._shared

    def wake(self, streams: Sequence[str]) -> int:
        """Queue a wake-up for *streams*; the number of messages. Never raises; see `Waker.wake`."""
        return (self._here if self._carrier() is None else self._elsewhere).wake(streams)

    def commands(self, streams: Sequence[str]) -> list[Command]:
        """What queues a wake-up of *streams* in the Redis at `redis_url`; nothing if some other broker carries them."""
        shared = self._shared
        if shared is None or self._carrier() is not shared:
            return []
        try:
            return commands_of(shared, lambda broker: enqueue(broker, self._namespace, streams))
        except (AttributeError, KeyError, TypeError, redis.RedisError):  # Dramatiq has changed, or asked Redis first
            return []

    def taken(self, streams: Sequence[str]) -> None:
        """The wake-up of *streams* has reached a worker. Never raises."""
        (self._here if self._carrier() is None else self._elsewhere).taken(streams)

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is pending but parked streams; False when *timeout* seconds were not enough."""
        if self._carrier() is None:
            return self._in_process.drain(timeout)
        deadline = time.monotonic() + timeout
        while any(pending.parked is None for pending in self._durable_streams.outbox.pending()):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Stop the worker in this process and close our connections. A later wake-up starts them anew."""
        self._in_process.close()
        if self._redis is not None:
            self._redis.close()


def _redis_client(url: str) -> redis.Redis:
    # A commit waits for this: better a wake-up left to the sweeper than redis-py's ten retries.
    return redis.Redis.from_url(url, socket_connect_timeout=0.5, socket_timeout=1.0, retry=Retry(NoBackoff(), 0))


def _producing_broker(client: redis.Redis) -> RedisBroker:
    return RedisBroker(client=client, middleware=[])  # type: ignore[no-untyped-call]
