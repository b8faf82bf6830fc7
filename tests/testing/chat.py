"""The models of these tests: a chat, as on the documentation's pages."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from broadcastable.declarations import streams, streams_to
from broadcastable.mixin import Broadcastable


class Base(DeclarativeBase):
    pass


class Room(Base, Broadcastable):
    __tablename__ = "rooms"
    __streams__ = streams()

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Message(Base, Broadcastable):
    __tablename__ = "messages"
    __streams__ = streams_to("room", "messages")

    id: Mapped[int] = mapped_column(primary_key=True)
    room_id: Mapped[int] = mapped_column(sa.ForeignKey("rooms.id"))
    body: Mapped[str]

    room: Mapped[Room] = relationship()


class Notice(Base, Broadcastable):
    __tablename__ = "notices"
    __streams__ = streams_to("notices", when=lambda notice: notice.published)

    id: Mapped[int] = mapped_column(primary_key=True)
    published: Mapped[bool] = mapped_column(default=False)


class Seat(Base, Broadcastable):
    __tablename__ = "seats"
    __streams__ = streams_to("seats")

    row: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[str] = mapped_column(primary_key=True)


class Note(Base, Broadcastable):
    __tablename__ = "notes"
    __streams__ = streams_to(lambda note: ["notes", note.topic])

    id: Mapped[int] = mapped_column(primary_key=True)
    topic: Mapped[str]
