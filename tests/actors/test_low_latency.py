"""The consumer that blocks in Redis, and each trap on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionClosed
from redis.backoff import NoBackoff
from redis.retry import Retry

from broadcastable import low_latency
from broadcastable.low_latency import BlockingConsumer
from tests.services import Valkey, wait_until

LONG = 60_000
"""Milliseconds of `worker_timeout`: with these a stock consumer would be asleep for the whole test."""


@pytest.fixture(params=[(), ("q",)], ids=["fetch", "fetch at once"], autouse=True)
def expendable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Collection[str]:
    """Everything holds for the application's queues and for our own."""
    queues: Collection[str] = request.param
    monkeypatch.setitem(globals(), "EXPENDABLE", queues)
    return queues


EXPENDABLE: Collection[str] = ()


def install(broker: dramatiq.Broker, queues: Collection[str] | None) -> bool:
    return low_latency.install(broker, queues, expendable=EXPENDABLE)


@pytest.fixture
def make_broker(valkey_url: str) -> Iterator[Callable[..., RedisBroker]]:
    brokers: list[RedisBroker] = []

    def make(cls: type[RedisBroker] = RedisBroker, **options: Any) -> RedisBroker:
        brokers.append(cls(**({} if "client" in options else {"url": valkey_url}) | options))
        return brokers[-1]

    yield make
    for broker in brokers:
        broker.client.connection_pool.disconnect()


@pytest.fixture
def consume() -> Iterator[Callable[..., Any]]:
    consumers: list[dramatiq.Consumer] = []

    def consume(broker: RedisBroker, queue: str = "q", *, prefetch: int = 1, timeout: int = LONG) -> Any:
        consumers.append(broker.consume(queue, prefetch, timeout))
        return consumers[-1]

    yield consume
    for consumer in consumers:
        consumer.close()


def send(broker: RedisBroker, *args: object, queue: str = "q", delay: int | None = None) -> None:
    message = dramatiq.Message(queue_name=queue, actor_name="note", args=args, kwargs={}, options={})
    broker.enqueue(message, delay=delay)


def blocked(broker: RedisBroker) -> int:
    return int(broker.client.info("clients")["blocked_clients"])


def noting(broker: RedisBroker, before: Callable[[], None] = lambda: None) -> list[object]:
    """Declares the actor `note`, whose arguments appear in the list."""
    noted: list[object] = []

    def note(value: object) -> None:
        before()
        noted.append(value)

    dramatiq.actor(broker=broker, actor_name="note", queue_name="q", max_retries=0)(note)
    return noted


# Blocking


def test_an_idle_worker_wakes_for_a_message(
    make_broker: Callable[..., RedisBroker], start_worker: Callable[..., dramatiq.Worker]
) -> None:
    broker = make_broker()
    noted = noting(broker)
    install(broker, {"q"})
    start_worker(broker, worker_timeout=2_000)
    wait_until(lambda: blocked(broker) == 2, what="both consumers waiting in Redis")
    send(broker, "hello")
    wait_until(lambda: noted == ["hello"], within=5)


def test_looking_takes_nothing_and_keeps_the_order(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any]
) -> None:
    broker = make_broker()
    install(broker, {"q"})
    consumer = consume(broker, prefetch=10, timeout=1)
    assert next(consumer) is None
    for number in range(5):
        send(broker, number)
    got: list[int] = []
    while len(got) < 5:
        message = next(consumer)
        if message is not None:
            got.append(message.args[0])
            consumer.ack(message)
    assert got == list(range(5))
    assert broker.client.llen("dramatiq:q") == 0


def test_it_waits_for_room_and_not_for_the_clock_when_its_window_is_full(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_latency, "HEARTBEAT", 30.0)
    broker = make_broker(heartbeat_timeout=120_000)
    install(broker, {"q"})
    consumer = consume(broker, prefetch=1)
    send(broker, 1)
    send(broker, 2)
    first = next(consumer)
    timer = threading.Timer(0.2, consumer.ack, (first,))
    timer.start()
    began = time.monotonic()
    second = next(consumer)
    timer.join()
    assert second is not None
    assert second.args == (2,)
    assert 0.1 < time.monotonic() - began < 10
    consumer.ack(second)


