"""Transactions that contend for one row reach its stream in the order in which they committed."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from dramatiq.brokers.stub import StubBroker
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from broadcastable import Broadcastable, DurableStreams, streams

STREAM = "gid://app/Counter/1"
WRITERS, COMMITS = 6, 20


class Base(DeclarativeBase):
    pass


class Counter(Base, Broadcastable):
    __tablename__ = "counters"
    __table_args__ = (sa.UniqueConstraint("unique_at_commit", deferrable=True, initially="DEFERRED"),)
    __streams__ = streams()
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(default=0)
    unique_at_commit: Mapped[int | None]


class Silent(Base, Broadcastable):
    __tablename__ = "silent"
    __streams__ = streams(on=("delete",))
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def slow_after_commit() -> Iterator[None]:
    """After COMMIT, and before anything is handed over, a thread loses the processor for a while."""
    chance = random.Random(3)

    def lose_the_processor(session: Session) -> None:
        time.sleep(chance.random() / 100)

    event.listen(Session, "after_commit", lose_the_processor, insert=True)
    yield
    event.remove(Session, "after_commit", lose_the_processor)


@pytest.fixture(params=["memory", "redis", "redis, two processes"])
def processes(request: pytest.FixtureRequest) -> Iterator[list[DurableStreams]]:
    """What writers use by turns. Two instances know no more of each other than two processes do: their Redis."""
    outbox, _, two = request.param.partition(",")
    redis_url = request.getfixturevalue("valkey_url") if outbox == "redis" else None
    broker = StubBroker()  # no worker listens to it: all stays in the outbox
    made = [DurableStreams(outbox=outbox, redis_url=redis_url, broker=broker) for _ in range(2 if two else 1)]
    yield made
    for each in made:
        each.close()
    broker.close()


def numbers_in(processes: list[DurableStreams]) -> list[int]:
    """What the counter was, one commit after the other."""
    for process in processes:
        assert process.handoff.flush(20)
    outbox = processes[0].outbox
    found: list[int] = []
    lease = None
    while (frame := outbox.claim(STREAM, lease_for=60, lease=lease)) is not None:
        found.extend(json.loads(each)["value"]["number"] for each in frame.events)
        outbox.ack(frame, offset="1")
        lease = frame.lease
    return found


def begin(engine: sa.Engine, process: DurableStreams) -> None:
    Base.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": process}) as session:
        session.add(Counter(id=1, number=0))
        session.commit()


@pytest.mark.usefixtures("slow_after_commit")
def test_threads_that_change_one_row(postgres_url: str, processes: list[DurableStreams]) -> None:
    engine = sa.create_engine(postgres_url, pool_size=WRITERS)
    begin(engine, processes[0])

    def count(process: DurableStreams) -> None:
        for _ in range(COMMITS):
            with Session(engine, info={"durable_streams": process}) as session:
                session.get_one(Counter, 1, with_for_update=True).number += 1
                session.commit()

    threads = [threading.Thread(target=count, args=(processes[n % len(processes)],)) for n in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.dispose()
    assert numbers_in(processes) == list(range(WRITERS * COMMITS + 1))


def test_tasks_that_change_one_row(postgres_url: str, processes: list[DurableStreams]) -> None:
    sync_engine = sa.create_engine(postgres_url)
    begin(sync_engine, processes[0])
    sync_engine.dispose()

    async def main() -> None:
        engine = create_async_engine(postgres_url.replace("+psycopg", "+asyncpg"), pool_size=WRITERS)

        async def count(process: DurableStreams) -> None:
            for _ in range(COMMITS):
                async with AsyncSession(engine, info={"durable_streams": process}) as session:
                    (await session.get_one(Counter, 1, with_for_update=True)).number += 1
                    await session.commit()

        await asyncio.gather(*(count(processes[n % len(processes)]) for n in range(WRITERS)))
        await engine.dispose()

    asyncio.run(main())
    assert numbers_in(processes) == list(range(WRITERS * COMMITS + 1))


def test_a_commit_needs_no_thread_that_the_application_can_fill(
    postgres_url: str, processes: list[DurableStreams]
) -> None:
    """It holds its locks, and the threads of the loop's own pool may be waiting for just those."""
    sync_engine = sa.create_engine(postgres_url)
    begin(sync_engine, processes[0])
    sync_engine.dispose()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        engine = create_async_engine(postgres_url.replace("+psycopg", "+asyncpg"))
        committed = threading.Event()
        async with AsyncSession(engine, info={"durable_streams": processes[0]}) as session:
            (await session.get_one(Counter, 1, with_for_update=True)).number = 1
            blocked = loop.run_in_executor(None, committed.wait, 60)
            await asyncio.wait_for(session.commit(), 30)
        committed.set()
        assert await blocked
        await engine.dispose()

    asyncio.run(main())
    assert numbers_in(processes) == [0, 1]


def test_a_commit_that_fails_holds_nobody_up(postgres_url: str, processes: list[DurableStreams]) -> None:
    """A deferred constraint fails in COMMIT itself, after the place was taken."""
    engine = sa.create_engine(postgres_url)
    begin(engine, processes[0])
    last = processes[-1]
    with Session(engine, info={"durable_streams": processes[0]}) as session:
        session.get_one(Counter, 1).number = 1
        session.add_all([Counter(id=2, unique_at_commit=1), Counter(id=3, unique_at_commit=1)])
        with pytest.raises(IntegrityError):
            session.commit()
    with Session(engine, info={"durable_streams": last}) as session:
        session.get_one(Counter, 1).number = 2
        session.commit()
    engine.dispose()
    # At once: no sweeper runs here that would find it after a while.
    assert numbers_in(processes) == [0, 2]


def test_what_a_transaction_reserved_and_has_no_event_for_holds_nobody_up(
    postgres_url: str, processes: list[DurableStreams]
) -> None:
    engine = sa.create_engine(postgres_url)
    begin(engine, processes[0])
    with Session(engine, info={"durable_streams": processes[0]}) as session:
        session.add(Silent(id=1))
        session.get_one(Counter, 1).number = 1
        session.commit()
    with Session(engine, info={"durable_streams": processes[-1]}) as session:
        session.delete(session.get_one(Silent, 1))
        session.commit()
    engine.dispose()
    frame = processes[0].outbox.claim("gid://app/Silent/1", lease_for=60)
    assert frame is not None
    assert json.loads(frame.events[0])["headers"]["operation"] == "delete"
