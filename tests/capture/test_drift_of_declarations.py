"""Drift where a declaration, a hierarchy of classes or a function of the application makes it hard to tell."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from broadcastable import Broadcastable, DurableStreams, streams_to
from broadcastable.drift import Drift, find_drift, repair
from broadcastable.server.embedded import EmbeddedServer
from tests import services


class Base(DeclarativeBase):
    pass


class Team(Base):
    __tablename__ = "teams"

    id: Mapped[int] = mapped_column(primary_key=True)


class Board(Base):
    __tablename__ = "boards"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "board"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    team_id: Mapped[int] = mapped_column(sa.ForeignKey("teams.id"))
    team: Mapped[Team] = relationship()
    cards: Mapped[list[Card]] = relationship(back_populates="board", lazy="joined")


class Wall(Board):
    __mapper_args__ = {"polymorphic_identity": "wall"}  # noqa: RUF012


def _refusing(card: Any) -> dict[str, Any]:
    if card.title == "bad":
        raise ValueError("no value for it")
    return {"title": card.title, "on": card.board.kind}


def _wanted(card: Any) -> bool:
    if card.title == "worse":
        raise RuntimeError("nobody knows")
    return True


class Card(Base, Broadcastable):
    __tablename__ = "cards"
    __streams__ = (
        streams_to("board.team", "cards"),
        streams_to("board", "cards"),
        streams_to("log", on=["insert"]),
        streams_to("mixed", on=["insert", "delete"]),
        streams_to("changes", on=["update"]),
        streams_to("shown", value=_refusing, when=_wanted),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    board_id: Mapped[int | None] = mapped_column(sa.ForeignKey("boards.id"), deferred=True)
    board: Mapped[Board | None] = relationship(back_populates="cards")


class Animal(Base, Broadcastable):
    __tablename__ = "animals"
    __streams__ = streams_to("animals")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]


class Cat(Animal):
    __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012

    lives: Mapped[int | None]


class Dog(Animal):
    __tablename__ = "dogs"
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012
    __streams__ = (streams_to("animals"), streams_to("walks"))

    id: Mapped[int] = mapped_column(sa.ForeignKey("animals.id"), primary_key=True)
    length: Mapped[int]


class Photo(Base, Broadcastable):
    __tablename__ = "photos"
    __stream_type__ = "item"
    __streams__ = streams_to("feed")

    id: Mapped[int] = mapped_column(primary_key=True)


class Film(Photo):
    __tablename__ = "films"
    __mapper_args__ = {"concrete": True}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    minutes: Mapped[int]


class Text(Base, Broadcastable):
    __tablename__ = "texts"
    __streams__ = streams_to(lambda text: "feed", type="item", key=lambda text: f"text-{text.id}")

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def durable_streams(stream_server: EmbeddedServer) -> Iterator[DurableStreams]:
    durable_streams = DurableStreams(stream_server.settings.replace(gid_app=f"drift-{uuid.uuid4().hex[:8]}"))
    yield durable_streams
    durable_streams.close()


@pytest.fixture
def session(sqlite_url: str, durable_streams: DurableStreams) -> Iterator[Session]:
    """A session on an empty database; the streams with plain names are removed afterwards."""
    engine = services.open_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": durable_streams}) as session:
        yield session
    for stream in ("log", "mixed", "changes", "shown", "animals", "walks", "feed"):
        durable_streams.delete_stream(stream)
    engine.dispose()


def commit(session: Session, *records: object) -> None:
    for record in records:
        session.add(record)
        session.flush()
    session.commit()
    assert session.info["durable_streams"].drain(10)


def by_hand(session: Session, *statements: str) -> None:
    with session.get_bind().connect() as connection, connection.begin():  # type: ignore[union-attr]
        for statement in statements:
            connection.exec_driver_sql(statement)


def drifts(session: Session, model: type) -> dict[str, Drift]:
    """By the stream's name, without scheme and application."""
    return {
        each.stream.split("/", 3)[3] if each.stream.startswith("gid://") else each.stream: each
        for each in find_drift(session, model)
    }


def with_cards(session: Session, *cards: Card) -> None:
    commit(session, Team(id=1), Wall(id=1, team_id=1), *cards)


def test_what_a_declaration_does_not_send_is_no_drift(session: Session) -> None:
    """Everything was captured here, so nothing has drifted."""
    with_cards(session, Card(id=1, title="one", board_id=1), Card(id=2, title="two", board_id=1))
    session.get_one(Card, 1).title = "changed"
    session.delete(session.get_one(Card, 2))
    commit(session)
    assert drifts(session, Card) == {}


