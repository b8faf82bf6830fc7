"""Two transactions that overlap: what docs/models.md advises against events of a row that another one has moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.orm.exc import StaleDataError

from broadcastable import Broadcastable, streams_to
from tests import services
from tests.capture.recorder import Recorder, fold


class Base(DeclarativeBase):
    pass


class Board(Base):
    __tablename__ = "boards"
    id: Mapped[int] = mapped_column(primary_key=True)


class Card(Base, Broadcastable):
    __tablename__ = "cards"
    __streams__ = streams_to("board", "cards")
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    board_id: Mapped[int] = mapped_column(sa.ForeignKey("boards.id"))
    board: Mapped[Board] = relationship()


class Versioned(Base, Broadcastable):
    __tablename__ = "versioned"
    __streams__ = streams_to("board", "cards")
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    version: Mapped[int] = mapped_column()
    board_id: Mapped[int] = mapped_column(sa.ForeignKey("boards.id"))
    board: Mapped[Board] = relationship()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


@pytest.fixture
def sessions(postgres_url: str, recorder: Recorder) -> Iterator[tuple[Session, Session]]:
    """Of two requests; cards 1 and 2 are on board 1."""
    engine = services.open_engine(postgres_url)
    Base.metadata.create_all(engine)
    info = {"durable_streams": recorder}
    with Session(engine, info=info) as one, Session(engine, info=info) as other:
        one.add_all([Board(id=1), Board(id=2)])
        one.flush()
        for cls in (Card, Versioned):
            one.add_all([cls(id=number, title="new", board_id=1) for number in (1, 2)])
        one.commit()
        yield one, other
    engine.dispose()


def load(session: Session, cls: type[Card | Versioned]) -> list[Card | Versioned]:
    return [session.get_one(cls, number) for number in (1, 2)]


def change_one_and_delete_one(session: Session, cards: list[Card | Versioned]) -> None:
    cards[0].title = "changed"
    session.delete(cards[1])
    session.commit()


def move_to_board_2(session: Session, cls: type[Card | Versioned]) -> None:
    for card in load(session, cls):
        card.board_id = 2
    session.commit()


def refresh(session: Session, cards: list[Card | Versioned]) -> None:
    for card in cards:
        session.refresh(card, with_for_update=True)


def read_again(session: Session, cards: list[Card | Versioned]) -> None:
    session.scalars(sa.select(Card).with_for_update().execution_options(populate_existing=True)).all()


@pytest.mark.parametrize("look_again", [refresh, read_again])
def test_rows_that_are_read_again_under_a_lock_are_told_where_they_are(
    sessions: tuple[Session, Session],
    recorder: Recorder,
    look_again: Callable[[Session, list[Card | Versioned]], None],
) -> None:
    one, other = sessions
    cards = load(one, Card)
    move_to_board_2(other, Card)
    look_again(one, cards)
    change_one_and_delete_one(one, cards)
    found = fold(recorder.batches)
    assert ("card", "1") not in found["gid://app/Board/1/cards"]
    assert {key: row["title"] for key, row in found["gid://app/Board/2/cards"].items()} == {("card", "1"): "changed"}


def test_a_version_makes_the_second_writer_fail(sessions: tuple[Session, Session], recorder: Recorder) -> None:
    one, other = sessions
    cards = load(one, Versioned)
    move_to_board_2(other, Versioned)
    with pytest.raises(StaleDataError):
        change_one_and_delete_one(one, cards)
    one.rollback()
    found = fold(recorder.batches)["gid://app/Board/2/cards"]
    assert {key: row["title"] for key, row in found.items()} == {("versioned", "1"): "new", ("versioned", "2"): "new"}
