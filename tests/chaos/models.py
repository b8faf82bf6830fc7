"""The application under chaos: rooms, and messages that are written, changed, moved and deleted in them.

Every transaction first locks the room it writes to and takes the room's next number, so the order of the commits that
touch a stream is known: the numbers on it must rise.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from broadcastable import Broadcastable, streams_to
from broadcastable.outbox import database


class Base(DeclarativeBase):
    pass


class Room(Base):
    __tablename__ = "rooms"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(default=0)


class Message(Base, Broadcastable):
    __tablename__ = "messages"
    __streams__ = streams_to("room", "messages")
    id: Mapped[int] = mapped_column(primary_key=True)
    room_id: Mapped[int] = mapped_column(ForeignKey("rooms.id"), index=True)
    number: Mapped[int]
    writer: Mapped[str]
    body: Mapped[str]
    room: Mapped[Room] = relationship()


class Commit(Base):
    """The log of what readers are owed: one row for each stream that a transaction touches, written in it."""

    __tablename__ = "commits"
    id: Mapped[int] = mapped_column(primary_key=True)
    txid: Mapped[str]
    room_id: Mapped[int]
    process: Mapped[int]


database.tables(Base.metadata)


def create(url: str, rooms: int) -> None:
    """Make the tables and the rooms."""
    engine = sa.create_engine(url)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Room), [{"id": n, "number": 0} for n in range(1, rooms + 1)])
    engine.dispose()