def test_what_a_declaration_does_send_is_drift(session: Session, durable_streams: DurableStreams) -> None:
    """Each of the three differences where its operation is sent, and it is mended."""
    with_cards(session, Card(id=1, title="one", board_id=1))
    session.get_one(Card, 1).title = "two"
    commit(session)
    by_hand(session, "UPDATE cards SET title = 'three'", "INSERT INTO cards VALUES (9, 'new', NULL)")
    found = drifts(session, Card)
    assert list(found["log"].missing) == ["9"]
    assert (list(found["mixed"].missing), list(found["mixed"].stale)) == (["9"], [])
    assert (list(found["changes"].missing), list(found["changes"].stale)) == ([], ["1"])
    by_hand(session, "DELETE FROM cards")
    found = drifts(session, Card)
    assert found["mixed"].extra == {"1"}
    assert found.keys().isdisjoint({"log", "changes"})
    for drift in found.values():
        repair(drift, durable_streams)
    assert durable_streams.drain(10)
    assert drifts(session, Card) == {}


def test_rows_too_many_are_found_where_no_row_is_left(session: Session) -> None:
    """On the streams of parents: several relationships away, and of a class that only the parent's row tells."""
    with_cards(session, Card(id=1, title="one", board_id=1))
    by_hand(session, "DELETE FROM cards")
    found = drifts(session, Card)
    assert found["Team/1/cards"].extra == found["Wall/1/cards"].extra == {"1"}


def test_columns_of_subclasses_are_compared(session: Session) -> None:
    """In one table and in joined ones, for the whole hierarchy and for one class, also when no row is left of it."""
    commit(session, Cat(id=1, lives=9), Dog(id=2, length=50), Animal(id=3))
    for model in (Animal, Cat, Dog):
        assert drifts(session, model) == {}
    by_hand(session, "UPDATE animals SET lives = 8 WHERE id = 1")
    (drift,) = find_drift(session, Animal)
    assert (drift.type, drift.stale["1"]["lives"]) == ("cat", 8)
    by_hand(session, "DELETE FROM dogs", "DELETE FROM animals")
    assert {(each.stream, each.type, *each.extra) for each in find_drift(session, Animal)} == {
        ("animals", "animal", "3"),
        ("animals", "cat", "1"),
        ("animals", "dog", "2"),
        ("walks", "dog", "2"),
    }


def test_rows_of_another_model_with_the_same_type_are_not_too_many(session: Session) -> None:
    """A repair would delete them."""
    commit(session, Photo(id=1), Film(id=2, minutes=3), Text(id=4))
    for model in (Photo, Film, Text):
        assert drifts(session, model) == {}
    by_hand(session, "DELETE FROM photos")
    assert drifts(session, Photo)["feed"].extra == {"1"}


def test_a_function_that_raises_costs_the_check_one_row(session: Session, durable_streams: DurableStreams) -> None:
    """The row is reported, whether its value or its place cannot be told; nothing is said against what readers have."""
    with_cards(session, *(Card(id=key, title=f"card {key}", board_id=1) for key in (1, 2, 3)))
    by_hand(
        session,
        "UPDATE cards SET title = 'bad' WHERE id = 1",
        "UPDATE cards SET title = 'worse' WHERE id = 2",
        "UPDATE cards SET title = 'else' WHERE id = 3",
    )
    found = drifts(session, Card)
    shown = found["shown"]
    assert shown.unknown == {"1": "ValueError: no value for it", "2": "RuntimeError: nobody knows"}
    assert (dict(shown.missing), list(shown.stale), shown.extra) == ({}, ["3"], frozenset())
    assert found["streams_to('shown',)"].unknown == {"2": "RuntimeError: nobody knows"}
    assert len(found["streams_to('shown',)"]) == 0
    repair(found["streams_to('shown',)"], durable_streams)
    assert not durable_streams.outbox.pending("shown")


def test_an_sql_error_in_a_function_ends_the_check(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cards(session, Card(id=1, title="one", board_id=1))
    route = Card.__dict__["__stream_plan__"].routes[-1]
    monkeypatch.setattr(route, "when", lambda card: session.execute(sa.text("SELECT nonsense")))
    with pytest.raises(sa.exc.DBAPIError):
        list(find_drift(session, Card))
