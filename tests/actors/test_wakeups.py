"""Wake-ups: few messages for many streams, and no trouble for the commit that sends them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import dramatiq
import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker

from broadcastable.errors import ConfigurationError
from broadcastable.wakeups import ProcessMarkers, RedisMarkers, Waker, enqueue, queue_name
from tests.services import Valkey


def queued(broker: StubBroker, queue: str = "broadcastable") -> list[list[str]]:
    """The streams of each message on *queue*."""
    return [list(dramatiq.Message.decode(data).args[0]) for data in list(broker.queues[queue].queue)]


class BrokenBroker(StubBroker):
    """Refuses messages, after *seconds*."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.asked = 0
        self.broken = True

    def enqueue(self, message: dramatiq.Message, *, delay: int | None = None) -> dramatiq.Message:
        self.asked += 1
        if self.broken:
            time.sleep(self.seconds)
            raise ConnectionRefusedError("nobody there")
        return super().enqueue(message, delay=delay)


def test_ten_thousand_streams_take_forty_messages(stub_broker: StubBroker) -> None:
    streams = [f"stream/{number}" for number in range(10_000)]
    assert Waker(lambda: stub_broker, "broadcastable").wake(streams) == 40
    assert [stream for message in queued(stub_broker) for stream in message] == streams


def test_a_stream_named_twice_is_woken_once(stub_broker: StubBroker) -> None:
    Waker(lambda: stub_broker, "broadcastable").wake(["a", "b", "a"])
    assert queued(stub_broker) == [["a", "b"]]


def test_nothing_to_wake_sends_nothing() -> None:
    def no_broker() -> dramatiq.Broker:
        raise AssertionError("asked for a broker")

    assert Waker(no_broker, "broadcastable").wake([]) == 0


def test_the_message_is_for_the_actor_and_queue_of_the_namespace(stub_broker: StubBroker) -> None:
    enqueue(stub_broker, "tenant-1", ["a"])
    [data] = list(stub_broker.queues["tenant-1"].queue)
    message = dramatiq.Message.decode(data)
    assert (message.queue_name, message.actor_name) == ("tenant-1", "tenant-1.deliver")


@pytest.mark.parametrize("namespace", ["1st", "a b", "a:b", "ä", "jobs.DQ", "jobs.XQ", "a/b"])
def test_a_namespace_that_cannot_be_a_queue_is_refused(namespace: str) -> None:
    with pytest.raises(ConfigurationError, match="namespace"):
        queue_name(namespace)


def test_a_broker_that_fails_is_left_alone_for_ten_times_as_long() -> None:
    """A commit is slowed by a tenth at most, whatever the broker's own retries take."""
    broker = BrokenBroker(seconds=0.2)
    waker = Waker(lambda: broker, "broadcastable")
    assert waker.wake(["a"]) == 0
    began = time.monotonic()
    for _ in range(50):
        waker.wake(["a"])
    assert broker.asked == 1
    assert time.monotonic() - began < 1.0
    assert waker._pause_ends - began > 1.5


def test_after_the_pause_one_caller_tries_and_the_others_pass_by() -> None:
    broker = BrokenBroker()
    waker = Waker(lambda: broker, "broadcastable")
    waker.wake(["a"])
    broker.seconds = 0.3
    waker._pause_ends = time.monotonic()
    threads = [threading.Thread(target=waker.wake, args=(["a"],)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert broker.asked == 2


def test_a_broker_that_is_back_gets_the_wake_ups_again(caplog: pytest.LogCaptureFixture) -> None:
    broker = BrokenBroker()
    waker = Waker(lambda: broker, "broadcastable")
    waker.wake(["a"])
    broker.broken = False
    waker._pause_ends = time.monotonic()
    assert waker.wake(["b"]) == 1
    assert waker.wake(["c"]) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_fan_out_through_redis_is_a_handful_of_messages(valkey_url: str) -> None:
    broker = RedisBroker(url=valkey_url)
    assert Waker(lambda: broker, "broadcastable").wake([f"s/{n}" for n in range(10_000)]) == 40
    assert broker.client.llen("dramatiq:broadcastable") == 40
    broker.client.close()
    broker.client.connection_pool.disconnect()


def test_unreachable_redis_does_not_raise(make_valkey: Callable[..., Valkey]) -> None:
    valkey = make_valkey()
    broker = RedisBroker(url=valkey.url)
    valkey.kill()
    assert Waker(lambda: broker, "broadcastable").wake(["a"]) == 0
    broker.client.connection_pool.disconnect()


@pytest.fixture(params=["process", "redis"])
def markers(request: pytest.FixtureRequest) -> object:
    if request.param == "process":
        yield ProcessMarkers()
        return
    client = redis.Redis.from_url(request.getfixturevalue("valkey_url"))
    yield RedisMarkers(client, "broadcastable")
    client.close()


def test_a_marked_stream_is_not_woken_again_until_a_worker_has_taken_it(
    markers: ProcessMarkers | RedisMarkers, stub_broker: StubBroker
) -> None:
    waker = Waker(lambda: stub_broker, "broadcastable", markers=markers)
    waker.wake(["a", "b"])
    waker.wake(["b", "c"])
    waker.wake(["a", "b", "c"])
    waker.taken(["a"])
    waker.wake(["a", "b", "c"])
    assert queued(stub_broker) == [["a", "b"], ["c"], ["a"]]


def test_a_great_fan_out_is_sent_without_a_look_at_the_markers(
    markers: ProcessMarkers | RedisMarkers, stub_broker: StubBroker
) -> None:
    waker = Waker(lambda: stub_broker, "broadcastable", markers=markers)
    waker.wake(["a"])
    waker.wake([*(f"s/{number}" for number in range(300)), "a"])
    assert queued(stub_broker)[-1][-1] == "a"
    assert markers.mark(["s/1"]) == ["s/1"]


def test_a_marker_does_not_outlive_a_lost_wake_up_for_long(
    markers: ProcessMarkers | RedisMarkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broadcastable.wakeups.MARKER_LIFE", 0.1)
    assert markers.mark(["a"]) == ["a"]
    deadline = time.monotonic() + 5
    while markers.mark(["a"]) == []:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_streams_are_woken_unmarked_when_the_markers_cannot_be_reached(
    make_valkey: Callable[..., Valkey], stub_broker: StubBroker
) -> None:
    valkey = make_valkey()
    client = redis.Redis.from_url(valkey.url, retry=None)
    valkey.kill()
    waker = Waker(lambda: stub_broker, "broadcastable", markers=RedisMarkers(client, "broadcastable"))
    waker.wake(["a"])
    waker.taken(["a"])
    assert queued(stub_broker) == [["a"]]
    client.close()
