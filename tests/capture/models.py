"""Teams have boards, boards have cards; cards move."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from broadcastable import Broadcastable, streams, streams_to


class Base(DeclarativeBase):
    type_annotation_map = {str: sa.String(50)}  # noqa: RUF012 - MariaDB wants a length


class Team(Base, Broadcastable):
    __tablename__ = "teams"
    __streams__ = streams()

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Board(Base, Broadcastable):
    __tablename__ = "boards"
    __streams__ = (streams(), streams_to("team", "boards"))

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    team_id: Mapped[int | None] = mapped_column(sa.ForeignKey("teams.id"))
    team: Mapped[Team | None] = relationship()
    cards: Mapped[list[Card]] = relationship(back_populates="board")


class Card(Base, Broadcastable):
    __tablename__ = "cards"
    __streams__ = streams_to("board", "cards")
    __stream_bulk__ = "capture"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    label: Mapped[str | None]
    board_id: Mapped[int | None] = mapped_column(sa.ForeignKey("boards.id"))
    board: Mapped[Board | None] = relationship(back_populates="cards")
