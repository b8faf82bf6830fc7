"""Where a frame ends, checked against the rule as the interface words it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from broadcastable.events import Batch, frame_body
from broadcastable.outbox import Frame, FrameId
from broadcastable.outbox.framing import Limits, events_that_fit, first_events, parts_of, take

sizes = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), max_size=6)
limits = st.builds(Limits, st.integers(1, 40), st.integers(1, 8))


def fits(events: list[int], limits: Limits) -> bool:
    return len(events) <= limits.max_events and len(frame_body([b"x" * size for size in events])) <= limits.max_bytes


@given(sizes=sizes, limits=limits, data=st.data())
def test_a_frame_takes_whole_batches_or_a_part_of_the_first(
    sizes: list[list[int]], limits: Limits, data: st.DataObject
) -> None:
    skip = data.draw(st.integers(0, len(sizes[0]) - 1)) if sizes else 0
    rests = [sizes[0][skip:], *sizes[1:]] if sizes else []
    count = events_that_fit(sizes, skip, limits)
    whole = 0
    for rest in rests:
        if not fits([size for each in rests for size in each][: whole + len(rest)], limits):
            break
        whole += len(rest)
    if whole or not sizes:
        assert count == whole
    else:
        assert 1 <= count < len(rests[0]) or len(rests[0]) == 1 == count
        assert count == 1 or fits(rests[0][:count], limits)
        assert not fits(rests[0][: count + 1], limits)


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30), limits=limits)
def test_parts_of_a_batch_fit_a_frame_and_are_as_few_as_can_be(sizes: list[int], limits: Limits) -> None:
    bounds = parts_of(sizes, limits)
    assert (bounds[0], bounds[-1]) == (0, len(sizes))
    for start, end in pairwise(bounds):
        assert start < end
        assert fits(sizes[start:end], limits) or end == start + 1
        assert end == len(sizes) or not fits(sizes[start : end + 1], limits)


@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=5), data=st.data())
def test_marks_and_events_agree(counts: list[int], data: st.DataObject) -> None:
    batches = [
        Batch(stream="s", events=tuple(b"%d" % n for n in range(count)), txid=f"t{number}", id=str(number))
        for number, count in enumerate(counts)
    ]
    skip = data.draw(st.integers(0, counts[0] - 1))
    count = data.draw(st.integers(1, sum(counts) - skip))
    events, marks = take(batches, skip, count)
    assert events == tuple(event for batch in batches for event in batch.events)[skip : skip + count]
    assert sum(mark.events for mark in marks) == count
    assert all(mark.events for mark in marks)
    frame = Frame("s", FrameId("p", 1, 0), events, marks, None, False, "lease")
    fewer = data.draw(st.integers(1, count))
    assert (first_events(frame, fewer).events, first_events(frame, fewer).batches) == take(batches, skip, fewer)
