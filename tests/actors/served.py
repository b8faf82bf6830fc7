"""What the Dramatiq side asks of a `DurableStreams`, with a relay that only writes down what it was told."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import dramatiq

from broadcastable.actors import Wakeups, wakeups_for
from broadcastable.events import Batch
from broadcastable.outbox import Outbox
from broadcastable.outbox.memory import MemoryOutbox
from broadcastable.settings import Settings


class RecordingRelay:
    """Empties a stream as the relay does, to nowhere; first calls `before` with it, in the worker's thread."""

    def __init__(self, outbox: Outbox, before: Callable[[str], None]) -> None:
        self._outbox = outbox
        self._before = before
        self._lock = threading.Lock()
        self.delivered: list[str] = []
        self.events: Counter[str] = Counter()

    def prepare(self) -> None:
        pass

    def deliver(self, stream: str, *, give_way: Callable[[], bool] = lambda: False) -> None:
        self._before(stream)
        lease = None
        while True:
            frame = self._outbox.claim(stream, lease_for=5.0, lease=lease)
            if frame is None:
                if self._outbox.finish(stream, lease=lease):
                    continue
                break
            lease = frame.lease
            self._outbox.ack(frame, offset=None)
            with self._lock:
                self.events[stream] += len(frame.events)
            if give_way():
                break
        with self._lock:
            self.delivered.append(stream)


class Served:
    """A `Delivering`: real wake-ups and a real outbox."""

    def __init__(
        self,
        *,
        before: Callable[[str], None] = lambda stream: None,
        broker: dramatiq.Broker | None = None,
        outbox: Outbox | None = None,
        **settings: object,
    ) -> None:
        self.settings = Settings().replace(**settings)
        self.outbox = outbox if outbox is not None else MemoryOutbox.from_settings(self.settings)
        self.relay = RecordingRelay(self.outbox, before)
        self.wakeups: Wakeups = wakeups_for(self, broker)

    def use_broker(self, broker: dramatiq.Broker) -> None:
        self.wakeups = wakeups_for(self, broker)

    def put(self, *streams: str) -> list[str]:
        """One event for each of *streams*, without a wake-up."""
        return self.outbox.put([Batch(stream=stream, events=(b"{}",), txid="tx") for stream in streams])

    def commit(self, *streams: str) -> None:
        """One event for each of *streams*, and the wake-up."""
        self.wakeups.wake(self.put(*streams))

    def delivered(self) -> Sequence[str]:
        return list(self.relay.delivered)
