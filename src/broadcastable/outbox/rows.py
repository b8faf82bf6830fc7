"""The rows of the database outbox as values: a batch as a row and back, and the state of a stream."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from broadcastable.events import Batch

from . import Frame


class About(msgspec.Struct, array_like=True):
    """What the column `about` holds, as MessagePack; the lengths are those of the events, 4 bytes each, big-endian."""

    id: str
    txid: str
    trace: str | None
    packed_lengths: bytes


@dataclass(slots=True)
class Stored:
    """A row as it is read: `payload` is None when it is too large to be read whole."""

    id: int
    created_at: int
    about: About
    lengths: tuple[int, ...]
    payload: bytes | None


@dataclass(frozen=True, slots=True)
class StreamState:
    """A stream's own row (`schema.tables` says what its columns mean), and the database's time `now` in ms.

    In the order of the columns, so that a row as it is read makes one.
    """

    stream: str
    epoch: int
    seq: int
    frame: int
    count: int
    head_id: int | None
    skip: int
    rest_id: int | None
    rest: int
    anchor: str | None
    lease: str | None
    leased_until: int
    not_before: int
    parked: str | None
    woken_at: int | None
    now: int

    def is_leased(self, lease: str | None) -> bool:
        """Whether another claim than *lease* holds the stream."""
        return self.lease is not None and self.lease != lease and self.leased_until > self.now

    def is_free(self, lease: str | None) -> bool:
        """Whether *lease*, or a new claim, may have a frame now, if there is one."""
        return self.parked is None and self.not_before <= self.now and not self.is_leased(lease)

    def is_current(self, frame: Frame) -> bool:
        """Whether *frame* is the one that is frozen."""
        return self.count > 0 and (self.epoch, self.seq) == (frame.id.epoch, frame.id.seq)


def row_of(batch: Batch) -> dict[str, Any]:
    """The values of a new row, but for the database's own (`id`, `put_at`, `frame`)."""
    lengths = struct.pack(f">{len(batch.events)}I", *map(len, batch.events))
    return {
        "stream": batch.stream,
        "created_at": batch.created_at,
        "events": len(batch.events),
        "size": batch.size + len(batch.events),
        "about": msgspec.msgpack.encode(About(batch.id, batch.txid, batch.trace, lengths)),
        "payload": b"".join(batch.events),
        "put_id": None,
    }


_read_about = msgspec.msgpack.Decoder(About).decode


def stored(rows: Iterable[Any]) -> list[Stored]:
    """Rows of id, created_at, about and payload, unpacked."""
    unpacked: list[Stored] = []
    for row_id, created_at, packed, payload in rows:
        about = _read_about(packed)
        lengths = struct.unpack(f">{len(about.packed_lengths) // 4}I", about.packed_lengths)
        unpacked.append(Stored(row_id, created_at, about, lengths, None if payload is None else bytes(payload)))
    return unpacked


def put_id_of(batch: Batch) -> str:
    """The batch's id as it fits its column."""
    return batch.id if len(batch.id) <= 32 else blake2b(batch.id.encode(), digest_size=32).hexdigest()


def split(rows: Sequence[tuple[int, int]], skip: int, count: int) -> tuple[list[int], int | None, int]:
    """The first *count* events after *skip* of *rows* (id, events): ids that hold them, and what of the last is left.

    Returns:
        The ids; the last one again when it is not done, else None; how many of its events are done then, else 0.
    """
    taken: list[int] = []
    for row_id, events in rows:
        if count == 0:
            break
        taken.append(row_id)
        if events - skip > count:
            return taken, row_id, skip + count
        count -= events - skip
        skip = 0
    return taken, None, 0