def test_it_is_back_when_a_delayed_message_is_due(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_latency, "HEARTBEAT", 30.0)
    broker = make_broker(heartbeat_timeout=120_000)
    install(broker, {"q"})
    consumer = consume(broker, "q.DQ", prefetch=10)
    send(broker, "later", delay=20_000)
    send(broker, "soon", delay=300)
    messages = [next(consumer), next(consumer)]
    began = time.monotonic()
    while all(message.options["eta"] > time.time() * 1000 for message in messages):
        assert next(consumer) is None
        assert time.monotonic() - began < 5
    consumer.ack(messages[1])
    # Now only the other eta counts.
    assert consumer._until_eta() > 10


def test_a_delayed_message_runs_when_it_is_due(
    make_broker: Callable[..., RedisBroker], start_worker: Callable[..., dramatiq.Worker]
) -> None:
    broker = make_broker()
    noted = noting(broker)
    install(broker, None)
    start_worker(broker, worker_timeout=2_000)
    wait_until(lambda: blocked(broker) == 2)
    send(broker, "later", delay=300)
    wait_until(lambda: noted == ["later"], within=5)


def test_a_short_socket_timeout_of_the_applications_client_does_not_matter(
    make_broker: Callable[..., RedisBroker], valkey_url: str, consume: Callable[..., Any]
) -> None:
    broker = make_broker(client=redis.Redis.from_url(valkey_url, socket_timeout=0.2, retry=Retry(NoBackoff(), 0)))
    install(broker, {"q"})
    consumer = consume(broker, timeout=1_000)
    assert next(consumer) is None
    connections = broker.client.info("stats")["total_connections_received"]
    for _ in range(2):
        assert next(consumer) is None
    # It waited, and did not lose and make connections.
    assert broker.client.info("stats")["total_connections_received"] - connections <= 1


def test_a_quiet_worker_asks_redis_for_little(
    make_broker: Callable[..., RedisBroker], start_worker: Callable[..., dramatiq.Worker]
) -> None:
    broker = make_broker()
    noting(broker)
    install(broker, {"q"})
    start_worker(broker, worker_timeout=1_000)
    wait_until(lambda: blocked(broker) == 2)
    calls = lambda: sum(each["calls"] for each in broker.client.info("commandstats").values())  # noqa: E731
    before = calls()
    time.sleep(2)
    assert calls() - before < 30


# Liveness


def test_the_heartbeat_goes_on_while_it_waits(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any]
) -> None:
    broker = make_broker(heartbeat_timeout=800)
    install(broker, {"q"})
    consumer = consume(broker)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        assert next(consumer) is None
        beat = broker.client.zscore("dramatiq:__heartbeats__", broker.broker_id)
        assert time.time() * 1000 - beat < 800


def test_the_heartbeat_goes_on_while_its_window_is_full(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any]
) -> None:
    broker = make_broker(heartbeat_timeout=800)
    install(broker, {"q"})
    consumer = consume(broker, prefetch=1)
    send(broker, "long")
    message = next(consumer)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        assert next(consumer) is None
        beat = broker.client.zscore("dramatiq:__heartbeats__", broker.broker_id)
        assert time.time() * 1000 - beat < 800
    consumer.ack(message)


def test_a_long_message_is_not_taken_for_a_dead_workers(
    make_broker: Callable[..., RedisBroker], start_worker: Callable[..., dramatiq.Worker]
) -> None:
    """While it runs on one worker, another looks for dead workers all the time."""
    runs: list[list[object]] = []
    for _ in range(2):
        broker = make_broker(heartbeat_timeout=800)
        runs.append(noting(broker, before=lambda: time.sleep(2.5)))
        install(broker, {"q"})
        start_worker(broker, worker_threads=1, worker_timeout=2_000)
    wait_until(lambda: blocked(broker) == 4)
    send(broker, "long")
    wait_until(lambda: runs[0] + runs[1])
    time.sleep(1.5)
    assert runs[0] + runs[1] == ["long"]


def test_what_a_dead_worker_held_is_put_back_on_time(
    make_broker: Callable[..., RedisBroker], start_worker: Callable[..., dramatiq.Worker]
) -> None:
    """Stock consumers do that once in a thousand commands, which takes an idle worker minutes."""
    dead = make_broker()
    send(dead, "orphan")
    [data] = dead.do_fetch("q", 1)
    assert b"orphan" in data
    broker = make_broker(heartbeat_timeout=1_000, maintenance_chance=0)
    noted = noting(broker)
    install(broker, {"q"})
    start_worker(broker, worker_timeout=200)
    wait_until(lambda: noted == ["orphan"], within=10)


# Trouble with Redis


def test_a_redis_that_stops_answering_is_a_lost_connection_and_not_a_defect(
    make_broker: Callable[..., RedisBroker],
    valkey_server: Valkey,
    consume: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(low_latency, "HEARTBEAT", 0.1)
    monkeypatch.setattr(low_latency, "ANSWER_MARGIN", 0.2)
    client = redis.Redis.from_url(valkey_server.url, socket_timeout=0.3, retry=Retry(NoBackoff(), 0))
    broker = make_broker(client=client)
    install(broker, {"q"})
    consumer = consume(broker, prefetch=2)
    send(broker, 1)
    message = next(consumer)
    assert next(consumer) is None
    valkey_server.pause()
    try:
        with pytest.raises(ConnectionClosed):
            next(consumer)
        with pytest.raises(ConnectionClosed):
            consumer.ack(message)
        with pytest.raises(ConnectionClosed):
            consumer.nack(message)
    finally:
        valkey_server.resume()


def test_a_worker_goes_on_after_redis_was_away(
    make_broker: Callable[..., RedisBroker],
    make_valkey: Callable[..., Valkey],
    start_worker: Callable[..., dramatiq.Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.1)
    valkey = make_valkey()
    broker = make_broker(client=redis.Redis.from_url(valkey.url, retry=Retry(NoBackoff(), 0)))
    noted = noting(broker)
    install(broker, {"q"})
    start_worker(broker, worker_timeout=2_000)
    wait_until(lambda: blocked(broker) == 2)
    valkey.kill()
    valkey.start()
    send(broker, "after")
    wait_until(lambda: noted == ["after"])


def test_a_redis_that_was_started_again_has_forgotten_the_script(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any]
) -> None:
    broker = make_broker()
    install(broker, {"q"})
    consumer = consume(broker, prefetch=10, timeout=200)
    assert [next(consumer), next(consumer)] == [None, None]
    send(broker, 1)
    broker.client.script_flush()
    message = next(consumer)
    assert message is not None
    assert message.args == (1,)
    consumer.ack(message)


# Stepping aside


def test_other_brokers_need_nothing() -> None:
    assert not install(StubBroker(), None)


def test_other_queues_are_consumed_as_ever(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any]
) -> None:
    broker = make_broker()
    install(broker, {"q"})
    assert isinstance(consume(broker, "q"), BlockingConsumer)
    assert isinstance(consume(broker, "q.DQ"), BlockingConsumer)
    assert isinstance(consume(broker, "default"), broker.consumer_class)


def test_all_queues_block_when_asked(make_broker: Callable[..., RedisBroker], consume: Callable[..., Any]) -> None:
    broker = make_broker()
    install(broker, {"q"})
    install(broker, None)
    assert isinstance(consume(broker, "default"), BlockingConsumer)


def test_installing_again_adds_queues_and_wraps_once(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any]
) -> None:
    broker = make_broker()
    assert install(broker, {"q"})
    assert install(broker, {"r"})
    for queue in ("q", "r"):
        assert type(consume(broker, queue)._stock) is broker.consumer_class


def test_other_brokers_of_the_process_stay_as_they_are(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any]
) -> None:
    changed, other = make_broker(), make_broker()
    install(changed, None)
    assert isinstance(consume(other), other.consumer_class)


class ChangedConsumer(RedisBroker(client=redis.Redis()).consumer_class):  # type: ignore[misc]
    """A Dramatiq in which the cache has another name."""

    @property
    def message_cache(self) -> list[bytes]:
        raise AttributeError("message_cache")

    @message_cache.setter
    def message_cache(self, value: list[bytes]) -> None:
        self.cache = value


class ChangedBroker(RedisBroker):
    @property
    def consumer_class(self) -> type:
        return ChangedConsumer


class BrokerWithoutHeartbeats(RedisBroker):
    @property
    def heartbeat_timeout(self) -> int:
        raise AttributeError("heartbeat_timeout")

    @heartbeat_timeout.setter
    def heartbeat_timeout(self, value: int) -> None:
        pass


def test_a_changed_consumer_is_left_alone_with_one_warning(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    broker = make_broker(ChangedBroker)
    install(broker, None)
    for queue in ("q", "q.DQ", "default"):
        assert type(consume(broker, queue)) is ChangedConsumer
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "message_cache" in caplog.text


def test_a_changed_broker_is_left_alone(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    broker = make_broker(BrokerWithoutHeartbeats)
    assert not install(broker, None)
    assert "heartbeat_timeout" in caplog.text
    assert isinstance(consume(broker), broker.consumer_class)


def test_a_redis_without_the_command_is_polled_with_one_warning(
    make_broker: Callable[..., RedisBroker],
    valkey_server: Valkey,
    start_worker: Callable[..., dramatiq.Worker],
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = redis.Redis.from_url(valkey_server.url)
    client.execute_command("ACL", "SETUSER", "default", "-blmove")
    broker = make_broker(client=client)
    noted = noting(broker)
    install(broker, {"q"})
    start_worker(broker, worker_timeout=100)
    wait_until(lambda: caplog.records)
    send(broker, "hello")
    wait_until(lambda: noted == ["hello"])
    warnings = [record for record in caplog.records if record.name == "broadcastable.low_latency"]
    assert len(warnings) == 1
    assert "blmove" in caplog.text


@pytest.mark.parametrize("threads", [1, 8])
def test_nothing_is_lost_or_doubled_under_load(
    make_broker: Callable[..., RedisBroker], start_worker: Callable[..., dramatiq.Worker], threads: int
) -> None:
    noted: list[list[object]] = []
    for _ in range(2):
        broker = make_broker()
        noted.append(noting(broker))
        install(broker, {"q"})
        start_worker(broker, worker_threads=threads, worker_timeout=1_000)
    for number in range(1_000):
        send(broker, number)
    wait_until(lambda: len(noted[0]) + len(noted[1]) >= 1_000, within=20)
    assert sorted(noted[0] + noted[1]) == list(range(1_000))


# Many workers


@pytest.fixture
def run_consumers(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any]
) -> Iterator[Callable[..., list[list[object]]]]:
    """Starts consumers, each in a thread that acks what it gets; their lists of arguments."""
    threads: list[threading.Thread] = []
    stopping = threading.Event()

    def run(number: int, *, timeout: int = 1_000, **options: Any) -> list[list[object]]:
        got: list[list[object]] = [[] for _ in range(number)]

        def take_all(consumer: dramatiq.Consumer, into: list[object]) -> None:
            while not stopping.is_set():
                message = next(consumer)
                if message is not None:
                    into.append(message.args[0])
                    consumer.ack(message)

        for into in got:
            broker = make_broker(heartbeat_timeout=120_000)
            install(broker, {"q"})
            threads.append(threading.Thread(target=take_all, args=(consume(broker, timeout=timeout, **options), into)))
            threads[-1].start()
        return got

    yield run
    stopping.set()
    for thread in threads:
        thread.join()


def test_a_message_wakes_one_of_many_idle_workers(
    make_broker: Callable[..., RedisBroker],
    run_consumers: Callable[..., list[list[object]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(low_latency, "HEARTBEAT", 30.0)
    broker = make_broker()
    got = run_consumers(12, prefetch=2)
    wait_until(lambda: blocked(broker) == 12, what="all consumers waiting in Redis")
    scripts = lambda: broker.client.info("commandstats")["cmdstat_evalsha"]["calls"]  # noqa: E731
    before = scripts()
    for number in range(20):
        send(broker, number)
        wait_until(lambda number=number: sum(map(len, got)) == number + 1)
    # Each is enqueued, fetched and acked; were all woken, they would all fetch.
    assert scripts() - before < 20 * 5


@pytest.mark.parametrize(("prefetch", "busy_with"), [(10, 2), (2, 1), (1, 1)])
def test_a_worker_that_is_busy_leaves_the_watch_to_an_idle_one(
    make_broker: Callable[..., RedisBroker],
    consume: Callable[..., Any],
    run_consumers: Callable[..., list[list[object]]],
    monkeypatch: pytest.MonkeyPatch,
    prefetch: int,
    busy_with: int,
) -> None:
    """Prefetch is twice the worker's threads unless the operator chose; what it holds may be all that it can do."""
    monkeypatch.setattr(low_latency, "HEARTBEAT", 30.0)
    monkeypatch.setattr(low_latency, "WATCH_MARGIN", 60.0)
    broker = make_broker(heartbeat_timeout=120_000)
    install(broker, {"q"})
    busy = consume(broker, prefetch=prefetch, timeout=200)
    assert [next(busy), next(busy)] == [None, None]
    [idle] = run_consumers(1, prefetch=10)
    wait_until(lambda: blocked(broker) == 1)
    for number in range(busy_with):
        send(broker, number)
    held = [next(busy) for _ in range(busy_with)]
    assert all(held)
    assert next(busy) is None
    send(broker, 3)
    wait_until(lambda: idle == [3])
    for message in held:
        busy.ack(message)


def test_a_worker_that_shuts_down_takes_nothing_more(
    make_broker: Callable[..., RedisBroker],
    consume: Callable[..., Any],
    run_consumers: Callable[..., list[list[object]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its threads have ended, or are at the last thing they do; its consumer lives on for the heartbeat."""
    monkeypatch.setattr(low_latency, "HEARTBEAT", 30.0)
    monkeypatch.setattr(low_latency, "WATCH_MARGIN", 60.0)
    broker = make_broker(heartbeat_timeout=120_000)
    install(broker, {"q"})
    ending = consume(broker, prefetch=10, timeout=200)
    assert [next(ending), next(ending)] == [None, None]
    [idle] = run_consumers(1, prefetch=10)
    wait_until(lambda: blocked(broker) == 1)
    low_latency.stop_fetching(broker)
    send(broker, 1)
    assert next(ending) is None
    wait_until(lambda: idle == [1])
    install(broker, {"q"})  # a worker boots again


def test_what_comes_to_a_worker_that_shuts_down_in_its_wait_is_for_the_others(
    make_broker: Callable[..., RedisBroker], consume: Callable[..., Any]
) -> None:
    broker = make_broker()
    install(broker, {"q"})
    ending = consume(broker, prefetch=10, timeout=5_000)
    assert next(ending) is None
    with ThreadPoolExecutor(1) as waiting:
        message = waiting.submit(next, ending)
        wait_until(lambda: blocked(broker) == 1)
        low_latency.stop_fetching(broker)
        send(broker, 1)
        assert message.result() is None
    other = make_broker()
    [data] = other.do_fetch("q", 10)
    assert dramatiq.Message.decode(data).args == (1,)


def test_the_watch_of_a_killed_worker_is_taken_over(
    make_broker: Callable[..., RedisBroker],
    run_consumers: Callable[..., list[list[object]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(low_latency, "HEARTBEAT", 30.0)
    broker = make_broker()
    broker.client.set("dramatiq:q.watch", "somebody who is no more", px=2_000)
    got = run_consumers(3, timeout=300)
    wait_until(lambda: blocked(broker) == 3)
    send(broker, 1)
    wait_until(lambda: any(got))


def test_a_worker_that_ends_hands_its_watch_over_at_once(
    make_broker: Callable[..., RedisBroker],
    consume: Callable[..., Any],
    run_consumers: Callable[..., list[list[object]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(low_latency, "HEARTBEAT", 30.0)
    monkeypatch.setattr(low_latency, "WATCH_MARGIN", 60.0)
    broker = make_broker(heartbeat_timeout=120_000)
    install(broker, {"q"})
    ending = consume(broker, timeout=1)
    assert [next(ending), next(ending)] == [None, None]
    [got] = run_consumers(1)
    wait_until(lambda: blocked(broker) == 1)
    ending.close()
    send(broker, 1)
    wait_until(lambda: got == [1])
