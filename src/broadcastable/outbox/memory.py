"""The outbox in the process: nothing to set up, and what is undelivered dies with the process.

Bounded by bytes: when a call does not fit, `OutboxFull` is raised and nothing of it is stored. Order and exactness are
those of the other stores as long as the process lives.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

from broadcastable.errors import OutboxFull, UsageError
from broadcastable.events import Batch
from broadcastable.settings import Settings

from . import Advanced, Frame, FrameId, PendingStream, Rate, steps
from .framing import Limits, events_that_fit, new_lease, take
from .rates import Recent

BATCH_OVERHEAD = 700
EVENT_OVERHEAD = 64
"""Bytes that CPython takes for a batch and for each event beside their contents, so that the bound is an honest one."""

IDS_KEPT = 100_000
"""Ids of the latest batches that are remembered, so that a repeated put is applied once."""

IDLE_STREAMS_KEPT = 10_000
"""Streams with nothing to deliver whose epoch and number are kept. One forgotten begins again under a higher epoch."""


@dataclass(slots=True)
class _Stream:
    epoch: int
    seq: int = 0
    queue: deque[Batch] = field(default_factory=deque)
    put_at: deque[float] = field(default_factory=deque)
    skip: int = 0
    """Events at the head of the queue's first batch that are acked."""
    count: int = 0
    """Events of the frozen frame; 0 when none is."""
    anchor: str | None = None
    lease: str | None = None
    leased_until: float = 0.0
    not_before: float = 0.0
    parked: str | None = None
    woken_at: float | None = None
    """When a wake-up was asked for or a worker last claimed; None when no worker knows of this stream."""

    @property
    def events(self) -> int:
        return sum(len(batch.events) for batch in self.queue) - self.skip

    def is_leased(self, now: float, lease: str | None = None) -> bool:
        return self.lease is not None and self.lease != lease and now < self.leased_until

    def is_claimable(self, now: float, lease: str | None = None) -> bool:
        return bool(self.queue) and self.parked is None and now >= self.not_before and not self.is_leased(now, lease)


