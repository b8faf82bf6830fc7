"""Transactions that contend for one row reach its stream in the order in which they committed."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from dramatiq.brokers.stub import StubBroker
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from broadcastable import Broadcastable, DurableStreams, streams
from broadcastable.outbox import Outbox


class Base(DeclarativeBase):
    pass


class Counter(Base, Broadcastable):
    __tablename__ = "counters"
    __streams__ = streams()
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(default=0)


@pytest.fixture
def slow_after_commit() -> Iterator[None]:
    """After COMMIT, and before anything is handed over, a thread loses the processor for a while."""
    chance = random.Random(3)

    def lose_the_processor(session: Session) -> None:
        time.sleep(chance.random() / 100)

    event.listen(Session, "after_commit", lose_the_processor, insert=True)
    yield
    event.remove(Session, "after_commit", lose_the_processor)


@pytest.fixture(params=["memory", "redis"])
def durable_streams(request: pytest.FixtureRequest) -> Iterator[DurableStreams]:
    redis_url = request.getfixturevalue("valkey_url") if request.param == "redis" else None
    broker = StubBroker()  # no worker listens to it: all stays in the outbox
    with DurableStreams(outbox=request.param, redis_url=redis_url, broker=broker) as made:
        yield made
    broker.close()


def numbers_in(outbox: Outbox) -> list[int]:
    """What the counter was, one commit after the other."""
    stream = "gid://app/Counter/1"
    found: list[int] = []
    lease = None
    while (frame := outbox.claim(stream, lease_for=60, lease=lease)) is not None:
        found.extend(json.loads(each)["value"]["number"] for each in frame.events)
        outbox.ack(frame, offset="1")
        lease = frame.lease
    return found


@pytest.mark.usefixtures("slow_after_commit")
def test_threads_that_change_one_row(postgres_url: str, durable_streams: DurableStreams) -> None:
    engine = sa.create_engine(postgres_url, pool_size=6)
    Base.metadata.create_all(engine)
    info = {"durable_streams": durable_streams}
    with Session(engine, info=info) as session:
        session.add(Counter(id=1, number=0))
        session.commit()

    def count() -> None:
        for _ in range(20):
            with Session(engine, info=info) as session:
                session.get_one(Counter, 1, with_for_update=True).number += 1
                session.commit()

    threads = [threading.Thread(target=count) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.dispose()
    assert durable_streams.handoff.flush(20)
    assert numbers_in(durable_streams.outbox) == list(range(121))


def test_tasks_that_change_one_row(postgres_url: str, durable_streams: DurableStreams) -> None:
    async def main() -> None:
        engine = create_async_engine(postgres_url.replace("+psycopg", "+asyncpg"), pool_size=6)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        info = {"durable_streams": durable_streams}
        async with AsyncSession(engine, info=info) as session:
            session.add(Counter(id=1, number=0))
            await session.commit()

        async def count() -> None:
            for _ in range(20):
                async with AsyncSession(engine, info=info) as session:
                    (await session.get_one(Counter, 1, with_for_update=True)).number += 1
                    await session.commit()

        await asyncio.gather(*(count() for _ in range(6)))
        await engine.dispose()

    asyncio.run(main())
    assert durable_streams.handoff.flush(20)
    assert numbers_in(durable_streams.outbox) == list(range(121))
