"""What only the memory store promises."""

from __future__ import annotations

import os
import threading

import pytest

from broadcastable.errors import OutboxFull, UsageError
from broadcastable.outbox import memory
from broadcastable.outbox.memory import BATCH_OVERHEAD, EVENT_OVERHEAD, MemoryOutbox
from broadcastable.settings import Settings
from tests.clock import Clock
from tests.outbox.workers import LONG, batch, claim, deliver


@pytest.fixture
def outbox(clock: Clock) -> MemoryOutbox:
    return MemoryOutbox(max_bytes=1 << 20, max_frame_bytes=1 << 20, max_frame_events=1_000, clock=clock)


def test_a_call_that_does_not_fit_stores_nothing() -> None:
    one = batch("a", "x" * 100)
    outbox = MemoryOutbox(
        max_bytes=2 * (100 + BATCH_OVERHEAD + EVENT_OVERHEAD), max_frame_bytes=1 << 20, max_frame_events=1_000
    )
    outbox.put([one])
    with pytest.raises(OutboxFull, match="memory_outbox_bytes"):
        outbox.put([batch("b", "x" * 100), batch("c", "x" * 100)])
    assert [each.stream for each in outbox.pending()] == ["a"]
    outbox.put([batch("b", "x" * 100)])


def test_a_refused_batch_may_be_put_again_when_there_is_room() -> None:
    room = 100 + BATCH_OVERHEAD + EVENT_OVERHEAD
    outbox = MemoryOutbox(max_bytes=room, max_frame_bytes=1 << 20, max_frame_events=1_000)
    first, second = batch("a", "x" * 100), batch("a", "y" * 100)
    outbox.put([first])
    with pytest.raises(OutboxFull):
        outbox.put([second])
    deliver(outbox, "a")
    outbox.put([second])
    assert deliver(outbox, "a") == [second.events[0]]
    outbox.put([batch("a", "z" * 100)])
    outbox.drop("a")
    outbox.put([batch("a", "z" * 100)])


def test_leases_delays_and_sweeps_go_by_the_clock(outbox: MemoryOutbox, clock: Clock) -> None:
    outbox.put([batch("a")])
    claim(outbox, "a", lease_for=5)
    clock.now += 4.999
    assert outbox.claim("a", lease_for=5) is None
    assert outbox.due() == []
    clock.now += 0.001
    assert outbox.due() == ["a"]
    frame = claim(outbox, "a", lease_for=5)
    outbox.release(frame, delay=10)
    clock.now += 9.999
    assert outbox.claim("a", lease_for=5) is None
    clock.now += 0.001
    assert claim(outbox, "a").id == frame.id


def test_the_epoch_is_the_streams_first_moment_in_ms(outbox: MemoryOutbox, clock: Clock) -> None:
    outbox.put([batch("a")])
    assert claim(outbox, "a").id.epoch == int(clock.now * 1000)


def test_a_stream_forgotten_and_met_again_in_the_same_millisecond_has_a_new_epoch(
    outbox: MemoryOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "IDLE_STREAMS_KEPT", 1)
    seen = set()
    for _ in range(3):
        for stream in ("a", "b"):
            outbox.put([batch(stream)])
            frame = claim(outbox, stream)
            outbox.ack(frame, offset="1")
            outbox.finish(stream, lease=frame.lease)
            seen.add((stream, frame.id.epoch, frame.id.seq))
    assert len(seen) == 6


def test_a_stream_with_something_to_deliver_is_never_forgotten(
    outbox: MemoryOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "IDLE_STREAMS_KEPT", 0)
    outbox.put([batch("a")])
    deliver(outbox, "b")
    frame = claim(outbox, "a")
    outbox.put([batch("b")])
    deliver(outbox, "b")
    assert outbox.ack(frame, offset="1")


def test_two_outboxes_are_two_producers() -> None:
    settings = Settings(namespace="shop ä")
    one, other = MemoryOutbox.from_settings(settings), MemoryOutbox.from_settings(settings)
    ids = []
    for outbox in (one, other):
        outbox.put([batch("a")])
        ids.append(claim(outbox, "a").id.producer_id)
    assert ids[0] != ids[1]
    assert all(each.startswith("shop%20") and each.isascii() for each in ids)


def test_a_forked_child_begins_empty_and_as_another_producer(outbox: MemoryOutbox) -> None:
    outbox.put([batch("a")])
    ours = claim(outbox, "a").id.producer_id
    reading, writing = os.pipe()
    with outbox._lock:  # held by another thread at the moment of the fork, as it may be
        child = os.fork()
        if child == 0:
            pending = len(outbox.pending())
            outbox.put([batch("b")])
            theirs = claim(outbox, "b").id.producer_id
            os.write(writing, f"{pending} {theirs}".encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        pending, theirs = answer.read().split()
    os.waitpid(child, 0)
    assert pending == "0"
    assert theirs != ours
    assert [each.stream for each in outbox.pending()] == ["a"]


def test_stage_says_what_to_do_instead(outbox: MemoryOutbox) -> None:
    with pytest.raises(UsageError, match="put"):
        outbox.stage(None, [batch("a")])
    assert outbox.staged(["a"]) == []
    assert not outbox.transactional


def test_many_threads_may_put_and_deliver_at_once(outbox: MemoryOutbox) -> None:
    streams = [f"s/{number}" for number in range(8)]
    delivered: dict[str, list[bytes]] = {stream: [] for stream in streams}

    def work(stream: str) -> None:
        for _ in range(300):
            outbox.put([batch(stream), batch(stream)])
            delivered[stream] += deliver(outbox, stream)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(events) == len(set(events)) == 600 for events in delivered.values())
    assert outbox.put([batch("a", "x" * (1 << 19))]) == ["a"], "the bytes of what was delivered are free again"
    assert outbox.claim("s/0", lease_for=LONG) is None
