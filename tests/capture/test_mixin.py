"""The verbs of a record, suppression, and the models there are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from broadcastable import Broadcastable, DurableStreams, UnsavedRecordError, UsageError, streams_to, suppressing_streams
from broadcastable.durable_streams import intercepting
from broadcastable.events import Batch
from broadcastable.names import locate
from tests import services
from tests.capture.conftest import populate
from tests.capture.models import Base, Board, Card
from tests.capture.recorder import Recorder, parsed


class Wire:
    """Keeps what would go out: at once, or with the commit."""

    def __init__(self) -> None:
        self.now: list[Batch] = []
        self.later: list[Batch] = []

    def intercept(self, batches: Sequence[Batch], *, sender: DurableStreams, deferred: bool, joined: bool) -> bool:
        (self.later if deferred else self.now).extend(batches)
        return True


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    with intercepting(wire):
        yield wire


@pytest.fixture
def session(sqlite_engine: sa.Engine, wire: Wire) -> Iterator[Session]:
    with (
        DurableStreams() as durable_streams,
        Session(sqlite_engine, info={"durable_streams": durable_streams}) as session,
    ):
        populate(session)
        session.commit()
        wire.later.clear()
        yield session


OPERATIONS = ("insert", "update", "upsert", "delete")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["own", "to"])
def test_each_verb_has_four_forms(session: Session, wire: Wire, operation: str, later: bool, elsewhere: bool) -> None:
    card, board = session.get_one(Card, 1), session.get_one(Board, 2)
    verb = getattr(card, f"stream_{operation}{'_later' if later else ''}{'_to' if elsewhere else ''}")
    txid = verb(board, "archive") if elsewhere else verb()
    assert isinstance(txid, str)
    sent = wire.later if later else wire.now
    assert bool(sent) is not later
    session.commit()
    (batch,) = sent
    assert batch.stream == ("gid://app/Board/2/archive" if elsewhere else "gid://app/Card/1")
    (event,) = parsed([batch])
    assert event["headers"]["operation"] == ("update" if operation == "upsert" else operation)
    assert (event["type"], event["key"], event["headers"]["txid"]) == ("card", "1", txid)
    assert event.get("value") == (
        None if operation == "delete" else {"id": "1", "title": "one", "label": None, "board_id": "1"}
    )


def test_a_later_verb_dies_with_the_rollback(session: Session, wire: Wire) -> None:
    card = session.get_one(Card, 1)
    card.stream_update_later()
    session.rollback()
    assert wire.later == []


def test_a_later_verb_outside_a_transaction_goes_at_once(session: Session, wire: Wire) -> None:
    card = session.get_one(Card, 1)
    session.expunge(card)
    session.rollback()
    card.stream_update_later()
    assert [batch.stream for batch in wire.later] == ["gid://app/Card/1"]


def test_a_later_verb_shares_the_txid_of_its_transaction(session: Session, wire: Wire) -> None:
    board = session.get_one(Board, 1)
    board.name = "renamed"
    txid = board.stream_upsert_later_to("elsewhere")
    session.commit()
    assert {batch.txid for batch in wire.later} == {txid}


def test_any_event_goes_below_the_record(session: Session, wire: Wire) -> None:
    board = session.get_one(Board, 1)
    event: dict[str, Any] = {"type": "note", "key": "n", "value": {"a": 1}, "operation": "insert"}
    assert board.broadcast_event_to("notes", **event) is not None
    assert board.broadcast_to("notes", typing=True) is True
    assert [batch.stream for batch in wire.now] == ["gid://app/Board/1/notes"] * 2
    board.broadcast_event_later_to("notes", **event)
    board.broadcast_later_to("notes", typing=True)
    session.commit()
    (batch,) = wire.later
    assert batch.stream == "gid://app/Board/1/notes"
    assert batch.events[1] == b'{"typing":true}'


def test_an_unsaved_record_has_no_stream(session: Session) -> None:
    for verb in OPERATIONS:
        with pytest.raises(UnsavedRecordError, match="Flush or commit"):
            getattr(Card(title="x"), f"stream_{verb}")()


def test_a_deleted_record_can_still_say_so(session: Session, wire: Wire) -> None:
    card = session.get_one(Card, 1)
    session.delete(card)
    session.flush()
    card.stream_delete_later_to("graveyard")
    session.commit()
    assert "graveyard" in [batch.stream for batch in wire.later]
    assert str(card.to_gid()) == "gid://app/Card/1"


def test_an_expired_record_that_cannot_be_loaded_is_refused_with_advice(session: Session) -> None:
    card = session.get_one(Card, 1)
    session.commit()
    session.expunge(card)
    with pytest.raises(UsageError, match="expire_on_commit"):
        card.stream_update()


def test_under_asyncio_a_later_verb_never_waits(sqlite_url: str, wire: Wire) -> None:
    async def main() -> None:
        engine = services.open_async_engine(sqlite_url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        with DurableStreams() as durable_streams:
            async with AsyncSession(engine, info={"durable_streams": durable_streams}) as session:
                card = Card(id=1, title="x")
                session.add(card)
                await session.flush()
                card.stream_update_later_to("room")
                await session.commit()
                assert "room" in [batch.stream for batch in wire.later]
                with pytest.raises(UsageError, match=r"await session.refresh"):
                    card.stream_update_later_to("room")
                await session.refresh(card)
                card.stream_update_later_to("room")
                await session.commit()
        await engine.dispose()

    asyncio.run(main())


def test_a_value_of_ones_own_is_used_by_verbs_and_capture_alike(sqlite_engine: sa.Engine, recorder: Recorder) -> None:
    class Own(DeclarativeBase):
        pass

    class Secretive(Own, Broadcastable):
        __tablename__ = "secretives"
        __streams__ = streams_to("secrets")
        __stream_type__ = "secret"
        __gid_name__ = "Hush"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

        def to_stream_value(self) -> Any:
            return {"initial": self.name[0]}

    Own.metadata.create_all(sqlite_engine)
    with Session(sqlite_engine, info={"durable_streams": recorder}) as session:
        record = Secretive(name="nobody")
        session.add(record)
        session.commit()
        (event,) = recorder.events("secrets")
        assert (event["type"], event["value"]) == ("secret", {"initial": "n"})
        assert locate(session, "gid://app/Hush/1") is record


# Suppression


def test_suppression_is_asked_at_the_flush(session: Session, wire: Wire) -> None:
    card = session.get_one(Card, 1)
    with Card.suppressing_streams():
        card.title = "quiet"
        session.flush()
        assert card.stream_update_later() is None
        assert card.broadcast_to("x", a=1) is None
    session.commit()
    assert wire.later == []
    with Card.suppressing_streams():
        card.title = "loud: flushed after the block"
    session.commit()
    assert len(wire.later) == 1


def test_suppression_nests_survives_errors_and_covers_only_its_model(session: Session, wire: Wire) -> None:
    card, board = session.get_one(Card, 1), session.get_one(Board, 1)
    with Card.suppressing_streams():
        with pytest.raises(ZeroDivisionError), Card.suppressing_streams():
            raise ZeroDivisionError
        card.title, board.name = "quiet", "loud"
        session.flush()
    with suppressing_streams():
        board.name = "quiet"
        session.flush()
    session.commit()
    assert {batch.stream for batch in wire.later} == {"gid://app/Board/1", "gid://app/Team/1/boards"}
    assert {event["value"]["name"] for event in parsed(wire.later)} == {"loud"}


def test_suppression_covers_subclasses_and_no_other_thread(session: Session) -> None:
    from broadcastable.suppression import is_suppressed

    class Special(Card):
        pass

    seen: list[bool] = []
    with Card.suppressing_streams():
        thread = threading.Thread(target=lambda: seen.append(is_suppressed(Card)))
        thread.start()
        thread.join()
        assert is_suppressed(Special)
        assert not is_suppressed(Board)
    assert seen == [False]
    assert not is_suppressed(Special)


def test_suppression_is_a_tasks_own() -> None:
    from broadcastable.suppression import is_suppressed

    async def quiet(started: asyncio.Event, done: asyncio.Event) -> None:
        with Card.suppressing_streams():
            started.set()
            await done.wait()
            assert is_suppressed(Card)

    async def main() -> None:
        started, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(quiet(started, done))
        await started.wait()
        assert not is_suppressed(Card)
        done.set()
        await task

    asyncio.run(main())
