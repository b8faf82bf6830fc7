"""The same under `AsyncSession`: no hook does I/O of its own accord, none blocks the loop, none needs a greenlet."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

from broadcastable import UsageError, txid
from broadcastable.settings import Settings
from tests import services
from tests.capture.conftest import populate
from tests.capture.models import Base, Card
from tests.capture.recorder import Recorder

CARDS_1 = "gid://app/Board/1/cards"


@asynccontextmanager
async def sessions(database_url: str, recorder: Recorder) -> AsyncIterator[async_sessionmaker[Any]]:
    engine = services.open_async_engine(database_url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    make = async_sessionmaker(engine, info={"durable_streams": recorder})
    async with make() as session:
        await session.run_sync(populate)
        await session.commit()
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
    async_database_url: str, recorder: Recorder, program: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    async def main() -> None:
        async with sessions(async_database_url, recorder) as make, make() as session:
            await program(session)

    asyncio.run(main())
    assert [event["value"]["title"] for event in recorder.events(CARDS_1)] == ["released"]


def test_tasks_with_sessions_of_their_own_do_not_mix(async_database_url: str, recorder: Recorder) -> None:
    async def main() -> None:
        async with sessions(async_database_url, recorder) as make:

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


def test_a_redis_that_accepts_and_never_answers_does_not_stop_the_loop(sqlite_url: str) -> None:
    """A ticker task runs on while commits hand their events to an outbox that hangs.

    In a process of its own: what cannot be delivered is tried again for as long as the process lives.
    """
    command = [sys.executable, "-m", "tests.capture.hanging_redis", sqlite_url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    longest = json.loads(done.stdout)
    # A blocking call would last until a socket timeout, for each of the commits.
    assert longest[2] < 0.2, f"the loop stood still, again and again: {longest}"
