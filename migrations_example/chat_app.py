"""A small application: rooms, their messages, and the outbox beside them."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from broadcastable import Broadcastable, streams, streams_to
from broadcastable.outbox.database import tables


class Base(DeclarativeBase):
    pass


class Room(Base, Broadcastable):
    __tablename__ = "rooms"
    __streams__ = streams()

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(100))


class Message(Base, Broadcastable):
    __tablename__ = "messages"
    __streams__ = streams_to("room", "messages")

    id: Mapped[int] = mapped_column(primary_key=True)
    room_id: Mapped[int] = mapped_column(sa.ForeignKey("rooms.id"))
    text: Mapped[str] = mapped_column(sa.Text)
    room: Mapped[Room] = relationship()


# This line is all that the outbox asks of an application: its migrations see the tables from here on.
outbox_tables = tables(Base.metadata)
