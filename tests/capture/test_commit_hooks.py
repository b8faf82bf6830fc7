"""What the application adds while a commit is under way: from its own hooks, on every kind of outbox."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy as sa
from dramatiq.brokers.stub import StubBroker
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session

from broadcastable import DurableStreams, confirm_txid, transactions
from broadcastable.counters import counters
from broadcastable.testing import capture_broadcasts
from tests import services
from tests.capture.conftest import populate
from tests.capture.models import Base, Card
from tests.capture.recorder import Recorder
from tests.outbox.conftest import create_tables

AUDIT = "audit"
CARDS = "gid://app/Board/1/cards"

Add = Callable[[Session], None]
Place = Callable[[Session, Add, ExitStack], None]


class PlainBase(DeclarativeBase):
    pass


class Invoice(PlainBase):
    """Has no streams, so that no flush of it concerns the capture."""

    __tablename__ = "invoices"

    id: Mapped[int] = mapped_column(primary_key=True)


def say(session: Session) -> None:
    streams: DurableStreams = session.info["durable_streams"]
    streams.broadcast_later_to(AUDIT, session=session, said=True)


def confirm(session: Session) -> None:
    confirm_txid(session, AUDIT)


def rename_in_bulk(session: Session) -> None:
    session.execute(sa.update(Card).where(Card.id == 1).values(title="renamed"))


def from_after_insert(session: Session, add: Add, undo: ExitStack) -> None:
    def hook(mapper: Any, connection: Any, invoice: Invoice) -> None:
        of = object_session(invoice)
        assert of is not None
        add(of)

    event.listen(Invoice, "after_insert", hook)
    undo.callback(event.remove, Invoice, "after_insert", hook)


def from_hook(name: str, *, first: bool = False) -> Place:
    """In the hook *name* of all sessions, once; *first* is before any other listener, ours too."""

    def install(session: Session, add: Add, undo: ExitStack) -> None:
        left = [add]

        def hook(of: Session, *rest: Any) -> None:
            if left:
                left.pop()(of)

        event.listen(Session, name, hook, insert=first)
        undo.callback(event.remove, Session, name, hook)

    return install


PLACES: dict[str, Place] = {
    "after_insert": from_after_insert,
    "before_flush": from_hook("before_flush"),
    "after_flush": from_hook("after_flush"),
    "after_flush, first": from_hook("after_flush", first=True),
    "after_flush_postexec": from_hook("after_flush_postexec"),
    "before_commit": from_hook("before_commit"),
    "before_commit, first": from_hook("before_commit", first=True),
}


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["memory", "redis", "database"])
def streams(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[DurableStreams]:
    create_tables(postgres_url)
    settings: dict[str, Any] = {"outbox": request.param, "database_url": postgres_url}
    if request.param == "redis":
        settings["redis_url"] = request.getfixturevalue("valkey_url")
    with DurableStreams(broker=StubBroker(), **settings) as streams:
        yield streams


@pytest.fixture
def engine(postgres_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(postgres_url)
    Base.metadata.create_all(engine)
    PlainBase.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: sa.Engine, streams: DurableStreams) -> Iterator[Session]:
    with Session(engine, info={"durable_streams": streams}) as session:
        with capture_broadcasts():
            populate(session)
            session.commit()
        yield session


def waiting(streams: DurableStreams) -> dict[str, int]:
    """How many events are in the outbox for each stream; nobody delivers them."""
    return {each.stream: each.events for each in streams.outbox.pending()}


@pytest.mark.parametrize("add", [say, confirm, rename_in_bulk], ids=lambda add: add.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_what_a_hook_adds_within_the_commit_shares_its_fate(
    session: Session, streams: DurableStreams, undo: ExitStack, place: str, add: Add
) -> None:
    """Also where the transaction has nothing else, so that no hook of ours was needed before."""
    expected = {CARDS if add is rename_in_bulk else AUDIT: 1}
    PLACES[place](session, add, undo)
    session.add(Invoice(id=1))
    before = counters["events_committed"]
    session.commit()
    assert waiting(streams) == expected
    assert counters["events_committed"] == before + 1


def test_what_hooks_add_in_the_commits_flush_is_one_statement(
    session: Session, streams: DurableStreams, undo: ExitStack, engine: sa.Engine
) -> None:
    """However many rows are flushed."""
    PLACES["after_insert"](session, say, undo)
    seen: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda c, cursor, statement, *rest: seen.append(statement))
    session.add_all([Invoice(id=number) for number in range(50)])
    session.commit()
    assert len([each for each in seen if "broadcastable_outbox" in each]) == streams.transactional
    assert waiting(streams) == {AUDIT: 50}


@pytest.mark.parametrize("streams", ["database"], indirect=True)
def test_what_is_added_after_the_database_has_committed_is_counted_as_lost(
    session: Session, streams: DurableStreams, undo: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """It could be written in no transaction any more; the commit does not fail for it."""
    from_hook("after_commit", first=True)(session, say, undo)
    session.get_one(Card, 1).title = "a"
    before = counters.snapshot()
    session.commit()
    assert waiting(streams) == {CARDS: 1}
    assert counters["events_committed"] == before.get("events_committed", 0) + 1
    assert counters["transactions_lost"] == before.get("transactions_lost", 0) + 1
    [line] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert f"1 events are not sent, the first for stream {AUDIT}" in line.getMessage()


def add_a_card_and_think_better_of_it(session: Session) -> None:
    savepoint = session.begin_nested()
    session.add(Card(id=50, title="phantom", board_id=1))
    session.flush()
    savepoint.rollback()


@pytest.mark.parametrize("first", [False, True])
def test_a_savepoint_rolled_back_within_the_commit_takes_its_events_along(
    session: Session, streams: DurableStreams, undo: ExitStack, first: bool
) -> None:
    from_hook("before_commit", first=first)(session, add_a_card_and_think_better_of_it, undo)
    session.get_one(Card, 1).title = "a"
    session.commit()
    assert waiting(streams) == {CARDS: 1}


def test_tests_see_no_row_of_a_savepoint_rolled_back_within_the_commit(
    session: Session, streams: DurableStreams, undo: ExitStack
) -> None:
    from_hook("before_commit")(session, add_a_card_and_think_better_of_it, undo)
    with capture_broadcasts() as sent:
        session.get_one(Card, 1).title = "a"
        session.commit()
    assert [each.value["title"] for each in sent] == ["a"]


def test_events_by_themselves_take_no_turn(
    sqlite_engine: sa.Engine, recorder: Recorder, undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn may be a round trip to the store, and only locked rows give others a reason to wait."""
    announced: list[set[str]] = []
    announce = recorder.announce
    monkeypatch.setattr(recorder, "announce", lambda names: (announced.append(set(names)), announce(names))[1])
    recorder.without_turn = {AUDIT}

    def say_often(session: Session) -> None:
        for _ in range(10):
            transactions.defer(session, recorder, AUDIT, b'{"said":true}')

    from_hook("before_commit")(Session(), say_often, undo)
    with Session(sqlite_engine, info={"durable_streams": recorder}) as session:
        populate(session)
        session.commit()
    assert len(announced) == 1
    assert AUDIT not in announced[0]
    assert recorder.turns == []
    assert len([body for batch in recorder.batches if batch.stream == AUDIT for body in batch.events]) == 10


