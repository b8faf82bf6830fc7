"""What was changed or broadcast and not sent, and why: for tests that wonder where their event is.

Nobody listens outside tests, so callers ask `listeners` first and make nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why something is not sent; the value says it, with what to do where something can be done."""

    UNFLUSHED = "not flushed: commit the session"
    OPEN = "its transaction is open: commit the session"
    ROLLED_BACK = "its transaction was rolled back"
    SAVEPOINT_ROLLED_BACK = "its savepoint was rolled back"
    CLOSED = "its session was closed without commit"
    SUPPRESSED = "inside suppressing_streams()"
    UNCHANGED = "the update changed no column"
    BULK = 'changed by a bulk statement: set __stream_bulk__ to "capture"'
    UNWANTED = "when= was false, or its target named no stream"


@dataclass(frozen=True, slots=True)
class Unsent:
    """One event, or one change that made none.

    Attributes:
        model: The name of the changed row's class, where a change was captured.
        stream: The stream it would have gone to, where that was known.
    """

    reason: Reason
    model: str | None = None
    stream: str | None = None

    def described(self, count: int) -> str:
        """*count* of these, in words."""
        what = f"{count} {'change' if self.model else 'event'}{'' if count == 1 else 's'}"
        of = f" of {self.model}" if self.model else ""
        on = f" on {self.stream}" if self.stream else ""
        return f"{what}{of}{on}: {self.reason.value}"


listeners: list[Callable[[Unsent], None]] = []
"""Told of everything that is not sent, from any thread, as soon as it is known."""


def note(reason: Reason, *, model: str | None = None, stream: str | None = None, count: int = 1) -> None:
    """Tell the listeners."""
    for listener in list(listeners):
        for _ in range(count):
            listener(Unsent(reason, model, stream))


@contextmanager
def listening(listener: Callable[[Unsent], None]) -> Iterator[None]:
    """Tell *listener* until the end of the block."""
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)
