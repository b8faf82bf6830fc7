"""The fold of every stream equals the committed table, whatever a session does.

Random programs over everything that a session can do; the oracle is the database, read through a connection of its own
after each step. `BROADCASTABLE_PROGRAMS` says how many programs each backend gets.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, SessionTransaction, mapped_column, relationship
from sqlalchemy.orm.util import identity_key

from broadcastable import Broadcastable, streams, streams_to, suppressing_streams
from broadcastable.counters import counters
from tests import services
from tests.capture.recorder import Fold, Recorder, fold

PROGRAMS = int(os.environ.get("BROADCASTABLE_PROGRAMS", "2000"))

ASYNC_SHARE = 2
"""One program in so many is run under asyncio as well, where the drivers' threads and loops take most of the time."""

T = TypeVar("T")


class Base(DeclarativeBase):
    type_annotation_map = {str: sa.String(50)}  # noqa: RUF012 - MariaDB wants a length


class Shelf(Base):
    __tablename__ = "shelves"
    id: Mapped[int] = mapped_column(primary_key=True)


class Box(Base):
    __tablename__ = "boxes"
    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int] = mapped_column(sa.ForeignKey("shelves.id"))
    shelf: Mapped[Shelf] = relationship()
    things: Mapped[list[Thing]] = relationship(back_populates="box")


class Thing(Base, Broadcastable):
    __tablename__ = "things"
    __stream_bulk__ = "capture"
    __streams__ = (
        streams(),
        streams_to("box", "things", old_value=True),
        streams_to("box.shelf", "things"),
        streams_to(lambda thing: f"label/{thing.label}" if thing.label else None),
        streams_to("shown", when=lambda thing: not thing.hidden),
        streams_to(
            "by-label", key=lambda thing: f"{thing.label}/{thing.id}", when=lambda thing: thing.label is not None
        ),
        streams_to(lambda thing: [thing.box, "by-function"] if thing.box_id else None),
    )

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    label: Mapped[str | None]
    hidden: Mapped[bool] = mapped_column(default=False)
    revision: Mapped[int] = mapped_column(server_default="1", onupdate=sa.text("revision + 1"))
    box_id: Mapped[int | None] = mapped_column(sa.ForeignKey("boxes.id"))
    box: Mapped[Box | None] = relationship(back_populates="things")


SHELF_OF_BOX = {1: 1, 2: 1, 3: 2}


def expected(rows: list[Any], ignored: set[int]) -> Fold:
    """What readers should have, from the rows of the table alone."""
    found: Fold = {}
    for row in rows:
        if row.id in ignored:
            continue
        value = {
            "id": str(row.id),
            "name": row.name,
            "label": row.label,
            "hidden": bool(row.hidden),
            "revision": row.revision,
            "box_id": None if row.box_id is None else str(row.box_id),
        }
        names = [f"gid://app/Thing/{row.id}"]
        if row.box_id is not None:
            names += [f"gid://app/Box/{row.box_id}/things", f"gid://app/Shelf/{SHELF_OF_BOX[row.box_id]}/things"]
            names.append(f"gid://app/Box/{row.box_id}/by-function")
        if row.label is not None:
            names.append(f"label/{row.label}")
            found.setdefault("by-label", {})["thing", f"{row.label}/{row.id}"] = value
        if not row.hidden:
            names.append("shown")
        for name in names:
            found.setdefault(name, {})["thing", str(row.id)] = value
    return found


