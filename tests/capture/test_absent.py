"""What an object was never given is null in the row of its INSERT, but not when something else has written that row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, load_only, mapped_column, relationship

from broadcastable import Broadcastable, streams, streams_to
from broadcastable.counters import counters
from tests import services
from tests.capture.recorder import Recorder, fold


class Base(DeclarativeBase):
    pass


class Board(Base):
    __tablename__ = "boards"
    id: Mapped[int] = mapped_column(primary_key=True)


class Card(Base, Broadcastable):
    __tablename__ = "cards"
    __stream_bulk__ = "capture"
    __streams__ = (
        streams_to("board", "cards"),
        streams_to("all"),
        streams_to("shown", when=lambda card: not card.hidden),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    owner: Mapped[str | None]
    hidden: Mapped[bool | None]
    board_id: Mapped[int | None] = mapped_column(sa.ForeignKey("boards.id"))
    board: Mapped[Board | None] = relationship()


class Employee(Base, Broadcastable):
    __tablename__ = "employees"
    __streams__ = streams_to("employees")

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str | None]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "employee"}  # noqa: RUF012


class Engineer(Employee):
    __mapper_args__ = {"polymorphic_identity": "engineer"}  # noqa: RUF012


class Temp(Employee):
    __streams__ = ()
    __mapper_args__ = {"polymorphic_identity": "temp"}  # noqa: RUF012


class Manager(Employee):
    car: Mapped[str | None]
    __mapper_args__ = {"polymorphic_identity": "manager"}  # noqa: RUF012


class Company(Base, Broadcastable):
    __tablename__ = "companies"
    __streams__ = (streams(), streams_to("boss", "led"))

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    boss_id: Mapped[int | None] = mapped_column(sa.ForeignKey("people.id", use_alter=True, name="boss"))
    boss: Mapped[Person | None] = relationship(foreign_keys=boss_id, post_update=True)


class Person(Base):
    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True)
    company_id: Mapped[int | None] = mapped_column(sa.ForeignKey("companies.id"))


@pytest.fixture
def session(sqlite_url: str, recorder: Recorder) -> Iterator[Session]:
    engine = services.open_engine(sqlite_url)
    Base.metadata.create_all(engine)
    failed = counters["events_failed"]
    with Session(engine, info={"durable_streams": recorder}) as session:
        session.add_all([Board(id=1), Board(id=2)])
        session.commit()
        yield session
    engine.dispose()
    assert counters["events_failed"] == failed


def commit_and_compare(session: Session, recorder: Recorder) -> None:
    """Commit, and hold what readers have to the table."""
    session.commit()
    expected: dict[str, dict[tuple[str, str], Any]] = {}
    for row in session.connection().execute(sa.select(Card.__table__)):
        board = None if row.board_id is None else str(row.board_id)
        hidden = None if row.hidden is None else bool(row.hidden)
        value = {"id": str(row.id), "title": row.title, "owner": row.owner, "hidden": hidden, "board_id": board}
        names = ["all", *([] if hidden else ["shown"]), *([f"gid://app/Board/{board}/cards"] if board else [])]
        for name in names:
            expected.setdefault(name, {})["card", str(row.id)] = value
    assert fold(recorder.batches) == expected


# Bulk statements


def then_change(session: Session, card: Card) -> None:
    card.title = "changed"


def then_move(session: Session, card: Card) -> None:
    card.board_id = 1


def then_delete(session: Session, card: Card) -> None:
    session.delete(card)


@pytest.mark.parametrize("then", [then_change, then_move, then_delete])
@pytest.mark.parametrize("synchronize", ["auto", "evaluate", "fetch", False])
@pytest.mark.parametrize("commits", [False, True])
def test_a_bulk_statement_sets_what_a_new_object_was_not_given(
    session: Session,
    recorder: Recorder,
    then: Callable[[Session, Card], None],
    synchronize: Any,
    commits: bool,
) -> None:
    """SQLAlchemy leaves it absent there; the event says what the table has."""
    session.expire_on_commit = False
    card = Card(id=1, title="new")
    session.add(card)
    session.flush()
    statement = sa.update(Card).where(Card.id == 1).values(owner="Ada", board_id=2, hidden=True)
    session.execute(statement, execution_options={"synchronize_session": synchronize})
    if commits:
        session.commit()
    then(session, card)
    commit_and_compare(session, recorder)


# A row deleted and another added with its key in one flush: SQLAlchemy makes one UPDATE of them


@pytest.mark.parametrize("new", [{}, {"board_id": 2}, {"board_id": None}, {"hidden": True}])
def test_a_row_that_replaces_another_keeps_what_the_new_object_was_not_given(
    session: Session, recorder: Recorder, new: dict[str, Any]
) -> None:
    session.add(Card(id=1, title="old", owner="Ada", board_id=1, hidden=False))
    session.commit()
    session.delete(session.get_one(Card, 1))
    session.add(Card(id=1, title="new", **new))
    commit_and_compare(session, recorder)
    assert session.get_one(Card, 1).owner == "Ada"


@pytest.mark.parametrize("hidden", [False, True])
def test_where_a_replaced_row_was_is_read_before(session: Session, recorder: Recorder, hidden: bool) -> None:
    """The old object was changed without having been loaded, so only the database knows."""
    session.autoflush = False
    card = Card(id=1, title="old", board_id=1, hidden=hidden)
    session.add(card)
    session.commit()
    card.hidden = False
    card.board_id = 2
    session.delete(card)
    session.add(Card(id=1, title="new", hidden=False, board_id=2))
    commit_and_compare(session, recorder)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (Engineer, Manager, [("delete", "engineer", "1"), ("insert", "manager", "1")]),
        (Engineer, Temp, [("delete", "engineer", "1")]),
        (Temp, Manager, [("insert", "manager", "1")]),
    ],
)
def test_a_row_replaced_by_one_of_another_class_leaves(
    session: Session, recorder: Recorder, old: type, new: type, told: list[tuple[str, str, str]]
) -> None:
    session.add(old(id=1, name="Ada"))
    session.commit()
    recorder.clear()
    session.delete(session.get_one(old, 1))
    session.add(new(id=1))
    session.commit()
    assert recorder.summary() == told
    assert all(event["value"]["name"] == "Ada" for event in recorder.events() if event["type"] == "manager")


# Foreign keys that the unit of work sets after its hooks


@pytest.mark.parametrize("boss", [1, None])
@pytest.mark.parametrize("loaded", ["expired", "without", "whole"])
def test_a_foreign_key_set_by_post_update_moves_the_row(
    session: Session, recorder: Recorder, boss: int | None, loaded: str
) -> None:
    session.add_all([Person(id=1), Person(id=2), Company(id=1)])
    session.flush()
    session.get_one(Company, 1).boss_id = 2
    session.commit()
    session.expunge_all()
    recorder.clear()
    options = [load_only(Company.name)] if loaded == "without" else []
    company = session.get_one(Company, 1, options=options)
    person = None if boss is None else session.get_one(Person, boss)
    if loaded == "expired":
        session.expire(company)
    company.boss = person
    session.commit()
    assert recorder.by_stream() == {
        "gid://app/Company/1": [("update", "1")],
        "gid://app/Person/2/led": [("delete", "1")],
        **({} if boss is None else {"gid://app/Person/1/led": [("insert", "1")]}),
    }
