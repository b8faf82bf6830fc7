"""What a worker does with a wake-up: the actor, and the middleware that puts it and the sweeper into a worker.

The events come from the outbox, so a message may be lost, repeated or late, and none ends in a dead-letter queue.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import dramatiq
from dramatiq.middleware.threading import Interrupt

from . import low_latency
from .outbox import Outbox
from .settings import Settings
from .sweeper import Sweeper
from .wakeups import actor_name, enqueue, queue_name

log = logging.getLogger(__name__)

PATIENCE = 0.25
"""Seconds after which a worker thread passes the rest of a message's streams on to another."""

TIME_LIMIT = 600_000
"""Milliseconds that Dramatiq gives one message. Only a stream that never runs dry lasts longer than its patience."""

SHUTDOWN_GRACE = 10.0
"""Seconds that a worker's shutdown waits for the sweeper to finish or release its frames."""


class Relaying(Protocol):
    """What carries one stream's frames to the stream server: `Relay`."""

    def prepare(self) -> None: ...

    def deliver(self, stream: str, *, give_way: Callable[[], bool] = ...) -> object: ...


class TakesWakeups(Protocol):
    """The worker's side of `actors.Wakeups`."""

    def taken(self, streams: Sequence[str]) -> None:
        """The wake-up of *streams* has reached a worker. Called before the first claim."""
        ...


class Delivering(Protocol):
    """What this module asks of a `DurableStreams`."""

    @property
    def settings(self) -> Settings: ...

    @property
    def outbox(self) -> Outbox: ...

    @property
    def relay(self) -> Relaying: ...

    @property
    def wakeups(self) -> TakesWakeups: ...

    def use_broker(self, broker: dramatiq.Broker) -> None:
        """Send wake-ups through *broker* from now on."""
        ...


