"""The demo's two models. All that makes them live is the mixin and one line each."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import DateTime, ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from broadcastable import Broadcastable, streams, streams_to
from broadcastable.outbox.schema import tables


class Base(DeclarativeBase):
    """The demo's tables."""


class Room(Base, Broadcastable):
    __tablename__ = "rooms"
    __streams__ = streams()

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))


class Message(Base, Broadcastable):
    __tablename__ = "messages"
    __streams__ = streams_to("room", "messages")

    id: Mapped[int] = mapped_column(primary_key=True)
    room_id: Mapped[int] = mapped_column(ForeignKey("rooms.id"), index=True)
    author: Mapped[str] = mapped_column(String(40))
    body: Mapped[str] = mapped_column(String(2_000))
    edited: Mapped[bool] = mapped_column(default=False)
    sent_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=lambda: datetime.now(UTC))

    room: Mapped[Room] = relationship()


# For the outbox that is kept beside the messages, when they are kept.
tables(Base.metadata)
