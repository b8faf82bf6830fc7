"""What the application's functions see: the row as it was and as it is, with its parents, in a flush and in bulk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.hybrid import hybrid_method, hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    composite,
    mapped_column,
    object_session,
    relationship,
    synonym,
)

from broadcastable import Broadcastable, streams_to
from broadcastable.counters import counters
from broadcastable.settings import Settings
from tests import services
from tests.capture.recorder import Recorder
from tests.capture.test_operations import statements


class Base(DeclarativeBase):
    type_annotation_map = {str: sa.String(50)}  # noqa: RUF012 - MariaDB wants a length


class Board(Base):
    __tablename__ = "boards"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]


class Person(Base):
    __tablename__ = "people"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012 - as SQLAlchemy has it
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]


class Boss(Person):
    __mapper_args__ = {"polymorphic_identity": "boss"}  # noqa: RUF012


@dataclasses.dataclass
class Point:
    x: int
    y: int


class Card(Base, Broadcastable):
    __tablename__ = "cards"
    __stream_bulk__ = "capture"
    __streams__ = (
        streams_to(lambda card: f"owner-{card.owner}" if card.owner else None),
        streams_to("by-owner", key="owner", when=lambda card: card.owner is not None),
        streams_to("public", when=lambda card: card.shown),
        streams_to("near", when=lambda card: card.point.x < 5),
        streams_to("low", when=lambda card: card.is_low()),
        streams_to("secrets", when=lambda card: card.secret == "yes"),
        streams_to("early", when=lambda card: card.version < 3),
        streams_to(lambda card: [card.board, "cards"] if card.board_id else None),
        streams_to(lambda card: iter([card.person, "cards"]) if card.person_id else None),
        streams_to(lambda card: [card, "own"]),
        streams_to("named", when=lambda card: card.board is not None, value=lambda card: {"board": card.board.name}),
    )
    LIMIT = 5

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    owner: Mapped[str | None]
    is_public: Mapped[bool] = mapped_column(default=False)
    shown: Mapped[bool] = synonym("is_public")
    x: Mapped[int] = mapped_column(default=9)
    y: Mapped[int] = mapped_column(default=9)
    point: Mapped[Point] = composite("x", "y")
    secret: Mapped[str | None] = mapped_column(deferred=True)
    version: Mapped[int] = mapped_column(default=1, onupdate=sa.text("version + 1"))
    board_id: Mapped[int | None] = mapped_column(sa.ForeignKey("boards.id"))
    board: Mapped[Board | None] = relationship()
    person_id: Mapped[int | None] = mapped_column(sa.ForeignKey("people.id"))
    person: Mapped[Person | None] = relationship()

    def is_low(self) -> bool:
        assert isinstance(self, Card)
        return self.below(self.LIMIT) and self.is_small and self.depth < self.LIMIT

    @hybrid_method
    def below(self, limit: int) -> bool:
        return self.x < limit

    @hybrid_property
    def is_small(self) -> bool:
        return self.x < 100

    @property
    def depth(self) -> int:
        return self.y

    def to_stream_value(self) -> Any:
        return super().to_stream_value() | {"columns": len(sa.inspect(self).mapper.columns)}


class Note(Base, Broadcastable):
    __tablename__ = "notes"
    __streams__ = streams_to(lambda note: [note.board, "notes"])
    id: Mapped[int] = mapped_column(primary_key=True)
    board_id: Mapped[int | None] = mapped_column(sa.ForeignKey("boards.id"))
    board: Mapped[Board | None] = relationship()


@pytest.fixture
def session(sqlite_url: str, recorder: Recorder) -> Iterator[Session]:
    engine = services.open_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": recorder}) as session:
        session.add_all([Board(id=1, name="todo"), Board(id=2, name="done"), Person(id=1), Boss(id=2)])
        session.commit()
        yield session
    engine.dispose()


def add(session: Session, recorder: Recorder, **values: Any) -> Card:
    card = Card(id=1, **values)
    session.add(card)
    session.commit()
    recorder.clear()
    return card


def moves(recorder: Recorder) -> dict[str, list[tuple[str, str]]]:
    """Where rows came or went; the streams on which they only changed are left out."""
    return {
        stream: found
        for stream, found in recorder.by_stream().items()
        if {operation for operation, _ in found} != {"update"}
    }


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "expired"])
@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            {"owner": "ann"},
            {"owner": "bob"},
            {
                "owner-ann": [("delete", "1")],
                "owner-bob": [("insert", "1")],
                "by-owner": [("delete", "ann"), ("insert", "bob")],
            },
        ),
        ({"is_public": True}, {"is_public": False}, {"public": [("delete", "1")]}),
        ({"is_public": False}, {"shown": True}, {"public": [("insert", "1")]}),
        ({"point": Point(1, 7)}, {"point": Point(9, 7)}, {"near": [("delete", "1")]}),
        ({"x": 1, "y": 2}, {"y": 8}, {"low": [("delete", "1")]}),
        ({"secret": "yes"}, {"secret": "no"}, {"secrets": [("delete", "1")]}),
        ({"version": 2}, {"is_public": False, "y": 7}, {"early": [("delete", "1")]}),
        (
            {"owner": None},
            {"id": 7},
            {"gid://app/Card/1/own": [("delete", "1")], "gid://app/Card/7/own": [("insert", "7")]},
        ),
    ],
    ids=["target and key", "condition", "synonym", "composite", "method", "deferred", "computed", "key"],
)
def test_a_function_is_asked_where_the_row_was(
    session: Session,
    recorder: Recorder,
    loaded: bool,
    before: dict[str, Any],
    after: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    """Also of a row whose attributes a commit has expired, so that the unit of work does not know the old values."""
    card = add(session, recorder, **before)
    if loaded:
        assert (card.owner, card.secret) is not None
    for name, value in after.items():
        setattr(card, name, value)
    session.commit()
    if "version" in before and not loaded:
        return  # only the database knew it, and nothing else was asked of it
    found = moves(recorder)
    assert {stream: found.get(stream) for stream in expected} == expected


# Parents


def set_the_key(session: Session, card: Card) -> None:
    card.board_id = 2


def set_the_key_with_the_parent_loaded(session: Session, card: Card) -> None:
    assert card.board is not None
    card.board_id = 2


def set_the_parent(session: Session, card: Card) -> None:
    card.board = session.get_one(Board, 2)


@pytest.mark.parametrize("move", [set_the_key, set_the_key_with_the_parent_loaded, set_the_parent])
def test_a_function_of_the_parent_sees_a_move_however_it_was_made(
    session: Session, recorder: Recorder, move: Callable[[Session, Card], None]
) -> None:
    card = add(session, recorder, board_id=1)
    move(session, card)
    session.commit()
    found = recorder.by_stream()
    assert found["gid://app/Board/1/cards"] == [("delete", "1")]
    assert found["gid://app/Board/2/cards"] == [("insert", "1")]
    assert [event["value"] for event in recorder.events("named")] == [{"board": "done"}]


def test_a_function_of_the_parent_is_right_about_a_new_record(session: Session, recorder: Recorder) -> None:
    """SQLAlchemy gives a pending record no parent for its foreign key; what is blank would be dropped from the name."""
    session.add_all([Board(id=3, name="new"), Card(id=1, board_id=1), Card(id=2, board_id=3), Card(id=3)])
    session.commit()
    assert recorder.by_stream()["gid://app/Board/1/cards"] == [("insert", "1")]
    assert recorder.by_stream()["gid://app/Board/3/cards"] == [("insert", "2")]
    assert [event["value"] for event in recorder.events("named")] == [{"board": "todo"}, {"board": "new"}]
    assert "cards" not in recorder.streams


def test_a_parent_that_only_names_a_stream_is_not_read(session: Session, recorder: Recorder) -> None:
    engine: Any = session.get_bind()
    notes = [Note(id=number, board_id=1 + number % 2) for number in range(1, 11)]

    def insert() -> None:
        session.add_all(notes)
        session.commit()

    assert {each.split()[0] for each in statements(engine, insert)} == {"INSERT"}
    assert len(recorder.events("gid://app/Board/2/notes")) == 5
    recorder.clear()
    assert [note.board_id for note in notes]

    def move() -> None:
        for note in notes:
            note.board_id = 1
        session.commit()

    assert {each.split()[0] for each in statements(engine, move)} == {"UPDATE"}
    assert len(recorder.events("gid://app/Board/2/notes")) == 5


def test_the_record_keeps_the_parent_that_it_had_loaded(session: Session, recorder: Recorder) -> None:
    """What functions are shown is nothing that the application's own code should find later."""
    card = add(session, recorder, board_id=1)
    board = card.board
    card.board_id = 2
    session.flush()
    assert card.board is board
    session.commit()
    assert card.board is session.get_one(Board, 2)


