"""The deferred verbs of no model: whose commit they wait for, and what their arguments may be."""

from __future__ import annotations

import asyncio
from collections import UserList, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

import broadcastable
import broadcastable.aio
from broadcastable import Broadcastable
from broadcastable.durable_streams import AsyncDurableStreams, DurableStreams
from broadcastable.errors import UsageError
from broadcastable.testing import Recording, isolated_durable_streams, recording
from tests import services


class Base(DeclarativeBase):
    pass


class Hall(Base, Broadcastable):
    __tablename__ = "halls"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def streams() -> Iterator[DurableStreams]:
    with isolated_durable_streams() as streams:
        yield streams


@pytest.fixture
def sent(streams: DurableStreams) -> Iterator[Recording]:
    with recording() as recorded:
        yield recorded


@pytest.fixture
def session(sqlite_url: str, sent: Recording) -> Iterator[Session]:
    engine = services.open_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with Session(engine, expire_on_commit=False) as session:
        session.add(Hall(id=1))
        session.commit()
        yield session
    engine.dispose()


SEQUENCES: dict[str, Callable[[Hall], Any]] = {
    "record": lambda hall: hall,
    "list": lambda hall: [hall, "x"],
    "nested": lambda hall: [["before"], (None, [hall])],
    "UserList": lambda hall: UserList([hall, "x"]),
    "deque": lambda hall: deque([hall, "x"]),
    "generator": lambda hall: (each for each in (hall, "x")),
    "dict.values()": lambda hall: {1: hall, 2: "x"}.values(),
    "generator in a tuple": lambda hall: ("before", (each for each in (None, hall))),
}


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("verb", ["event", "payload"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_whatever_sequence_a_record_is_in_the_verb_waits_for_its_session(
    session: Session, sent: Recording, streams: DurableStreams, sequence: str, verb: str, asynchronous: bool
) -> None:
    """The name and the session are taken from the same look at the streamables, of which a generator allows one."""
    hall = session.get_one(Hall, 1)

    def broadcast() -> Any:
        streamables = SEQUENCES[sequence](hall)
        doing: Any = AsyncDurableStreams(streams) if asynchronous else streams
        if verb == "event":
            done = doing.broadcast_event_later_to(streamables, type="n", key=1, value={}, operation="insert")
        else:
            done = doing.broadcast_later_to(streamables, n=1)
        return asyncio.run(done) if asynchronous else done

    assert session.in_transaction()
    assert broadcast()
    assert not sent
    session.rollback()
    assert not sent
    session.begin()
    assert broadcast()
    assert not sent
    session.commit()
    assert len(sent) == 1


@pytest.mark.parametrize("wrong", ["abc", 5, object()])
def test_a_session_that_is_none_is_refused_with_what_to_do(session: Session, sent: Recording, wrong: object) -> None:
    hall = session.get_one(Hall, 1)
    for verb in (hall.broadcast_later_to, broadcastable.broadcast_later_to):
        with pytest.raises(UsageError, match="call it something else"):
            verb("x", session=wrong)
    with pytest.raises(UsageError, match="Session or AsyncSession"):
        broadcastable.broadcast_event_later_to("x", type="n", key=1, operation="delete", session=wrong)
    with pytest.raises(UsageError, match="Session or AsyncSession"):
        asyncio.run(broadcastable.aio.broadcast_later_to("x", session=wrong))
    session.commit()
    assert not sent


def test_a_scoped_session_is_one(session: Session, sent: Recording) -> None:
    registry = scoped_session(sessionmaker(session.get_bind()))
    registry.execute(sa.select(1))
    broadcastable.broadcast_later_to("x", session=registry, n=1)
    assert not sent
    registry.commit()
    assert [each.payload for each in sent] == [{"n": 1}]
    registry.remove()


def test_a_payload_may_have_a_field_called_self(session: Session, sent: Recording) -> None:
    hall = session.get_one(Hall, 1)
    hall.broadcast_to(self=1)
    hall.broadcast_later_to(self=2)
    broadcastable.broadcast_to("x", self=3)
    session.commit()
    assert [each.payload["self"] for each in sent] == [1, 3, 2]


@pytest.mark.parametrize("key", [None, ""])
@pytest.mark.parametrize("verb", ["broadcast_event_to", "broadcast_event_later_to"])
def test_a_key_that_is_nothing_is_refused(sent: Recording, verb: str, key: object) -> None:
    """Not sent as the text "None", under which readers would keep one row for all."""
    with pytest.raises(UsageError, match="key is text"):
        getattr(broadcastable, verb)("x", type="n", key=key, value={}, operation="insert")
    assert not sent
