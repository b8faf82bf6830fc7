"""Counts of what happened in this process since it started, for `status`, metrics and tests. Thread safe."""

from __future__ import annotations

import threading
from collections import Counter


class Counters:
    """Named counts that only grow; a name exists once it has been counted."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def increment(self, name: str, by: int = 1) -> None:
        """Add *by* to the count of *name*."""
        with self._lock:
            self._counts[name] += by

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def snapshot(self) -> dict[str, int]:
        """All counts as they are now."""
        with self._lock:
            return dict(self._counts)


counters = Counters()
"""The counts of this process."""
