"""Every test runs in a transaction that is rolled back, without a stream server, Redis or a worker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from app import app
from database import open_engine, session_of_request
from models import Base, Room
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from broadcastable import DurableStreams


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncEngine]:
    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('database') / 'chat.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()


@pytest.fixture
async def session(engine: AsyncEngine, durable_streams: DurableStreams) -> AsyncIterator[AsyncSession]:
    async with engine.connect() as connection:
        everything = await connection.begin()
        async with AsyncSession(
            connection, join_transaction_mode="create_savepoint", expire_on_commit=False
        ) as session:
            yield session
        await everything.rollback()


@pytest.fixture
async def client(session: AsyncSession) -> AsyncIterator[httpx.AsyncClient]:
    app.dependency_overrides[session_of_request] = lambda: session
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://chat") as client:
        yield client
    app.dependency_overrides.clear()


@pytest.fixture
async def room(session: AsyncSession) -> Room:
    room = Room(name="Garden")
    session.add(room)
    await session.commit()
    return room
