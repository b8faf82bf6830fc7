"""The outbox: where batches wait, in order, until the stream server has them.

One FIFO of batches for each stream. A claimed frame is *frozen*: whoever claims that stream next, after a crash or
beside a slow worker, is given the same events under the same producer sequence number until the frame is acked. That
alone makes delivery exact; the lease only saves work.

    put ──> [batch batch batch …]  claim ──> Frame(epoch, seq, events) ──POST──> ack
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from broadcastable.events import Batch

__all__ = ["Advanced", "Batch", "BatchMark", "Frame", "FrameId", "Outbox", "PendingStream", "Rate"]


@dataclass(frozen=True, slots=True)
class FrameId:
    """The idempotent producer's name for one append (Durable Streams protocol, 5.2.1).

    Attributes:
        producer_id: Stable for one outbox.
        epoch: Creation time of this stream's outbox state in ms, by the store's own clock; raised when a server knows
            more, and by `Outbox.drop`.
        seq: Number of the frame within the epoch, from 0.
    """

    producer_id: str
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class BatchMark:
    """What a frame remembers of a batch in it: for metrics, traces and the split of a frame that is too large.

    `events` counts those of its events that are in this frame.
    """

    id: str
    txid: str
    events: int
    created_at: int
    trace: str | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One or more batches of a stream, sent as one append.

    Attributes:
        id: The producer headers.
        events: At least one event, as JSON bytes, in order.
        batches: The batches they come from, in order; their event counts add up to `len(events)`.
        anchor: An offset of the stream known from before this frame was first sent, or None when this outbox knows of
            nothing that was sent: `Outbox.anchor` is called before the first send, so None proves that there is nothing
            to look for.
        begun: An earlier claim was given this very frame, so it may have been sent: look before sending.
        lease: Names this claim; `release` by an older claim changes nothing.
    """

    stream: str
    id: FrameId
    events: tuple[bytes, ...]
    batches: tuple[BatchMark, ...]
    anchor: str | None
    begun: bool
    lease: str


@dataclass(frozen=True, slots=True)
class Advanced:
    """What `Outbox.advance` did: whether this call acked the frame, and the next frame of the stream, if any."""

    acked: bool
    following: Frame | None