class Programs(RuleBasedStateMachine):
    """Programs for a `Session`; subclasses say where."""

    engine: ClassVar[sa.Engine]

    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()
        # Rows that were changed while streams were suppressed: readers do not have them as they are.
        self.ignored: set[int] = set()
        self.savepoints: list[SessionTransaction] = []
        # What the program has in its variables: the session lets go of what has no change.
        self.held: set[Thing] = set()
        self.failed_before = counters["events_failed"]
        with self.engine.begin() as connection:
            connection.execute(sa.delete(Thing.__table__))
        self.open(autoflush=True, expire_on_commit=True)

    # What differs under asyncio

    def open(self, **options: Any) -> None:
        self.session = Session(self.engine, info={"durable_streams": self.recorder}, **options)

    def run(self, step: Callable[[Session], T]) -> T:
        return step(self.session)

    def call(self, name: str) -> None:
        getattr(self.session, name)()

    # Steps

    def do(self, step: Callable[[Session], object]) -> None:
        """A step, or where the database refuses it (keys that clash), a rollback: what was captured dies with it."""
        try:
            self.run(step)
        except IntegrityError:
            self.end("rollback")

    def end(self, name: str) -> None:
        self.savepoints.clear()
        try:
            self.call(name)
        except IntegrityError:
            self.call("rollback")

    @initialize(autoflush=st.booleans(), expire_on_commit=st.booleans(), transactional=st.booleans())
    def choose(self, autoflush: bool, expire_on_commit: bool, transactional: bool) -> None:
        self.end("close")
        self.recorder.transactional = transactional
        self.open(autoflush=autoflush, expire_on_commit=expire_on_commit)

    def pick(self, session: Session, number: int) -> Thing | None:
        """One of the rows as the session sees them, without a flush; the same number picks the same one again.

        No query for whole rows: it would give new objects what they have been left without.
        """
        there: list[tuple[int, int | Thing]] = []
        with session.no_autoflush:
            for identity in session.scalars(sa.select(Thing.id)):
                known = session.identity_map.get(identity_key(Thing, identity))
                if known is None or known not in session.deleted:
                    there.append((identity if known is None else sa.inspect(known).dict.get("id", identity), identity))
            there += [(sa.inspect(each).dict.get("id", 0), each) for each in session.new if isinstance(each, Thing)]
            there.sort(key=lambda each: each[0])
            if not there:
                return None
            _, picked = there[number % len(there)]
            thing = picked if isinstance(picked, Thing) else session.get_one(Thing, picked)
            self.held.add(thing)
            return thing

    def with_picked(self, number: int, step: Callable[[Session, Thing], None]) -> None:
        def picked(session: Session) -> None:
            thing = self.pick(session, number)
            if thing is not None:
                step(session, thing)

        self.do(picked)

    def free_id(self, session: Session, number: int) -> int | None:
        """An id that no row has, neither in the database nor in the session; ids come back after a delete."""
        with session.no_autoflush:
            taken = set(session.scalars(sa.select(Thing.id)))
        self.forget_rows_but(session, taken)
        # What is deleted is gone with the next flush: SQLAlchemy makes a new row of its key one UPDATE.
        taken -= {sa.inspect(each).identity[0] for each in session.deleted}
        for each in (*session.new, *session.identity_map.values()):
            if isinstance(each, Thing) and each not in session.deleted:
                taken.add(sa.inspect(each).dict.get("id", 0))
        free = [each for each in range(1, 7) if each not in taken]
        return free[number % len(free)] if free else None

    def forget_rows_but(self, session: Session, there: set[int]) -> None:
        """Expunge what has no row any more.

        A bulk DELETE may leave such objects in the session, and so does the rollback of a bulk INSERT, until they are
        collected; SQLAlchemy warns of a new row that takes the key of one. What a program does must not depend on when
        Python collects.
        """
        for each in session.identity_map.values():
            if isinstance(each, Thing) and sa.inspect(each).identity[0] not in there:
                self.expunge(session, each)

    def expunge(self, session: Session, thing: Thing) -> None:
        """And let go of it: a rollback gives a key back to an object that had another, be it in the session or not."""
        session.expunge(thing)
        self.held.discard(thing)

    numbers = st.integers(0, 5)
    boxes = st.sampled_from([None, 1, 2, 3])
    labels = st.sampled_from([None, "a", "b"])

    @rule(
        number=numbers, box=boxes, label=labels, hidden=st.booleans(), way=st.sampled_from(["key", "parent", "child"])
    )
    def add(self, number: int, box: int | None, label: str | None, hidden: bool, way: str) -> None:
        def step(session: Session) -> None:
            identity = self.free_id(session, number)
            if identity is None:
                return
            with session.no_autoflush:
                thing = Thing(id=identity, name="new", hidden=hidden)
                if label is not None:
                    thing.label = label
                if box is not None:
                    if way == "key":
                        thing.box_id = box
                    elif way == "parent":
                        thing.box = session.get_one(Box, box)
                    else:
                        parent = session.get_one(Box, box)
                        parent.things.append(thing)
                session.add(thing)
                self.held.add(thing)

        self.do(step)

    @rule()
    def let_go(self) -> None:
        self.held.clear()

    @rule(number=numbers, name=st.sampled_from(["x", "y", "z"]))
    def change(self, number: int, name: str) -> None:
        self.with_picked(number, lambda session, thing: setattr(thing, "name", name))

    @rule(number=numbers)
    def change_by_expression(self, number: int) -> None:
        self.with_picked(
            number,
            lambda session, thing: setattr(thing, "name", Thing.name + "!") if sa.inspect(thing).persistent else None,
        )

    @rule(number=numbers)
    def change_nothing(self, number: int) -> None:
        def step(session: Session, thing: Thing) -> None:
            with session.no_autoflush:
                thing.name = thing.name

        self.with_picked(number, step)

    def set(self, number: int, *, expired: bool, **values: Any) -> None:
        """Change attributes of a row that is loaded, or of one whose old values only the database knows."""

        def step(session: Session, thing: Thing) -> None:
            with session.no_autoflush:
                if expired and sa.inspect(thing).persistent and not session.is_modified(thing):
                    session.expire(thing)
                for name, value in values.items():
                    setattr(thing, name, value)

        self.with_picked(number, step)

    @rule(number=numbers, label=labels, expired=st.booleans())
    def relabel(self, number: int, label: str | None, expired: bool) -> None:
        self.set(number, expired=expired, label=label)

    @rule(number=numbers, hidden=st.booleans(), expired=st.booleans())
    def hide(self, number: int, hidden: bool, expired: bool) -> None:
        self.set(number, expired=expired, hidden=hidden)

    @rule(number=numbers, box=boxes, way=st.sampled_from(["key", "parent loaded", "parent", "child", "expired"]))
    def move(self, number: int, box: int | None, way: str) -> None:
        def step(session: Session, thing: Thing) -> None:
            with session.no_autoflush:
                if way in {"key", "parent loaded"}:
                    if way == "parent loaded":
                        parent = thing.box
                        assert parent is None or parent.id
                    thing.box_id = box
                elif way == "expired" and sa.inspect(thing).persistent and not session.is_modified(thing):
                    session.expire(thing)
                    thing.box_id = box
                elif way == "child" and box is not None:
                    parent = session.get_one(Box, box)
                    if thing not in parent.things:
                        parent.things.append(thing)
                else:
                    thing.box = None if box is None else session.get_one(Box, box)

        self.with_picked(number, step)

    @rule(number=numbers, other=numbers)
    def rekey(self, number: int, other: int) -> None:
        def step(session: Session, thing: Thing) -> None:
            identity = self.free_id(session, other)
            deleted = {sa.inspect(each).identity[0] for each in session.deleted}
            if identity is not None and identity not in deleted and thing.id not in self.ignored:
                thing.id = identity

        self.with_picked(number, step)

    @rule(number=numbers)
    def delete(self, number: int) -> None:
        def step(session: Session, thing: Thing) -> None:
            with session.no_autoflush:
                if sa.inspect(thing).persistent:
                    session.delete(thing)
                else:
                    thing.box = None
                    self.expunge(session, thing)

        self.with_picked(number, step)

    def in_bulk(self, step: Callable[[Session], object], *, synchronized: bool) -> None:
        """A bulk statement, and where SQLAlchemy leaves the session's objects as they were, an end to what they say."""

        def flushed(session: Session) -> None:
            session.flush()
            step(session)
            if not synchronized:
                session.expire_all()

        self.do(flushed)

    @rule(label=labels, box=boxes, hidden=st.booleans(), orm=st.booleans())
    def update_in_bulk(self, label: str | None, box: int | None, hidden: bool, orm: bool) -> None:
        of = Thing if orm else Thing.__table__
        statement = sa.update(of).where(Thing.label == label)
        self.in_bulk(lambda session: session.execute(statement.values(box_id=box, hidden=hidden)), synchronized=orm)

    @rule(label=labels, box=boxes)
    def delete_in_bulk(self, label: str | None, box: int | None) -> None:
        statement = sa.delete(Thing).where(Thing.label == label, Thing.box_id == box)
        self.in_bulk(lambda session: session.execute(statement), synchronized=True)

    @rule(number=numbers, label=labels, box=boxes, way=st.sampled_from(["execute", "scalars", "values", "mappings"]))
    def insert_in_bulk(self, number: int, label: str | None, box: int | None, way: str) -> None:
        def step(session: Session) -> None:
            identity = self.free_id(session, number)
            if identity is None:
                return
            row = {"id": identity, "name": "bulk", "label": label, "box_id": box, "hidden": False}
            if way == "execute":
                session.execute(sa.insert(Thing), [row])
            elif way == "scalars":
                assert session.scalars(sa.insert(Thing).returning(Thing.name), [row]).all() == ["bulk"]
            elif way == "values":
                assert session.execute(sa.insert(Thing).values([row])).rowcount in (1, -1)
            else:
                session.bulk_insert_mappings(Thing, [row])

        self.in_bulk(step, synchronized=way != "mappings")

    @rule(number=numbers, name=st.sampled_from(["s", "t"]), box=boxes, way=st.sampled_from(["execute", "mappings"]))
    def update_in_bulk_by_key(self, number: int, name: str, box: int | None, way: str) -> None:
        def step(session: Session) -> None:
            thing = self.pick(session, number)
            if thing is None:
                return
            row = {"id": thing.id, "name": name, "box_id": box}
            if way == "execute":
                session.execute(sa.update(Thing), [row])
            else:
                session.bulk_update_mappings(Thing, [row])

        self.in_bulk(step, synchronized=way != "mappings")

    @rule(number=numbers, other=numbers, name=st.sampled_from(["v", "w"]), box=boxes)
    def save_in_bulk(self, number: int, other: int, name: str, box: int | None) -> None:
        def step(session: Session) -> None:
            thing, identity = self.pick(session, number), self.free_id(session, other)
            saved = [] if identity is None else [Thing(id=identity, name=name, box_id=box)]
            if thing is not None:
                assert thing.name
                self.expunge(session, thing)
                thing.name, thing.box_id = name, box
                saved.append(thing)
            session.bulk_save_objects(saved)

        self.in_bulk(step, synchronized=False)

    @rule(number=numbers, name=st.sampled_from(["p", "q"]))
    def change_suppressed(self, number: int, name: str) -> None:
        def step(session: Session) -> None:
            session.flush()
            thing = self.pick(session, number)
            if thing is None:
                return
            self.ignored.add(thing.id)
            with Thing.suppressing_streams() if number % 2 else suppressing_streams():
                thing.name = name
                session.flush()

        self.do(step)

    @rule()
    def flush(self) -> None:
        self.do(lambda session: session.flush())

    @rule()
    def fail_in_flush(self) -> None:
        def step(session: Session) -> None:
            session.flush()
            with session.no_autoflush:
                thing = self.pick(session, 0)
                if thing is not None:
                    thing.name = "never seen"
                session.add(Thing(id=90))  # its name is missing
            try:
                session.flush()
            except IntegrityError:
                pass
            else:
                raise AssertionError("a row without its name was stored")

        self.do(step)
        if self.savepoints:
            self.do(lambda session: self.savepoints.pop().rollback())
        else:
            self.end("rollback")

    @rule()
    def expire_all(self) -> None:
        def step(session: Session) -> None:
            session.flush()
            session.expire_all()

        self.do(step)

    @rule()
    def expunge_all(self) -> None:
        def step(session: Session) -> None:
            session.flush()
            session.expunge_all()
            self.held.clear()

        self.do(step)

    @precondition(lambda self: len(self.savepoints) < 3)
    @rule()
    def begin_nested(self) -> None:
        self.do(lambda session: self.savepoints.append(session.begin_nested()))

    @precondition(lambda self: self.savepoints)
    @rule()
    def release(self) -> None:
        self.do(lambda session: self.savepoints.pop().commit())

    @precondition(lambda self: self.savepoints)
    @rule(depth=st.integers(0, 2))
    def roll_back_to(self, depth: int) -> None:
        def step(session: Session) -> None:
            depth_there_is = min(depth, len(self.savepoints) - 1)
            self.savepoints[depth_there_is].rollback()
            del self.savepoints[depth_there_is:]

        self.do(step)

    @rule()
    def commit(self) -> None:
        self.end("commit")

    @rule()
    def commit_through_the_root(self) -> None:
        """As a `with session.begin():` block does that left savepoints open."""

        def step(session: Session) -> None:
            root = session.get_transaction()
            if root is not None:
                root.commit()
            self.savepoints.clear()

        self.do(step)

    @rule()
    def rollback(self) -> None:
        self.end("rollback")

    @rule()
    def close(self) -> None:
        self.end("close")

    # The promise

    def is_ignored(self, key: str) -> bool:
        return int(key.rpartition("/")[2]) in self.ignored

    @invariant()
    def readers_have_what_is_committed(self) -> None:
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(Thing.__table__)).all()
        seen = {
            stream: {key: value for key, value in rows.items() if not self.is_ignored(key[1])}
            for stream, rows in fold(self.recorder.batches, lenient=self.is_ignored).items()
        }
        assert {stream: rows for stream, rows in seen.items() if rows} == expected(rows, self.ignored)

    @invariant()
    def no_event_fails(self) -> None:
        """None that could not be made, and none that was a guess: where it cannot be told where a row was."""
        assert counters["events_failed"] == self.failed_before

    def teardown(self) -> None:
        self.end("close")


