"""Finding the streams whose wake-up was lost, and delivering them: one sweep a second in every worker process.

The sweeper delivers by itself instead of queueing new wake-ups. So nothing piles up in the queue while the stream
server is away, and events go out while the broker is down.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from . import jitter
from .outbox import Outbox

log = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two sweeps, and the age from which a batch counts as forgotten."""

BATCH = 64
"""Streams taken in one sweep. More are taken as soon as these are done: the other processes have their share."""

THREADS = 4
"""A stream whose server does not answer holds one of them for some seconds; the others go on."""

_LONGEST_PAUSE = 30.0


class Sweeper:
    """A thread that looks for due streams, and others that deliver them and end when there are none left.

    Args:
        outbox: Where to look.
        deliver: Delivers one stream, or returns False when that is vain now. What it raises is logged.
        interval: Seconds between two sweeps, give or take a fifth so that processes do not march in step.
        batch: Most streams taken in one sweep.
        threads: Most streams delivered at the same time.
    """

    def __init__(
        self,
        outbox: Outbox,
        deliver: Callable[[str], object],
        *,
        interval: float = INTERVAL,
        batch: int = BATCH,
        threads: int = THREADS,
    ) -> None:
        self._outbox = outbox
        self._deliver = deliver
        self._interval = interval
        self._batch = batch
        self._most_threads = threads
        self._changed = threading.Condition()
        self._due: deque[str] = deque()
        self._vain = 0
        self._stopping = False
        self._sweeping = threading.Thread(target=self._sweep_until_stopped, name="broadcastable-sweeper", daemon=True)
        self._delivering: dict[threading.Thread, str | None] = {}

    def start(self) -> None:
        """Start sweeping. A sweeper is started once."""
        self._sweeping.start()

    def stop(self) -> None:
        """Ask the threads to end after the stream they are at. Does not wait."""
        with self._changed:
            self._stopping = True
            self._due.clear()
            self._changed.notify_all()

    def join(self, timeout: float) -> bool:
        """After `stop`: wait up to *timeout* seconds in all; whether all threads have ended."""
        deadline = time.monotonic() + timeout
        with self._changed:
            threads = [self._sweeping, *self._delivering]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _sweep_until_stopped(self) -> None:
        failures = 0
        pause = self._interval * jitter.between(0.2, 1.2)
        while self._paused(pause):
            try:
                streams = self._outbox.due(older_than=self._interval, limit=self._batch)
                self._take(streams)
            except Exception as error:  # the store's own errors, of any driver; the next sweep may find it well
                failures += 1
                pause = min(self._interval * 2 ** min(failures, 10), _LONGEST_PAUSE) * jitter.between(0.8, 1.2)
                log.warning(
                    "The outbox could not be swept (%s: %s); next try in %.0f s", type(error).__name__, error, pause
                )
                continue
            failures = 0
            pause = 0.0 if len(streams) == self._batch else self._interval * jitter.between(0.8, 1.2)

    def _paused(self, seconds: float) -> bool:
        """Wait *seconds*, and on until the streams of the last sweep are taken; False when it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, seconds)
            self._changed.wait_for(lambda: self._stopping or not self._due)
            if self._vain > self._batch // 2:
                # All that is found next would be as vain, until the stream server answers.
                self._changed.wait_for(lambda: self._stopping, self._interval)
            self._vain = 0
            return not self._stopping

    def _take(self, streams: list[str]) -> None:
        with self._changed:
            if self._stopping:
                return
            # One whose lease ran out while a thread of ours is still at it would only take a second thread.
            fresh = [stream for stream in streams if stream not in self._delivering.values()]
            self._due.extend(fresh)
            for _ in range(min(len(fresh), self._most_threads - len(self._delivering))):
                thread = threading.Thread(target=self._deliver_due, name="broadcastable-sweep", daemon=True)
                thread.start()  # it waits for the lock
                self._delivering[thread] = None

    def _deliver_due(self) -> None:
        thread = threading.current_thread()
        while True:
            with self._changed:
                if not self._due:
                    del self._delivering[thread]
                    return
                stream = self._delivering[thread] = self._due.popleft()
                self._changed.notify_all()
            try:
                if self._deliver(stream) is False:
                    with self._changed:
                        self._vain += 1
            except Exception:  # the store's own errors again
                log.warning("Stream %s could not be delivered; a later sweep finds it again", stream, exc_info=True)
