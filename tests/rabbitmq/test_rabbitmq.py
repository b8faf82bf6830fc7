"""Wake-ups over a real RabbitMQ, to worker processes that deliver to a real stream server."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import dramatiq
import pytest
import sqlalchemy as sa
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from sqlalchemy.orm import Session

from broadcastable import DurableStreams, Settings
from broadcastable.actors import declare
from broadcastable.outbox.redis import RedisOutbox
from broadcastable.server import embedded_server
from broadcastable.wakeups import actor_name
from tests.actors.commands import ONE, Command, environment_of, numbers_in
from tests.actors.served import Served
from tests.chaos import models
from tests.chaos.models import Message, Room
from tests.rabbitmq.server import RabbitMQ
from tests.services import free_port, wait_until

ROOMS = 6


@pytest.fixture
def settings(postgres_url: str, stream_server: object, signing_key: str) -> Settings:
    """The database outbox, and no Redis: RabbitMQ is all there is."""
    models.create(postgres_url, ROOMS)
    unique = f"test-{uuid.uuid4().hex}"
    return Settings(
        server_url=stream_server.url,
        signing_key=signing_key,
        outbox="database",
        database_url=postgres_url,
        namespace=unique,
        gid_app=unique,  # all tests share the stream server
    )


@pytest.fixture
def engine(postgres_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(postgres_url)
    yield engine
    engine.dispose()


@pytest.fixture
def streams(settings: Settings, make_broker: Callable[[], RabbitmqBroker]) -> Iterator[DurableStreams]:
    with DurableStreams(settings, broker=make_broker()) as streams:
        yield streams


@pytest.fixture
def run_worker(run_dramatiq: Callable[..., Command], rabbitmq: RabbitMQ, settings: Settings) -> Callable[..., Command]:
    """Starts `dramatiq` for the application, with one process."""

    def run(settings: Settings = settings, *arguments: str) -> Command:
        environment = environment_of(settings) | {"TEST_RABBITMQ_URL": rabbitmq.url}
        return run_dramatiq(environment, "tests.rabbitmq.application", *(arguments or ONE))

    return run


def write(engine: sa.Engine, streams: DurableStreams, room: int, writer: str = "test") -> None:
    """One transaction that adds the room's next message."""
    with Session(engine, info={"durable_streams": streams}) as session:
        found = session.get_one(Room, room, with_for_update=True)
        found.number += 1
        session.add(Message(room_id=room, number=found.number, writer=writer, body="hello"))
        session.commit()


def stream_of(settings: Settings, room: int) -> str:
    return f"gid://{settings.gid_app}/Room/{room}/messages"


def numbers_of(streams: DurableStreams, room: int) -> list[int]:
    """The numbers of the messages on the stream of *room*, in its order."""
    numbers: list[int] = []
    offset = "-1"
    while True:
        page = streams.client.read(stream_of(streams.settings, room), offset)
        numbers.extend(json.loads(event)["value"]["number"] for event in page.events)
        offset = page.next_offset
        if page.up_to_date:
            return numbers


@contextmanager
def writing(engine: sa.Engine, streams: DurableStreams, *, threads: int, each: int) -> Iterator[None]:
    """In *threads* threads, each of which writes *each* messages to every room."""

    def write_all(writer: str) -> None:
        for _ in range(each):
            for room in range(1, ROOMS + 1):
                write(engine, streams, room, writer)

    writers = [threading.Thread(target=write_all, args=(f"writer {n}",)) for n in range(threads)]
    for writer in writers:
        writer.start()
    try:
        yield
    finally:
        for writer in writers:
            writer.join()


def queued(broker: RabbitmqBroker, settings: Settings) -> tuple[int, int, int]:
    """How many messages wait, wait for their time, and are dead."""
    return broker.get_queue_message_counts(settings.namespace)


def test_a_commit_reaches_the_stream_by_a_worker_process(
    run_worker: Callable[..., Command],
    engine: sa.Engine,
    streams: DurableStreams,
    settings: Settings,
    make_broker: Callable[[], RabbitmqBroker],
) -> None:
    worker = run_worker().wait_until_ready()
    for _ in range(20):
        write(engine, streams, 1)
    assert streams.drain(20)
    assert numbers_of(streams, 1) == list(range(1, 21))
    assert worker.terminate() == 0
    assert "ERROR" not in worker.output
    assert queued(make_broker(), settings) == (0, 0, 0)


def test_it_is_the_wake_up_that_brings_a_worker_thread_to_deliver(
    make_served: Callable[..., Served],
    make_broker: Callable[[], RabbitmqBroker],
    start_worker: Callable[..., dramatiq.Worker],
    settings: Settings,
    valkey_url: str,
) -> None:
    """And not the sweeper, who would come a second later."""
    by: list[str] = []
    settings = settings.replace(outbox="redis", redis_url=valkey_url)
    with closing(RedisOutbox.from_settings(settings)) as outbox:
        broker = make_broker()
        served = make_served(before=lambda stream: by.append(threading.current_thread().name), outbox=outbox)
        served.settings = settings
        declare(broker, served)
        start_worker(broker)
        for n in range(10):
            served.commit("a stream")
            wait_until(lambda n=n: served.relay.events["a stream"] == n + 1)
    assert [name for name in by if not name.startswith("broadcastable-sweep")]


