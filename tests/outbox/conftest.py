"""The three stores, each on its real service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from redis.cluster import RedisCluster

from broadcastable.outbox import Outbox
from broadcastable.outbox.database import DatabaseOutbox, tables
from broadcastable.outbox.memory import MemoryOutbox
from broadcastable.outbox.redis import RedisOutbox
from tests.conftest import BACKENDS
from tests.services import Valkey, free_port, wait_until

STORES = ("memory", "redis", "cluster", *BACKENDS)


@pytest.fixture(scope="session")
def _cluster_server() -> Iterator[Valkey]:
    server = Valkey(**{"cluster-enabled": "yes", "cluster-port": free_port()}).start()
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_until(lambda: client.cluster("INFO")["cluster_state"] == "ok", what="the cluster")
    yield server
    server.stop()


@pytest.fixture
def cluster(_cluster_server: Valkey) -> Iterator[RedisCluster]:
    """A client of an empty Valkey Cluster of one node, which refuses scripts whose keys are in two slots."""
    with RedisCluster(host="127.0.0.1", port=_cluster_server.port) as client:
        client.flushall()
        yield client


@pytest.fixture(params=STORES)
def make_outbox(request: pytest.FixtureRequest) -> Iterator[Callable[..., Outbox]]:
    """Opens an outbox on a store that is empty at first; a second call opens it again where it is shared."""
    opened: list[Outbox] = []
    shared: list[Outbox] = []

    def make(**limits: Any) -> Outbox:
        outbox: Outbox
        limits = {"max_frame_bytes": 1 << 20, "max_frame_events": 1_000, **limits}
        if request.param == "memory":
            if not shared:
                shared.append(MemoryOutbox(max_bytes=64 << 20, **limits))
            outbox = shared[0]
        elif request.param == "redis":
            outbox = RedisOutbox(request.getfixturevalue("valkey_url"), namespace="test", timeout=10, **limits)
        elif request.param == "cluster":
            outbox = RedisOutbox(request.getfixturevalue("cluster"), namespace="test", **limits)
        else:
            url = request.getfixturevalue(f"{request.param}_url")
            if not opened:
                create_tables(url)
            outbox = DatabaseOutbox(url, namespace="test", **limits)
        opened.append(outbox)
        return outbox

    yield make
    for outbox in opened:
        outbox.close()


def create_tables(url: str) -> None:
    metadata = sa.MetaData()
    tables(metadata)
    engine = sa.create_engine(url)
    metadata.create_all(engine)
    engine.dispose()


@pytest.fixture
def outbox(make_outbox: Callable[..., Outbox]) -> Outbox:
    return make_outbox()
