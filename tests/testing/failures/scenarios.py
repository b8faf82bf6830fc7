"""Tests that fail, each in its own way; what each says is in the text file of its name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from datetime import datetime

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from tests.services import open_engine
from tests.testing.chat import Base, Message, Note, Notice, Room

import broadcastable.durable_streams
from broadcastable.suppression import suppressing_streams
from broadcastable.testing import Recording, assert_broadcasts, assert_no_broadcasts, freeze_txid
from broadcastable.verbs import broadcast_event_to, broadcast_later_to, broadcast_to


@pytest.fixture
def session(durable_streams: broadcastable.durable_streams.DurableStreams) -> Iterator[Session]:
    engine = open_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine, expire_on_commit=False) as session:
        yield session
    engine.dispose()


@pytest.fixture
def room(session: Session) -> Room:
    room = Room(id=1, name="Lobby")
    session.add_all([room, Room(id=2, name="Attic")])
    session.commit()
    return room


def post(session: Session, room: Room, body: str) -> Message:
    message = Message(room_id=room.id, body=body)
    session.add(message)
    session.commit()
    return message


def test_nothing_anywhere(room: Room) -> None:
    with assert_broadcasts(room, "messages"):
        pass


def test_on_another_stream(room: Room, session: Session) -> None:
    attic = session.get_one(Room, 2)
    with assert_broadcasts(room, "messages", count=1):
        post(session, attic, "Hi")


def test_on_many_other_streams(room: Room, broadcasts: Recording) -> None:
    broadcast_to(room, "typing", who="ann")
    for n in range(8):
        broadcast_to(f"notices/{n}", text="Hi")
    assert_broadcasts(room, "messages")


def test_too_many(room: Room, session: Session) -> None:
    with assert_broadcasts(room, "messages", count=1, operation="insert"):
        post(session, room, "Hi")
        post(session, room, "Ho")


def test_too_few(room: Room, session: Session) -> None:
    with assert_broadcasts(room, count=3):
        post(session, room, "Hi")
        room.name = "Foyer"
        session.commit()


def test_none_is_like_that(room: Room, session: Session) -> None:
    with assert_broadcasts(room, "messages", type="message", operation="update", value={"body": "Ho", "room_id": 1}):
        post(session, room, "Hi")
        session.delete(session.scalars(sa.select(Message)).one())
        session.commit()


def test_some_where_none_should_be(room: Room, session: Session) -> None:
    with assert_no_broadcasts(room):
        post(session, room, "Hi")


def test_some_on_any_stream(room: Room, session: Session) -> None:
    with assert_no_broadcasts():
        post(session, room, "Hi")
        broadcast_to("notices", text="Hi")


def test_none_on_any_stream(room: Room) -> None:
    with assert_broadcasts():
        pass


def test_long_values_and_many_events(room: Room) -> None:
    with assert_no_broadcasts("notices"):
        broadcast_to("notices", text="x" * 1000, end="the end")
        for n in range(12):
            broadcast_event_to("notices", type="notice", key=n, value={"n": n}, operation="insert")


def test_rolled_back(room: Room, session: Session) -> None:
    with assert_broadcasts(room):
        session.add(Message(room_id=room.id, body="Hi"))
        session.add(Message(room_id=room.id, body="Ho"))
        session.flush()
        session.rollback()


def test_savepoint_rolled_back(room: Room, session: Session) -> None:
    with assert_broadcasts(room):
        with session.begin_nested() as savepoint:
            session.add(Message(room_id=room.id, body="Hi"))
            session.flush()
            savepoint.rollback()
        session.commit()


def test_session_closed(room: Room, session: Session) -> None:
    with assert_broadcasts("notices"):
        session.execute(sa.select(1))
        broadcast_later_to("notices", text="Hi", session=session)
        session.close()


def test_transaction_still_open(room: Room, session: Session) -> None:
    with assert_broadcasts(room):
        session.add(Message(room_id=room.id, body="Hi"))
        session.flush()


def test_not_flushed(room: Room, session: Session) -> None:
    attic = session.get_one(Room, 2)
    with assert_broadcasts(room):
        session.add(Message(room_id=room.id, body="Hi"))
        session.add(Message(room_id=room.id, body="Ho"))
        room.name = "Foyer"
        session.delete(attic)


def test_not_flushed_by_an_older_session() -> None:
    """Nothing was recorded when it began; the record that names the stream leads to it."""
    engine = open_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        rooms = [Room(id=n, name="Lobby") for n in (1, 2)]
        with suppressing_streams():
            session.add_all(rooms)
            session.flush()
        with assert_broadcasts(rooms[0]):
            for room in rooms:
                room.name = "Foyer"
    engine.dispose()


def test_in_bulk(room: Room, session: Session) -> None:
    with assert_broadcasts("notices"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session.execute(sa.insert(Notice), [{"id": 1, "published": True}])
        session.commit()


def test_in_bulk_by_choice(room: Room, session: Session) -> None:
    with pytest.MonkeyPatch.context() as patch, assert_broadcasts("notices"):
        patch.setattr(Notice, "__stream_bulk__", "ignore")
        session.execute(sa.insert(Notice), [{"id": 1, "published": True}])
        session.commit()


def test_suppressed(room: Room, session: Session) -> None:
    with assert_broadcasts(room), suppressing_streams():
        room.stream_update()
        post(session, room, "Hi")


def test_unchanged(room: Room, session: Session) -> None:
    with assert_broadcasts(room):
        room.name = "Foyer"
        room.name = "Lobby"
        session.commit()


def test_unwanted(room: Room, session: Session) -> None:
    with assert_broadcasts("notices"):
        session.add(Notice(published=False))
        session.commit()


def test_failing(session: Session) -> None:
    """A stream's name cannot hold a question mark."""
    with assert_broadcasts("notes"):
        session.add(Note(topic="why?"))
        session.add(Note(topic="who?"))
        session.commit()


def test_lost_at_the_commit(room: Room, session: Session) -> None:
    def stopped() -> datetime:
        raise OSError("The clock has stopped")

    with freeze_txid(clock=stopped), assert_broadcasts(room):
        room.name = "Foyer"
        session.commit()