@dataclass(frozen=True, slots=True)
class PendingStream:
    """A stream with undelivered batches, for `status`, metrics and the drain.

    `oldest_at` is the `created_at` of the first batch in ms; `parked` holds the error that parked the stream, or None.
    """

    stream: str
    batches: int
    events: int
    oldest_at: int | None
    parked: str | None = None


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast batches leave the outbox: appends that were acked, and the events in them, a second."""

    frames_per_second: float
    events_per_second: float


class Outbox(Protocol):
    """A store of batches. Every method may be called from any thread; each is one round trip to its store unless said.

    `transactional` is True when batches are written in the caller's own database transaction (`stage`), and False when
    they are put after its commit (`put`).

    `put`, `stage` and `claim` on different streams never wait for each other. Errors of the store itself (connection
    lost and so on) are raised as they come; the callers decide.
    """

    @property
    def transactional(self) -> bool: ...

    @property
    def reserves(self) -> bool:
        """Whether transactions reserve their place before they commit: where several processes put after the commit."""
        ...

    def reserve(self, turn: str, streams: Collection[str]) -> None:
        """Before the commit, with its locks held: the next place on *streams* for batches that carry *turn*.

        A batch that is put with a later place waits until the earlier ones are taken by `put`, given up by `withdraw`,
        or older than the store's patience. Nothing where not `reserves`.

        Args:
            turn: The writer, a colon, and a text that is greater for each later turn of that writer. A batch whose turn
                has no place, or no more, goes before those of the same writer that are later, or else behind all.
        """
        ...

    def withdraw(self, turn: str, streams: Collection[str]) -> list[str]:
        """Give the place of *turn* on *streams* up; those of them that need a wake-up, as `put` says."""
        ...

    def put(self, batches: Sequence[Batch]) -> list[str]:
        """Append *batches* to their streams' queues, in order; a batch whose id was put before is skipped.

        "Before" reaches back ten minutes (memory: 100,000 batches), which is longer than anyone repeats a put.

        Returns:
            The streams that need a wake-up: those with no wake-up already queued and no worker at work, and neither
            parked nor delayed by `release`.

        Raises:
            OutboxFull: A bounded store has no room; nothing was stored.
        """
        ...

    def stage(self, connection: Any, batches: Sequence[Batch]) -> None:
        """Write *batches* through *connection*, a `sqlalchemy.Connection` inside the caller's transaction.

        One INSERT for each 1,000 batches. Only where `transactional`; called before commit.
        """
        ...

    def staged(self, streams: Sequence[str]) -> list[str]:
        """After the commit of what `stage` wrote: which of *streams* need a wake-up. No I/O on the database."""
        ...

    def claim(self, stream: str, *, lease_for: float, lease: str | None = None) -> Frame | None:
        """The frozen frame of *stream*, freezing one first if there is none; None when there is nothing to send now.

        A frame takes whole batches up to the settings' limits; a first batch too large alone is taken in part, and the
        rest follows in the next frames. None also when another claim's lease still runs, when the stream is parked,
        or when `release` asked for a later time.

        Args:
            lease_for: Seconds for which other claims are refused.
            lease: The lease of a frame that this worker has just acked, to go on with it.
        """
        ...

    def anchor(self, frame: Frame, offset: str) -> Frame:
        """Remember *offset* as known from before *frame*; the frame with its anchor. Before the first send of a stream.

        Conditional on the frame being current and its anchor still being `frame.anchor`, so that of two workers the
        later one does not move the anchor past what the earlier one sent. Otherwise the same as `renew` returns.
        """
        ...

    def ack(self, frame: Frame, *, offset: str | None, events: int | None = None) -> bool:
        """Remove the frame's events (the first *events* of them; all when None) and move on to the next number.

        Conditional on the epoch and number still being current, so a second ack of the same frame changes nothing.
        Never more than what is frozen, so that the ack of a frame from before a `shrink` removes the shrunk one.
        The lease goes on: the same worker claims the next frame. A parked stream is parked no longer.

        Args:
            offset: The stream's offset after the frame, the next frame's anchor; None keeps the old anchor.

        Returns:
            Whether this call was the one that did it.
        """
        ...

    def advance(self, frame: Frame, *, offset: str | None, lease_for: float) -> Advanced:
        """`ack` all of *frame*, `claim` what follows under its lease, and `finish` when nothing does, at once.

        The way of a worker from frame to frame. A store that is far away does it in one step; whatever is done when
        this raises is safe to do again, piece by piece.
        """
        ...

    def renew(self, frame: Frame, *, above: int) -> Frame:
        """The same events under a new epoch, higher than *above*, with number 0; the frame as it is now frozen.

        For a server that knows a newer epoch (403), or lost or advanced its count. `begun` stays as it was in *frame*.
        When the frame is no longer current the current frame is returned, or *frame* itself when nothing is frozen any
        more: with *frame*'s lease, and begun, since another worker has it too.
        """
        ...

    def shrink(self, frame: Frame, *, events: int) -> Frame:
        """Freeze the first *events* of *frame* (1 or more) in its place, under the same number.

        For 413 only, which proves that it was not stored. When the frame is no longer current: as `renew`.
        """
        ...

    def release(self, frame: Frame, *, delay: float) -> None:
        """Give up the lease, if it is still this claim's. No claim for *delay* seconds; the frame stays frozen.

        The queued-wake-up mark goes too: the next `put` after the delay, or the sweeper, wakes the stream again.
        """
        ...

    def finish(self, stream: str, *, lease: str | None) -> bool:
        """Called when `claim` found nothing: drop this worker's lease and the queued-wake-up mark.

        While another claim's lease runs nothing changes: that worker will finish.

        Returns:
            True when there is something to claim after all, because a batch came between: claim again.
        """
        ...

    def park(self, frame: Frame, error: str) -> None:
        """Set the stream aside, if *frame* is current and with it frozen: no claim until `retry` or `drop`."""
        ...

    def retry(self, stream: str) -> bool:
        """Unpark *stream* and forget any delay; False when it is not parked and has nothing pending.

        The caller wakes it; the sweeper would, too.
        """
        ...

    def drop(self, stream: str) -> int:
        """Throw the stream's undelivered batches away, parked or not; the number of events lost.

        What comes later goes out under a new epoch: nobody knows whether the dropped frame's number was used.
        """
        ...

    def due(self, *, older_than: float = 1.0, limit: int = 1_000) -> list[str]:
        """Streams with claimable batches older than *older_than* seconds and no live lease: lost wake-ups.

        A stream whose last wake-up or claim is younger than that is left alone. Each one returned is marked as woken
        now, so that several sweepers do not all wake the same. Not one round trip.

        It also tells the store what this process has acked since the last call, for `rate`.
        """
        ...

    def pending(self, stream: str | None = None) -> list[PendingStream]:
        """The streams that have undelivered batches, oldest first; or just *stream*, if it has any.

        Not one round trip.
        """
        ...

    def rate(self) -> Rate:
        """What all workers acked in the last ten seconds, a second.

        For people, not for accounts: a second or so behind, and without the last second of a worker that was killed.
        """
        ...

    def close(self) -> None:
        """Close connections. The outbox may be used again; it reconnects."""
        ...
