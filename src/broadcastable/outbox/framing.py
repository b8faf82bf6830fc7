"""Where a frame ends. Pure, and the one place that knows: the stores differ in where they keep the batches only.

A queue is read from its head, whose first `skip` events are already acked (a batch too large for one frame).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace

from broadcastable.events import Batch

from . import BatchMark, Frame


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest frame: `max_bytes` of its body as a JSON array, brackets and commas included, and `max_events`."""

    max_bytes: int
    max_events: int


def events_that_fit(sizes: Iterable[Iterable[int]], skip: int, limits: Limits) -> int:
    """How many events the next frame takes, the first *skip* of the first batch left out; 0 only when there are none.

    Whole batches only. What is left of the first one is taken in part when it alone is too large: at least one event,
    and then nothing of the next batch.

    Args:
        sizes: For each batch from the head of the queue, the bytes of its events. Read no further than needed.
    """
    events, size = 0, 1
    for number, batch in enumerate(sizes):
        before = events
        for index, event in enumerate(batch):
            if number == 0 and index < skip:
                continue
            if events and (events == limits.max_events or size + event + 1 > limits.max_bytes):
                return before or events
            events += 1
            size += event + 1
    return events


def take(batches: Iterable[Batch], skip: int, count: int) -> tuple[tuple[bytes, ...], tuple[BatchMark, ...]]:
    """The first *count* events after *skip*, and the marks of the batches they come from."""
    events: list[bytes] = []
    marks: list[BatchMark] = []
    for batch in batches:
        if len(events) == count:
            break
        taken = batch.events[skip : skip + count - len(events)]
        skip = 0
        events += taken
        marks.append(BatchMark(batch.id, batch.txid, len(taken), batch.created_at, batch.trace))
    return tuple(events), tuple(marks)


def first_events(frame: Frame, count: int) -> Frame:
    """*frame* with its first *count* events only."""
    marks: list[BatchMark] = []
    left = count
    for mark in frame.batches:
        if left == 0:
            break
        marks.append(replace(mark, events=min(mark.events, left)))
        left -= marks[-1].events
    return replace(frame, events=frame.events[:count], batches=tuple(marks))


def new_lease() -> str:
    """A name that no other claim has."""
    return secrets.token_hex(8)


def parts_of(sizes: Iterable[int], limits: Limits) -> list[int]:
    """Where to cut a batch whose events have these *sizes* into parts that fit a frame: 0, ..., number of events."""
    bounds, events, size = [0], 0, 1
    number = 0
    for number, event in enumerate(sizes, 1):
        if events and (events == limits.max_events or size + event + 1 > limits.max_bytes):
            bounds.append(number - 1)
            events, size = 0, 1
        events += 1
        size += event + 1
    return [*bounds, number]
