"""A store or a server that forgets, or goes back in time: what comes later arrives, and one line in the log says so."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa

from broadcastable import DurableStreams, Settings
from broadcastable.outbox import database
from broadcastable.server.embedded import EmbeddedServer, embedded_server

STREAM = "gid://app/Room/1/messages"


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with embedded_server(settings=Settings()) as server:
        yield server


def queue(streams: DurableStreams, *numbers: int) -> None:
    """Into the outbox, one transaction each."""
    for n in numbers:
        streams.broadcast_event_later_to(STREAM, type="n", key=n, value={"n": n}, operation="insert")
    assert streams.handoff.flush(10)


def deliver(streams: DurableStreams) -> None:
    """As a worker would: with Redis there is none in this process."""
    streams.relay.deliver(STREAM)
    assert not streams.outbox.pending()


def numbers(streams: DurableStreams) -> list[int]:
    return [json.loads(event)["value"]["n"] for event in streams.client.read(STREAM).events]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_redis_flushed_loses_what_was_queued_and_nothing_later(
    server: EmbeddedServer, valkey_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with DurableStreams(server.settings, outbox="redis", redis_url=valkey_url) as streams:
        queue(streams, 1, 2)
        deliver(streams)
        queue(streams, 3)
        client = redis.Redis.from_url(valkey_url)
        client.flushdb()
        client.close()
        queue(streams, 4)
        deliver(streams)
        queue(streams, 5)
        deliver(streams)
        assert numbers(streams) == [1, 2, 4, 5]
    # A higher epoch begins by itself: there is nothing to warn of.
    assert warnings(caplog) == []


def test_an_outbox_restored_from_an_older_copy_doubles_nothing_and_swallows_nothing(
    server: EmbeddedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy knows lower numbers than the server; the server would take new events for old ones."""
    file, copy = tmp_path / "app.db", tmp_path / "copy.db"
    engine = sa.create_engine(f"sqlite:///{file}")
    database.tables(metadata := sa.MetaData())
    metadata.create_all(engine)
    engine.dispose()
    settings = server.settings.replace(outbox="database", database_url=f"sqlite:///{file}")
    with DurableStreams(settings) as streams:
        queue(streams, 1)
        assert streams.drain(20)
    with sqlite3.connect(file) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    source.close()
    target.close()
    with DurableStreams(settings) as streams:
        for n in (2, 3):
            queue(streams, n)
            assert streams.drain(20)
    for leftover in tmp_path.glob("app.db*"):
        leftover.unlink()
    shutil.copy(copy, file)
    caplog.clear()
    with DurableStreams(settings) as streams:
        for n in (4, 5):
            queue(streams, n)
            assert streams.drain(20)
        assert numbers(streams) == [1, 2, 3, 4, 5]
    assert len(warnings(caplog)) == 1
    assert "lost count" in warnings(caplog)[0]


@pytest.mark.parametrize("outbox", ["memory", "redis"])
def test_a_stream_deleted_and_made_again_gets_what_comes_later(
    server: EmbeddedServer, valkey_url: str, caplog: pytest.LogCaptureFixture, outbox: str
) -> None:
    with DurableStreams(server.settings, outbox=outbox, redis_url=valkey_url) as streams:
        queue(streams, 1, 2)
        deliver_or_drain(streams, outbox)
        streams.client.delete(STREAM)
        streams.client.create(STREAM)
        caplog.clear()
        queue(streams, 3)
        deliver_or_drain(streams, outbox)
        assert numbers(streams) == [3]
        assert len(warnings(caplog)) == 1
        streams.client.delete(STREAM)
        caplog.clear()
        queue(streams, 4)
        deliver_or_drain(streams, outbox)
        assert numbers(streams) == [4]
        assert len(warnings(caplog)) == 1
        assert "gone" in warnings(caplog)[0]


def deliver_or_drain(streams: DurableStreams, outbox: str) -> None:
    if outbox == "memory":  # its worker is in this process, and may have been faster
        assert streams.drain(20)
    else:
        deliver(streams)
