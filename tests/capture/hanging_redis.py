"""Commits under asyncio while Redis accepts connections and never answers; prints the ticker's longest pauses."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time

from sqlalchemy.ext.asyncio import AsyncSession

from broadcastable import DurableStreams
from broadcastable.settings import Settings
from tests import services
from tests.capture.conftest import populate
from tests.capture.models import Base, Card


async def tick(pauses: list[float]) -> None:
    last = time.perf_counter()
    while True:
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        pauses.append(now - last)
        last = now


async def main(url: str, redis_url: str) -> list[float]:
    durable_streams = DurableStreams(Settings(outbox="redis", redis_url=redis_url))
    engine = services.open_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    pauses: list[float] = []
    async with AsyncSession(engine, info={"durable_streams": durable_streams}) as session:
        await session.run_sync(populate)
        await session.commit()
        ticker = asyncio.create_task(tick(pauses))
        for number in range(5):
            (await session.get_one(Card, 1)).title = f"title {number}"
            await session.commit()
        # Long enough for what a hook may have left to run on the loop.
        await asyncio.sleep(1)
        ticker.cancel()
    await engine.dispose()
    return sorted(pauses, reverse=True)[:10]


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = asyncio.run(main(sys.argv[1], f"redis://127.0.0.1:{silent.getsockname()[1]}/0"))
        print(json.dumps(found), flush=True)
        os._exit(0)  # events wait for a Redis that never answers; nobody needs them