class AsyncPrograms(Programs):
    """The same programs for an `AsyncSession`."""

    async_engine: ClassVar[AsyncEngine]
    loop: ClassVar[asyncio.AbstractEventLoop]

    def open(self, **options: Any) -> None:
        self.async_session = AsyncSession(self.async_engine, info={"durable_streams": self.recorder}, **options)

    def run(self, step: Callable[[Session], T]) -> T:
        return self.loop.run_until_complete(self.async_session.run_sync(step))

    def call(self, name: str) -> None:
        self.loop.run_until_complete(getattr(self.async_session, name)())


def programs(number: int) -> settings:
    return settings(
        max_examples=number,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        print_blob=True,
    )


def prepare(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Shelf.__table__), [{"id": each} for each in sorted(set(SHELF_OF_BOX.values()))])
        connection.execute(
            sa.insert(Box.__table__), [{"id": box, "shelf_id": shelf} for box, shelf in SHELF_OF_BOX.items()]
        )


def test_the_fold_of_every_stream_is_the_committed_table(engine: sa.Engine) -> None:
    """Atomicity of capture: an event exists if and only if its change was committed, with the right value."""
    prepare(engine)
    machine = type("SessionPrograms", (Programs,), {"engine": engine})
    run_state_machine_as_test(machine, settings=programs(PROGRAMS))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_the_fold_of_every_stream_is_the_committed_table_under_asyncio(
    async_database_url: str, loop: asyncio.AbstractEventLoop
) -> None:
    engine = services.open_engine(async_database_url)
    async_engine = services.open_async_engine(async_database_url)
    prepare(engine)
    machine = type(
        "AsyncSessionPrograms", (AsyncPrograms,), {"engine": engine, "async_engine": async_engine, "loop": loop}
    )
    try:
        run_state_machine_as_test(machine, settings=programs(PROGRAMS // ASYNC_SHARE))
    finally:
        loop.run_until_complete(async_engine.dispose())
        engine.dispose()
