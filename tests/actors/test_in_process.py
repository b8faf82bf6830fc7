"""The worker inside the application: there when it is needed, gone when the process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from broadcastable.in_process import InProcessWorker
from tests.actors.served import Served
from tests.services import wait_until


def run(code: str, *arguments: str) -> float:
    """Run *code* in a fresh interpreter; the seconds it took."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-W", "error", "-c", code, *arguments], check=True, timeout=60)
    return time.monotonic() - began


def test_nothing_starts_before_the_first_wake_up(make_served: Callable[..., Served]) -> None:
    before = threading.active_count()
    served = make_served()
    assert served.wakeups.drain(1)
    assert threading.active_count() == before
    served.commit("a")
    assert threading.active_count() > before


def test_every_thread_is_a_daemon(make_served: Callable[..., Served]) -> None:
    before = set(threading.enumerate())
    served = make_served()
    served.commit("a")
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)


def test_drain_returns_when_everything_is_delivered(make_served: Callable[..., Served]) -> None:
    served = make_served(before=lambda stream: time.sleep(0.01))
    for number in range(50):
        served.commit(f"s/{number}")
    assert served.wakeups.drain(20)
    assert len(served.relay.events) == 50


def test_drain_finds_what_nobody_was_woken_for(make_served: Callable[..., Served]) -> None:
    served = make_served()
    served.put("a")
    assert served.wakeups.drain(10)
    assert served.relay.events["a"] == 1


def test_drain_gives_up_in_time(make_served: Callable[..., Served]) -> None:
    stuck = threading.Event()
    served = make_served(before=lambda stream: stuck.wait(20))
    served.commit("a")
    began = time.monotonic()
    assert not served.wakeups.drain(0.2)
    assert time.monotonic() - began < 5
    stuck.set()


def test_drain_does_not_wait_for_parked_streams(make_served: Callable[..., Served]) -> None:
    served = make_served()
    served.put("a")
    frame = served.outbox.claim("a", lease_for=5)
    assert frame is not None
    served.outbox.park(frame, "400")
    assert served.wakeups.drain(1)


def test_close_stops_the_threads_and_a_later_wake_up_starts_anew(make_served: Callable[..., Served]) -> None:
    before = set(threading.enumerate())
    served = make_served()
    served.commit("a")
    assert served.wakeups.drain(10)
    served.wakeups.close()
    assert set(threading.enumerate()) <= before
    served.commit("b")
    wait_until(lambda: served.relay.events["b"] == 1)


def test_many_threads_start_one_worker(make_served: Callable[..., Served]) -> None:
    served = make_served()
    worker = InProcessWorker(served)
    brokers: list[object] = []
    threads = [threading.Thread(target=lambda: brokers.append(worker.broker)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, brokers))) == 1
    worker.close()


SLOWLY = """
import sys, time
from pathlib import Path
from tests.actors.served import Served

def note(stream):
    time.sleep(0.05)
    with open(sys.argv[1], "a") as file:
        file.write(stream + "\\n")

served = Served(before=note)
"""


def test_commits_just_before_the_exit_get_out(tmp_path: Path) -> None:
    noted = tmp_path / "delivered"
    run(SLOWLY + "for n in range(20): served.commit(f's/{n}')\n", str(noted))
    assert sorted(noted.read_text().split()) == sorted(f"s/{n}" for n in range(20))


def test_exit_does_not_wait_for_ever(tmp_path: Path) -> None:
    """A delivery that hangs costs the grace, three seconds, and no more."""
    took = run(
        "import threading\n"
        "from tests.actors.served import Served\n"
        "served = Served(before=lambda stream: threading.Event().wait())\n"
        "served.commit('a')\n"
    )
    assert took < 30


def test_exit_is_quick_when_there_is_nothing_to_wait_for() -> None:
    run(
        "import atexit, time\n"
        "from tests.actors.served import Served\n"
        "began = []\n"
        "atexit.register(lambda: None if time.monotonic() - began[0] < 2 else print(1 / 0))\n"
        "served = Served(); served.commit('a'); assert served.wakeups.drain(10)\n"
        "began.append(time.monotonic())\n"
    )


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of fork() beside threads
def test_a_forked_child_delivers_its_own_and_not_its_parents(make_served: Callable[..., Served]) -> None:
    served = make_served()
    served.commit("parent")
    assert served.wakeups.drain(10)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            served.commit("child")
            drained = served.wakeups.drain(10)
            os.write(write, repr((drained, served.relay.events["child"])).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == "(True, 1)"
    os.waitpid(child, 0)
    served.commit("parent")
    assert served.wakeups.drain(10)
    assert served.relay.events["parent"] == 2


def test_a_multiprocessing_child_gets_its_last_commits_out(tmp_path: Path) -> None:
    noted = tmp_path / "delivered"
    run(
        SLOWLY
        + "import multiprocessing\n"
        + "def child():\n"
        + "    for n in range(5): served.commit(f's/{n}')\n"
        + "process = multiprocessing.get_context('fork').Process(target=child)\n"
        + "process.start(); process.join(); assert process.exitcode == 0\n",
        str(noted),
    )
    assert sorted(noted.read_text().split()) == [f"s/{n}" for n in range(5)]