class MemoryOutbox:
    """An `Outbox` in this process. Thread safe; no I/O; one lock, held for microseconds.

    A forked child begins with an empty outbox and a producer id of its own: what waits is delivered by the parent.

    Args:
        max_bytes: What the undelivered batches may take, overhead included (`BATCH_OVERHEAD`, `EVENT_OVERHEAD`).
        max_frame_bytes: See `Settings.max_frame_bytes`.
        max_frame_events: See `Settings.max_frame_events`.
        producer_id: Never the same in two processes that write to the same streams; random when None.
        clock: Unix time in seconds. It must not go backwards; the default is wall time at start plus monotonic time.
    """

    transactional = False
    reserves = False

    def __init__(
        self,
        *,
        max_bytes: int,
        max_frame_bytes: int,
        max_frame_events: int,
        producer_id: str | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._limits = Limits(max_frame_bytes, max_frame_events)
        self._producer_id = producer_id or f"memory-{uuid.uuid4().hex}"
        self._clock = clock or _steady_clock()
        self._empty()
        if hasattr(os, "register_at_fork"):
            begin_again = weakref.WeakMethod(self._begin_again_after_fork)
            os.register_at_fork(after_in_child=lambda: (method := begin_again()) and method())

    @classmethod
    def from_settings(cls, settings: Settings) -> MemoryOutbox:
        """An outbox as *settings* say; its producer id begins with their namespace."""
        return cls(
            max_bytes=settings.memory_outbox_bytes,
            max_frame_bytes=settings.max_frame_bytes,
            max_frame_events=settings.max_frame_events,
            producer_id=f"{quote(settings.namespace)}-memory-{uuid.uuid4().hex}",
        )

    def _empty(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[str, _Stream] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._ids: OrderedDict[str, None] = OrderedDict()  # a dict is slow to find the oldest of many
        self._bytes = 0
        self._last_epoch = 0
        self._recent = Recent()

    def _begin_again_after_fork(self) -> None:
        self._producer_id = f"{self._producer_id}-{uuid.uuid4().hex[:12]}"
        self._empty()

    def put(self, batches: Sequence[Batch]) -> list[str]:
        """See `Outbox.put`. A parked or delayed stream needs no wake-up."""
        with self._lock:
            now = self._clock()
            fresh = {batch.id: batch for batch in batches if batch.id not in self._ids}
            size = sum(map(_footprint, fresh.values()))
            if self._bytes + size > self._max_bytes:
                raise OutboxFull(
                    f"The memory outbox holds {self._bytes} of {self._max_bytes} bytes and cannot take {size} more. "
                    "Is the stream server reachable? Raise memory_outbox_bytes, or use the redis or database outbox"
                )
            self._bytes += size
            wanting: list[str] = []
            for batch in fresh.values():
                self._ids[batch.id] = None
                state = self._streams.get(batch.stream)
                if state is None:
                    state = self._streams[batch.stream] = _Stream(self._new_epoch(now))
                self._idle.pop(batch.stream, None)
                state.queue.append(batch)
                state.put_at.append(now)
                if state.woken_at is None and state.parked is None and now >= state.not_before:
                    state.woken_at = now
                    wanting.append(batch.stream)
            while len(self._ids) > IDS_KEPT:
                self._ids.popitem(last=False)
            return wanting

    def reserve(self, turn: str, streams: Collection[str]) -> None:
        """This store has one process, whose hand-off keeps the order by itself."""

    def withdraw(self, turn: str, streams: Collection[str]) -> list[str]:
        """Nothing was reserved."""
        return []

    def stage(self, connection: Any, batches: Sequence[Batch]) -> None:
        """Not for this store: it knows no transactions. Put the batches after the commit."""
        raise UsageError('The memory outbox takes batches after the commit: call put(), or choose outbox="database"')

    def staged(self, streams: Sequence[str]) -> list[str]:
        """Nothing was staged."""
        return []

    def claim(self, stream: str, *, lease_for: float, lease: str | None = None) -> Frame | None:
        """See `Outbox.claim`."""
        with self._lock:
            now = self._clock()
            state = self._streams.get(stream)
            if state is None or not state.is_claimable(now, lease):
                return None
            begun = state.count > 0
            if not begun:
                sizes = (map(len, batch.events) for batch in state.queue)
                state.count = events_that_fit(sizes, state.skip, self._limits)
            given = lease if lease is not None and state.lease == lease else new_lease()
            state.lease = given
            state.leased_until = now + lease_for
            state.woken_at = now
            return self._frame(stream, state, begun=begun, lease=given)

    def anchor(self, frame: Frame, offset: str) -> Frame:
        """See `Outbox.anchor`."""
        with self._lock:
            state = self._current(frame)
            if state is None or state.anchor != frame.anchor:
                return self._frozen(frame)
            state.anchor = offset
            return self._frame(frame.stream, state, begun=frame.begun, lease=frame.lease)

    def ack(self, frame: Frame, *, offset: str | None, events: int | None = None) -> bool:
        """See `Outbox.ack`."""
        with self._lock:
            state = self._current(frame)
            if state is None:
                return False
            acked = min(state.count, len(frame.events) if events is None else events)
            self._recent.add(self._clock(), acked)
            state.skip += acked
            while state.queue and state.skip >= len(state.queue[0].events):
                batch = state.queue.popleft()
                state.put_at.popleft()
                state.skip -= len(batch.events)
                self._bytes -= _footprint(batch)
            state.count = 0
            state.seq += 1
            state.parked = None
            if offset is not None:
                state.anchor = offset
            self._retire(frame.stream, state)
            return True

    def advance(self, frame: Frame, *, offset: str | None, lease_for: float) -> Advanced:
        """See `Outbox.advance`."""
        return steps.advance(self, frame, offset=offset, lease_for=lease_for)

    def renew(self, frame: Frame, *, above: int) -> Frame:
        """See `Outbox.renew`."""
        with self._lock:
            state = self._current(frame)
            if state is None:
                return self._frozen(frame)
            state.epoch = self._new_epoch(self._clock(), above=max(above, state.epoch))
            state.seq = 0
            return self._frame(frame.stream, state, begun=frame.begun, lease=frame.lease)

    def shrink(self, frame: Frame, *, events: int) -> Frame:
        """See `Outbox.shrink`."""
        with self._lock:
            state = self._current(frame)
            if state is None:
                return self._frozen(frame)
            state.count = max(1, min(state.count, events))
            return self._frame(frame.stream, state, begun=frame.begun, lease=frame.lease)

    def release(self, frame: Frame, *, delay: float) -> None:
        """See `Outbox.release`."""
        with self._lock:
            state = self._streams.get(frame.stream)
            if state is not None and state.lease == frame.lease:
                state.lease = state.woken_at = None
                state.not_before = self._clock() + delay if delay > 0 else 0.0

    def finish(self, stream: str, *, lease: str | None) -> bool:
        """See `Outbox.finish`."""
        with self._lock:
            now = self._clock()
            state = self._streams.get(stream)
            if state is None or state.is_leased(now, lease):
                return False
            state.lease = None
            if state.is_claimable(now):
                return True
            state.woken_at = None
            self._retire(stream, state)
            return False

    def park(self, frame: Frame, error: str) -> None:
        """See `Outbox.park`."""
        with self._lock:
            state = self._current(frame)
            if state is not None:
                state.parked = error
                state.lease = state.woken_at = None

    def retry(self, stream: str) -> bool:
        """See `Outbox.retry`."""
        with self._lock:
            state = self._streams.get(stream)
            if state is None:
                return False
            found = bool(state.queue) or state.parked is not None
            state.parked = None
            state.not_before = 0.0
            return found

    def drop(self, stream: str) -> int:
        """See `Outbox.drop`."""
        with self._lock:
            state = self._streams.get(stream)
            if state is None:
                return 0
            self._bytes -= sum(map(_footprint, state.queue))
            # Above its own epoch, which a server may have raised far above the clock.
            empty = _Stream(self._new_epoch(self._clock(), above=state.epoch))
            self._streams[stream] = empty
            self._retire(stream, empty)
            return state.events

    def due(self, *, older_than: float = 1.0, limit: int = 1_000) -> list[str]:
        """See `Outbox.due`."""
        with self._lock:
            now = self._clock()
            streams = [
                (state.woken_at or 0.0, state.put_at[0], name)
                for name, state in self._streams.items()
                if state.is_claimable(now)
                and now - state.put_at[0] >= older_than
                and (state.woken_at is None or now - state.woken_at >= older_than)
            ]
            # Never woken first, so that no stream waits for ever behind others that are woken in vain.
            due = [name for _, _, name in sorted(streams)[:limit]]
            for name in due:
                self._streams[name].woken_at = now
            return due

    def pending(self, stream: str | None = None) -> list[PendingStream]:
        """See `Outbox.pending`."""
        with self._lock:
            names = list(self._streams) if stream is None else [stream] if stream in self._streams else []
            pending = [
                PendingStream(name, len(state.queue), state.events, state.queue[0].created_at, state.parked)
                for name in names
                if (state := self._streams[name]).queue
            ]
        return sorted(pending, key=lambda each: each.oldest_at or 0)

    def rate(self) -> Rate:
        """See `Outbox.rate`. Up to the last whole second."""
        with self._lock:
            return self._recent.rate(self._clock())

    def close(self) -> None:
        """Nothing to close; what waits goes on waiting."""

    def _current(self, frame: Frame) -> _Stream | None:
        state = self._streams.get(frame.stream)
        if state is None or not state.count or (state.epoch, state.seq) != (frame.id.epoch, frame.id.seq):
            return None
        return state

    def _frozen(self, frame: Frame) -> Frame:
        """What is frozen now, for a worker whose *frame* is not; it may have been sent by another."""
        state = self._streams.get(frame.stream)
        if state is None or not state.count:
            return replace(frame, begun=True)
        return self._frame(frame.stream, state, begun=True, lease=frame.lease)

    def _frame(self, stream: str, state: _Stream, *, begun: bool, lease: str) -> Frame:
        events, marks = take(state.queue, state.skip, state.count)
        frame_id = FrameId(self._producer_id, state.epoch, state.seq)
        return Frame(stream, frame_id, events, marks, state.anchor, begun, lease)

    def _new_epoch(self, now: float, *, above: int = 0) -> int:
        # Higher than any that this outbox gave out: a stream forgotten and met again in the same millisecond would
        # otherwise repeat its numbers, and the server would take its events for old ones.
        self._last_epoch = max(int(now * 1000), self._last_epoch + 1)
        return max(self._last_epoch, above + 1)

    def _retire(self, stream: str, state: _Stream) -> None:
        if state.queue:
            return
        self._idle[stream] = None
        self._idle.move_to_end(stream)
        while len(self._idle) > IDLE_STREAMS_KEPT:
            del self._streams[self._idle.popitem(last=False)[0]]


def _footprint(batch: Batch) -> int:
    return batch.size + BATCH_OVERHEAD + EVENT_OVERHEAD * len(batch.events)


def _steady_clock() -> Callable[[], float]:
    offset = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset
