"""The relay against a stream server that loses requests, answers, its memory and its temper."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator

import pytest

from broadcastable.client import StreamClient
from broadcastable.events import Batch
from broadcastable.outbox.memory import MemoryOutbox
from broadcastable.provisioner import StreamProvisioner
from broadcastable.relay import Relay
from broadcastable.settings import Settings
from broadcastable.tokens import Gatekeeper
from tests.clock import Clock
from tests.core.origin import Origin, answer, lose_answer, lose_request, refuse_connection, repeat

ROOM = "gid://app/Room/1"


@pytest.fixture
def outbox(clock: Clock) -> MemoryOutbox:
    return MemoryOutbox(max_bytes=1 << 24, max_frame_bytes=1 << 16, max_frame_events=100, clock=clock)


@pytest.fixture
def relay(outbox: MemoryOutbox, origin: Origin, settings: Settings, clock: Clock) -> Iterator[Relay]:
    client = StreamClient(settings, Gatekeeper(settings), transport=origin.transport())
    yield Relay(outbox, client, StreamProvisioner(settings), settings, clock=clock)
    client.close()


def put(outbox: MemoryOutbox, *events: int, stream: str = ROOM) -> None:
    outbox.put([Batch(stream=stream, events=tuple(b'{"n":%d}' % n for n in events), txid=str(events))])


def numbers(origin: Origin, stream: str = ROOM) -> list[int]:
    return [event["n"] for event in origin.events(stream)]  # type: ignore[index]


def settle(relay: Relay, outbox: MemoryOutbox, clock: Clock, stream: str = ROOM) -> None:
    """Deliver as the sweeper would: again and again, with time going on, until nothing is left."""
    for _ in range(20):
        relay.deliver(stream)
        if not outbox.pending(stream):
            return
        clock.now += 30
    raise AssertionError(f"still pending: {outbox.pending(stream)}")


def test_batches_leave_in_order_in_one_append(relay: Relay, outbox: MemoryOutbox, origin: Origin) -> None:
    put(outbox, 1, 2)
    put(outbox, 3)
    relay.deliver(ROOM)
    assert numbers(origin) == [1, 2, 3]
    assert origin.count("POST") == 1
    assert not outbox.pending()


def test_a_stream_that_never_runs_dry_gives_way_between_two_frames(
    relay: Relay, outbox: MemoryOutbox, origin: Origin
) -> None:
    """A worker that shuts down must come to an end; whoever comes next finds the stream free."""
    for n in range(3):
        put(outbox, *range(100 * n, 100 * n + 100))
    relay.deliver(ROOM, give_way=lambda: True)
    assert numbers(origin) == list(range(100))
    relay.deliver(ROOM)
    assert numbers(origin) == list(range(300))
    assert not outbox.pending()


def test_without_a_key_everything_waits_and_one_line_says_why(
    outbox: MemoryOutbox, origin: Origin, settings: Settings, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the operator's to mend, and what is said a thousand times is read by nobody."""
    without = settings.replace(signing_key=None)
    client = StreamClient(without, Gatekeeper(without), transport=origin.transport())
    relay = Relay(outbox, client, StreamProvisioner(without), without, clock=clock)
    for n in range(50):
        put(outbox, n, stream=f"rooms/{n}")
        relay.deliver(f"rooms/{n}")
    [line] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "signing_key" in line.getMessage()
    assert line.exc_info is None
    assert len(outbox.pending()) == 50
    clock.now += 30
    relay.deliver("rooms/0")
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 2
    client.close()


def test_each_stream_numbers_its_own_frames(relay: Relay, outbox: MemoryOutbox, origin: Origin) -> None:
    for n in range(3):
        put(outbox, n)
        relay.deliver(ROOM)
    assert [seq for seq, _ in origin.bodies] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "fault", [lose_request, lose_answer, answer(503), answer(200), answer(429, Retry_After="7"), refuse_connection]
)
@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_fault_on_the_way_neither_loses_nor_doubles(
    relay: Relay,
    outbox: MemoryOutbox,
    origin: Origin,
    clock: Clock,
    fault: Callable[..., object],
    times: int,
) -> None:
    """Whatever happens to a request or its answer, every event is stored once and in order."""
    put(outbox, 1)
    relay.deliver(ROOM)
    origin.faults.extend([fault] * times)  # type: ignore[list-item]
    put(outbox, 2)
    put(outbox, 3)
    settle(relay, outbox, clock)
    put(outbox, 4)
    settle(relay, outbox, clock)
    assert numbers(origin) == [1, 2, 3, 4]


