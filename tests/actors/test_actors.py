"""`declare()` and where wake-ups go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker

import broadcastable.actors
from broadcastable.actors import DeliveryMiddleware, declare, declared_broker, wakeups_for
from broadcastable.durable_streams import DurableStreams, current
from broadcastable.errors import ConfigurationError
from tests.actors.served import Served
from tests.services import wait_until


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_importing_touches_no_broker_and_no_encoder() -> None:
    run(
        "import dramatiq, dramatiq.broker as b, dramatiq.message as m, threading\n"
        "encoder = m.global_encoder\n"
        "import broadcastable.actors\n"
        "assert b.global_broker is None\n"
        "assert m.global_encoder is encoder\n"
        "assert threading.active_count() == 1\n"
    )


def test_a_worker_in_the_process_sets_no_global_broker() -> None:
    run(
        "import dramatiq.broker as b, dramatiq.message as m\n"
        "from tests.actors.served import Served\n"
        "encoder = m.global_encoder\n"
        "served = Served(); served.commit('a'); assert served.wakeups.drain(10)\n"
        "assert b.global_broker is None and m.global_encoder is encoder\n"
    )


def test_declaring_twice_changes_nothing(make_served: Callable[..., Served], stub_broker: StubBroker) -> None:
    served = make_served()
    before = len(stub_broker.middleware)
    declare(stub_broker, served)
    actor = stub_broker.get_actor("broadcastable.deliver")
    declare(stub_broker, served)
    assert len(stub_broker.middleware) == before + 1
    assert stub_broker.get_actor("broadcastable.deliver") is actor
    [middleware] = [each for each in stub_broker.middleware if isinstance(each, DeliveryMiddleware)]
    assert middleware._served == [served]


def test_declare_without_a_broker_takes_the_process_wide_one(
    monkeypatch: pytest.MonkeyPatch, stub_broker: StubBroker
) -> None:
    monkeypatch.setattr(dramatiq.broker, "global_broker", stub_broker)
    declare()
    assert declared_broker() is stub_broker
    assert any(isinstance(each, DeliveryMiddleware) for each in stub_broker.middleware)


def test_declare_does_not_look_at_the_settings_yet(monkeypatch: pytest.MonkeyPatch, stub_broker: StubBroker) -> None:
    """`configure()` may come after it."""
    monkeypatch.setenv("BROADCASTABLE_OUTBOX", "nonsense")
    monkeypatch.setattr("broadcastable.settings._default", None)
    declare(stub_broker)


def test_a_namespace_that_cannot_be_a_queue_is_refused_at_once(stub_broker: StubBroker) -> None:
    with pytest.raises(ConfigurationError, match="namespace"), DurableStreams(namespace="a b") as streams:
        declare(stub_broker, streams)


def test_the_default_streams_are_delivered_through_the_declared_broker(
    monkeypatch: pytest.MonkeyPatch,
    stub_broker: StubBroker,
    start_worker: Callable[..., dramatiq.Worker],
    signing_key: str,
) -> None:
    """Also when they were there before the declaration."""
    monkeypatch.setattr("broadcastable.settings._default", None)
    monkeypatch.setattr("broadcastable.durable_streams._instances", {})
    monkeypatch.setenv("BROADCASTABLE_SIGNING_KEY", signing_key)
    streams = current()
    streams.wakeups.wake([])
    declare(stub_broker)
    streams.wakeups.wake(["nothing/there"])
    assert stub_broker.queues["broadcastable"].qsize() == 1
    start_worker(stub_broker)
    stub_broker.join("broadcastable", timeout=10_000)
    streams.close()


def test_streams_of_ones_own_do_not_go_through_the_broker_of_the_default_ones(
    make_served: Callable[..., Served], stub_broker: StubBroker
) -> None:
    declare(stub_broker)
    served = make_served()
    served.commit("a")
    wait_until(lambda: served.relay.events["a"] == 1)
    assert "broadcastable" not in stub_broker.queues


def test_with_the_memory_outbox_only_this_process_can_deliver(
    make_served: Callable[..., Served], valkey_url: str
) -> None:
    """A broker whose workers are elsewhere would carry wake-ups for events that they cannot see."""
    broker = RedisBroker(url=valkey_url)
    served = make_served()
    declare(broker, served)
    served.commit("a")
    wait_until(lambda: served.relay.events["a"] == 1)
    assert broker.client.llen("dramatiq:broadcastable") == 0
    broker.client.connection_pool.disconnect()


def test_a_shared_outbox_and_redis_need_no_broker_of_ones_own(
    make_served: Callable[..., Served], valkey_url: str
) -> None:
    """The wake-ups wait where `dramatiq broadcastable.worker` takes them."""
    served = make_served()
    served.settings = served.settings.replace(outbox="redis", redis_url=valkey_url)
    wakeups = wakeups_for(served)
    wakeups.wake(["a"])
    broker = RedisBroker(url=valkey_url)
    [data] = broker.client.hvals("dramatiq:broadcastable.msgs")
    assert dramatiq.Message.decode(data).args == (["a"],)
    broker.client.connection_pool.disconnect()
    wakeups.close()


def test_drain_waits_for_workers_elsewhere(
    make_served: Callable[..., Served], stub_broker: StubBroker, start_worker: Callable[..., dramatiq.Worker]
) -> None:
    served = make_served()
    declare(stub_broker, served)
    served.commit("a")
    assert not served.wakeups.drain(0.05)
    start_worker(stub_broker)
    assert served.wakeups.drain(10)
    assert served.relay.events == {"a": 1}


def test_its_names_are_there() -> None:
    assert all(hasattr(broadcastable.actors, name) for name in broadcastable.actors.__all__)


def test_later_streams_of_a_namespace_take_the_place_of_earlier_ones(
    make_served: Callable[..., Served], stub_broker: StubBroker, start_worker: Callable[..., dramatiq.Worker]
) -> None:
    """An application factory may be called more than once in a process."""
    first, second = make_served(), make_served()
    declare(stub_broker, first)
    declare(stub_broker, second)
    start_worker(stub_broker)
    second.commit("a")
    wait_until(lambda: second.relay.events["a"] == 1)
    assert not first.relay.events
