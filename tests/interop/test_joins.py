"""Pages of the npm client that join by a snapshot while writers run end with exactly the rows of the table."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from broadcastable import DurableStreams, Settings
from broadcastable.server.embedded import embedded_server
from tests import services
from tests.chaos.models import create
from tests.chaos.test_joins import ROOMS, fold, join, write_until
from tests.interop.node import NodeProcess

JOINS = 200
AT_ONCE = 20
"""Pages that follow at the same time; each holds a request of the server."""


@pytest.fixture
def node() -> Iterator[NodeProcess]:
    process = NodeProcess("reader.mjs")
    yield process
    process.close()


def test_two_hundred_pages_join_while_writers_run(postgres_url: str, node: NodeProcess) -> None:
    create(postgres_url, ROOMS)
    engine = services.open_engine(postgres_url, pool_size=16)
    chance = random.Random(3)
    with embedded_server(settings=Settings()) as server:
        settings = server.settings.replace(outbox="database", database_url=postgres_url)
        with DurableStreams(settings) as streams:
            offsets = set()
            for _ in range(JOINS // AT_ONCE):
                stop = threading.Event()
                writers = [threading.Thread(target=write_until, args=(stop, engine, streams, n)) for n in range(2)]
                for writer in writers:
                    writer.start()
                pages: dict[str, int] = {}
                for n in range(AT_ONCE):
                    room = chance.randint(1, ROOMS)
                    snapshot = join(engine, streams, room)
                    offsets.add(snapshot.offset)
                    collections = {"messages": ["message", "id"]}
                    node.do("join_by_snapshot", name=f"p{n}", snapshot=snapshot.as_dict(), collections=collections)
                    pages[f"p{n}"] = room
                stop.set()
                for writer in writers:
                    writer.join()
                assert streams.drain(30)
                table = {room: fold(list(join(engine, streams, room).events)) for room in range(1, ROOMS + 1)}

                def caught_up(name: str, room: int, table: dict[int, object] = table) -> bool:  # type: ignore[assignment]
                    rows = node.do("rows", collection=f"{name}.messages")
                    return {row["id"]: row for row in rows} == table[room]

                for name, room in pages.items():
                    services.wait_until(lambda: caught_up(name, room), within=20, what=f"{name} to have the rows")  # noqa: B023
                    node.do("close", name=name)
            assert node.do("failures") == []
    engine.dispose()
    assert len(offsets) > JOINS / 4
