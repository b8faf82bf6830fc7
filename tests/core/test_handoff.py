"""From commit to outbox: in order, without raising, without waiting, and with a bound on what is kept."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from broadcastable.counters import counters
from broadcastable.events import Batch
from broadcastable.handoff import Handoff
from broadcastable.outbox.memory import MemoryOutbox
from broadcastable.outbox.redis import RedisOutbox
from tests import services


def batch(n: int, stream: str = "rooms/1") -> Batch:
    return Batch(stream=stream, events=(b'{"n":%d}' % n,), txid=str(n))


def redis_outbox(url: str) -> RedisOutbox:
    return RedisOutbox(url, namespace="handoff", max_frame_bytes=1 << 20, max_frame_events=1000)


def numbers(outbox: RedisOutbox | MemoryOutbox, stream: str = "rooms/1") -> list[bytes]:
    found: list[bytes] = []
    frame = outbox.claim(stream, lease_for=5)
    while frame is not None:
        found.extend(frame.events)
        outbox.ack(frame, offset="1")
        frame = outbox.claim(stream, lease_for=5, lease=frame.lease)
    return found


def expected(count: int) -> list[bytes]:
    return [b'{"n":%d}' % n for n in range(count)]


def within(seconds: float, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def test_batches_go_straight_into_the_outbox_and_their_streams_are_woken() -> None:
    outbox = MemoryOutbox(max_bytes=1 << 20, max_frame_bytes=1 << 16, max_frame_events=100)
    woken: list[str] = []
    handoff = Handoff(outbox, woken.extend, max_bytes=1 << 20, blocking=False)
    handoff.submit([batch(0), batch(1), batch(0, "rooms/2")])
    assert sorted(woken) == ["rooms/1", "rooms/2"]
    assert handoff.buffered == 0
    assert numbers(outbox) == expected(2)


def test_a_full_memory_outbox_drops_counts_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    outbox = MemoryOutbox(max_bytes=1_000, max_frame_bytes=1 << 16, max_frame_events=100)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=False)
    before = counters["batches_dropped"]
    for n in range(10):
        handoff.submit([batch(n)])
    assert counters["batches_dropped"] > before
    assert "rooms/1" in caplog.text


def test_while_redis_is_away_commits_do_not_fail_and_nothing_is_lost_or_reordered(
    valkey_server: services.Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = redis_outbox(valkey_server.url)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=True)
    handoff.submit([batch(0)])
    valkey_server.pause()
    began = time.monotonic()
    for n in range(1, 200):
        handoff.submit([batch(n)])
    slowed = time.monotonic() - began
    valkey_server.resume()
    assert handoff.flush(20)
    assert numbers(outbox) == expected(200)
    # One attempt of a hundred and ninety-nine waited for Redis; the rest went into the buffer.
    assert slowed < 5
    outbox.close()


def test_what_does_not_fit_the_buffer_is_dropped_and_counted(valkey_server: services.Valkey) -> None:
    outbox = redis_outbox(valkey_server.url)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=80, blocking=True)
    valkey_server.kill()
    before = counters["batches_dropped"]
    for n in range(20):
        handoff.submit([batch(n)])
    # Ten events of seven bytes and one of eight.
    assert handoff.buffered == 11
    assert counters["batches_dropped"] - before == 9
    valkey_server.start()
    assert handoff.flush(20)
    assert numbers(outbox) == expected(11)
    outbox.close()


def test_an_event_loop_never_waits_for_a_redis_that_accepts_and_never_answers(valkey_server: services.Valkey) -> None:
    outbox = redis_outbox(valkey_server.url)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=True)
    valkey_server.pause()

    async def main() -> float:
        longest = 0.0
        last = time.perf_counter()
        for n in range(50):
            handoff.submit([batch(n)])
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        return longest

    longest = asyncio.run(main())
    valkey_server.resume()
    assert handoff.flush(20)
    assert numbers(outbox) == expected(50)
    # Redis's timeout is fifty times as long.
    assert longest < 0.5
    outbox.close()


def test_a_waker_that_fails_does_not_fail_the_commit(caplog: pytest.LogCaptureFixture) -> None:
    outbox = MemoryOutbox(max_bytes=1 << 20, max_frame_bytes=1 << 16, max_frame_events=100)

    def broken(streams: Sequence[str]) -> None:
        raise ConnectionError("no broker")

    with caplog.at_level(logging.WARNING):
        Handoff(outbox, broken, max_bytes=1 << 20, blocking=False).submit([batch(0)])
    assert "sweeper" in caplog.text
    assert numbers(outbox) == expected(1)


def test_a_forked_child_does_not_send_what_its_parent_has_in_the_buffer(valkey_server: services.Valkey) -> None:
    outbox = redis_outbox(valkey_server.url)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=True)
    valkey_server.pause()
    handoff.submit([batch(0)])
    assert handoff.buffered == 1
    child = os.fork()
    if child == 0:
        fine = handoff.flush(0.1)
        handoff.submit([])
        os._exit(0 if fine and handoff.buffered == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    valkey_server.resume()
    assert handoff.flush(20)
    assert numbers(outbox) == expected(1)
    outbox.close()


def test_threads_that_submit_at_once_lose_nothing(valkey_url: str) -> None:
    outbox = redis_outbox(valkey_url)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=True)
    threads = [
        threading.Thread(target=lambda i=i: [handoff.submit([batch(n, f"rooms/{i}")]) for n in range(50)])
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert handoff.flush(10)
    for i in range(8):
        assert numbers(outbox, f"rooms/{i}") == expected(50)
    outbox.close()
