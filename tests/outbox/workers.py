"""What the tests of all stores share: batches to put, and the waits that real clocks ask for."""

from __future__ import annotations

import itertools

from broadcastable.events import Batch
from broadcastable.outbox import Frame, Outbox
from broadcastable.outbox.steps import claim_or_finish
from tests.services import wait_until

_numbers = itertools.count()

LONG = 30.0
"""A lease that does not end within a test."""

SHORT = 0.02
"""A lease that has ended by the time one looks again; tests wait for that, they do not assume it."""


def batch(stream: str, *events: str | bytes, txid: str = "tx") -> Batch:
    """A batch of *events*, or of one event that no other batch has."""
    texts = events or (f'{{"n":{next(_numbers)}}}',)
    encoded = tuple(event if isinstance(event, bytes) else event.encode() for event in texts)
    return Batch(stream=stream, events=encoded, txid=txid)


def events_of(*batches: Batch) -> tuple[bytes, ...]:
    return tuple(event for each in batches for event in each.events)


def claim(outbox: Outbox, stream: str, *, lease_for: float = LONG, lease: str | None = None) -> Frame:
    """The frame that a claim gives now."""
    frame = outbox.claim(stream, lease_for=lease_for, lease=lease)
    assert frame is not None
    return frame


def claim_when_free(outbox: Outbox, stream: str, *, lease_for: float = LONG, within: float = 10.0) -> Frame:
    """The frame that a claim gives once an earlier claim's lease, or a delay, is over."""
    frames: list[Frame] = []

    def claimed() -> bool:
        frame = outbox.claim(stream, lease_for=lease_for)
        if frame is not None:
            frames.append(frame)
        return frame is not None

    wait_until(claimed, within=within, what="the end of the lease")
    return frames[0]


def deliver(outbox: Outbox, stream: str) -> list[bytes]:
    """Claim and ack until nothing is left, as a relay does; the events in the order of their sending."""
    sent: list[bytes] = []
    frame = claim_or_finish(outbox, stream, lease_for=LONG, lease=None)
    while frame is not None:
        sent += frame.events
        advanced = outbox.advance(frame, offset=f"after-{frame.id.seq}", lease_for=LONG)
        assert advanced.acked
        frame = advanced.following
    return sent
