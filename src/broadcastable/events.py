"""Change events of the Durable Streams State Protocol, and the batches in which they travel.

The published schema knows insert, update and delete. An upsert is written as an update: every client materialises
an update of an unknown key as a new row (State Protocol, 6).
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

import msgspec

from .errors import UnencodableValue, UsageError
from .tracing import current_trace


class Operation(StrEnum):
    """What happened to a row."""

    INSERT = "insert"
    UPDATE = "update"
    UPSERT = "upsert"
    DELETE = "delete"


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = _Absent()
"""No `old_value` at all, as opposed to one that is null."""

TXID_MARKER_TYPE = "$tx"


def _random_txid() -> str:
    # str(uuid.uuid4()) in a third of its time: each commit makes one.
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def _utc_now() -> datetime:
    return datetime.now(UTC)


_make_txid: Callable[[], str] = _random_txid
_now: Callable[[], datetime] = _utc_now


def new_txid() -> str:
    """A fresh transaction id: a random UUID as text."""
    return _make_txid()


def utc_timestamp() -> str:
    """Now, as RFC 3339 with milliseconds and Z."""
    now = _now()
    if now.tzinfo is not UTC:
        now = now.astimezone(UTC)
    return now.isoformat(timespec="milliseconds")[:-6] + "Z"


@contextmanager
def pinning(*, txid: Callable[[], str] | None = None, clock: Callable[[], datetime] | None = None) -> Iterator[None]:
    """Take new txids and the time of events from *txid* and *clock*, in all threads; see `testing.freeze_txid`."""
    global _make_txid, _now
    previous = _make_txid, _now
    _make_txid, _now = txid or _make_txid, clock or _now
    try:
        yield
    finally:
        _make_txid, _now = previous


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeEvent:
    """One change message (State Protocol, 4.1). `value` and `old_value` are JSON-ready; see `values`."""

    type: str
    key: str
    operation: Operation
    value: Any = None
    old_value: Any = ABSENT
    txid: str | None = None
    timestamp: str | None = None

    def encode(self) -> bytes:
        """The event as JSON.

        Raises:
            UsageError: A type, key or txid that is empty or no text; or a value of None in an insert or update, which
                ends the session of the reference client.
            UnencodableValue: A value that has no JSON form.
        """
        check_text("type", self.type)
        check_text("key", self.key)
        if self.txid is not None:
            check_text("txid", self.txid)
        operation = Operation.UPDATE if self.operation is Operation.UPSERT else self.operation
        if self.value is None and operation is not Operation.DELETE:
            raise UsageError(f"The {operation} of {self.type} {self.key} has no value; only a delete goes without one")
        message: dict[str, Any] = {"type": self.type, "key": self.key}
        if operation is not Operation.DELETE:
            message["value"] = self.value
        if self.old_value is not ABSENT:
            message["old_value"] = self.old_value
        headers: dict[str, str] = {"operation": operation.value}
        if self.txid is not None:
            headers["txid"] = self.txid
        if self.timestamp is not None:
            headers["timestamp"] = self.timestamp
        message["headers"] = headers
        return encode_json(message)


def check_text(name: str, text: object) -> None:
    """Raise `UsageError` unless *text* may be the type, key or txid (*name*) of a change event."""
    if not (isinstance(text, str) and text):
        raise UsageError(f"A change event's {name} is text that is not empty (State Protocol, 5.1); got {text!r}")


def txid_marker(txid: str) -> ChangeEvent:
    """The event of a transaction that changed nothing, so that a client's `awaitTxId` resolves all the same."""
    return ChangeEvent(
        type=TXID_MARKER_TYPE, key=txid, operation=Operation.DELETE, txid=txid, timestamp=utc_timestamp()
    )


def encode_json(value: Any) -> bytes:
    """*value* as JSON bytes.

    Raises:
        UnencodableValue: Something in it has no JSON form.
    """
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, ArithmeticError, RecursionError, msgspec.MsgspecError) as error:
        raise UnencodableValue(
            f"{error}. Give plain JSON values, or convert them first (values.to_json_value)"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The events of one transaction for one stream; readers see them all at once.

    Attributes:
        stream: The stream's name.
        events: One or more events, each as JSON bytes.
        txid: The transaction's id.
        id: Unique; a push that is repeated with the same id is applied once.
        created_at: Unix time in milliseconds, by the writer's clock; for age and latency figures only.
        trace: W3C `traceparent` of the writer, when OpenTelemetry is in use.
        turn: The name of the transaction's turn among those of all writers (`Outbox.reserve`), where the store asks.
    """

    stream: str
    events: tuple[bytes, ...]
    txid: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_at: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    trace: str | None = field(default_factory=current_trace)
    turn: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the events, without the separators of a frame."""
        return sum(map(len, self.events))


def frame_body(events: Sequence[bytes]) -> bytes:
    """*events* as the JSON array of one append (protocol, 7.1), byte for byte the same for the same events."""
    return b"[" + b",".join(events) + b"]"