def test_a_proxy_that_repeats_what_it_lost_before_doubles_nothing(
    relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock
) -> None:
    """A look that came before the doubtful answer proves nothing about it."""
    origin.faults.extend([lose_request, repeat, answer(503), repeat])
    for n in range(4):
        put(outbox, n)
        settle(relay, outbox, clock)
    assert numbers(origin) == [0, 1, 2, 3]


def test_a_frame_is_sent_again_byte_for_byte(relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock) -> None:
    origin.faults.extend([lose_request] * 4)
    put(outbox, 1)
    relay.deliver(ROOM)
    put(outbox, 2)
    settle(relay, outbox, clock)
    firsts = [body for seq, body in origin.bodies if seq == "0"]
    assert set(firsts) == {b'[{"n":1}]'}
    assert numbers(origin) == [1, 2]


def test_a_server_that_forgot_its_producers_after_an_unanswered_append_stores_nothing_twice(
    relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A kill -9 of the server between the data and the producer state: only a look can tell."""
    put(outbox, 1)
    relay.deliver(ROOM)

    def lose_answer_and_memory(request: object, perform: Callable[[], object]) -> object:
        try:
            return lose_answer(request, perform)  # type: ignore[arg-type]
        finally:
            origin.streams[ROOM].producers.clear()

    origin.faults.append(lose_answer_and_memory)  # type: ignore[arg-type]
    put(outbox, 2)
    settle(relay, outbox, clock)
    put(outbox, 3)
    with caplog.at_level(logging.WARNING):
        settle(relay, outbox, clock)
    assert numbers(origin) == [1, 2, 3]
    assert len([record for record in caplog.records if "lost count" in record.message]) == 1


def test_a_torn_append_is_completed(relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock) -> None:
    """A server killed in the middle of writing kept only the first events of the frame."""
    put(outbox, 0)
    relay.deliver(ROOM)

    def tear(request: object, perform: Callable[[], object]) -> object:
        try:
            return lose_answer(request, perform)  # type: ignore[arg-type]
        finally:
            del origin.streams[ROOM].events[2:]
            origin.streams[ROOM].producers.clear()

    origin.faults.append(tear)  # type: ignore[arg-type]
    put(outbox, 1, 2, 3)
    settle(relay, outbox, clock)
    assert numbers(origin) == [0, 1, 2, 3]


def test_a_deleted_stream_is_made_again(relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock) -> None:
    put(outbox, 1)
    relay.deliver(ROOM)
    put(outbox, 2)
    relay.deliver(ROOM)
    del origin.streams[ROOM]
    put(outbox, 3)
    settle(relay, outbox, clock)
    assert numbers(origin) == [3]
    assert not outbox.pending()


@pytest.mark.parametrize("status", [404, 410])
def test_a_stream_that_is_gone_again_at_once_is_left_for_later(
    relay: Relay,
    outbox: MemoryOutbox,
    origin: Origin,
    clock: Clock,
    status: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A proxy that knows the way for PUT only, for one: making the stream again and again would not help."""
    put(outbox, 1)
    relay.deliver(ROOM)
    put(outbox, 2)
    origin.faults.extend([answer(status)] * 6)
    for deliveries in (1, 2, 3):
        relay.deliver(ROOM)
        relay.deliver(ROOM)  # not before its pause is over
        assert origin.count("PUT") == 1 + deliveries
        assert origin.count("POST") == 1 + 2 * deliveries
        clock.now += 30
    assert outbox.pending(ROOM)[0].parked is None
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 2
    settle(relay, outbox, clock)
    assert numbers(origin) == [1, 2]


def test_a_stream_made_again_by_somebody_else_gets_what_is_new(
    relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock
) -> None:
    for n in range(3):
        put(outbox, n)
        relay.deliver(ROOM)
    origin.streams[ROOM].events.clear()
    origin.streams[ROOM].producers.clear()
    put(outbox, 7)
    settle(relay, outbox, clock)
    assert numbers(origin) == [7]


def test_a_server_that_knows_a_newer_epoch_is_overtaken(
    relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock
) -> None:
    """The store was restored from an older copy, and the server remembers what it had promised since."""
    put(outbox, 1)
    relay.deliver(ROOM)
    (producer,) = origin.streams[ROOM].producers
    origin.streams[ROOM].producers[producer] = (9_000_000_000_000, 4)
    put(outbox, 2)
    settle(relay, outbox, clock)
    put(outbox, 3)
    settle(relay, outbox, clock)
    assert numbers(origin) == [1, 2, 3]
    assert origin.streams[ROOM].producers[producer][0] > 9_000_000_000_000


def test_a_number_that_the_server_has_had_does_not_swallow_a_new_event(
    relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock
) -> None:
    """A store that went back in time gives old numbers to new events; the server would answer 204 and drop them."""
    put(outbox, 1)
    relay.deliver(ROOM)
    (producer,) = origin.streams[ROOM].producers
    epoch, _ = origin.streams[ROOM].producers[producer]
    origin.streams[ROOM].producers[producer] = (epoch, 40)
    put(outbox, 2)
    settle(relay, outbox, clock)
    assert numbers(origin) == [1, 2]


def test_a_server_restored_with_an_older_epoch_gets_a_new_one(
    relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock
) -> None:
    for n in range(3):
        put(outbox, n)
        relay.deliver(ROOM)
    (producer,) = origin.streams[ROOM].producers
    origin.streams[ROOM].producers[producer] = (5, 1)
    put(outbox, 3)
    settle(relay, outbox, clock)
    assert numbers(origin) == [0, 1, 2, 3]


@pytest.mark.parametrize(("status", "headers"), [(400, {}), (409, {"Stream_Closed": "true"}), (409, {}), (405, {})])
def test_what_the_server_will_never_take_parks_its_stream_only(
    relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock, status: int, headers: dict[str, str]
) -> None:
    origin.faults.append(answer(status, **headers))
    put(outbox, 1)
    put(outbox, 5, stream="other")
    relay.deliver(ROOM)
    relay.deliver("other")
    (parked,) = outbox.pending()
    assert parked.stream == ROOM
    assert str(status) in (parked.parked or "") or "closed" in (parked.parked or "")
    assert numbers(origin, "other") == [5]
    clock.now += 3600
    relay.deliver(ROOM)
    assert numbers(origin) == []
    assert outbox.retry(ROOM)
    relay.deliver(ROOM)
    assert numbers(origin) == [1]


def test_a_frame_over_the_servers_limit_is_halved_until_it_fits(
    relay: Relay, outbox: MemoryOutbox, origin: Origin
) -> None:
    origin.most_bytes = 40
    put(outbox, *range(10, 20))
    put(outbox, 20, 21)
    relay.deliver(ROOM)
    assert numbers(origin) == list(range(10, 22))
    assert not outbox.pending()


def test_one_event_over_the_servers_limit_is_parked(relay: Relay, outbox: MemoryOutbox, origin: Origin) -> None:
    origin.most_bytes = 4
    put(outbox, 1)
    relay.deliver(ROOM)
    assert "limit" in (outbox.pending()[0].parked or "")


def test_a_worker_that_died_after_its_append_leaves_no_double(
    relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock
) -> None:
    """The next worker is given the same frame, looks, and finds it, even if the server forgot the producer."""
    put(outbox, 1)
    relay.deliver(ROOM)
    put(outbox, 2)
    dead = outbox.claim(ROOM, lease_for=5)
    assert dead is not None
    origin.streams[ROOM].events.append({"n": 2})
    origin.streams[ROOM].producers.clear()
    clock.now += 6
    settle(relay, outbox, clock)
    assert numbers(origin) == [1, 2]


def test_the_look_ignores_what_servers_add_on_reading(
    relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock
) -> None:
    event = {"type": "m", "key": "1", "value": {"f": 1.0}, "headers": {"operation": "insert", "txid": "a"}}
    put(outbox, 0)
    relay.deliver(ROOM)
    outbox.put([Batch(stream=ROOM, events=(json.dumps(event).encode(),), txid="a")])
    assert outbox.claim(ROOM, lease_for=5) is not None
    stored = {**event, "value": {"f": 1}, "headers": {"operation": "insert", "txid": "a", "offset": "000000000007"}}
    origin.streams[ROOM].events.append(stored)
    clock.now += 6
    settle(relay, outbox, clock)
    assert origin.events(ROOM) == [{"n": 0}, stored]


def test_a_refused_server_token_waits_for_the_operator_and_parks_nothing(
    relay: Relay, outbox: MemoryOutbox, origin: Origin, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    origin.faults.extend([answer(401), answer(403)])
    put(outbox, 1)
    relay.deliver(ROOM)
    assert outbox.pending()[0].parked is None
    assert "verify key" in caplog.text
    settle(relay, outbox, clock)
    assert numbers(origin) == [1]
