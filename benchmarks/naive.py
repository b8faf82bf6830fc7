"""The peer of the delivery benchmark: what one would build first. One Dramatiq message and one POST an event."""

from __future__ import annotations

import os

import dramatiq
import httpx
from dramatiq.brokers.redis import RedisBroker

from broadcastable import Gatekeeper
from broadcastable.names import stream_path
from broadcastable.settings import current_settings

broker = RedisBroker(url=os.environ["BROADCASTABLE_REDIS_URL"])
dramatiq.set_broker(broker)
_client = httpx.Client()


@dramatiq.actor(broker=broker, queue_name="naive")
def post(stream: str, event: str) -> None:
    settings = current_settings()
    _client.post(
        f"{settings.server_urls[0]}/{stream_path(stream)}",
        content=event,
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Bearer {_gatekeeper.server_token()}",
        },
    ).raise_for_status()


_gatekeeper = Gatekeeper(current_settings())
