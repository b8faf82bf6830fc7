"""A chat: rooms and their messages."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.orm import Mapped, mapped_column

from broadcastable import Broadcastable, streams, streams_to


class Base(orm.DeclarativeBase):
    pass


class Room(Base, Broadcastable):
    __tablename__ = "rooms"
    __streams__ = streams()  # a room's own stream: gid://app/Room/1

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Message(Base, Broadcastable):
    __tablename__ = "messages"
    __streams__ = streams_to("room", "messages")  # gid://app/Room/1/messages

    id: Mapped[int] = mapped_column(primary_key=True)
    room_id: Mapped[int] = mapped_column(sa.ForeignKey("rooms.id"))
    author: Mapped[str]
    text: Mapped[str]

    room: Mapped[Room] = orm.relationship()


engine = sa.create_engine("sqlite:///chat.db")
Session = orm.sessionmaker(engine)
