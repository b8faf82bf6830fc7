"""From a committed transaction to the outbox, without ever raising into it or making it wait.

`Handoff.submit` puts batches into the outbox at once where that is safe and cheap. Under an event loop, or while the
store does not answer, a daemon thread does it: a bounded buffer keeps the order, and a failing store is asked again
once an interval, so that a commit is slowed by at most one short connect timeout in that interval.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from .counters import counters
from .errors import OutboxFull
from .events import Batch
from .outbox import Outbox

log = logging.getLogger(__name__)

RETRY_INTERVAL = 0.5
"""Seconds between two attempts to reach a store that failed."""

SAY_INTERVAL = 5.0
"""Seconds between two lines in the log about dropped batches."""

EXIT_GRACE = 3.0
"""Seconds that interpreter exit waits for what is still in the buffer."""


class Handoff:
    """One for each outbox. Thread safe; a forked child begins with an empty buffer of its own.

    Args:
        wake: Told which streams have something to deliver; what it raises is logged.
        max_bytes: What the buffer may hold; batches beyond it are dropped, logged and counted.
        blocking: Whether `put` does network I/O, so that an event loop must not call it.
    """

    def __init__(
        self, outbox: Outbox, wake: Callable[[Sequence[str]], object], *, max_bytes: int, blocking: bool
    ) -> None:
        self._outbox = outbox
        self._wake = wake
        self._max_bytes = max_bytes
        self._blocking = blocking
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._buffer: deque[tuple[Batch, ...]] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._sender: threading.Thread | None = None
        self._retry_at = 0.0
        self._sending = False
        self._say_dropped_at = 0.0

    def submit(self, batches: Sequence[Batch]) -> None:
        """Take *batches* of a committed transaction, in order. Never raises and never blocks an event loop."""
        if self._pid != os.getpid():
            self._reset()
        if not batches:
            return
        with self._changed:
            behind = bool(self._buffer) or self._sending or time.monotonic() < self._retry_at
        if behind or (self._blocking and _on_event_loop()):
            self._enqueue(tuple(batches))
            return
        try:
            self._deliver(tuple(batches))
        except OutboxFull as error:
            self._dropped(batches, error)
        except Exception as error:  # any store, any driver: the row is stored, so the commit must not fail
            self._failed(error)
            self._enqueue(tuple(batches))

    def _deliver(self, batches: tuple[Batch, ...]) -> None:
        if self._outbox.transactional:
            streams = self._outbox.staged(list(dict.fromkeys(batch.stream for batch in batches)))
        else:
            streams = self._outbox.put(batches)
        if streams:
            try:
                self._wake(streams)
            except Exception as error:  # a lost wake-up costs a second: the sweeper finds the streams
                log.warning("%d streams could not be woken (%s); the sweeper will find them", len(streams), error)

    def _dropped(self, batches: Sequence[Batch], why: object) -> None:
        counters.increment("batches_dropped", len(batches))
        if time.monotonic() >= self._say_dropped_at:
            # A flood of losses is one line an interval in the log; the count has them all.
            self._say_dropped_at = time.monotonic() + SAY_INTERVAL
            log.error("%d batches dropped, the first for stream %s: %s", len(batches), batches[0].stream, why)

    def _failed(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + RETRY_INTERVAL
        log.error(
            "The outbox cannot be reached (%s: %s). Up to %d bytes are kept here and sent when it is back",
            type(error).__name__,
            error,
            self._max_bytes,
        )

    def _enqueue(self, batches: tuple[Batch, ...]) -> None:
        size = sum(batch.size for batch in batches)
        with self._changed:
            if self._bytes + size > self._max_bytes:
                self._dropped(batches, f"the local buffer of {self._max_bytes} bytes is full")
                return
            self._buffer.append(batches)
            self._bytes += size
            if self._sender is None:
                self._sender = threading.Thread(target=self._send_all, name="broadcastable-handoff", daemon=True)
                self._sender.start()
                atexit.register(self.flush, EXIT_GRACE)
            self._changed.notify_all()

    def _send_all(self) -> None:
        while True:
            with self._changed:
                while not self._buffer:
                    self._changed.wait()
                batches = tuple(batch for each in self._buffer for batch in each)
                taken = len(self._buffer)
                self._sending = True
            try:
                self._deliver(batches)
            except Exception as error:
                self._failed(error)
                time.sleep(RETRY_INTERVAL)
                continue
            finally:
                with self._changed:
                    self._sending = False
            with self._changed:
                for _ in range(taken):
                    self._bytes -= sum(batch.size for batch in self._buffer.popleft())
                self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until everything submitted so far is in the outbox; False when *timeout* seconds were not enough."""
        if self._pid != os.getpid():
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._buffer, timeout)

    @property
    def buffered(self) -> int:
        """Batches that wait in this process."""
        return sum(map(len, self._buffer))


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
