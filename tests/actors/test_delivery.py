"""The actor and its middleware in a worker of Dramatiq's, over StubBroker and over a real Valkey."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import TimeLimitExceeded

from broadcastable.actors import DeliveryMiddleware, declare
from broadcastable.delivery import deliver_streams
from tests.actors.served import Served
from tests.services import wait_until


@pytest.fixture
def redis_broker(valkey_url: str) -> Iterator[RedisBroker]:
    broker = RedisBroker(url=valkey_url)
    yield broker
    broker.client.connection_pool.disconnect()


@pytest.fixture(params=["stub", "redis"])
def broker(request: pytest.FixtureRequest) -> dramatiq.Broker:
    return request.getfixturevalue(f"{request.param}_broker")


def dead_letters(broker: dramatiq.Broker) -> int:
    if isinstance(broker, StubBroker):
        return len(broker.dead_letters)
    return int(broker.client.zcard("dramatiq:broadcastable.XQ"))


def remote(make_served: Callable[..., Served], broker: dramatiq.Broker, **options: object) -> Served:
    """A `Served` whose wake-ups go through *broker*; it says so of its outbox, so that they may."""
    served = make_served(**options)
    served.settings = served.settings.replace(outbox="database")
    declare(broker, served)
    return served


def test_a_commit_is_delivered_by_the_brokers_worker(
    make_served: Callable[..., Served], broker: dramatiq.Broker, start_worker: Callable[..., dramatiq.Worker]
) -> None:
    served = remote(make_served, broker)
    start_worker(broker)
    served.commit("a", "b")
    wait_until(lambda: served.relay.events == {"a": 1, "b": 1}, within=0.9, what="delivery before any sweep")
    assert dead_letters(broker) == 0


def test_a_worker_that_boots_with_the_middleware_alone_has_the_actor(
    make_served: Callable[..., Served], start_worker: Callable[..., dramatiq.Worker]
) -> None:
    served = make_served()
    broker = StubBroker(middleware=[DeliveryMiddleware(served)])
    served.use_broker(broker)
    start_worker(broker)
    served.commit("a")
    wait_until(lambda: served.relay.events["a"] == 1)
    assert broker.get_declared_actors() == {"broadcastable.deliver"}


def test_a_wake_up_that_was_sent_before_any_worker_booted_is_not_lost(
    make_served: Callable[..., Served], broker: dramatiq.Broker, start_worker: Callable[..., dramatiq.Worker]
) -> None:
    served = remote(make_served, broker)
    served.commit("a")
    start_worker(broker)
    wait_until(lambda: served.relay.events["a"] == 1)


def test_a_lost_wake_up_is_made_good_by_the_sweeper(
    make_served: Callable[..., Served], broker: dramatiq.Broker, start_worker: Callable[..., dramatiq.Worker]
) -> None:
    served = remote(make_served, broker)
    start_worker(broker)
    served.put("a")
    wait_until(lambda: served.relay.events["a"] == 1)


def test_a_slow_stream_does_not_hold_up_the_others_of_its_message(
    make_served: Callable[..., Served], broker: dramatiq.Broker, start_worker: Callable[..., dramatiq.Worker]
) -> None:
    """The rest of the message goes to another thread, although the sweeper would help too: it is stopped here."""
    stuck = threading.Event()
    served = remote(make_served, broker, before=lambda stream: stream == "slow" and stuck.wait(20))
    worker = start_worker(broker, worker_threads=2)
    [middleware] = [each for each in broker.middleware if isinstance(each, DeliveryMiddleware)]
    for sweeper in middleware._sweepers:
        sweeper.stop()
    served.commit("slow", *(f"s/{number}" for number in range(200)))
    try:
        wait_until(lambda: len(served.relay.events) == 200)
        assert not served.relay.events["slow"]
    finally:
        stuck.set()
    wait_until(lambda: served.relay.events["slow"] == 1)
    worker.stop(timeout=5_000)
    assert dead_letters(broker) == 0


def test_an_outbox_that_fails_spoils_one_stream_and_sends_nothing_to_the_dead_letters(
    make_served: Callable[..., Served],
    broker: dramatiq.Broker,
    start_worker: Callable[..., dramatiq.Worker],
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = [True]

    def before(stream: str) -> None:
        if stream == "a" and failing:
            failing.clear()
            raise ConnectionError("the store is away")

    served = remote(make_served, broker, before=before)
    start_worker(broker)
    served.commit("a", "b")
    wait_until(lambda: served.relay.events["b"] == 1)
    wait_until(lambda: served.relay.events["a"] == 1, what="the sweep that finds the stream again")
    assert dead_letters(broker) == 0
    assert "Stream a could not be delivered" in caplog.text


def test_an_interrupted_delivery_passes_the_rest_on(
    make_served: Callable[..., Served], stub_broker: StubBroker
) -> None:
    def before(stream: str) -> None:
        raise TimeLimitExceeded

    served = make_served(before=before)
    stub_broker.declare_queue("broadcastable")
    deliver_streams(["a", "b", "c"], served, stub_broker, lambda: False)
    [data] = list(stub_broker.queues["broadcastable"].queue)
    assert dramatiq.Message.decode(data).args == (["b", "c"],)


def test_shutdown_finishes_the_frame_at_hand_and_passes_the_rest_on(
    make_served: Callable[..., Served], redis_broker: RedisBroker, start_worker: Callable[..., dramatiq.Worker]
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def before(stream: str) -> None:
        begun.set()
        go_on.wait(20)

    served = remote(make_served, redis_broker, before=before)
    worker = start_worker(redis_broker, worker_threads=1)
    served.commit("a", "b", "c")
    assert begun.wait(10)
    stopping = threading.Thread(target=worker.stop, args=(10_000,))
    stopping.start()
    wait_until(
        lambda: next(each for each in redis_broker.middleware if isinstance(each, DeliveryMiddleware)).is_stopping()
    )
    go_on.set()
    stopping.join()
    assert served.delivered() == ["a"]
    [left] = redis_broker.client.hvals("dramatiq:broadcastable.msgs")
    assert dramatiq.Message.decode(left).args == (["a", "b", "c"],)


def test_a_stopped_worker_leaves_no_thread_behind(
    make_served: Callable[..., Served], broker: dramatiq.Broker, start_worker: Callable[..., dramatiq.Worker]
) -> None:
    before = set(threading.enumerate())
    remote(make_served, broker)
    start_worker(broker).stop(timeout=5_000)
    assert {thread.name for thread in set(threading.enumerate()) - before if "broadcastable" in thread.name} == set()


def test_a_worker_without_our_queue_says_so_and_delivers_nothing(
    make_served: Callable[..., Served],
    stub_broker: StubBroker,
    start_worker: Callable[..., dramatiq.Worker],
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = make_served()
    declare(stub_broker, served)
    served.put("a")
    start_worker(stub_broker, queues={"default"})
    time.sleep(0.1)
    assert "does not take the queue 'broadcastable'" in caplog.text
    assert not served.relay.events


def test_two_namespaces_share_a_broker(
    make_served: Callable[..., Served], stub_broker: StubBroker, start_worker: Callable[..., dramatiq.Worker]
) -> None:
    first, second = make_served(namespace="first"), make_served(namespace="second")
    declare(stub_broker, first)
    declare(stub_broker, second)
    start_worker(stub_broker)
    first.commit("a")
    second.commit("b")
    wait_until(lambda: first.relay.events == {"a": 1} and second.relay.events == {"b": 1})


def test_a_broker_without_retries_and_time_limits_will_do(
    make_served: Callable[..., Served], start_worker: Callable[..., dramatiq.Worker]
) -> None:
    broker = StubBroker(middleware=[])
    served = make_served()
    declare(broker, served)
    start_worker(broker)
    served.commit("a")
    wait_until(lambda: served.relay.events["a"] == 1)


def test_the_relay_retries_so_dramatiq_does_not(make_served: Callable[..., Served], stub_broker: StubBroker) -> None:
    declare(stub_broker, make_served())
    assert stub_broker.get_actor("broadcastable.deliver").options["max_retries"] == 0


def test_a_worker_may_boot_again_after_its_shutdown(
    make_served: Callable[..., Served], stub_broker: StubBroker, start_worker: Callable[..., dramatiq.Worker]
) -> None:
    served = make_served()
    declare(stub_broker, served)
    start_worker(stub_broker).stop(timeout=5_000)
    stub_broker.middleware = [each for each in stub_broker.middleware if isinstance(each, DeliveryMiddleware)]
    start_worker(stub_broker)
    served.commit("a")
    wait_until(lambda: served.relay.events["a"] == 1)


def test_a_stream_is_looked_at_after_its_marker_is_gone(
    make_served: Callable[..., Served], stub_broker: StubBroker
) -> None:
    """A commit between the claim and the removal of the marker would have no wake-up."""
    order: list[str] = []
    served = make_served(before=lambda stream: order.append(f"deliver {stream}"))

    class Taking:
        def taken(self, streams: list[str]) -> None:
            order.append(f"taken {streams}")

    served.wakeups.close()
    served.wakeups = Taking()
    try:
        deliver_streams(["a", "b"], served, stub_broker, lambda: False)
    finally:
        served.wakeups = Served().wakeups
    assert order == ["taken ['a', 'b']", "deliver a", "deliver b"]


def test_no_log_of_a_delivery_is_louder_than_it_needs_to_be(
    make_served: Callable[..., Served],
    stub_broker: StubBroker,
    start_worker: Callable[..., dramatiq.Worker],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="broadcastable")
    served = make_served()
    declare(stub_broker, served)
    start_worker(stub_broker)
    served.commit("a")
    wait_until(lambda: served.relay.events["a"] == 1)
    assert [record for record in caplog.records if record.name.startswith("broadcastable")] == []