def test_a_parent_is_called_by_its_own_class(session: Session, recorder: Recorder) -> None:
    session.expunge_all()
    session.add_all([Card(id=1, person_id=1), Card(id=2, person_id=2)])
    session.commit()
    assert recorder.by_stream()["gid://app/Person/1/cards"] == [("insert", "1")]
    assert recorder.by_stream()["gid://app/Boss/2/cards"] == [("insert", "2")]


def test_a_parent_that_is_not_there_costs_an_event_and_no_commit(session: Session, recorder: Recorder) -> None:
    failed = counters["events_failed"]
    session.add(Card(id=1, board_id=99))
    session.commit()
    assert recorder.by_stream()["gid://app/Board/99/cards"] == [("insert", "1")]
    assert "named" not in recorder.streams
    assert counters["events_failed"] - failed == 1


def test_where_a_row_was_is_reported_when_it_cannot_be_told(
    sqlite_url: str, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """The row may stay on a stream that it has left: that is drift, and it must not happen in silence."""

    class Here(DeclarativeBase):
        pass

    class Entry(Here, Broadcastable):
        __tablename__ = "entries"
        __streams__ = streams_to(lambda entry: f"size-{10 // entry.size}")
        id: Mapped[int] = mapped_column(primary_key=True)
        size: Mapped[int]

    engine = services.open_engine(sqlite_url)
    Here.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": recorder}) as session:
        with Entry.suppressing_streams():
            session.add(Entry(id=1, size=0))
            session.commit()
        failed = counters["events_failed"]
        session.get_one(Entry, 1).size = 5
        session.commit()
    engine.dispose()
    assert recorder.by_stream() == {"size-2": [("update", "1")]}
    assert counters["events_failed"] - failed == 1
    (record,) = (each for each in caplog.records if each.levelname == "ERROR")
    assert "cannot be told whether it left a stream" in record.getMessage()


# Bulk statements


def test_a_bulk_statements_row_is_as_good_as_a_record(session: Session, recorder: Recorder) -> None:
    """Class attributes, composites, parents, super() and what SQLAlchemy knows of a record are there as in a flush."""
    add(session, recorder, owner="ann", x=1, y=1, board_id=1, person_id=2)
    failed = counters["events_failed"]
    session.expunge_all()
    session.execute(sa.update(Card).values(board_id=2, y=8))
    session.commit()
    assert counters["events_failed"] - failed == 1  # a deferred column is not read
    found = recorder.by_stream()
    assert found["gid://app/Board/1/cards"] == [("delete", "1")]
    assert found["gid://app/Board/2/cards"] == [("insert", "1")]
    assert found["gid://app/Boss/2/cards"] == [("update", "1")]
    assert found["gid://app/Card/1/own"] == [("update", "1")]
    assert found["low"] == [("delete", "1")]
    assert found["near"] == [("update", "1")]
    assert [event["value"] for event in recorder.events("named")] == [{"board": "done"}]
    (event,) = recorder.events("near")
    assert event["value"] | {"id": "1", "board_id": "2", "y": 8, "columns": 9} == event["value"]


def test_a_bulk_statements_row_has_keys_as_its_session_wants_them(session: Session, recorder: Recorder) -> None:
    add(session, recorder, x=1, board_id=1)
    recorder.settings = Settings(keys_as_strings=False)
    session.execute(sa.update(Card).values(y=8))
    session.commit()
    assert recorder.events("near")[0]["value"]["board_id"] == 1


def test_a_bulk_statements_row_is_in_no_session(session: Session, recorder: Recorder) -> None:
    """It does not replace the record that the session has, nor become one."""
    card = add(session, recorder, x=1)
    session.execute(sa.update(Card).values(y=8))
    assert object_session(card) is session
    assert list(session.identity_map.values()) == [card]
    session.commit()
