"""Rooms and their messages."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from broadcastable import Broadcastable, streams, streams_to


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Room(Base, Broadcastable):
    __tablename__ = "rooms"
    __streams__ = (streams(), streams_to("rooms"))

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Message(Base, Broadcastable):
    __tablename__ = "messages"
    # A draft is on no stream; publishing it is an insert there, and withdrawing it a delete.
    __streams__ = streams_to("room", "messages", when=lambda message: not message.draft)

    id: Mapped[int] = mapped_column(primary_key=True)
    room_id: Mapped[int] = mapped_column(sa.ForeignKey("rooms.id"))
    author: Mapped[str]
    text: Mapped[str]
    draft: Mapped[bool] = mapped_column(default=False)

    room: Mapped[Room] = relationship()
