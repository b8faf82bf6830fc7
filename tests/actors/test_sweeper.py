"""The sweeper: what was forgotten is delivered, whatever else is slow or broken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from broadcastable.sweeper import Sweeper
from tests.actors.served import Served
from tests.services import wait_until


@pytest.fixture
def sweep() -> Iterator[Callable[..., Sweeper]]:
    sweepers: list[Sweeper] = []

    def start(served: Served, **options: float) -> Sweeper:
        sweeper = Sweeper(served.outbox, served.relay.deliver, **{"interval": 0.05, **options})
        sweepers.append(sweeper)
        sweeper.start()
        return sweeper

    yield start
    for sweeper in sweepers:
        sweeper.stop()
        assert sweeper.join(10.0)


def test_a_stream_that_nobody_was_woken_for_is_delivered(
    make_served: Callable[..., Served], sweep: Callable[..., Sweeper]
) -> None:
    served = make_served()
    sweep(served)
    served.put("a")
    wait_until(lambda: served.relay.events["a"] == 1)


def test_a_lost_wake_up_costs_about_a_second(make_served: Callable[..., Served], sweep: Callable[..., Sweeper]) -> None:
    """With the interval as it is in use; the bound is generous, the usual value is 1 to 2.2 seconds."""
    served = make_served()
    sweep(served, interval=1.0)
    began = time.monotonic()
    served.put("a")
    wait_until(lambda: served.relay.events["a"] == 1)
    assert time.monotonic() - began < 5.0


def test_more_streams_than_one_sweep_takes_are_taken_by_the_next_at_once(
    make_served: Callable[..., Served], sweep: Callable[..., Sweeper]
) -> None:
    served = make_served()
    served.put(*(f"s/{number}" for number in range(100)))
    time.sleep(0.06)  # older than the interval
    sweep(served, batch=8, interval=0.05)
    wait_until(lambda: len(served.relay.events) == 100)


def test_slow_streams_do_not_hold_up_the_others(
    make_served: Callable[..., Served], sweep: Callable[..., Sweeper]
) -> None:
    stuck = threading.Event()
    served = make_served(before=lambda stream: stream.startswith("slow") and stuck.wait(20))
    sweep(served, threads=4)
    served.put("slow/1", "slow/2", "slow/3", "a")
    try:
        wait_until(lambda: served.relay.events["a"] == 1)
        served.put("b")
        wait_until(lambda: served.relay.events["b"] == 1)
        assert not served.relay.events["slow/1"]
    finally:
        stuck.set()
    wait_until(lambda: len(served.relay.events) == 5)


def test_never_more_than_its_share_of_threads(
    make_served: Callable[..., Served], sweep: Callable[..., Sweeper]
) -> None:
    stuck = threading.Event()
    at_once, most, lock = 0, 0, threading.Lock()

    def before(stream: str) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        stuck.wait(0.02)
        with lock:
            at_once -= 1

    served = make_served(before=before)
    sweep(served, threads=3)
    served.put(*(f"s/{number}" for number in range(30)))
    wait_until(lambda: len(served.relay.events) == 30)
    assert most == 3


def test_a_delivery_that_raises_is_logged_and_found_again(
    make_served: Callable[..., Served], sweep: Callable[..., Sweeper], caplog: pytest.LogCaptureFixture
) -> None:
    failures = ["first", "second"]

    def before(stream: str) -> None:
        if stream == "a" and failures:
            raise ConnectionError(failures.pop())

    served = make_served(before=before)
    sweep(served)
    served.put("a", "b")
    wait_until(lambda: served.relay.events["a"] == 1)
    assert served.relay.events["b"] == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_it_outlives_an_outbox_that_cannot_be_reached(
    make_served: Callable[..., Served],
    sweep: Callable[..., Sweeper],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = make_served()
    due, broken = served.outbox.due, [True]

    def due_or_not(**options: float) -> list[str]:
        if broken:
            raise ConnectionError("away")
        return due(**options)

    monkeypatch.setattr(served.outbox, "due", due_or_not)
    sweep(served, interval=0.02)
    served.put("a")
    wait_until(lambda: caplog.records)
    assert "could not be swept" in caplog.text
    broken.clear()
    wait_until(lambda: served.relay.events["a"] == 1)


def test_stop_lets_the_stream_at_hand_finish_and_takes_no_other(
    make_served: Callable[..., Served], sweep: Callable[..., Sweeper]
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def before(stream: str) -> None:
        begun.set()
        go_on.wait(20)

    served = make_served(before=before)
    sweeper = sweep(served, threads=1)
    served.put("a", "b", "c")
    assert begun.wait(10)
    sweeper.stop()
    assert not sweeper.join(0.05)
    go_on.set()
    assert sweeper.join(10)
    assert len(served.delivered()) == 1
