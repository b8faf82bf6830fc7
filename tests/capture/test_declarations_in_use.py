"""When plans are made: by the first statement of a process too, and by each use of a class with a mistake."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.declarative import DeferredReflection
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, configure_mappers, mapped_column, registry, relationship

from broadcastable import Broadcastable, DeclarationError, streams, streams_to
from broadcastable.bulk import UncapturedSecondary
from tests import services
from tests.capture.recorder import Recorder

Models = list[tuple[registry, type[Any]]]


@pytest.fixture
def mapped() -> Iterator[Models]:
    """Add what a test maps: its mistakes are not to be met by another test."""
    mapped: Models = []
    yield mapped
    for its_registry, cls in mapped:
        cls.__streams__ = ()
        its_registry.dispose()


@contextlib.contextmanager
def opened(metadata: sa.MetaData, recorder: Recorder) -> Iterator[Session]:
    """A session on a new database with these tables, and in each one row, which another process has written."""
    engine = services.open_engine("sqlite://")
    metadata.create_all(engine)
    with engine.begin() as connection:
        for table in metadata.sorted_tables:
            connection.execute(sa.text(f"INSERT INTO {table.name} (id) VALUES (1)"))
    with Session(engine, info={"durable_streams": recorder}) as session:
        yield session
    engine.dispose()


# The first statement of a process


def _with_a_base() -> type[Any]:
    class Here(DeclarativeBase):
        pass

    class Job(Here, Broadcastable):
        __tablename__ = "jobs"
        __stream_bulk__ = "capture"
        __streams__ = streams_to("jobs")
        id: Mapped[int] = mapped_column(primary_key=True)
        state: Mapped[str | None]

    return Job


def _with_a_metaclass() -> type[Any]:
    base: Any = registry().generate_base()

    class Job(base, Broadcastable):
        __tablename__ = "jobs"
        __stream_bulk__ = "capture"
        __streams__ = streams_to("jobs")
        id = mapped_column(sa.Integer, primary_key=True)
        state = mapped_column(sa.String)

    return Job


def _by_hand() -> type[Any]:
    class Job(Broadcastable):
        __stream_bulk__ = "capture"
        __streams__ = streams_to("jobs")

    here = registry()
    id_, state = sa.Column("id", sa.Integer, primary_key=True), sa.Column("state", sa.String)
    here.map_imperatively(Job, sa.Table("jobs", here.metadata, id_, state))
    return Job


FIRST: list[tuple[str, Callable[[Session, Any], object]]] = [
    ("update", lambda session, job: session.execute(sa.update(job).values(state="x"))),
    ("update", lambda session, job: session.execute(sa.update(sa.inspect(job).local_table).values(state="x"))),
    ("update", lambda session, job: session.execute(sa.update(job), [{"id": 1, "state": "x"}])),
    ("delete", lambda session, job: session.execute(sa.delete(job))),
    ("insert", lambda session, job: session.execute(sa.insert(job), [{"id": 2}])),
    ("update", lambda session, job: session.query(job).update({"state": "x"})),
    ("insert", lambda session, job: session.bulk_insert_mappings(job, [{"id": 2}])),
    ("update", lambda session, job: session.bulk_update_mappings(job, [{"id": 1, "state": "x"}])),
]


@pytest.mark.parametrize("map_job", [_with_a_base, _with_a_metaclass, _by_hand])
@pytest.mark.parametrize(("operation", "first"), FIRST, ids=range(len(FIRST)))
def test_a_bulk_statement_that_comes_before_all_else_is_captured(
    recorder: Recorder,
    mapped: Models,
    map_job: Callable[[], type[Any]],
    operation: str,
    first: Callable[[Session, Any], object],
) -> None:
    job = map_job()
    mapper: Any = sa.inspect(job)
    mapped.append((mapper.registry, job))
    with opened(mapper.registry.metadata, recorder) as session:
        first(session, job)
        session.commit()
    (event,) = recorder.events("jobs")
    assert event["headers"]["operation"] == operation


def test_a_registry_that_is_not_complete_yet_waits_for_its_turn(recorder: Recorder, mapped: Models) -> None:
    class Elsewhere(DeclarativeBase):
        pass

    class Waiting(Elsewhere, Broadcastable):
        __tablename__ = "waiting"
        __streams__ = streams()
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("nowhere.id"))
        parent = relationship("NotImportedYet")

    job = _with_a_base()
    mapped += [(Elsewhere.registry, Waiting), (job.registry, job)]
    with opened(job.metadata, recorder) as session:
        session.add(job())
        session.commit()
    assert recorder.summary() == [("insert", "job", "2")]


def test_a_class_that_is_not_reflected_yet_is_in_nobodys_way(recorder: Recorder, mapped: Models) -> None:
    job = _with_a_base()

    class Here(DeclarativeBase):
        pass

    class Now(Here, Broadcastable):
        __tablename__ = "now"
        __streams__ = streams()
        id: Mapped[int] = mapped_column(primary_key=True)

    class Later(DeferredReflection, Here, Broadcastable):
        __tablename__ = "jobs"
        __stream_bulk__ = "capture"
        __streams__ = streams()

    mapped += [(job.registry, job), (Here.registry, Now), (Here.registry, Later)]
    configure_mappers()
    with opened(job.metadata, recorder) as session:
        Later.prepare(session.connection())
        session.execute(sa.update(Later).values(state="x"))
        session.commit()
    assert recorder.summary() == [("update", "later", "1")]


# A class with a mistake


def test_a_mistake_in_one_model_costs_no_other_its_events_and_is_told_each_time(
    recorder: Recorder, mapped: Models
) -> None:
    class Here(DeclarativeBase):
        pass

    class Before(Here, Broadcastable):
        __tablename__ = "before"
        __streams__ = streams_to("things")
        id: Mapped[int] = mapped_column(primary_key=True)

    class Wrong(Here, Broadcastable):
        __tablename__ = "wrong"
        __stream_bulk__ = "capture"
        __streams__ = streams_to("befor", "things")
        id: Mapped[int] = mapped_column(primary_key=True)
        before_id: Mapped[int | None] = mapped_column(sa.ForeignKey("before.id"))
        before: Mapped[Before | None] = relationship()

    mapped.append((Here.registry, Wrong))
    right = []
    for name in ("A", "B", "C", "D", "E", "F", "G", "H"):
        id_ = mapped_column(sa.Integer, primary_key=True)
        namespace = {"__tablename__": name, "__streams__": streams_to("things"), "id": id_}
        right.append(type(name, (Here, Broadcastable), namespace))
    with opened(Here.metadata, recorder) as session:
        with pytest.raises(DeclarationError, match="did you mean 'before'"):
            configure_mappers()
        session.add_all([Before(), *(cls() for cls in right)])
        session.commit()
        assert len(recorder.events("things")) == 9
        wrong = session.get_one(Wrong, 1)
        uses: list[Callable[[], object]] = [
            lambda: (session.add(Wrong()), session.commit()),
            lambda: (setattr(session.get_one(Wrong, 1), "before_id", 2), session.commit()),
            lambda: (session.delete(session.get_one(Wrong, 1)), session.commit()),
            lambda: session.execute(sa.update(Wrong).values(before_id=2)),
            lambda: session.execute(sa.delete(Wrong.__table__)),
            lambda: session.bulk_save_objects([Wrong()]),
        ]
        for use in uses * 2:
            with pytest.raises(DeclarationError, match="did you mean 'before'"):
                use()
            session.rollback()
        assert session.scalars(sa.select(Wrong)).all() == [wrong]
        assert wrong.before_id is None
    assert len(recorder.events()) == 9


# A table that is written behind its model's back


def test_a_relationship_that_writes_a_models_table_is_warned_of_once(mapped: Models) -> None:
    class Here(DeclarativeBase):
        pass

    class Label(Here):
        __tablename__ = "labels"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Post(Here):
        __tablename__ = "posts"
        id: Mapped[int] = mapped_column(primary_key=True)
        labels: Mapped[list[Label]] = relationship(secondary="labellings")
        seen: Mapped[list[Label]] = relationship(secondary="labellings", viewonly=True)
        quiet: Mapped[list[Label]] = relationship(secondary="quiet_labellings")
        streamless: Mapped[list[Label]] = relationship(secondary="plain_labellings")

    class Link:
        post_id: Mapped[int] = mapped_column(sa.ForeignKey("posts.id"), primary_key=True)
        label_id: Mapped[int] = mapped_column(sa.ForeignKey("labels.id"), primary_key=True)

    class Labelling(Link, Here, Broadcastable):
        __tablename__ = "labellings"
        __streams__ = streams()

    class QuietLabelling(Link, Here, Broadcastable):
        __tablename__ = "quiet_labellings"
        __stream_bulk__ = "ignore"
        __streams__ = streams()

    class PlainLabelling(Link, Here, Broadcastable):
        __tablename__ = "plain_labellings"

    mapped += [(Here.registry, Labelling), (Here.registry, QuietLabelling)]
    with pytest.warns(UncapturedSecondary, match=r"Post\.labels .*viewonly=True") as caught:
        configure_mappers()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job = _with_a_base()
        mapped.append((job.registry, job))
        configure_mappers()
