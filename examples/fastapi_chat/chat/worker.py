"""Work that nobody waits for: `dramatiq chat.worker`. The same workers deliver the streams."""

from __future__ import annotations

import asyncio
import random

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from broadcastable import actors

from . import settings
from .models import Message, Session, engine

assert settings.redis_url is not None, "Set BROADCASTABLE_REDIS_URL; the README says to what"
broker = RedisBroker(url=settings.redis_url)
dramatiq.set_broker(broker)
actors.declare(broker)  # wake-ups go through this broker, and its workers deliver


@dramatiq.actor
def throw_dice(room_id: int, author: str) -> None:
    """Answer in the room. A row that a worker commits is streamed like any other."""
    asyncio.run(_say(room_id, f"{author} throws {random.randint(1, 6)} and {random.randint(1, 6)}."))


async def _say(room_id: int, text: str) -> None:
    async with Session() as session:
        session.add(Message(room_id=room_id, author="dice", text=text))
        await session.commit()
    await engine.dispose()  # its connections belong to this event loop, which ends now
