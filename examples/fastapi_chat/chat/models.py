"""The rows, and what is told of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import ClassVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from broadcastable import Broadcastable, streams_to
from broadcastable.outbox.schema import tables

from . import settings


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {datetime: sa.DateTime(timezone=True)}


# The outbox is two more tables: events are written in the transaction that they tell of.
tables(Base.metadata)


class Room(Base, Broadcastable):
    __tablename__ = "rooms"
    __streams__ = streams_to("rooms")  # one stream with all rooms: the list at the side of the page

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40), unique=True)


class Message(Base, Broadcastable):
    __tablename__ = "messages"
    __streams__ = streams_to("room", "messages")  # gid://app/Room/1/messages

    id: Mapped[int] = mapped_column(primary_key=True)
    room_id: Mapped[int] = mapped_column(sa.ForeignKey("rooms.id"), index=True)
    author: Mapped[str] = mapped_column(sa.String(40))
    text: Mapped[str] = mapped_column(sa.String(2_000))
    at: Mapped[datetime] = mapped_column(server_default=sa.func.now())

    room: Mapped[Room] = relationship()


assert settings.database_url is not None, "Set BROADCASTABLE_DATABASE_URL; the README says to what"
engine = create_async_engine(settings.database_url)
Session = async_sessionmaker(engine)


async def create_tables() -> None:
    """For an example this will do; an application has migrations."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


async def session() -> AsyncIterator[AsyncSession]:
    """FastAPI dependency: a session for one request, in no transaction yet."""
    async with Session() as session:
        yield session
