"""A stream that sleeps is woken in the round trip that brings its events, where one Redis has them and the queue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker

from broadcastable.durable_streams import DurableStreams
from broadcastable.events import Batch
from broadcastable.outbox import Outbox
from broadcastable.settings import Settings
from tests.outbox.workers import LONG, batch, claim, deliver


@pytest.fixture
def queue(valkey_url: str) -> Iterator[RedisBroker]:
    broker = RedisBroker(url=valkey_url)
    yield broker
    broker.client.connection_pool.disconnect()


@pytest.fixture
def streams(valkey_url: str, queue: RedisBroker) -> Iterator[DurableStreams]:
    """With every script loaded, and an empty queue."""
    with DurableStreams(Settings(outbox="redis", redis_url=valkey_url, server_url="http://unused")) as streams:
        streams.wakeups.wake(commit(streams.outbox, "w:0", batch("warm")))
        deliver(streams.outbox, "warm")
        queue.flush("broadcastable")
        yield streams


def commit(outbox: Outbox, turn: str, *batches: Batch) -> list[str]:
    """Reserve, then put; the streams that the caller is to wake."""
    outbox.reserve(turn, list(dict.fromkeys(each.stream for each in batches)))
    return outbox.put([replace(each, turn=turn) for each in batches])


def woken(queue: RedisBroker) -> list[list[str]]:
    """The streams of each message, in the order of the queue."""
    ids = queue.client.lrange("dramatiq:broadcastable", 0, -1)
    return [dramatiq.Message.decode(queue.client.hget("dramatiq:broadcastable.msgs", each)).args[0] for each in ids]


def test_streams_that_sleep_are_woken_by_one_message_and_the_caller_wakes_none(
    streams: DurableStreams, queue: RedisBroker
) -> None:
    assert commit(streams.outbox, "w:1", batch("a"), batch("b"), batch("a")) == []
    assert woken(queue) == [["a", "b"]]
    assert len(claim(streams.outbox, "a").events) == 2


def test_streams_that_are_awake_are_not_woken_again(streams: DurableStreams, queue: RedisBroker) -> None:
    commit(streams.outbox, "w:1", batch("a"))
    assert commit(streams.outbox, "w:2", batch("a"), batch("b")) == []
    assert woken(queue) == [["a"], ["b"]]


def test_a_stream_that_falls_asleep_between_is_for_the_caller_to_wake(
    streams: DurableStreams, queue: RedisBroker
) -> None:
    outbox = streams.outbox
    commit(outbox, "w:1", batch("a"))
    queue.flush("broadcastable")
    outbox.reserve("w:2", ["a"])
    deliver(outbox, "a")
    assert outbox.put([replace(batch("a"), turn="w:2")]) == ["a"]
    assert woken(queue) == []


def test_a_parked_stream_is_not_woken(streams: DurableStreams, queue: RedisBroker) -> None:
    outbox = streams.outbox
    commit(outbox, "w:1", batch("a"))
    queue.flush("broadcastable")
    outbox.park(claim(outbox, "a", lease_for=LONG), "closed")
    assert commit(outbox, "w:2", batch("a")) == []
    assert woken(queue) == []


def test_a_place_that_is_given_up_wakes_nobody(streams: DurableStreams, queue: RedisBroker) -> None:
    streams.outbox.reserve("w:1", ["a"])
    assert streams.outbox.withdraw("w:1", ["a"]) == []
    assert streams.outbox.put([replace(batch("a"), turn="w:1")]) == ["a"]
    assert woken(queue) == []


def test_a_redis_that_was_started_again_leaves_it_to_the_caller(streams: DurableStreams, queue: RedisBroker) -> None:
    streams.outbox.reserve("w:1", ["a"])
    queue.client.script_flush()
    assert streams.outbox.put([replace(batch("a"), turn="w:1")]) == ["a"]
    assert woken(queue) == []
    streams.wakeups.wake(["a"])
    assert woken(queue) == [["a"]]


def test_another_broker_carries_its_wake_ups_itself(
    streams: DurableStreams, queue: RedisBroker, stub_broker: StubBroker
) -> None:
    streams.use_broker(stub_broker)
    assert commit(streams.outbox, "w:1", batch("a")) == ["a"]
    assert woken(queue) == []
