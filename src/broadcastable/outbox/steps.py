"""`Outbox.advance` in its single steps, for the stores whose steps are cheap."""

from __future__ import annotations

from . import Advanced, Frame, Outbox


def claim_or_finish(outbox: Outbox, stream: str, *, lease_for: float, lease: str | None) -> Frame | None:
    """The next frame; None when there was nothing to send, and the stream is finished."""
    while True:
        frame = outbox.claim(stream, lease_for=lease_for, lease=lease)
        if frame is not None or not outbox.finish(stream, lease=lease):
            return frame


def advance(outbox: Outbox, frame: Frame, *, offset: str | None, lease_for: float) -> Advanced:
    """See `Outbox.advance`."""
    acked = outbox.ack(frame, offset=offset)
    return Advanced(acked, claim_or_finish(outbox, frame.stream, lease_for=lease_for, lease=frame.lease))
