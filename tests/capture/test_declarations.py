"""Where a declaration leads and what it says; and which declarations are refused when the mappers are configured."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import pydantic
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    column_property,
    composite,
    configure_mappers,
    mapped_column,
    registry,
    relationship,
    synonym,
)

from broadcastable import Broadcastable, DeclarationError, UnknownModelError, streams, streams_to
from broadcastable.declarations import snake_case
from broadcastable.mixin import broadcastable_model
from tests import services
from tests.capture.recorder import Recorder


class Base(DeclarativeBase):
    type_annotation_map = {str: sa.String(50)}  # noqa: RUF012 - MariaDB wants a length


class Org(Base):
    __tablename__ = "orgs"
    id: Mapped[int] = mapped_column(primary_key=True)


class Person(Base):
    """Joined inheritance, with a gid for each class."""

    __tablename__ = "people"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012 - as SQLAlchemy has it
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    org_id: Mapped[int | None] = mapped_column(sa.ForeignKey("orgs.id"))
    org: Mapped[Org | None] = relationship()


class Boss(Person):
    __tablename__ = "bosses"
    __mapper_args__ = {"polymorphic_identity": "boss"}  # noqa: RUF012
    id: Mapped[int] = mapped_column(sa.ForeignKey("people.id"), primary_key=True)


class Slot(Base):
    __tablename__ = "slots"
    room: Mapped[str] = mapped_column(primary_key=True)
    hour: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Shape(msgspec.Struct):
    id: str
    title: str


class View(pydantic.BaseModel):
    id: int
    title: str


@dataclasses.dataclass
class Line:
    title: str
    person_id: int | None


def broken(record: Any) -> Any:
    raise ZeroDivisionError("on purpose")


@dataclasses.dataclass
class Place:
    x: int | None
    y: int | None


class Task(Base, Broadcastable):
    __tablename__ = "tasks"
    __stream_bulk__ = "ignore"
    __streams__ = (
        streams(value=Shape, type="struct"),
        streams(value=View, type="model"),
        streams(value=Line, type="dataclass"),
        streams(value=lambda task: {"loud": task.title.upper()}, type="function"),
        streams_to("person", "tasks"),
        streams_to("person.org", "tasks"),
        streams_to("slot", "tasks", old_value=True),
        streams_to("titles", key="title", on=["insert", "delete"]),
        streams_to("words", key=lambda task: task.title.split()[0], type="word"),
        streams_to("open", when=lambda task: task.is_open()),
        streams_to(lambda task: [task.slot, "functions"]),
        streams_to(lambda task: [[None, ""], f"tag-{task.tag}" if task.tag else None], "tasks"),
        streams_to("broken", value=broken, when=lambda task: task.title == "break"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    tag: Mapped[str | None]
    done: Mapped[bool] = mapped_column(default=False)
    person_id: Mapped[int | None] = mapped_column(sa.ForeignKey("people.id"))
    slot_room: Mapped[str | None]
    slot_hour: Mapped[int | None]
    x: Mapped[int | None]
    y: Mapped[int | None]
    place: Mapped[Place] = composite("x", "y")
    name: Mapped[str] = synonym("title")
    twice: Mapped[str] = column_property(sa.literal_column("title || title", sa.String))
    person: Mapped[Person | None] = relationship()
    slot: Mapped[Slot | None] = relationship()
    __table_args__ = (sa.ForeignKeyConstraint(["slot_room", "slot_hour"], ["slots.room", "slots.hour"]),)

    def is_open(self) -> bool:
        return not self.finished

    @property
    def finished(self) -> bool:
        return self.done


@pytest.fixture
def session(engine: sa.Engine, recorder: Recorder) -> Iterator[Session]:
    Base.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": recorder}) as session:
        session.add_all([Org(id=1), Org(id=2)])
        session.flush()
        session.add_all(
            [Person(id=1, org_id=1), Boss(id=2, org_id=2), Slot(room="a/b", hour=9), Slot(room="c", hour=1)]
        )
        session.commit()
        yield session


def add(session: Session, recorder: Recorder, **values: Any) -> None:
    session.add(Task(id=1, **({"title": "first task"} | values)))
    session.commit()


OWN = "gid://app/Task/1"


def test_values_come_from_a_function_or_a_class(session: Session, recorder: Recorder) -> None:
    """Filled from what is loaded; keys travel as text whatever the class says."""
    add(session, recorder, person_id=1)
    assert {event["type"]: event["value"] for event in recorder.events(OWN)} == {
        "struct": {"id": "1", "title": "first task"},
        "model": {"id": "1", "title": "first task"},
        "dataclass": {"title": "first task", "person_id": "1"},
        "function": {"loud": "FIRST TASK"},
    }


def test_the_whole_row_has_the_columns_and_nothing_else(session: Session, recorder: Recorder) -> None:
    add(session, recorder, person_id=1, place=Place(1, 2))
    (event,) = recorder.events("gid://app/Person/1/tasks")
    assert event["value"] == {
        "id": "1",
        "title": "first task",
        "tag": None,
        "done": False,
        "person_id": "1",
        "slot_room": None,
        "slot_hour": None,
        "x": 1,
        "y": 2,
    }


def test_a_stream_is_named_after_the_parents_own_class(session: Session, recorder: Recorder) -> None:
    """A foreign key does not tell the subclass; its row does."""
    add(session, recorder, person_id=2)
    assert "gid://app/Boss/2/tasks" in recorder.streams
    assert "gid://app/Person/2/tasks" not in recorder.streams


def test_a_path_is_followed_and_a_move_along_it_seen(session: Session, recorder: Recorder) -> None:
    add(session, recorder, person_id=1)
    assert recorder.by_stream()["gid://app/Org/1/tasks"] == [("insert", "1")]
    recorder.clear()
    session.get_one(Task, 1).person_id = 2
    session.commit()
    assert recorder.by_stream()["gid://app/Org/1/tasks"] == [("delete", "1")]
    assert recorder.by_stream()["gid://app/Org/2/tasks"] == [("insert", "1")]
    recorder.clear()
    session.get_one(Task, 1).person = None
    session.commit()
    assert recorder.by_stream()["gid://app/Org/2/tasks"] == [("delete", "1")]


def test_a_path_costs_one_select_for_each_class(session: Session, recorder: Recorder) -> None:
    from tests.capture.test_operations import statements

    def step() -> None:
        session.add_all([Task(title=f"task {number}", person_id=1 + number % 2) for number in range(100)])
        session.flush()
        session.add_all([Task(title=f"more {number}", person_id=1 + number % 2) for number in range(100)])
        session.commit()

    selects = [each for each in statements(session.get_bind(), step) if each.startswith("SELECT")]
    # The person's class and its organisation are two questions.
    assert sum("people" in each for each in selects) <= 2
    assert len(recorder.events("gid://app/Org/2/tasks")) == 100


def test_a_parent_that_is_deleted_in_the_same_flush_is_still_known(session: Session, recorder: Recorder) -> None:
    add(session, recorder, person_id=1)
    recorder.clear()
    task, person = session.get_one(Task, 1), session.get_one(Person, 1)
    assert person.org is not None
    session.delete(task)
    session.delete(person)
    session.commit()
    assert recorder.by_stream()["gid://app/Org/1/tasks"] == [("delete", "1")]
    assert recorder.by_stream()["gid://app/Person/1/tasks"] == [("delete", "1")]


@pytest.mark.parametrize("flushes", [1, 2], ids=["in the same flush", "in a later one"])
@pytest.mark.parametrize("leave", ["delete", "move"])
def test_a_parent_that_is_deleted_after_its_rows_is_still_known(
    session: Session, recorder: Recorder, flushes: int, leave: str
) -> None:
    """What left a stream is looked up at once, and also if nothing of the way was loaded."""
    session.add_all([Task(id=number, title=f"task {number}", person_id=1) for number in (1, 2)])
    session.commit()
    recorder.clear()
    session.expunge_all()
    tasks = session.scalars(sa.select(Task)).all()
    person = session.get_one(Person, 1)
    for task in tasks:
        if leave == "delete":
            session.delete(task)
        else:
            task.person_id = None
    if flushes == 2:
        session.expunge(person)
        del person
        session.flush()
        person = session.get_one(Person, 1)
    session.expire(person, ["org_id", "kind"])
    session.delete(person)
    session.commit()
    assert recorder.by_stream()["gid://app/Org/1/tasks"] == [("delete", "1"), ("delete", "2")]
    assert recorder.by_stream()["gid://app/Person/1/tasks"] == [("delete", "1"), ("delete", "2")]


@pytest.mark.parametrize("unit_of_work", [True, False], ids=["by the session", "by SQL"])
def test_rows_that_come_and_go_before_their_parent_dies_leave_no_trace(
    session: Session, recorder: Recorder, unit_of_work: bool
) -> None:
    session.expunge_all()
    session.add(Task(id=1, title="brief", person_id=1))
    session.flush()
    session.delete(session.get_one(Task, 1))
    session.flush()
    if unit_of_work:
        session.delete(session.get_one(Person, 1))
    else:
        session.execute(sa.text("DELETE FROM people WHERE id = 1"))
    session.commit()
    assert recorder.batches == []


def test_a_row_that_goes_as_its_parent_moves_leaves_the_stream_it_was_on(session: Session, recorder: Recorder) -> None:
    add(session, recorder, person_id=1)
    recorder.clear()
    session.delete(session.get_one(Task, 1))
    session.get_one(Person, 1).org_id = 2
    session.commit()
    assert recorder.by_stream()["gid://app/Org/1/tasks"] == [("delete", "1")]


def test_a_composite_foreign_key_names_its_parent(session: Session, recorder: Recorder) -> None:
    add(session, recorder, slot_room="a/b", slot_hour=9)
    stream = "gid://app/Slot/a%2Fb/9/tasks"
    assert recorder.by_stream()[stream] == [("insert", "1")]
    recorder.clear()
    session.get_one(Task, 1).slot_hour = None
    session.commit()
    assert recorder.by_stream()[stream] == [("delete", "1")]
    (event,) = recorder.events(stream)
    assert event["old_value"]["slot_hour"] == 9 or event["old_value"]["slot_hour"] == "9"


def test_an_old_value_is_the_row_before_the_transaction(session: Session, recorder: Recorder) -> None:
    add(session, recorder, slot_room="c", slot_hour=1)
    recorder.clear()
    task = session.get_one(Task, 1)
    for title in ("second task", "third task"):
        task.title = title
        session.flush()
    session.expire(task)
    task.title = "fourth task"
    session.commit()
    (event,) = recorder.events("gid://app/Slot/c/1/tasks")
    assert (event["old_value"]["title"], event["value"]["title"]) == ("first task", "fourth task")


def test_a_key_of_its_own_moves_the_row_when_it_changes(session: Session, recorder: Recorder) -> None:
    add(session, recorder)
    assert recorder.by_stream()["words"] == [("insert", "first")]
    recorder.clear()
    session.get_one(Task, 1).title = "second task"
    session.commit()
    assert recorder.by_stream()["words"] == [("delete", "first"), ("insert", "second")]
    assert recorder.summary("titles") == [("delete", "task", "first task"), ("insert", "task", "second task")]


def test_on_counts_for_what_the_transaction_did_in_all(session: Session, recorder: Recorder) -> None:
    task = Task(id=1, title="draft", tag="x")
    session.add(task)
    session.flush()
    task.tag = "y"
    session.commit()
    (event,) = recorder.events("titles")
    assert (event["headers"]["operation"], event["value"]["tag"]) == ("insert", "y")
    recorder.clear()
    task.tag = "z"
    session.commit()
    assert "titles" not in recorder.streams


def test_a_row_is_on_a_stream_while_its_condition_holds(session: Session, recorder: Recorder) -> None:
    """Methods and properties of the model are asked about the past as well."""
    add(session, recorder, done=True)
    assert "open" not in recorder.streams
    for done, expected in ((False, "insert"), (True, "delete")):
        recorder.clear()
        session.get_one(Task, 1).done = done
        session.commit()
        assert recorder.by_stream()["open"] == [(expected, "1")]
    recorder.clear()
    session.get_one(Task, 1).tag = "still done"
    session.commit()
    assert "open" not in recorder.streams


def test_a_function_may_give_records_names_or_nothing(session: Session, recorder: Recorder) -> None:
    add(session, recorder, slot=session.get_one(Slot, ("c", 1)), tag="red")
    assert recorder.by_stream()["gid://app/Slot/c/1/functions"] == [("insert", "1")]
    assert recorder.by_stream()["tag-red/tasks"] == [("insert", "1")]
    recorder.clear()
    session.get_one(Task, 1).tag = "blue"
    session.commit()
    assert recorder.by_stream()["tag-red/tasks"] == [("delete", "1")]
    assert recorder.by_stream()["tag-blue/tasks"] == [("insert", "1")]


def test_a_function_that_raises_costs_its_own_event_only(
    session: Session, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    from broadcastable.counters import counters

    failed = counters["events_failed"]
    session.add_all([Task(id=number, title="break") for number in range(1, 4)])
    session.commit()
    assert session.scalar(sa.select(sa.func.count()).select_from(Task)) == 3
    assert "broken" not in recorder.streams
    assert len(recorder.events("open")) == 3
    assert counters["events_failed"] - failed == 3
    (record,) = (each for each in caplog.records if each.levelname == "ERROR")
    assert record.levelname == "ERROR"
    assert "Task 1" in record.getMessage()
    assert "broken" in record.getMessage()


# What is refused


@pytest.mark.parametrize(
    ("declaration", "match"),
    [
        (streams_to("parnt", "things"), "did you mean 'parent'"),
        (streams_to("parent_id"), "not a relationship"),
        (streams_to("parent.missing", "things"), "Parent has no relationship 'missing'"),
        (streams_to("parent.children"), "does not lead from a foreign key"),
        (streams_to("live_parent", "things"), "does not lead from a foreign key of Child alone"),
        (streams_to("first_parent", "things"), "does not lead from a foreign key of Child alone"),
        (streams_to("either_parent", "things"), "does not lead from a foreign key of Child alone"),
        (streams_to("nowhere.at.all"), "no relationship 'nowhere'"),
        (streams_to("parent", "a//b"), "empty segment"),
        (streams_to("__ds"), "reserves"),
        (streams(key="nothing"), "no column"),
        (streams(value=int), "no Pydantic model"),
        ("messages", "streams_to"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused_when_mappers_are_configured(declaration: Any, match: str) -> None:
    base: Any = registry().generate_base()

    class Parent(base):
        __tablename__ = "parents"
        id: Mapped[int] = mapped_column(primary_key=True)
        is_live: Mapped[bool]
        children = relationship("Child", back_populates="parent")

    class Child(base, Broadcastable):
        __tablename__ = "children"
        __streams__ = [declaration]  # noqa: RUF012
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int] = mapped_column(sa.ForeignKey("parents.id"))
        other_id: Mapped[int]
        parent = relationship(Parent, back_populates="children")
        live_parent = relationship(
            Parent, viewonly=True, primaryjoin=lambda: sa.and_(Child.parent_id == Parent.id, Parent.is_live)
        )
        first_parent = relationship(
            Parent, viewonly=True, primaryjoin=lambda: sa.and_(Child.parent_id == Parent.id, Parent.id == 1)
        )
        either_parent = relationship(
            Parent,
            viewonly=True,
            foreign_keys=lambda: [Child.parent_id, Child.other_id],
            primaryjoin=lambda: sa.or_(Child.parent_id == Parent.id, Child.other_id == Parent.id),
        )

    try:
        with pytest.raises(DeclarationError, match=match):
            configure_mappers()
    finally:
        Child.__streams__ = ()
        base.registry.dispose()


@pytest.mark.parametrize("wrong", [{"on": ["insret"]}, {"on": []}])
def test_an_unknown_operation_is_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(DeclarationError, match="on="):
        streams(**wrong)
    with pytest.raises(DeclarationError, match="needs a target"):
        streams_to()


def test_a_plain_name_that_looks_like_a_relationship_goes_into_a_tuple(recorder: Recorder) -> None:
    class Here(DeclarativeBase):
        pass

    class Thing(Here, Broadcastable):
        __tablename__ = "things"
        __streams__ = streams_to(("thing_id",), "x")
        id: Mapped[int] = mapped_column(primary_key=True)
        thing_id: Mapped[int | None]

    engine = services.open_engine("sqlite://")
    Here.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": recorder}) as session:
        session.add(Thing())
        session.commit()
    engine.dispose()
    assert recorder.streams == ["thing_id/x"]


# Kinds of mapping


def test_every_kind_of_mapping_is_captured(recorder: Recorder) -> None:
    class Kinds(DeclarativeBase):
        pass

    class Timestamped:
        made_by: Mapped[str] = mapped_column(default="me")

    class Animal(Kinds, Broadcastable, Timestamped):
        __tablename__ = "animals"
        __streams__ = streams_to("animals")
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012
        id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
        kind: Mapped[str]

    class Cat(Animal):
        """Single table."""

        __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012
        lives: Mapped[int | None]

    class BigDog(Animal):
        """Joined."""

        __tablename__ = "dogs"
        __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012
        id: Mapped[uuid.UUID] = mapped_column(sa.ForeignKey("animals.id"), primary_key=True)
        tricks: Mapped[int]

    class Stone(Kinds, Broadcastable):
        __tablename__ = "stones"
        __streams__ = streams_to("stones")
        code: Mapped[str] = mapped_column(primary_key=True)
        weight: Mapped[int]
        version: Mapped[int] = mapped_column()
        __mapper_args__ = {"version_id_col": version}  # noqa: RUF012

    class Gem(Stone):
        """Concrete."""

        __tablename__ = "gems"
        __stream_type__ = "jewel"
        __mapper_args__ = {"concrete": True}  # noqa: RUF012
        code: Mapped[str] = mapped_column(primary_key=True)
        weight: Mapped[int]
        version: Mapped[int]

    class Coin(MappedAsDataclass, Kinds, Broadcastable):
        __tablename__ = "coins"
        __streams__ = streams_to("coins")
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        worth: Mapped[int]

    class Plain(Broadcastable):
        __streams__ = streams_to("plain")
        id: int
        name: str

    plain = sa.Table("plain", Kinds.metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.Text))
    Kinds.registry.map_imperatively(Plain, plain)

    engine = services.open_engine("sqlite://")
    Kinds.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": recorder}) as session:
        cat, dog, stone, gem, coin, other = Cat(lives=9), BigDog(tricks=2), Stone(), Gem(), Coin(worth=5), Plain()
        stone.code, stone.weight = "a", 1
        gem.code, gem.weight, gem.version = "b", 2, 1
        other.name = "x"
        session.add_all([cat, dog, stone, gem, coin, other])
        session.commit()
        assert {event["type"] for event in recorder.events()} == {"cat", "big_dog", "stone", "jewel", "coin", "plain"}
        values = {event["type"]: event["value"] for event in recorder.events()}
        assert values["cat"] == {"id": str(cat.id), "kind": "cat", "made_by": "me", "lives": 9}
        assert values["big_dog"] == {"id": str(dog.id), "kind": "dog", "made_by": "me", "tricks": 2}
        assert values["stone"]["version"] == 1
        recorder.clear()
        stone.weight = 3
        dog.tricks = 3
        session.commit()
        values = {event["type"]: event["value"] for event in recorder.events()}
        assert (values["stone"]["version"], values["big_dog"]["tricks"]) == (2, 3)
        assert cat.to_gid().model == "Cat"
        assert broadcastable_model("BigDog") is BigDog
        session.delete(dog)
        session.commit()
        assert recorder.summary()[-1] == ("delete", "big_dog", str(dog.id))
    engine.dispose()
    with pytest.raises(UnknownModelError, match="No Broadcastable model"):
        broadcastable_model("Nobody")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Room", "room"), ("ChatRoom", "chat_room"), ("HTTPLog", "http_log"), ("V2Thing", "v2_thing"), ("A", "a")],
)
def test_a_type_is_the_class_name_in_snake_case(name: str, expected: str) -> None:
    assert snake_case(name) == expected
