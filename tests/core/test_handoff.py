"""From commit to outbox: in order, without raising, without waiting, and with a bound on what is kept."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from sqlalchemy.util.concurrency import greenlet_spawn

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


def test_a_redis_that_hangs_slows_one_commit_not_each(valkey_server: services.Valkey) -> None:
    outbox = redis_outbox(valkey_server.url)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=True)
    handoff.submit([batch(0)], handoff.announce(["rooms/1"]))
    valkey_server.pause()
    slowed = 0.0
    for n in range(1, 61):
        began = time.monotonic()
        handoff.submit([batch(n)], handoff.announce(["rooms/1"]))
        slowed += time.monotonic() - began
        time.sleep(0.05)  # the pace of the commits: three seconds, in which a store may be asked again and again
    valkey_server.resume()
    assert handoff.flush(20)
    found: list[bytes] = []
    within(10, lambda: found.extend(numbers(outbox)) or len(found) >= 61)
    assert found == expected(61)
    assert slowed < 1.0
    outbox.close()


def test_a_redis_that_hangs_slows_no_rollback(valkey_server: services.Valkey) -> None:
    """They have nothing to send, so it is they who ask whether the store is back: one in each interval."""
    outbox = redis_outbox(valkey_server.url)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=True)
    valkey_server.pause()
    began = time.monotonic()
    for _ in range(200):
        handoff.withdraw(handoff.announce(["rooms/1"]))
    assert time.monotonic() - began < 2.0
    valkey_server.resume()

    def has_a_place() -> bool:
        handoff.withdraw(handoff.announce(["rooms/1"]))
        return handoff._is_failing is False

    within(10, has_a_place)
    outbox.close()


def test_commits_of_many_tasks_wait_for_a_redis_that_hangs_once(valkey_server: services.Valkey) -> None:
    outbox = redis_outbox(valkey_server.url)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=True)
    valkey_server.pause()

    async def commit(n: int) -> None:
        handoff.submit([batch(n)], await greenlet_spawn(handoff.announce, ["rooms/1"]))

    async def main() -> float:
        began = time.monotonic()
        await asyncio.gather(*(commit(n) for n in range(200)))
        return time.monotonic() - began

    assert asyncio.run(main()) < 2.0
    valkey_server.resume()
    assert handoff.flush(20)
    assert sorted(numbers(outbox)) == sorted(expected(200))
    handoff.close(1)
    outbox.close()


def test_a_commit_that_is_cancelled_gives_its_place_up(valkey_server: services.Valkey) -> None:
    outbox = redis_outbox(valkey_server.url)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=True)

    async def main() -> None:
        valkey_server.pause()
        commit = asyncio.create_task(greenlet_spawn(handoff.announce, ["rooms/1"]))
        await asyncio.sleep(0.02)  # until the reservation is on its way
        commit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await commit
        valkey_server.resume()

    asyncio.run(main())
    handoff.close(1)  # and with it the threads that reserve
    later = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=True)
    later.submit([batch(0)], later.announce(["rooms/1"]))
    within(1.5, lambda: numbers(outbox) == expected(1))  # well before a place that nobody gave up would pass
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


# The order of commits: a turn is taken with the row's lock held, before COMMIT.


def memory_handoff() -> tuple[MemoryOutbox, Handoff]:
    outbox = MemoryOutbox(max_bytes=1 << 20, max_frame_bytes=1 << 16, max_frame_events=100)
    return outbox, Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=False)


def in_thread(handoff: Handoff, n: int, *streams: str) -> threading.Thread:
    """A thread that announces now and has submitted when it ends."""
    announced = threading.Event()

    def run() -> None:
        turn = handoff.announce(streams)
        announced.set()
        handoff.submit([batch(n, stream) for stream in streams], turn)

    thread = threading.Thread(target=run)
    thread.start()
    assert announced.wait(10)
    return thread


def test_who_committed_later_is_handed_over_later() -> None:
    outbox, handoff = memory_handoff()
    first = handoff.announce(["rooms/1"])
    later = in_thread(handoff, 1, "rooms/1", "rooms/2")
    elsewhere = in_thread(handoff, 0, "rooms/3")
    elsewhere.join(10)
    later.join(0.1)
    assert later.is_alive()
    assert numbers(outbox) == numbers(outbox, "rooms/2") == []
    handoff.submit([batch(0)], first)
    later.join(10)
    assert numbers(outbox) == expected(2)
    assert numbers(outbox, "rooms/3") == expected(1)


def test_a_transaction_that_fails_after_all_lets_the_next_one_pass() -> None:
    outbox, handoff = memory_handoff()
    first = handoff.announce(["rooms/1"])
    later = in_thread(handoff, 0, "rooms/1")
    handoff.withdraw(first)
    later.join(10)
    assert numbers(outbox) == expected(1)
    handoff.withdraw(first)


def test_a_session_that_commits_within_the_commit_of_another_does_not_wait_for_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    outbox, handoff = memory_handoff()
    outer = handoff.announce(["rooms/1"])
    inner = handoff.announce(["rooms/1"])
    handoff.submit([batch(0)], inner)
    handoff.submit([batch(1)])
    handoff.submit([batch(2)], outer)
    assert numbers(outbox) == expected(3)
    assert not caplog.records


def test_a_transaction_that_never_ends_is_overtaken_and_named(caplog: pytest.LogCaptureFixture) -> None:
    outbox, handoff = memory_handoff()
    endless = handoff.announce(["rooms/1"])
    in_thread(handoff, 0, "rooms/1").join(20)
    assert handoff.flush(20)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "rooms/1" in caplog.text
    handoff.submit([batch(1)], endless)
    assert numbers(outbox) == expected(2)
    handoff.close(0)


def test_tasks_are_handed_over_in_the_order_of_their_turns(valkey_url: str) -> None:
    outbox = redis_outbox(valkey_url)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=True)

    async def commit(n: int, answered: asyncio.Event, next_: asyncio.Event) -> None:
        turn = handoff.announce(["rooms/1", f"rooms/{n}"])
        await answered.wait()
        handoff.submit([batch(n)], turn)
        await asyncio.to_thread(lambda: None)
        next_.set()

    async def main() -> None:
        events = [asyncio.Event() for _ in range(21)]
        # The last one to be announced is the first whose COMMIT is answered.
        tasks = [asyncio.create_task(commit(n, events[20 - n - 1], events[20 - n])) for n in range(20)]
        events[0].set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert handoff.flush(10)
    assert numbers(outbox) == expected(20)
    handoff.close(0)
    outbox.close()


def test_the_order_survives_a_redis_that_goes_away_and_comes_back(valkey_server: services.Valkey) -> None:
    """Threads that contend for one row: its lock is held until COMMIT, which is where the number is given."""
    outbox = redis_outbox(valkey_server.url)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=True)
    row, chance = threading.Lock(), random.Random(7)
    order: list[int] = []

    def commit() -> None:
        for _ in range(40):
            with row:
                n = len(order)
                order.append(n)
                turn = handoff.announce(["rooms/1"])
            time.sleep(chance.random() / 500)  # the thread loses the processor
            handoff.submit([batch(n)], turn)

    threads = [threading.Thread(target=commit) for _ in range(8)]
    for thread in threads:
        thread.start()
    valkey_server.pause()
    within(20, lambda: handoff.buffered > 20)
    valkey_server.resume()
    for thread in threads:
        thread.join()
    assert handoff.flush(20)
    assert numbers(outbox) == expected(320)
    handoff.close(0)
    outbox.close()


def test_closing_drops_what_cannot_be_handed_over_and_ends_the_sender(
    valkey_server: services.Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = redis_outbox(valkey_server.url)
    handoff = Handoff(outbox, lambda streams: None, max_bytes=1 << 20, blocking=True)
    valkey_server.kill()
    before, threads = counters["batches_dropped"], set(threading.enumerate())
    handoff.submit([batch(0)])
    assert set(threading.enumerate()) > threads
    handoff.close(0.1)
    assert counters["batches_dropped"] - before == 1
    assert "closed before" in caplog.text
    assert set(threading.enumerate()) <= threads
    valkey_server.start()
    within(20, lambda: handoff.submit([batch(0)]) or handoff.flush(5))
    handoff.close(0)
    outbox.close()
