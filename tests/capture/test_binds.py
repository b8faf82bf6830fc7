"""Sessions that have more than one database to choose from, and rows that are not found where they were written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, load_only, mapped_column, relationship

from broadcastable import Broadcastable, UsageError, confirm_txid, streams, streams_to, transactions
from broadcastable.counters import counters
from tests import services
from tests.capture.recorder import Recorder


class Base(DeclarativeBase):
    pass


class Chain(Base, Broadcastable):
    __tablename__ = "chains"
    __streams__ = streams()

    id: Mapped[int] = mapped_column(primary_key=True)


class Shop(Base, Broadcastable):
    __tablename__ = "shops"
    __streams__ = streams()

    id: Mapped[int] = mapped_column(primary_key=True)
    chain_id: Mapped[int] = mapped_column(sa.ForeignKey("chains.id"))
    chain: Mapped[Chain] = relationship()


class Order(Base, Broadcastable):
    __tablename__ = "orders"
    __streams__ = (streams_to("orders"), streams_to("shop.chain", "orders"))
    __stream_bulk__ = "capture"
    __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012 - so that rows are read again before the commit

    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(server_default="new")
    shop_id: Mapped[int] = mapped_column(sa.ForeignKey("shops.id"), server_default="1")
    shop: Mapped[Shop] = relationship()


class Town(Base, Broadcastable):
    __tablename__ = "towns"
    __streams__ = streams_to("towns", old_value=True)

    id: Mapped[int] = mapped_column(primary_key=True)
    side: Mapped[str]
    name: Mapped[str | None]


class Note(Base):
    """Has no streams."""

    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)


class RoutingSession(Session):
    """Writes to one database and reads from another.

    SQLAlchemy documentation, "Session Partitioning", "Custom Vertical Partitioning".
    """

    leader: sa.Engine
    follower: sa.Engine

    def get_bind(self, mapper: Any = None, *, clause: Any = None, **kw: Any) -> sa.Engine:
        return self.leader if self._flushing or isinstance(clause, sa.Update | sa.Delete) else self.follower


@pytest.fixture
def leader(sqlite_url: str) -> Iterator[sa.Engine]:
    engine = services.open_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Chain).values(id=1))
        connection.execute(sa.insert(Shop).values(id=1, chain_id=1))
    yield engine
    engine.dispose()


@pytest.fixture
def routing(leader: sa.Engine, tmp_path: Path, recorder: Recorder) -> Iterator[RoutingSession]:
    """The follower lags behind: it has the tables and no row."""
    follower = services.open_engine(f"sqlite:///{tmp_path / 'follower.db'}")
    Base.metadata.create_all(follower)
    with RoutingSession(info={"durable_streams": recorder}) as session:
        session.leader, session.follower = leader, follower
        yield session
    follower.dispose()


CHAIN = "gid://app/Chain/1/orders"


@pytest.mark.parametrize("transactional", [False, True], ids=["after commit", "in the transaction"])
def test_rows_are_read_again_where_the_flush_wrote_them(
    routing: RoutingSession, recorder: Recorder, leader: sa.Engine, transactional: bool
) -> None:
    """What is read and staged before the commit is not in the flush, and must not go to the replica."""
    recorder.transactional = transactional
    routing.add(Order(id=1))
    routing.flush()
    with routing.begin_nested():
        routing.add(Order(id=2, shop_id=1))
    routing.commit()
    found = {stream: sorted(events) for stream, events in recorder.by_stream().items()}
    assert found == {stream: [("insert", "1"), ("insert", "2")] for stream in ("orders", CHAIN)}
    assert {event["value"]["state"] for event in recorder.events()} == {"new"}
    assert set(recorder.staged_in) == ({leader} if transactional else set())


def test_what_a_bulk_statement_changed_is_staged_where_it_was_executed(
    routing: RoutingSession, recorder: Recorder, leader: sa.Engine
) -> None:
    with leader.begin() as connection:
        connection.execute(sa.insert(Order).values(id=1))
    recorder.transactional = True
    routing.execute(sa.update(Order).values(state="old"))
    routing.commit()
    assert recorder.by_stream()["orders"] == [("update", "1")]
    assert recorder.staged_in == [leader]


def defer(session: Session, recorder: Recorder) -> None:
    transactions.defer(session, recorder, "room", b"{}")


def confirm(session: Session, recorder: Recorder) -> None:
    confirm_txid(session, "room")


deferred = pytest.mark.parametrize("add", [defer, confirm], ids=["a verb", "a confirmation"])


@deferred
def test_deferred_events_alone_go_where_the_session_writes(
    routing: RoutingSession, recorder: Recorder, leader: sa.Engine, add: Callable[[Session, Recorder], None]
) -> None:
    recorder.transactional = True
    routing.scalars(sa.select(Order)).all()
    add(routing, recorder)
    routing.commit()
    assert recorder.streams == ["room"]
    assert recorder.staged_in == [leader]


@deferred
def test_deferred_events_alone_go_to_the_one_database_that_the_transaction_uses(
    leader: sa.Engine, recorder: Recorder, add: Callable[[Session, Recorder], None]
) -> None:
    """Where no bind is the session's own, nothing but a row or a statement tells one."""
    recorder.transactional = True
    with Session(binds={Base: leader}, info={"durable_streams": recorder}) as session:
        session.get(Order, 1)
        add(session, recorder)
        session.commit()
    assert recorder.streams == ["room"]
    assert recorder.staged_in == [leader]


