"""Which models broadcast nothing for now: per context (thread or task), nested, and for subclasses too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from . import unsent

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
    """Whether *model* broadcasts nothing here and now. To be asked when something would be: `unsent` is told if not."""
    suppressed = _suppressed.get()
    if not suppressed or not issubclass(model, suppressed):
        return False
    if unsent.listeners:
        unsent.note(unsent.Reason.SUPPRESSED, model=model.__name__)
    return True
