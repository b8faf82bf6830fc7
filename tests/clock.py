"""A clock of the test's own, so that a lease or a delay passes when the test says so."""

from __future__ import annotations


class Clock:
    """Unix time that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now