def test_deferred_events_that_belong_to_no_database_are_refused_before_anything_is_stored(
    leader: sa.Engine, tmp_path: Path, recorder: Recorder
) -> None:
    recorder.transactional = True
    other = services.open_engine(f"sqlite:///{tmp_path / 'other.db'}")
    Base.metadata.create_all(other)
    with Session(binds={Order: leader, Note: other}, info={"durable_streams": recorder}) as session:
        session.get(Order, 1)
        session.add(Note(id=1))
        session.flush()
        defer(session, recorder)
        with pytest.raises(UsageError, match="several databases"):
            session.commit()
        session.rollback()
        assert session.get(Note, 1) is None
        # A row of a model with streams tells.
        session.add(Order(id=1, shop_id=1, state="new"))
        defer(session, recorder)
        session.commit()
    assert "room" in recorder.streams
    assert recorder.staged_in == [leader]
    other.dispose()


def test_a_session_that_chooses_its_database_by_the_record_is_given_the_record(
    leader: sa.Engine, recorder: Recorder, tmp_path: Path
) -> None:
    """Also where a row is read before another one replaces it, which the unit of work tells nobody of."""
    other = services.open_engine(f"sqlite:///{tmp_path / 'south.db'}")
    Base.metadata.create_all(other)
    with other.begin() as connection:
        connection.execute(sa.insert(Town).values(id=1, side="south", name="Old"))
    session = ShardedSession(
        shards={"north": leader, "south": other},
        shard_chooser=lambda mapper, instance, clause=None: instance.side,
        identity_chooser=lambda *args, **kw: ["south"],
        execute_chooser=lambda context: ["south"],
        info={"durable_streams": recorder},
    )
    with session:
        session.delete(session.get_one(Town, 1, options=[load_only(Town.side)]))
        session.add(Town(id=1, side="south", name="New"))
        session.commit()
    [event] = recorder.events("towns")
    assert (event["old_value"]["name"], event["value"]["name"]) == ("Old", "New")
    other.dispose()


# Rows that are gone


def test_a_row_that_is_not_found_again_is_counted_and_said_once(
    leader: sa.Engine, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """Deleted past the session, or hidden by the database: nobody else would notice that its event is missing."""
    before = counters["events_failed"]
    with Session(leader, info={"durable_streams": recorder}) as session:
        session.add_all([Order(id=1, shop_id=1), Order(id=2, shop_id=1), Order(id=3, shop_id=1)])
        session.flush()
        session.execute(sa.text("DELETE FROM orders WHERE id < 3"))
        session.commit()
    assert recorder.by_stream() == {"orders": [("insert", "3")], CHAIN: [("insert", "3")]}
    assert counters["events_failed"] == before + 4
    [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert line.startswith("order 1 is not found before the commit, so its event is not sent (4 in all)")


@pytest.mark.parametrize("given", [{}, {"shop_id": 1}], ids=["its stream is not known yet", "only its value is not"])
@pytest.mark.parametrize("bulk", [False, True])
def test_a_row_deleted_again_by_the_session_is_not_missed(
    leader: sa.Engine, recorder: Recorder, given: dict[str, int], bulk: bool
) -> None:
    before = counters["events_failed"]
    with Session(leader, info={"durable_streams": recorder}) as session:
        order = Order(id=1, **given)
        session.add(order)
        session.flush()
        if bulk:
            session.execute(sa.delete(Order))
        else:
            session.delete(order)
        session.commit()
    assert counters["events_failed"] == before


def test_a_row_that_has_another_key_by_now_is_not_missed(
    leader: sa.Engine, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    with Session(leader, info={"durable_streams": recorder}) as session:
        order = Order(id=1)
        session.add(order)
        session.flush()
        order.id = 44
        session.commit()
    assert recorder.by_stream() == {"orders": [("insert", "44")], CHAIN: [("insert", "44")]}
    assert "is not found" not in caplog.text