class DeliveryMiddleware(dramatiq.Middleware):
    """Makes the workers of a broker deliver streams. `declare()` adds it; so may you, in the broker's own list.

    Args:
        durable_streams: None means the default one, looked up when a worker boots.
        low_latency: Whether a RedisBroker's consumers block in Redis instead of polling. True: those of our own
            queue, so that the application's own are consumed as ever. "all": those too.
    """

    def __init__(self, durable_streams: Delivering | None = None, *, low_latency: bool | Literal["all"] = True) -> None:
        self.shutdown_grace = SHUTDOWN_GRACE
        self._served: list[Delivering | None] = [durable_streams]
        self.low_latency = low_latency
        self._sweepers: list[Sweeper] = []
        self._stopping = threading.Event()

    def serve(self, durable_streams: Delivering | None) -> bool:
        """Deliver for *durable_streams* too, from the next boot of a worker on, in place of one of its namespace.

        Returns:
            False when it was served before.
        """
        if any(each is durable_streams for each in self._served):
            return False
        if durable_streams is not None:
            self._served = [
                each
                for each in self._served
                if each is None or each.settings.namespace != durable_streams.settings.namespace
            ]
        self._served.append(durable_streams)
        return True

    def is_stopping(self) -> bool:
        """Whether the worker has been asked to shut down."""
        return self._stopping.is_set()

    def before_worker_boot(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        self._stopping.clear()
        for durable_streams in self._resolved():
            queue = queue_name(durable_streams.settings.namespace)
            declare_actor(broker, durable_streams, self.is_stopping)
            if self.low_latency:
                low_latency.install(broker, None if self.low_latency == "all" else {queue}, expendable={queue})
            if worker.consumer_whitelist and queue not in worker.consumer_whitelist:
                log.warning(
                    "This worker does not take the queue %r, so it delivers no streams. "
                    "Some worker must: dramatiq --queues ... %s",
                    queue,
                    queue,
                )
                continue
            durable_streams.relay.prepare()
            sweeper = Sweeper(durable_streams.outbox, partial(durable_streams.relay.deliver, give_way=self.is_stopping))
            self._sweepers.append(sweeper)
            sweeper.start()

    def _resolved(self) -> list[Delivering]:
        resolved = [each if each is not None else _current() for each in self._served]
        return list({id(each): each for each in resolved}.values())

    def before_worker_shutdown(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        self._stopping.set()
        low_latency.stop_fetching(broker)
        for sweeper in self._sweepers:
            sweeper.stop()

    def after_worker_shutdown(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        while self._sweepers:
            if not self._sweepers.pop().join(self.shutdown_grace) and self.shutdown_grace > 0:
                log.warning(
                    "A sweeper was still at work %.0f s after the shutdown. What it had claimed is delivered "
                    "by another worker once its lease has run out",
                    self.shutdown_grace,
                )


def _current() -> Delivering:
    from .durable_streams import current  # stands on this module

    return current()


def declare_actor(broker: dramatiq.Broker, durable_streams: Delivering, is_stopping: Callable[[], bool]) -> None:
    """Declare the actor of *durable_streams* on *broker*, in place of one of its namespace."""
    name = actor_name(durable_streams.settings.namespace)
    broker.actors.pop(name, None)  # Dramatiq refuses a second actor of a name

    def deliver(streams: list[str]) -> None:
        deliver_streams(streams, durable_streams, broker, is_stopping)

    # The relay retries for itself: Dramatiq's Retries would reorder wake-ups and end in the dead-letter queue. Options
    # of a middleware that the application left out would be refused.
    options: dict[str, Any] = {"max_retries": 0, "time_limit": TIME_LIMIT}
    dramatiq.actor(
        actor_name=name,
        queue_name=queue_name(durable_streams.settings.namespace),
        broker=broker,
        **{option: value for option, value in options.items() if option in broker.actor_options},
    )(deliver)


def deliver_streams(
    streams: Sequence[str],
    durable_streams: Delivering,
    broker: dramatiq.Broker,
    is_stopping: Callable[[], bool],
    *,
    patience: float = PATIENCE,
) -> None:
    """Deliver *streams* one after the other, until one of them is slow: then another worker thread gets the rest.

    So the last of 256 does not wait for the retries of the first. Raises nothing that would send the message to the
    dead-letter queue: what is not delivered here is found by the sweeper.
    """
    durable_streams.wakeups.taken(streams)
    errand = _Errand(streams, lambda rest: enqueue(broker, durable_streams.settings.namespace, rest))
    timer = _pass_on_after(patience, errand) if len(streams) > 1 else None
    try:
        while (stream := errand.next_stream()) is not None:
            try:
                durable_streams.relay.deliver(stream, give_way=is_stopping)
            except Exception:  # of the store; the relay sees to the stream server's
                log.warning("Stream %s could not be delivered; a sweeper finds it again", stream, exc_info=True)
            if is_stopping():
                errand.pass_on(stream)  # which has more, maybe, than one frame
    except Interrupt as interrupt:
        log.warning("Delivery was interrupted (%s); another worker goes on", type(interrupt).__name__)
        errand.pass_on()
    finally:
        if timer is not None:
            timer.cancel()


def _pass_on_after(seconds: float, errand: _Errand) -> threading.Timer | None:
    timer = threading.Timer(seconds, errand.pass_on)
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError:  # no new threads while the interpreter shuts down (Python 3.12); then one thread does it all
        return None
    return timer


class _Errand:
    """The streams of one message that nobody has begun yet."""

    def __init__(self, streams: Sequence[str], enqueue_rest: Callable[[list[str]], object]) -> None:
        self._left = deque(streams)
        self._enqueue_rest = enqueue_rest
        self._lock = threading.Lock()

    def next_stream(self) -> str | None:
        with self._lock:
            return self._left.popleft() if self._left else None

    def pass_on(self, *begun: str) -> None:
        """Queue *begun* and what is left for whoever is free. If the broker does not take it, it stays here."""
        with self._lock:
            self._left.extendleft(begun)
            if not self._left:
                return
            try:
                self._enqueue_rest(list(self._left))
            except Exception as error:
                log.warning("%d streams could not be passed on to another worker (%s)", len(self._left), error)
            else:
                self._left.clear()
