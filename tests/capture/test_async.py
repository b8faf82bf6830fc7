"""The same under `AsyncSession`: no hook does I/O of its own accord, none blocks the loop, none needs a greenlet."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

from broadcastable import DurableStreams, UsageError, txid
from broadcastable.settings import Settings
from tests import services
from tests.capture.conftest import populate
from tests.capture.models import Base, Card
from tests.capture.recorder import Recorder

CARDS_1 = "gid://app/Board/1/cards"


@asynccontextmanager
async def sessions(database_url: str, recorder: Recorder | DurableStreams) -> AsyncIterator[async_sessionmaker[Any]]:
    engine = services.open_async_engine(database_url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    make = async_sessionmaker(engine, info={"durable_streams": recorder})
    async with make() as session:
        await session.run_sync(populate)
        await session.commit()
    if isinstance(recorder, Recorder):
        recorder.clear()
    try:
        yield make
    finally:
        await engine.dispose()


async def savepoints(session: AsyncSession) -> None:
    async with session.begin_nested():
        (await session.get_one(Card, 1)).title = "released"
    savepoint = await session.begin_nested()
    (await session.get_one(Card, 2)).title = "rolled back"
    await session.flush()
    await savepoint.rollback()
    await session.commit()


async def expired(session: AsyncSession) -> None:
    """With the default `expire_on_commit`: the record is changed without being loaded again."""
    card = await session.get_one(Card, 1)
    await session.commit()
    card.title = "released"
    await session.commit()


async def refreshed(session: AsyncSession) -> None:
    card = await session.get_one(Card, 1)
    card.title = "released"
    await session.commit()
    await session.refresh(card)
    assert card.title == "released"


async def cancelled(session: AsyncSession) -> None:
    """A task that is cancelled between flush and commit leaves nothing behind."""

    async def change() -> None:
        async with session.begin():
            (await session.get_one(Card, 2)).title = "never"
            await session.flush()
            await asyncio.sleep(60)

    task = asyncio.create_task(change())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (await session.get_one(Card, 1)).title = "released"
    await session.commit()


@pytest.mark.parametrize("program", [savepoints, expired, refreshed, cancelled], ids=lambda program: program.__name__)
def test_what_is_committed_goes_out(
    database_url: str, recorder: Recorder, program: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    async def main() -> None:
        async with sessions(database_url, recorder) as make, make() as session:
            await program(session)

    asyncio.run(main())
    assert [event["value"]["title"] for event in recorder.events(CARDS_1)] == ["released"]


def test_tasks_with_sessions_of_their_own_do_not_mix(database_url: str, recorder: Recorder) -> None:
    async def main() -> None:
        async with sessions(database_url, recorder) as make:

            async def move(card: int, commit: bool) -> None:
                async with make() as session:
                    (await session.get_one(Card, card)).title = f"title {card}"
                    if commit:
                        await session.commit()
                    else:
                        await session.rollback()

            for card in (1, 2, 3):
                await move(card, commit=card != 2)

    asyncio.run(main())
    assert sorted(event["key"] for event in recorder.events()) == ["1", "3"]


def test_the_txid_is_known_without_io(sqlite_url: str, recorder: Recorder) -> None:
    async def main() -> None:
        async with sessions(sqlite_url, recorder) as make:
            async with make() as session:
                known = txid(session)
                (await session.get_one(Card, 1)).title = "x"
                await session.commit()
            assert [batch.txid for batch in recorder.batches] == [known]
            scoped = async_scoped_session(make, scopefunc=asyncio.current_task)
            assert txid(scoped) == txid(scoped())
            await scoped.remove()

    asyncio.run(main())


def test_a_txid_of_the_database_is_asked_for_inside_run_sync(postgres_url: str, recorder: Recorder) -> None:
    recorder.settings = Settings(txid_from="postgres")

    async def main() -> None:
        async with sessions(postgres_url, recorder) as make, make() as session:
            with pytest.raises(UsageError, match="run_sync"):
                txid(session)
            known = await session.run_sync(txid)
            assert txid(session) == known
            (await session.get_one(Card, 1)).title = "x"
            await session.commit()
            assert [batch.txid for batch in recorder.batches] == [known]

    asyncio.run(main())


def test_a_redis_that_accepts_and_never_answers_does_not_stop_the_loop(sqlite_url: str, signing_key: str) -> None:
    """A ticker task runs on while a commit hands its events to an outbox that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = Settings(
            outbox="redis", redis_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0", signing_key=signing_key
        )
        gaps: list[float] = []

        async def tick() -> None:
            last = time.perf_counter()
            while True:
                await asyncio.sleep(0.001)
                now = time.perf_counter()
                gaps.append(now - last)
                last = now

        async def main() -> None:
            with DurableStreams(settings) as durable_streams:
                async with sessions(sqlite_url, durable_streams) as make:
                    ticker = asyncio.create_task(tick())
                    async with make() as session:
                        for number in range(5):
                            (await session.get_one(Card, 1)).title = f"title {number}"
                            await session.commit()
                    # Long enough for a blocking socket timeout to show.
                    await asyncio.sleep(0.5)
                    ticker.cancel()

        asyncio.run(main())
    assert len(gaps) > 50
    assert sorted(gaps)[-3] < 0.25, "the loop stood still again and again"
