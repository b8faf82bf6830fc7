"""Counts and durations of what happened in this process since it started, for metrics and tests. Thread safe."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable


class Counters:
    """Named counts that only grow; a name exists once it has been counted.

    `on_count` and `on_duration` are told of every increment and every duration; `metrics` adds itself there.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.on_count: list[Callable[[str, int], None]] = []
        self.on_duration: list[Callable[[str, float], None]] = []

    def increment(self, name: str, by: int = 1) -> None:
        """Add *by* to the count of *name*."""
        with self._lock:
            self._counts[name] += by
        for listener in self.on_count:
            listener(name, by)

    def duration(self, name: str, seconds: float) -> None:
        """Something named *name* took *seconds*. Kept by listeners only."""
        for listener in self.on_duration:
            listener(name, seconds)

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def snapshot(self) -> dict[str, int]:
        """All counts as they are now."""
        with self._lock:
            return dict(self._counts)


counters = Counters()
"""The counts of this process."""
