"""Durable Streams for SQLAlchemy: every committed change reaches every subscriber, in commit order, exactly once.

>>> class Room(Base, Broadcastable):
...     __tablename__ = "rooms"
...     __streams__ = streams()
...     id: Mapped[int] = mapped_column(primary_key=True)

>>> class Message(Base, Broadcastable):
...     __tablename__ = "messages"
...     __streams__ = streams_to("room", "messages")
...     id: Mapped[int] = mapped_column(primary_key=True)
...     room_id: Mapped[int] = mapped_column(ForeignKey("rooms.id"))
...     room: Mapped[Room] = relationship()

Submodules: `aio` (the verbs, awaited), `testing`, `actors` (Dramatiq), `server` (the embedded stream server, extra
`server`), `outbox.database` (its tables), `metrics`.
"""

from __future__ import annotations

from .declarations import streams, streams_to
from .durable_streams import AsyncDurableStreams, DurableStreams, current
from .errors import (
    BlankStreamables,
    BroadcastableError,
    BulkStatementError,
    ConfigurationError,
    DeclarationError,
    ExpiredToken,
    FrameTooLarge,
    InvalidStreamName,
    InvalidToken,
    MissingExtraError,
    OutboxError,
    OutboxFull,
    ProducerFenced,
    ProducerGap,
    StaleSnapshotError,
    StreamClosed,
    StreamConflict,
    StreamError,
    StreamForbidden,
    StreamNotFound,
    StreamRefused,
    StreamTimeout,
    StreamUnavailable,
    TokenError,
    UnencodableValue,
    UnknownModelError,
    UnknownPermission,
    UnsavedRecordError,
    UsageError,
)
from .mixin import Broadcastable
from .names import GID, locate, stream_name_from
from .settings import Settings, configure, override
from .snapshots import Snapshot
from .suppression import suppressing_streams
from .tokens import PERMISSIONS, Gatekeeper
from .transactions import confirm_txid, txid
from .verbs import (
    broadcast_event_later_to,
    broadcast_event_to,
    broadcast_later_to,
    broadcast_to,
    close_stream,
    delete_stream,
    drain,
    ensure_stream_exists,
    signed_stream_primitives,
    signed_stream_url,
    snapshot,
    stream_offset,
    stream_snapshot,
)

__version__ = "0.1.0"

__all__ = [
    "GID",
    "PERMISSIONS",
    "AsyncDurableStreams",
    "BlankStreamables",
    "Broadcastable",
    "BroadcastableError",
    "BulkStatementError",
    "ConfigurationError",
    "DeclarationError",
    "DurableStreams",
    "ExpiredToken",
    "FrameTooLarge",
    "Gatekeeper",
    "InvalidStreamName",
    "InvalidToken",
    "MissingExtraError",
    "OutboxError",
    "OutboxFull",
    "ProducerFenced",
    "ProducerGap",
    "Settings",
    "Snapshot",
    "StaleSnapshotError",
    "StreamClosed",
    "StreamConflict",
    "StreamError",
    "StreamForbidden",
    "StreamNotFound",
    "StreamRefused",
    "StreamTimeout",
    "StreamUnavailable",
    "TokenError",
    "UnencodableValue",
    "UnknownModelError",
    "UnknownPermission",
    "UnsavedRecordError",
    "UsageError",
    "broadcast_event_later_to",
    "broadcast_event_to",
    "broadcast_later_to",
    "broadcast_to",
    "close_stream",
    "configure",
    "confirm_txid",
    "current",
    "delete_stream",
    "drain",
    "ensure_stream_exists",
    "locate",
    "override",
    "signed_stream_primitives",
    "signed_stream_url",
    "snapshot",
    "stream_name_from",
    "stream_offset",
    "stream_snapshot",
    "streams",
    "streams_to",
    "suppressing_streams",
    "txid",
]
