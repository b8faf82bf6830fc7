"""A stream server that goes away and comes back, and what its streams cost meanwhile."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from broadcastable import DurableStreams
from broadcastable.circuit import FAILURES, PAUSE, Circuit
from broadcastable.events import Batch
from broadcastable.outbox import PendingStream
from broadcastable.server import embedded_server
from broadcastable.settings import Settings
from broadcastable.sweeper import Sweeper
from tests.clock import Clock
from tests.services import free_port, wait_until

PATIENCE = 6.0
STREAMS = [f"room/{number}" for number in range(60)]


@pytest.fixture
def circuit(clock: Clock) -> Circuit:
    return Circuit("http://streams.test", patience=PATIENCE, clock=clock)


def lets_through(circuit: Circuit) -> bool:
    with circuit.attempt() as may_try:
        return may_try


def test_a_server_that_answers_now_and_then_is_tried_by_all(circuit: Circuit) -> None:
    for _ in range(5):
        circuit.unanswered(times=FAILURES - 1)
        assert lets_through(circuit)
        circuit.answered()


def test_one_at_a_time_tries_a_server_that_does_not_answer(circuit: Circuit, clock: Clock) -> None:
    circuit.unanswered(times=FAILURES)
    assert not lets_through(circuit)
    clock.now += PAUSE
    with circuit.attempt() as may_try:
        assert may_try
        assert not lets_through(circuit)
        clock.now += PATIENCE - 1
        assert not lets_through(circuit)
        circuit.unanswered()
    assert not lets_through(circuit)
    clock.now += PAUSE
    with circuit.attempt() as may_try:
        assert may_try
        circuit.answered()
        assert lets_through(circuit)
    assert lets_through(circuit)


def test_one_that_had_nothing_to_send_gives_its_turn_away(circuit: Circuit, clock: Clock) -> None:
    circuit.unanswered(times=FAILURES)
    clock.now += PAUSE
    for _ in range(3):
        assert lets_through(circuit)
    with pytest.raises(KeyboardInterrupt), circuit.attempt():
        raise KeyboardInterrupt
    assert lets_through(circuit)


def test_one_that_hangs_holds_the_others_up_no_longer_than_its_patience(circuit: Circuit, clock: Clock) -> None:
    circuit.unanswered(times=FAILURES)
    clock.now += PAUSE
    with circuit.attempt():
        clock.now += PATIENCE
        assert lets_through(circuit)


# With real servers


@contextmanager
def swallowing_server(port: int) -> Iterator[list[socket.socket]]:
    """Takes connections and never says a word, as a host behind a broken firewall does; the connections it took."""
    taken: list[socket.socket] = []
    stopping = threading.Event()

    def accept() -> None:
        while not stopping.is_set():
            try:
                taken.append(listening.accept()[0])
            except TimeoutError:
                continue

    with socket.create_server(("127.0.0.1", port), backlog=256) as listening:
        listening.settimeout(0.05)
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield taken
        finally:
            stopping.set()
            thread.join()
            for connection in taken:
                connection.close()


@contextmanager
def sweeping(durable_streams: DurableStreams) -> Iterator[list[object]]:
    """A sweeper at work; what each delivery told it."""
    told: list[object] = []

    def deliver(stream: str) -> object:
        told.append(durable_streams.relay.deliver(stream))
        return told[-1]

    sweeper = Sweeper(durable_streams.outbox, deliver, interval=0.1)
    sweeper.start()
    try:
        yield told
    finally:
        sweeper.stop()
        assert sweeper.join(20)


def fill(durable_streams: DurableStreams, events: range) -> None:
    durable_streams.outbox.put(
        [Batch(stream=stream, events=(b'{"n":%d}' % n,), txid=str(n)) for n in events for stream in STREAMS]
    )


def waiting(durable_streams: DurableStreams) -> list[PendingStream]:
    return durable_streams.outbox.pending()


def test_the_streams_of_a_server_that_went_away_are_not_all_tried_and_all_arrive_when_it_is_back(
    signing_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    settings = Settings(signing_key=signing_key, request_timeout=0.3, server_url=f"http://127.0.0.1:{port}/v1/streams")
    with closing(DurableStreams(settings)) as durable_streams, sweeping(durable_streams) as told:
        with embedded_server(port=port, settings=settings) as server:
            assert server.url == settings.server_url
            fill(durable_streams, range(2))
            wait_until(lambda: not waiting(durable_streams), what="the first events")
        with swallowing_server(port) as taken:
            fill(durable_streams, range(2, 4))
            told.clear()
            wait_until(lambda: told.count(False) >= 3 * len(STREAMS), within=30, what="deliveries in vain")
            assert len(taken) < len(STREAMS), "one try for each would be three connections for each"
            assert len(waiting(durable_streams)) == len(STREAMS)
            assert all(each.parked is None for each in waiting(durable_streams))
        assert "gives no answer" in caplog.text
        with embedded_server(port=port, settings=settings) as server:
            wait_until(lambda: not waiting(durable_streams), within=20, what="the other events")
            for stream in STREAMS:
                page = durable_streams.client.read(stream)
                assert list(page.events) == [b'{"n":2}', b'{"n":3}'], "this server began with nothing"