@pytest.mark.parametrize("streams", ["database"], indirect=True)
def test_what_a_hook_adds_before_the_commits_flush_is_one_batch(
    session: Session, streams: DurableStreams, undo: ExitStack, engine: sa.Engine
) -> None:
    """The flush is to come, and its end takes it all: one statement, and a reader sees all of it at once."""

    def say_often(of: Session) -> None:
        for _ in range(50):
            say(of)

    from_hook("before_commit")(session, say_often, undo)
    seen: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda c, cursor, statement, *rest: seen.append(statement))
    session.add(Invoice(id=1))
    session.commit()
    assert len([each for each in seen if "broadcastable_outbox" in each]) == 1
    [pending] = streams.outbox.pending()
    assert (pending.batches, pending.events) == (1, 50)


def test_a_verb_after_a_refused_commit_waits_for_the_next_one(async_database_url: str, undo: ExitStack) -> None:
    """A verb is no coroutine: under asyncio it must not ask the database, where the next commit does it anyway."""
    create_tables(async_database_url)
    refused = [ValueError("not now")]

    def refuse(session: Session) -> None:
        if refused:
            raise refused.pop()

    async def main(streams: DurableStreams) -> None:
        engine = services.open_async_engine(async_database_url)
        async with AsyncSession(engine, info={"durable_streams": streams}) as session:
            event.listen(session.sync_session, "before_commit", refuse)
            session.add(Invoice(id=1))
            await session.flush()
            with pytest.raises(ValueError, match="not now"):
                await session.commit()
            say(session.sync_session)
            await session.commit()
        await engine.dispose()

    engine = services.open_engine(async_database_url)
    PlainBase.metadata.create_all(engine)
    engine.dispose()
    with DurableStreams(broker=StubBroker(), outbox="database", database_url=async_database_url) as streams:
        asyncio.run(main(streams))
        assert waiting(streams) == {AUDIT: 1}
