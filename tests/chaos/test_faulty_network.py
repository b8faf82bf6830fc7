"""Every event exactly once and in order, although the network between relay and server does what it likes."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from broadcastable.client import StreamClient
from broadcastable.events import Batch
from broadcastable.outbox import Outbox
from broadcastable.outbox.database import DatabaseOutbox
from broadcastable.outbox.memory import MemoryOutbox
from broadcastable.outbox.redis import RedisOutbox
from broadcastable.provisioner import StreamProvisioner
from broadcastable.relay import Relay
from broadcastable.server.embedded import embedded_server
from broadcastable.settings import Settings
from broadcastable.sweeper import Sweeper
from broadcastable.tokens import Gatekeeper
from tests.chaos.faults import FaultyTransport
from tests.outbox.conftest import create_tables

BATCHES = int(os.environ.get("CHAOS_BATCHES", "1500"))
STREAMS = 12
LIMITS = {"max_frame_bytes": 1 << 14, "max_frame_events": 50}


@pytest.fixture(params=["memory", "redis", "database"])
def outbox(request: pytest.FixtureRequest) -> Iterator[Outbox]:
    outbox: Any
    match request.param:
        case "memory":
            outbox = MemoryOutbox(max_bytes=1 << 26, **LIMITS)
        case "redis":
            outbox = RedisOutbox(request.getfixturevalue("valkey_url"), namespace="chaos", **LIMITS)
        case _:
            url = request.getfixturevalue("postgres_url")
            create_tables(url)
            outbox = DatabaseOutbox(url, namespace="chaos", **LIMITS)
    yield outbox
    outbox.close()


def until(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def read_numbers(client: StreamClient, stream: str) -> list[int]:
    numbers: list[int] = []
    page = client.read(stream)
    while page.events:
        numbers.extend(json.loads(event)["n"] for event in page.events)
        page = client.read(stream, page.next_offset)
    return numbers


def test_a_third_of_all_requests_goes_wrong_and_every_event_is_there_once(outbox: Outbox) -> None:
    transport = FaultyTransport(share=0.3, seed=7)
    with embedded_server(settings=Settings(request_timeout=1.0)) as server:
        settings = server.settings
        client = StreamClient(settings, Gatekeeper(settings), transport=transport)
        relay = Relay(outbox, client, StreamProvisioner(settings), settings)
        sweepers = [Sweeper(outbox, relay.deliver, interval=0.05) for _ in range(3)]
        for sweeper in sweepers:
            sweeper.start()
        expected: dict[str, list[int]] = {f"rooms/{n}": [] for n in range(STREAMS)}

        def write(part: int) -> None:
            # Each writer has streams of its own, so that the order of its puts is the order to expect.
            chance = random.Random(part)
            for n in range(BATCHES // 4):
                stream = f"rooms/{chance.randrange(STREAMS // 4) * 4 + part}"
                events = [n * 10 + each for each in range(chance.randint(1, 5))]
                outbox.put([Batch(stream=stream, events=tuple(b'{"n":%d}' % each for each in events), txid=str(n))])
                expected[stream].extend(events)
                if n % 10 == 0:
                    relay.deliver(stream)

        writers = [threading.Thread(target=write, args=(part,)) for part in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        drained = until(120, lambda: not outbox.pending())
        for sweeper in sweepers:
            sweeper.stop()
        for sweeper in sweepers:
            sweeper.join(10)
        assert drained, outbox.pending()
        honest = StreamClient(settings, Gatekeeper(settings))
        for stream, numbers in expected.items():
            if numbers:
                assert read_numbers(honest, stream) == numbers, stream
        honest.close()
        client.close()
    transport.close()
    assert set(transport.harm) == {"lose request", "lose answer", "delay", "repeat", "refuse"}
