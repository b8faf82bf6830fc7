"""The application of these tests: rooms and messages, and one model with a column of every type."""

from __future__ import annotations

import datetime
import decimal
import enum
import uuid
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from broadcastable.declarations import streams, streams_to
from broadcastable.mixin import Broadcastable


class Base(DeclarativeBase):
    pass


class Room(Base, Broadcastable):
    __tablename__ = "rooms"
    __streams__ = (streams(), streams_to("lobby"))

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    messages_count: Mapped[int] = mapped_column(default=0)


class Message(Base, Broadcastable):
    __tablename__ = "messages"
    __streams__ = (streams_to("room", "messages"), streams_to("lobby"))

    id: Mapped[str] = mapped_column(primary_key=True)
    room_id: Mapped[int] = mapped_column(sa.ForeignKey("rooms.id"))
    body: Mapped[str]
    room: Mapped[Room] = relationship()


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Sample(Base, Broadcastable):
    __tablename__ = "samples"
    __streams__ = streams_to("samples")

    id: Mapped[int] = mapped_column(primary_key=True)
    integer: Mapped[int]
    big: Mapped[int] = mapped_column(sa.BigInteger)
    ratio: Mapped[float]
    price: Mapped[decimal.Decimal] = mapped_column(sa.Numeric(10, 2, asdecimal=True))
    flag: Mapped[bool]
    text: Mapped[str]
    missing: Mapped[str | None]
    moment: Mapped[datetime.datetime] = mapped_column(sa.DateTime(timezone=True))
    naive: Mapped[datetime.datetime]
    day: Mapped[datetime.date]
    hour: Mapped[datetime.time]
    lasting: Mapped[datetime.timedelta]
    token: Mapped[uuid.UUID]
    blob: Mapped[bytes]
    colour: Mapped[Colour]
    document: Mapped[Any] = mapped_column(sa.JSON)
