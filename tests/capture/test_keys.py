"""A row has one key, whether its session has it from the program that made it or from the database."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from broadcastable import Broadcastable, streams, streams_to
from broadcastable.names import gid_of, locate
from tests import services
from tests.capture.recorder import Recorder, fold

TWO_HOURS_AHEAD = datetime.timezone(datetime.timedelta(hours=2))
MOMENT = datetime.datetime(2026, 1, 1, 12, tzinfo=TWO_HOURS_AHEAD)


class Base(DeclarativeBase):
    pass


class Price(Base, Broadcastable):
    __tablename__ = "prices"
    __streams__ = (streams(), streams_to("prices"))

    amount: Mapped[decimal.Decimal] = mapped_column(sa.Numeric(10, 2), primary_key=True)
    name: Mapped[str | None] = mapped_column(sa.String(50))
    revision: Mapped[int] = mapped_column(server_default="1")
    __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012 - so that it is read by its key before the commit


class Reading(Base, Broadcastable):
    __tablename__ = "readings"
    __streams__ = (streams(), streams_to("readings"))

    sensor: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime.datetime] = mapped_column(sa.DateTime(timezone=True), primary_key=True)
    level: Mapped[float | None]


def live_through(engine: sa.Engine, recorder: Recorder, made: Any, changed: str) -> None:
    """Made by one session and changed there, changed by a second one, deleted by a third."""
    cls = type(made)
    with Session(engine, info={"durable_streams": recorder}) as session:
        session.add(made)
        session.commit()
        setattr(made, changed, 1)
        session.commit()
    with Session(engine, info={"durable_streams": recorder}) as session:
        found = session.scalars(sa.select(cls)).one()
        setattr(found, changed, 2)
        session.commit()
        assert locate(session, gid_of(found)) is found
    fold(recorder.batches)
    assert len({event["key"] for event in recorder.events()}) == 1
    assert len(set(recorder.streams)) == 2
    with Session(engine, info={"durable_streams": recorder}) as session:
        session.delete(session.scalars(sa.select(cls)).one())
        session.commit()
    assert fold(recorder.batches) == {}


@pytest.mark.parametrize("amount", ["5", "5.00", "500", "0"])
def test_a_number_is_one_key_with_and_without_its_zeros(engine: sa.Engine, recorder: Recorder, amount: str) -> None:
    Base.metadata.create_all(engine, tables=[Price.__table__])
    live_through(engine, recorder, Price(amount=decimal.Decimal(amount)), "revision")


def test_a_moment_is_one_key_in_each_zone(postgres_url: str, recorder: Recorder) -> None:
    """The program's, and the one in which the server gives it back."""
    engine = services.open_engine(postgres_url, connect_args={"options": "-c timezone=Europe/Berlin"})
    Base.metadata.create_all(engine)
    live_through(engine, recorder, Reading(sensor=1, at=MOMENT), "level")
    engine.dispose()


def test_a_moment_in_utc_is_one_key_where_the_database_has_no_zones(sqlite_url: str, recorder: Recorder) -> None:
    engine = services.open_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": recorder}) as session:
        session.add(Reading(sensor=1, at=MOMENT.astimezone(datetime.UTC)))
        session.commit()
    with Session(engine, info={"durable_streams": recorder}) as session:
        session.delete(session.scalars(sa.select(Reading)).one())
        session.commit()
    assert fold(recorder.batches) == {}
    engine.dispose()
