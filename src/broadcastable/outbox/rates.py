"""How fast an outbox empties: what was acked in the last seconds.

A store that processes share is told by each of them in its sweep (`Outbox.due`), and not at every ack.
"""

from __future__ import annotations

import threading
from collections import deque

from . import Rate

SECONDS = 10
"""A rate is the mean of so many whole seconds, up to the last one."""


class Tally:
    """Frames that this process acked and has not told the store of. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames = self._events = 0

    def add(self, events: int) -> None:
        """One more frame, of *events*."""
        with self._lock:
            self._frames += 1
            self._events += events

    def take(self) -> tuple[int, int]:
        """Frames and events since the last call."""
        with self._lock:
            taken = self._frames, self._events
            self._frames = self._events = 0
            return taken


class Recent:
    """Frames and events of each of the last seconds. Not thread safe."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int, int]] = deque(maxlen=SECONDS + 1)

    def add(self, now: float, events: int) -> None:
        """One frame of *events* at *now*, in seconds and never earlier than in the call before."""
        second, frames = int(now), 1
        if self._seconds and self._seconds[-1][0] == second:
            _, before, events_before = self._seconds.pop()
            frames, events = frames + before, events + events_before
        self._seconds.append((second, frames, events))

    def rate(self, now: float) -> Rate:
        """The mean of the last whole seconds before *now*."""
        within = [each for each in self._seconds if int(now) - SECONDS <= each[0] < int(now)]
        return rate_of(sum(frames for _, frames, _ in within), sum(events for _, _, events in within))


def rate_of(frames: int, events: int) -> Rate:
    """The rate of a store that counted *frames* and *events* in the last `SECONDS`."""
    return Rate(frames / SECONDS, events / SECONDS)
