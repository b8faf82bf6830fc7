"""Workers as in production: the `dramatiq` command in its own processes, a real Valkey, a real stream server."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import redis
from dramatiq.brokers.redis import RedisBroker

from broadcastable.durable_streams import DurableStreams
from broadcastable.errors import ConfigurationError
from broadcastable.server import embedded_server
from broadcastable.settings import Settings
from tests.actors.commands import ONE, Command, environment_of, numbers_in
from tests.services import free_port, wait_until


@pytest.fixture
def settings(valkey_url: str, stream_server: object, signing_key: str) -> Settings:
    return Settings(
        server_url=stream_server.url,
        signing_key=signing_key,
        redis_url=valkey_url,
        outbox="redis",
        namespace=f"test-{uuid.uuid4().hex}",
    )


@pytest.fixture
def streams(settings: Settings) -> Iterator[DurableStreams]:
    with DurableStreams(settings) as streams:
        yield streams


def dead_letters(settings: Settings) -> int:
    with redis.Redis.from_url(settings.redis_url) as client:
        return int(client.zcard(f"dramatiq:{settings.namespace}.XQ"))


def test_a_ready_worker_delivers_what_an_application_commits(
    run_dramatiq: Callable[..., Command], settings: Settings, streams: DurableStreams
) -> None:
    worker = run_dramatiq(environment_of(settings), "broadcastable.worker", *ONE).wait_until_ready()
    room = f"room/{uuid.uuid4()}"
    for n in range(100):
        streams.broadcast_later_to(room, n=n)
    assert streams.drain(20)
    assert numbers_in(streams, room) == list(range(100))
    assert worker.terminate() == 0
    assert "ERROR" not in worker.output
    assert dead_letters(settings) == 0


def test_another_worker_takes_over_from_one_that_was_killed(
    run_dramatiq: Callable[..., Command], settings: Settings, streams: DurableStreams
) -> None:
    """Every event once and in order, although workers die by SIGKILL while they deliver."""
    doomed, survivor = (run_dramatiq(environment_of(settings), "broadcastable.worker", *ONE) for _ in range(2))
    doomed.wait_until_ready()
    survivor.wait_until_ready()
    rooms = [streams.ensure_stream_exists(f"room/{uuid.uuid4()}") for _ in range(8)]

    def commit() -> None:
        for n in range(150):
            for room in rooms:
                streams.broadcast_later_to(room, n=n)
            time.sleep(0.005)

    committing = threading.Thread(target=commit)
    committing.start()
    wait_until(lambda: streams.client.read(rooms[0], "-1").events, within=20, what="the first events")
    doomed.kill()
    committing.join()
    assert streams.drain(40)
    for room in rooms:
        assert numbers_in(streams, room) == list(range(150))


def test_a_worker_that_is_asked_to_end_leaves_nothing_half_done(
    run_dramatiq: Callable[..., Command], settings: Settings, streams: DurableStreams
) -> None:
    first = run_dramatiq(environment_of(settings), "broadcastable.worker", *ONE).wait_until_ready()
    rooms = [f"room/{uuid.uuid4()}" for _ in range(50)]
    for n in range(5):
        for room in rooms:
            streams.broadcast_later_to(room, n=n)
    assert first.terminate() == 0
    for room in rooms:
        streams.broadcast_later_to(room, n=5)
    run_dramatiq(environment_of(settings), "broadcastable.worker", *ONE).wait_until_ready()
    assert streams.drain(30)
    for room in rooms:
        assert numbers_in(streams, room) == list(range(6))
    assert dead_letters(settings) == 0


APPLICATION = """
import dramatiq
from dramatiq.brokers.redis import RedisBroker
import broadcastable.actors

broker = RedisBroker(url={url!r})
dramatiq.set_broker(broker)
broadcastable.actors.declare(broker)

@dramatiq.actor
def greet(name, path):
    open(path, "w").write("hello " + name)
"""


def test_the_applications_own_workers_deliver_streams_beside_its_tasks(
    run_dramatiq: Callable[..., Command],
    settings: Settings,
    tmp_path: Path,
    valkey_url: str,
) -> None:
    (tmp_path / "their_tasks.py").write_text(APPLICATION.format(url=valkey_url))
    worker = run_dramatiq(environment_of(settings), "their_tasks", "--path", str(tmp_path), *ONE).wait_until_ready()
    broker = RedisBroker(url=valkey_url)
    room = f"room/{uuid.uuid4()}"
    with DurableStreams(settings, broker=broker) as streams:
        streams.broadcast_later_to(room, n=1)
        assert streams.drain(20)
        assert numbers_in(streams, room) == [1]
    module = ModuleType("their_tasks")
    exec(APPLICATION.format(url=valkey_url).replace("dramatiq.set_broker(broker)", ""), module.__dict__)
    greeting = tmp_path / "greeting"
    broker.enqueue(module.greet.message("you", str(greeting)))
    wait_until(lambda: greeting.exists() and greeting.read_text() == "hello you")
    assert worker.terminate() == 0
    for each in (broker, module.broker):
        each.client.connection_pool.disconnect()


def test_an_unreachable_stream_server_fills_no_dead_letter_queue_and_is_caught_up_with(
    run_dramatiq: Callable[..., Command], settings: Settings
) -> None:
    port = free_port()
    settings = settings.replace(server_url=f"http://127.0.0.1:{port}/v1/streams")
    worker = run_dramatiq(environment_of(settings), "broadcastable.worker", *ONE).wait_until_ready()
    rooms = [f"room/{n}" for n in range(20)]
    with DurableStreams(settings) as streams:
        for room in rooms:
            streams.broadcast_later_to(room, n=1)
        queue = redis.Redis.from_url(settings.redis_url)
        wait_until(lambda: queue.hlen(f"dramatiq:{settings.namespace}.msgs") == 0, within=30, what="an empty queue")
        queue.close()
        assert not streams.drain(0.5)
        assert dead_letters(settings) == 0
        with embedded_server(port=port, settings=settings):
            assert streams.drain(40)
            assert [numbers_in(streams, room) for room in rooms] == [[1]] * len(rooms)
            assert worker.terminate() == 0


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "BROADCASTABLE_REDIS_URL"),
        ({"BROADCASTABLE_REDIS_URL": "redis://localhost"}, "BROADCASTABLE_OUTBOX"),
        (
            {"BROADCASTABLE_REDIS_URL": "redis://localhost", "BROADCASTABLE_OUTBOX": "database"},
            "BROADCASTABLE_DATABASE_URL",
        ),
    ],
)
def test_a_worker_that_could_deliver_nothing_says_what_is_missing(
    run_dramatiq: Callable[..., Command], variables: dict[str, str], named: str
) -> None:
    worker = run_dramatiq(variables, "broadcastable.worker", *ONE)
    assert worker.wait() != 0
    assert ConfigurationError.__name__ in worker.output
    assert named in worker.output