def test_the_order_of_each_stream_is_kept_by_several_workers(
    run_worker: Callable[..., Command], engine: sa.Engine, streams: DurableStreams, settings: Settings
) -> None:
    workers = [run_worker(settings, "-p", "2", "-t", "4") for _ in range(2)]
    for worker in workers:
        worker.wait_until_ready()
    with writing(engine, streams, threads=4, each=15):
        pass
    assert streams.drain(40)
    for room in range(1, ROOMS + 1):
        assert numbers_of(streams, room) == list(range(1, 61))


def test_another_worker_takes_over_from_one_that_was_killed(
    run_worker: Callable[..., Command], engine: sa.Engine, streams: DurableStreams
) -> None:
    doomed, survivor = run_worker(), run_worker()
    doomed.wait_until_ready()
    survivor.wait_until_ready()
    for room in range(1, ROOMS + 1):
        streams.ensure_stream_exists(stream_of(streams.settings, room))
    with writing(engine, streams, threads=2, each=60):
        wait_until(lambda: len(numbers_of(streams, ROOMS)) > 5, within=20, what="the first messages")
        doomed.kill()
    assert streams.drain(40)
    for room in range(1, ROOMS + 1):
        assert numbers_of(streams, room) == list(range(1, 121))


def test_an_unreachable_stream_server_fills_no_dead_letter_queue_and_is_caught_up_with(
    run_worker: Callable[..., Command],
    engine: sa.Engine,
    settings: Settings,
    make_broker: Callable[[], RabbitmqBroker],
) -> None:
    port = free_port()
    settings = settings.replace(server_url=f"http://127.0.0.1:{port}/v1/streams")
    worker = run_worker(settings).wait_until_ready()
    broker = make_broker()
    with DurableStreams(settings, broker=make_broker()) as streams:
        for room in range(1, ROOMS + 1):
            write(engine, streams, room)
        wait_until(lambda: queued(broker, settings)[:2] == (0, 0), within=30, what="an empty queue")
        assert not streams.drain(0.5)
        with embedded_server(port=port, settings=settings):
            assert streams.drain(40)
            assert [numbers_of(streams, room) for room in range(1, ROOMS + 1)] == [[1]] * ROOMS
            assert worker.terminate() == 0
    # What a worker had not acked would be queued again by now.
    assert queued(broker, settings) == (0, 0, 0)


def test_commits_to_one_stream_queue_one_wake_up_and_a_fan_out_a_few(
    run_worker: Callable[..., Command],
    settings: Settings,
    valkey_url: str,
    make_broker: Callable[[], RabbitmqBroker],
) -> None:
    settings = settings.replace(outbox="redis", redis_url=valkey_url)
    broker = make_broker()
    with DurableStreams(settings, broker=broker) as streams:
        room = f"room/{uuid.uuid4()}"
        for n in range(100):
            streams.broadcast_later_to(room, n=n)
        assert streams.wakeups.wake([f"nothing/{n}" for n in range(600)]) == 3
        wait_until(lambda: queued(broker, settings)[0] >= 4, what="all of the wake-ups in their queue")
        assert queued(broker, settings) == (4, 0, 0)
        worker = run_worker(settings).wait_until_ready()
        assert streams.drain(20)
        assert numbers_in(streams, room) == list(range(100))
        wait_until(lambda: queued(broker, settings)[0] == 0, what="the last of the wake-ups")
        assert worker.terminate() == 0
        assert queued(broker, settings) == (0, 0, 0)


def test_wake_ups_that_come_twice_or_late_change_nothing(
    run_worker: Callable[..., Command],
    engine: sa.Engine,
    streams: DurableStreams,
    settings: Settings,
    make_broker: Callable[[], RabbitmqBroker],
) -> None:
    broker = make_broker()
    broker.declare_queue(settings.namespace)
    name = stream_of(settings, 1)
    wake_up = dramatiq.Message(settings.namespace, actor_name(settings.namespace), ([name, name],), {}, {})
    write(engine, streams, 1)
    for delay in (None, None, 400, 800):
        broker.enqueue(wake_up, delay=delay)
    wait_until(lambda: queued(broker, settings) == (3, 2, 0), what="all of the wake-ups in their queues")
    worker = run_worker().wait_until_ready()
    assert streams.drain(20)
    write(engine, streams, 1)
    broker.enqueue(wake_up)
    assert streams.drain(20)
    wait_until(lambda: queued(broker, settings)[:2] == (0, 0), what="the last of the wake-ups")
    assert worker.terminate() == 0
    assert numbers_of(streams, 1) == [1, 2]
    assert queued(broker, settings) == (0, 0, 0)


def test_what_is_committed_while_the_broker_is_down_is_found_by_the_sweeper(
    run_worker: Callable[..., Command],
    engine: sa.Engine,
    streams: DurableStreams,
    settings: Settings,
    rabbitmq: RabbitMQ,
    make_broker: Callable[[], RabbitmqBroker],
) -> None:
    run_worker().wait_until_ready()
    write(engine, streams, 1)
    assert streams.drain(20)
    rabbitmq.kill()
    for _ in range(10):
        write(engine, streams, 1)
    assert streams.drain(30)
    assert numbers_of(streams, 1) == list(range(1, 12))
    rabbitmq.start()
    wait_until(lambda: streams.wakeups.wake(["a stream"]), within=30, what="wake-ups, again")
    write(engine, streams, 1)
    assert streams.drain(20)
    assert numbers_of(streams, 1) == list(range(1, 13))
    broker = make_broker()
    wait_until(lambda: queued(broker, settings)[0] == 0, within=30, what="a worker that takes wake-ups again")
    assert queued(broker, settings)[2] == 0
