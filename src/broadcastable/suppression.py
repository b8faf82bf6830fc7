"""Which models broadcast nothing for now: per context (thread or task), nested, and for subclasses too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_suppressed: ContextVar[tuple[type, ...]] = ContextVar("broadcastable_suppressed", default=())


@contextmanager
def suppressing_streams(model: type = object) -> Iterator[None]:
    """Broadcast nothing for *model* and its subclasses in this block; for all models when none is given.

    It counts when a change is captured, that is when its session flushes, and when a verb of a record is called: flush
    inside the block. It nests, ends with an exception too, and other threads and tasks do not notice.
    """
    token = _suppressed.set((*_suppressed.get(), model))
    try:
        yield
    finally:
        _suppressed.reset(token)


def is_suppressed(model: type) -> bool:
    """Whether *model* broadcasts nothing here and now."""
    suppressed = _suppressed.get()
    return bool(suppressed) and issubclass(model, suppressed)
