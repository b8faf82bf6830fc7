"""Any sequence of calls, by workers that know too much or too little, against a model in plain Python.

Time stands still for the model: a lease or a delay is either over at once or outlives the example.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from broadcastable.events import Batch, frame_body
from broadcastable.outbox import BatchMark, Frame, Outbox
from broadcastable.outbox.database import DatabaseOutbox, tables
from broadcastable.outbox.memory import MemoryOutbox
from broadcastable.outbox.redis import RedisOutbox
from tests.outbox.conftest import create_tables
from tests.outbox.workers import LONG

MAX_BYTES, MAX_EVENTS = 40, 4


@dataclass
class Stream:
    """What an outbox knows of one stream."""

    queue: list[tuple[Batch, list[bytes]]] = field(default_factory=list)
    """Batches with what is left of their events."""
    frozen: int = 0
    epoch: int | None = None
    seq: int = 0
    anchor: str | None = None
    lease: str | None = None
    leased: bool = False
    delayed: bool = False
    parked: str | None = None
    woken: bool = False

    @property
    def events(self) -> list[bytes]:
        return [event for _, left in self.queue for event in left]

    def is_claimable(self, lease: str | None = None) -> bool:
        refused = self.leased and self.lease != lease
        return bool(self.queue) and not refused and not self.delayed and self.parked is None

    def next_frame(self) -> int:
        """Whole batches while they fit; of a first one too large, what fits, or one event."""
        count = 0
        for _, left in self.queue:
            if not fits(self.events[: count + len(left)]):
                break
            count += len(left)
        if count:
            return count
        first = self.queue[0][1]
        return max([1, *(n for n in range(1, len(first)) if fits(first[:n]))])

    def marks(self, count: int) -> tuple[BatchMark, ...]:
        marks = []
        for batch, left in self.queue:
            taken = min(count, len(left))
            if taken:
                marks.append(BatchMark(batch.id, batch.txid, taken, batch.created_at, batch.trace))
            count -= taken
        return tuple(marks)

    def remove(self, count: int) -> None:
        while count:
            left = self.queue[0][1]
            taken = min(count, len(left))
            del left[:taken]
            count -= taken
            if not left:
                del self.queue[0]

    def acked(self, events: int, offset: str | None) -> None:
        self.remove(min(self.frozen, events))
        self.seq += 1
        self.frozen, self.parked = 0, None
        self.anchor = self.anchor if offset is None else offset

    def is_current(self, frame: Frame) -> bool:
        return self.frozen > 0 and (self.epoch, self.seq) == (frame.id.epoch, frame.id.seq)


def fits(events: list[bytes]) -> bool:
    return len(events) <= MAX_EVENTS and len(frame_body(events)) <= MAX_BYTES


streams = st.sampled_from(["a", "a/b", "{c}"])
sizes = st.lists(st.integers(1, 15), min_size=1, max_size=9)


class OutboxMachine(RuleBasedStateMachine):
    frames: Bundle[Frame] = Bundle("frames")
    batches: Bundle[Batch] = Bundle("batches")

    def __init__(self, outbox: Outbox, *, due_is_complete: bool) -> None:
        super().__init__()
        self.outbox = outbox
        self.due_is_complete = due_is_complete
        self.streams = {"a": Stream(), "a/b": Stream(), "{c}": Stream()}
        self.seen: set[str] = set()
        self.given: dict[tuple[str, int, int], list[bytes]] = {}
        self.numbers = itertools.count()

    @rule(target=batches, given=st.lists(st.tuples(streams, sizes), max_size=4))
    def put(self, given: list[tuple[str, list[int]]]) -> object:
        batches = [
            Batch(stream=stream, events=tuple(b"%d" % next(self.numbers) + b"x" * size for size in some), txid="t")
            for stream, some in given
        ]
        self.put_and_compare(batches)
        return multiple(*batches)

    @rule(again=st.lists(batches, min_size=1, max_size=3))
    def put_again(self, again: list[Batch]) -> None:
        self.put_and_compare(again)

    def put_and_compare(self, batches: list[Batch]) -> None:
        wanting: list[str] = []
        for batch in batches:
            if batch.id in self.seen:
                continue
            self.seen.add(batch.id)
            stream = self.streams[batch.stream]
            stream.queue.append((batch, list(batch.events)))
            if not stream.woken and not stream.delayed and stream.parked is None:
                stream.woken = True
                wanting.append(batch.stream)
        assert sorted(self.outbox.put(batches)) == sorted(wanting)

    @rule(target=frames, name=streams, lease_for=st.sampled_from([0.0, LONG]))
    def claim(self, name: str, lease_for: float) -> object:
        return self.claim_and_compare(name, lease_for, None)

    @rule(target=frames, frame=frames, lease_for=st.sampled_from([0.0, LONG]))
    def claim_again(self, frame: Frame, lease_for: float) -> object:
        return self.claim_and_compare(frame.stream, lease_for, frame.lease)

    def claim_and_compare(self, name: str, lease_for: float, lease: str | None) -> object:
        frame = self.outbox.claim(name, lease_for=lease_for, lease=lease)
        return self.compare_claim(frame, name, lease_for, lease)

    def compare_claim(self, frame: Frame | None, name: str, lease_for: float, lease: str | None) -> object:
        stream = self.streams[name]
        if not stream.is_claimable(lease):
            assert frame is None
            return multiple()
        assert frame is not None
        if stream.epoch is None:
            stream.epoch = frame.id.epoch
        begun = stream.frozen > 0
        if not begun:
            stream.frozen = stream.next_frame()
        if lease is None or stream.lease != lease:
            assert frame.lease != stream.lease
            stream.lease = frame.lease
        stream.leased, stream.woken = lease_for > 0, True
        self.compare(frame, stream, begun=begun, lease=stream.lease)
        return frame

    def compare(self, frame: Frame, stream: Stream, *, begun: bool, lease: str) -> None:
        assert list(frame.events) == stream.events[: stream.frozen]
        assert frame.batches == stream.marks(stream.frozen)
        assert (frame.id.epoch, frame.id.seq) == (stream.epoch, stream.seq)
        assert (frame.anchor, frame.begun, frame.lease) == (stream.anchor, begun, lease)
        # Whatever happens, a number stands for the same events, or for the first of them.
        before = self.given.setdefault((frame.stream, frame.id.epoch, frame.id.seq), list(frame.events))
        shorter = min(len(before), len(frame.events))
        assert before[:shorter] == list(frame.events[:shorter])

    @rule(frame=frames, offset=st.sampled_from([None, "1", "2"]), events=st.none() | st.integers(1, 5))
    def ack(self, frame: Frame, offset: str | None, events: int | None) -> None:
        stream = self.streams[frame.stream]
        is_current = stream.is_current(frame)
        assert self.outbox.ack(frame, offset=offset, events=events) == is_current
        if is_current:
            stream.acked(len(frame.events) if events is None else events, offset)

    @rule(target=frames, frame=frames, offset=st.sampled_from([None, "1", "2"]), lease_for=st.sampled_from([0.0, LONG]))
    def advance(self, frame: Frame, offset: str | None, lease_for: float) -> object:
        stream = self.streams[frame.stream]
        is_current = stream.is_current(frame)
        advanced = self.outbox.advance(frame, offset=offset, lease_for=lease_for)
        assert advanced.acked == is_current
        if is_current:
            stream.acked(len(frame.events), offset)
        taken = self.compare_claim(advanced.following, frame.stream, lease_for, frame.lease)
        if advanced.following is None and not (stream.leased and stream.lease != frame.lease):
            stream.lease, stream.leased, stream.woken = None, False, False
        return taken

    @rule(target=frames, frame=frames, offset=st.sampled_from(["1", "3"]))
    def anchor(self, frame: Frame, offset: str) -> Frame:
        stream = self.streams[frame.stream]
        if is_own := stream.is_current(frame) and stream.anchor == frame.anchor:
            stream.anchor = offset
        return self.current(self.outbox.anchor(frame, offset), frame, is_own=is_own)

    @rule(target=frames, frame=frames, above=st.sampled_from([0, 10**14]))
    def renew(self, frame: Frame, above: int) -> Frame:
        stream = self.streams[frame.stream]
        renewed = self.outbox.renew(frame, above=above)
        is_own = stream.is_current(frame)
        if is_own:
            assert renewed.id.epoch > max(above, frame.id.epoch)
            stream.epoch, stream.seq = renewed.id.epoch, 0
        return self.current(renewed, frame, is_own=is_own)

    @rule(target=frames, frame=frames, events=st.integers(1, 5))
    def shrink(self, frame: Frame, events: int) -> Frame:
        stream = self.streams[frame.stream]
        is_own = stream.is_current(frame)
        if is_own:
            stream.frozen = min(stream.frozen, events)
        return self.current(self.outbox.shrink(frame, events=events), frame, is_own=is_own)

    def current(self, answer: Frame, frame: Frame, *, is_own: bool) -> Frame:
        stream = self.streams[frame.stream]
        if stream.frozen:
            self.compare(answer, stream, begun=frame.begun if is_own else True, lease=frame.lease)
        else:
            assert answer == replace(frame, begun=True)
        return answer

    @rule(frame=frames, delay=st.sampled_from([0.0, LONG]))
    def release(self, frame: Frame, delay: float) -> None:
        self.outbox.release(frame, delay=delay)
        stream = self.streams[frame.stream]
        if stream.lease == frame.lease:
            stream.lease, stream.leased, stream.woken, stream.delayed = None, False, False, delay > 0

    @rule(frame=frames)
    def finish_with_a_lease(self, frame: Frame) -> None:
        self.finish_and_compare(frame.stream, frame.lease)

    @rule(name=streams)
    def finish(self, name: str) -> None:
        self.finish_and_compare(name, None)

    def finish_and_compare(self, name: str, lease: str | None) -> None:
        stream = self.streams[name]
        again = self.outbox.finish(name, lease=lease)
        if stream.leased and stream.lease != lease:
            assert not again
            return
        stream.lease, stream.leased = None, False
        assert again == stream.is_claimable()
        if not again:
            stream.woken = False

    @rule(frame=frames)
    def park(self, frame: Frame) -> None:
        self.outbox.park(frame, "no")
        stream = self.streams[frame.stream]
        if stream.is_current(frame):
            stream.parked, stream.lease, stream.leased, stream.woken = "no", None, False, False

    @rule(name=streams)
    def retry(self, name: str) -> None:
        stream = self.streams[name]
        assert self.outbox.retry(name) == bool(stream.queue or stream.parked)
        stream.parked, stream.delayed = None, False

    @rule(name=streams)
    def drop(self, name: str) -> None:
        stream = self.streams[name]
        assert self.outbox.drop(name) == len(stream.events)
        self.streams[name] = Stream()

    @rule()
    def due(self) -> None:
        due = self.outbox.due(older_than=0)
        claimable = {name for name, stream in self.streams.items() if stream.is_claimable()}
        assert len(due) == len(set(due))
        assert set(due) <= claimable
        if self.due_is_complete:
            assert set(due) == claimable
        for name in due:
            self.streams[name].woken = True

    @invariant()
    def pending_tells_what_waits(self) -> None:
        found = {each.stream: (each.batches, each.events, each.parked) for each in self.outbox.pending()}
        assert found == {
            name: (len(stream.queue), len(stream.events), stream.parked)
            for name, stream in self.streams.items()
            if stream.queue
        }


def run(make: Callable[[], Outbox], *, examples: int, due_is_complete: bool) -> None:
    run_state_machine_as_test(
        lambda: OutboxMachine(make(), due_is_complete=due_is_complete),
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_the_memory_outbox_does_as_the_model() -> None:
    run(
        lambda: MemoryOutbox(max_bytes=1 << 20, max_frame_bytes=MAX_BYTES, max_frame_events=MAX_EVENTS),
        examples=200,
        due_is_complete=True,
    )


@pytest.mark.parametrize("part_of", [MAX_EVENTS, 2, 100])
def test_the_redis_outbox_does_as_the_model(valkey_url: str, part_of: int) -> None:
    """Also for batches that were stored in parts of other sizes than a frame's."""
    namespaces = (f"test{number}" for number in itertools.count())
    opened: list[RedisOutbox] = []

    class WrittenByOthers(RedisOutbox):
        def put(self, batches: object) -> list[str]:
            return writer(self._prefix).put(batches)  # type: ignore[arg-type]

    def writer(namespace: str) -> RedisOutbox:
        return RedisOutbox(
            opened[0]._client, namespace=namespace, max_frame_bytes=10 * part_of, max_frame_events=part_of
        )

    def make() -> Outbox:
        client = opened[0]._client if opened else valkey_url
        outbox = WrittenByOthers(
            client, namespace=next(namespaces), max_frame_bytes=MAX_BYTES, max_frame_events=MAX_EVENTS, timeout=10
        )
        opened.append(outbox)
        return outbox

    try:
        # A sweeper looks at a stream once a second, so one call need not see all.
        run(make, examples=50, due_is_complete=False)
    finally:
        opened[0].close()


def test_the_database_outbox_does_as_the_model(database_url: str) -> None:
    create_tables(database_url)
    outbox = DatabaseOutbox(database_url, namespace="test", max_frame_bytes=MAX_BYTES, max_frame_events=MAX_EVENTS)
    found = tables(sa.MetaData())

    def make() -> Outbox:
        with outbox._transaction() as connection:
            connection.execute(sa.delete(found.batches))
            connection.execute(sa.delete(found.streams))
        return outbox

    try:
        run(make, examples=50, due_is_complete=True)
    finally:
        outbox.close()
