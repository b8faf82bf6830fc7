"""The promises of `Outbox`, kept by every store."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable

import pytest

from broadcastable.events import Batch, frame_body
from broadcastable.outbox import Advanced, Frame, Outbox, Rate
from tests.outbox.workers import LONG, SHORT, batch, claim, claim_when_free, deliver, events_of
from tests.services import wait_until

MakeOutbox = Callable[..., Outbox]

STREAM = "gid://app/Room/1/messages"


def test_batches_of_a_stream_leave_in_the_order_they_were_put(outbox: Outbox) -> None:
    batches = [batch(STREAM) for _ in range(25)]
    for each in batches:
        outbox.put([each])
    assert deliver(outbox, STREAM) == list(events_of(*batches))
    assert outbox.claim(STREAM, lease_for=LONG) is None


def test_one_call_may_carry_many_streams(outbox: Outbox) -> None:
    batches = [batch(f"room/{number % 300}") for number in range(900)]
    assert sorted(outbox.put(batches)) == sorted({each.stream for each in batches})
    for stream in {each.stream for each in batches}:
        assert deliver(outbox, stream) == [each.events[0] for each in batches if each.stream == stream]
    assert outbox.pending() == []


def test_put_of_nothing_wakes_nobody(outbox: Outbox) -> None:
    assert outbox.put([]) == []


def test_events_come_back_byte_for_byte(outbox: Outbox) -> None:
    awkward = (
        b'{"a":"\\u0000"}',
        '{"ü":"日本\u2028😀"}'.encode(),
        b'"' + b"x" * (1 << 20) + b'"',
        b"0",
        b'"\x7f,[]{}"',
    )
    stream = "Räume/{1}/%7B'\"/😀"
    outbox.put([Batch(stream=stream, events=awkward, txid="täx", trace="00-abc-def-01")])
    assert deliver(outbox, stream) == list(awkward)


def test_a_frame_names_its_batches(outbox: Outbox) -> None:
    first = Batch(stream=STREAM, events=(b"1", b"2"), txid="t1", id="a", created_at=1_700_000_000_001, trace="00-x")
    second = Batch(stream=STREAM, events=(b"3",), txid="t2", id="b", created_at=1_700_000_000_002)
    outbox.put([first, second])
    frame = claim(outbox, STREAM)
    assert frame.stream == STREAM
    assert frame.events == (b"1", b"2", b"3")
    assert [(mark.id, mark.txid, mark.events, mark.created_at, mark.trace) for mark in frame.batches] == [
        ("a", "t1", 2, 1_700_000_000_001, "00-x"),
        ("b", "t2", 1, 1_700_000_000_002, None),
    ]


def test_streams_do_not_meet(outbox: Outbox) -> None:
    names = ("a", "a/b", "a}", "{a}", "{a", "a%7D", "A", "a ", "ä", "a\u0308")
    outbox.put([batch(name, f'"{name}"') for name in names])
    for name in names:
        assert deliver(outbox, name) == [f'"{name}"'.encode()]


# Limits of a frame


def test_a_frame_holds_at_most_so_many_events(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox(max_frame_events=5)
    batches = [batch(STREAM, *(f"{n}{m}" for m in range(2))) for n in range(1, 6)]
    outbox.put(batches)
    frames = frames_until_empty(outbox)
    assert [len(frame.events) for frame in frames] == [4, 4, 2]


def test_a_frame_holds_at_most_so_many_bytes_brackets_and_commas_included(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox(max_frame_bytes=22)
    outbox.put([batch(STREAM, "123456") for _ in range(7)])
    frames = frames_until_empty(outbox)
    assert [len(frame_body(frame.events)) for frame in frames] == [22, 22, 8]


def test_a_batch_too_large_alone_is_split_and_keeps_its_order(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox(max_frame_events=10)
    before, large, after = batch(STREAM), batch(STREAM, *(str(n) for n in range(25))), batch(STREAM)
    outbox.put([before, large, after])
    frames = frames_until_empty(outbox)
    assert [len(frame.events) for frame in frames] == [1, 10, 10, 6]
    assert [[mark.id for mark in frame.batches] for frame in frames] == [
        [before.id],
        [large.id],
        [large.id],
        [large.id, after.id],
    ]
    assert [sum(mark.events for mark in frame.batches) for frame in frames] == [1, 10, 10, 6]
    assert sum((frame.events for frame in frames), ()) == events_of(before, large, after)


def test_the_rest_of_a_split_batch_goes_before_a_batch_that_does_not_fit_beside_it(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox(max_frame_events=4)
    outbox.put([batch(STREAM, *"123456"), batch(STREAM, *"789")])
    assert [len(frame.events) for frame in frames_until_empty(outbox)] == [4, 2, 3]


def test_two_batches_too_large_do_not_mix(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox(max_frame_events=4)
    outbox.put([batch(STREAM, *"123456"), batch(STREAM, *"12345")])
    assert [len(frame.events) for frame in frames_until_empty(outbox)] == [4, 2, 4, 1]


def test_an_event_too_large_alone_goes_alone(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox(max_frame_bytes=10)
    outbox.put([batch(STREAM, "1", "x" * 50, "2", "3")])
    assert [len(frame.events) for frame in frames_until_empty(outbox)] == [1, 1, 2]


def test_many_small_batches_fill_a_frame(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox()
    outbox.put([batch(STREAM) for _ in range(2_100)])
    assert [len(frame.events) for frame in frames_until_empty(outbox)] == [1_000, 1_000, 100]


# Frozen frames


def test_a_second_claim_gets_the_same_frame_under_the_same_number(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    first = claim(outbox, STREAM, lease_for=SHORT)
    assert not first.begun
    outbox.put([batch(STREAM)])
    second = claim_when_free(outbox, STREAM)
    assert second.begun
    assert (second.id, second.events, second.batches) == (first.id, first.events, first.batches)
    assert second.lease != first.lease


def test_a_frame_begins_at_number_nought_and_each_ack_moves_on_by_one(outbox: Outbox) -> None:
    for number in range(3):
        outbox.put([batch(STREAM)])
        frame = claim(outbox, STREAM)
        assert frame.id.seq == number
        assert outbox.ack(frame, offset=None)
        outbox.finish(STREAM, lease=frame.lease)


def test_other_claims_are_refused_while_a_lease_runs(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    claim(outbox, STREAM)
    assert outbox.claim(STREAM, lease_for=LONG) is None
    assert outbox.claim(STREAM, lease_for=LONG, lease="another") is None


def test_the_same_worker_goes_on_with_its_lease(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    first = claim(outbox, STREAM)
    assert outbox.ack(first, offset="1")
    outbox.put([batch(STREAM)])
    assert outbox.claim(STREAM, lease_for=LONG) is None
    second = claim(outbox, STREAM, lease=first.lease)
    assert second.lease == first.lease
    assert not second.begun


def test_a_second_ack_changes_nothing(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    assert outbox.ack(frame, offset="1")
    outbox.put([batch(STREAM)])
    assert not outbox.ack(frame, offset="2")
    following = claim(outbox, STREAM, lease=frame.lease)
    assert (following.id.seq, following.anchor) == (1, "1")
    assert not outbox.ack(frame, offset="3")
    assert outbox.ack(following, offset="4")


def test_a_zombie_acks_the_frame_that_both_were_given_once(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    zombie = claim(outbox, STREAM, lease_for=SHORT)
    successor = claim_when_free(outbox, STREAM)
    outbox.put([batch(STREAM)])
    assert outbox.ack(zombie, offset="1")
    assert not outbox.ack(successor, offset="1")
    assert pending_events(outbox) == 1


def test_an_ack_of_an_unknown_stream_changes_nothing(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox()
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    outbox.drop(STREAM)
    assert not outbox.ack(frame, offset="1")


def test_a_partial_ack_leaves_the_rest_to_the_next_frame(outbox: Outbox) -> None:
    outbox.put([batch(STREAM, "1", "2", "3"), batch(STREAM, "4", "5")])
    frame = claim(outbox, STREAM)
    assert outbox.ack(frame, offset="one", events=1)
    assert pending_events(outbox) == 4
    frame = claim(outbox, STREAM, lease=frame.lease)
    assert (frame.id.seq, frame.events, frame.begun) == (1, (b"2", b"3", b"4", b"5"), False)
    assert [mark.events for mark in frame.batches] == [2, 2]
    assert outbox.ack(frame, offset="two", events=3)
    frame = claim(outbox, STREAM, lease=frame.lease)
    assert frame.events == (b"5",)
    assert outbox.ack(frame, offset="three")
    assert outbox.pending() == []


# Anchors


def test_the_anchor_is_none_until_one_is_known(outbox: Outbox) -> None:
    outbox.put([batch(STREAM), batch("other")])
    frame = claim(outbox, STREAM, lease_for=SHORT)
    assert frame.anchor is None
    assert claim_when_free(outbox, STREAM, lease_for=SHORT).anchor is None
    assert outbox.anchor(frame, "0_0").anchor == "0_0"
    again = claim_when_free(outbox, STREAM)
    assert again.anchor == "0_0"
    assert outbox.ack(again, offset=None)
    outbox.put([batch(STREAM)])
    assert claim(outbox, STREAM, lease=again.lease).anchor == "0_0"
    assert claim(outbox, "other").anchor is None


def test_an_ack_moves_the_anchor(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = outbox.anchor(claim(outbox, STREAM), "1")
    outbox.ack(frame, offset="2")
    outbox.finish(STREAM, lease=frame.lease)
    outbox.put([batch(STREAM)])
    assert claim(outbox, STREAM).anchor == "2"


def test_the_later_of_two_workers_does_not_move_the_anchor_past_the_earlier_ones_send(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    early = claim(outbox, STREAM, lease_for=SHORT)
    late = claim_when_free(outbox, STREAM)
    outbox.anchor(early, "before")
    anchored = outbox.anchor(late, "after")
    assert (anchored.anchor, anchored.begun, anchored.lease) == ("before", True, late.lease)


def test_an_anchor_can_be_replaced_by_who_knows_it(outbox: Outbox) -> None:
    """The stream was made again: offsets of the old one mean nothing."""
    outbox.put([batch(STREAM)])
    frame = outbox.anchor(claim(outbox, STREAM, lease_for=SHORT), "old")
    frame = outbox.anchor(frame, "new")
    assert frame.anchor == "new"
    assert claim_when_free(outbox, STREAM).anchor == "new"


# Renew


def test_a_renewed_frame_has_the_same_events_and_a_higher_epoch(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    outbox.ack(frame, offset="1")
    outbox.put([batch(STREAM), batch(STREAM)])
    frame = claim(outbox, STREAM, lease=frame.lease, lease_for=SHORT)
    above = frame.id.epoch + 10**10
    renewed = outbox.renew(frame, above=above)
    assert renewed.id.epoch > above
    assert renewed.id.seq == 0
    assert renewed.id.producer_id == frame.id.producer_id
    assert (renewed.events, renewed.batches, renewed.anchor) == (frame.events, frame.batches, "1")
    assert (renewed.begun, renewed.lease) == (frame.begun, frame.lease)
    again = claim_when_free(outbox, STREAM)
    assert (again.id, again.events, again.begun) == (renewed.id, renewed.events, True)


def test_a_renewed_epoch_is_always_a_new_one(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    first = outbox.renew(frame, above=0)
    assert first.id.epoch > frame.id.epoch
    assert outbox.renew(first, above=5).id.epoch > first.id.epoch


def test_a_zombie_cannot_ack_what_was_renewed(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    zombie = claim(outbox, STREAM, lease_for=SHORT)
    renewed = outbox.renew(claim_when_free(outbox, STREAM), above=zombie.id.epoch)
    assert not outbox.ack(zombie, offset="1")
    assert outbox.ack(renewed, offset="1")


def test_who_is_late_is_given_the_current_frame(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    late = claim(outbox, STREAM, lease_for=SHORT)
    current = outbox.renew(claim_when_free(outbox, STREAM), above=late.id.epoch)
    answers = [outbox.renew(late, above=10**15), outbox.shrink(late, events=1), outbox.anchor(late, "x")]
    assert [answer.id for answer in answers] == [current.id] * 3
    assert all(answer.begun and answer.lease == late.lease and answer.anchor is None for answer in answers)
    outbox.ack(current, offset="1")
    answers = [outbox.renew(late, above=10**15), outbox.shrink(late, events=1), outbox.anchor(late, "x")]
    assert [answer.id for answer in answers] == [late.id] * 3
    assert all(answer.begun and answer.events == late.events for answer in answers)


# Shrink


def test_a_shrunk_frame_keeps_its_number_and_is_frozen_so(outbox: Outbox) -> None:
    outbox.put([batch(STREAM, "1", "2"), batch(STREAM, "3", "4")])
    frame = claim(outbox, STREAM, lease_for=SHORT)
    shrunk = outbox.shrink(frame, events=3)
    assert (shrunk.id, shrunk.events, shrunk.begun) == (frame.id, (b"1", b"2", b"3"), False)
    assert [mark.events for mark in shrunk.batches] == [2, 1]
    again = claim_when_free(outbox, STREAM)
    assert (again.id, again.events, again.batches) == (shrunk.id, shrunk.events, shrunk.batches)
    assert outbox.ack(again, offset="1")
    rest = claim(outbox, STREAM, lease=again.lease)
    assert (rest.id.seq, rest.events, [mark.events for mark in rest.batches]) == (1, (b"4",), [1])


def test_shrink_does_not_grow_a_frame(outbox: Outbox) -> None:
    outbox.put([batch(STREAM, "1", "2", "3")])
    frame = claim(outbox, STREAM)
    assert outbox.shrink(frame, events=1).events == (b"1",)
    assert outbox.shrink(frame, events=3).events == (b"1",)


def test_an_ack_of_the_frame_as_it_was_removes_only_what_is_frozen(outbox: Outbox) -> None:
    outbox.put([batch(STREAM, "1", "2", "3")])
    zombie = claim(outbox, STREAM, lease_for=SHORT)
    outbox.shrink(claim_when_free(outbox, STREAM), events=1)
    assert outbox.ack(zombie, offset="1")
    assert pending_events(outbox) == 2


# Release, finish and wake-ups


def test_a_put_wakes_a_stream_once_until_its_worker_finished(outbox: Outbox) -> None:
    assert outbox.put([batch(STREAM)]) == [STREAM]
    assert outbox.put([batch(STREAM), batch("other")]) == ["other"]
    deliver(outbox, STREAM)
    assert outbox.put([batch(STREAM)]) == [STREAM]


def test_a_put_while_a_worker_is_at_work_wakes_nobody(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    assert outbox.put([batch(STREAM)]) == []
    outbox.ack(frame, offset="1")
    assert outbox.put([batch(STREAM)]) == []


def test_a_batch_that_comes_between_the_empty_claim_and_finish_is_noticed(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    outbox.ack(frame, offset="1")
    assert outbox.claim(STREAM, lease_for=LONG, lease=frame.lease) is None
    assert outbox.put([batch(STREAM)]) == []
    assert outbox.finish(STREAM, lease=frame.lease)
    following = claim(outbox, STREAM, lease=frame.lease)
    outbox.ack(following, offset="2")
    assert outbox.claim(STREAM, lease_for=LONG, lease=following.lease) is None
    assert not outbox.finish(STREAM, lease=following.lease)
    assert outbox.put([batch(STREAM)]) == [STREAM]


def test_finish_drops_the_lease(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    outbox.ack(frame, offset="1")
    outbox.finish(STREAM, lease=frame.lease)
    outbox.put([batch(STREAM)])
    claim(outbox, STREAM)


def test_finish_leaves_another_workers_lease_and_wake_up_alone(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    assert not outbox.finish(STREAM, lease=None)
    assert not outbox.finish(STREAM, lease="another")
    assert outbox.claim(STREAM, lease_for=LONG) is None
    assert outbox.put([batch(STREAM)]) == []
    assert outbox.ack(frame, offset="1")


def test_finish_of_a_stream_that_was_never_seen_is_harmless(outbox: Outbox) -> None:
    assert outbox.claim(STREAM, lease_for=LONG) is None
    assert not outbox.finish(STREAM, lease=None)


def test_a_released_frame_stays_frozen(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    outbox.release(frame, delay=0)
    outbox.put([batch(STREAM)])
    again = claim(outbox, STREAM)
    assert (again.id, again.events, again.begun) == (frame.id, frame.events, True)


def test_release_keeps_claims_away_for_the_delay(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    outbox.release(frame, delay=LONG)
    assert outbox.claim(STREAM, lease_for=LONG) is None
    assert outbox.claim(STREAM, lease_for=LONG, lease=frame.lease) is None
    assert not outbox.finish(STREAM, lease=frame.lease)
    assert outbox.due(older_than=0) == []
    assert outbox.put([batch(STREAM)]) == []


def test_a_short_delay_ends_by_itself(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    outbox.release(claim(outbox, STREAM), delay=SHORT)
    assert claim_when_free(outbox, STREAM).begun


def test_a_put_after_the_delay_wakes_the_stream(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    outbox.release(claim(outbox, STREAM), delay=0)
    assert outbox.put([batch(STREAM)]) == [STREAM]


def test_release_by_an_older_claim_changes_nothing(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    older = claim(outbox, STREAM, lease_for=SHORT)
    newer = claim_when_free(outbox, STREAM)
    outbox.release(older, delay=LONG)
    assert outbox.claim(STREAM, lease_for=LONG) is None
    outbox.ack(newer, offset="1")
    outbox.put([batch(STREAM)])
    claim(outbox, STREAM, lease=newer.lease)


# Advance


def test_advance_goes_on_to_the_next_frame_under_the_same_lease(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox(max_frame_events=2)
    outbox.put([batch(STREAM, "1", "2"), batch(STREAM, "3")])
    first = claim(outbox, STREAM)
    advanced = outbox.advance(first, offset="7", lease_for=LONG)
    second = advanced.following
    assert advanced.acked
    assert second is not None
    assert (second.events, second.id.seq, second.anchor) == ((b"3",), 1, "7")
    assert (second.begun, second.lease) == (False, first.lease)
    assert outbox.claim(STREAM, lease_for=LONG) is None
    assert pending_events(outbox) == 1


def test_advance_past_the_last_frame_finishes(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    assert outbox.advance(frame, offset="1", lease_for=LONG) == Advanced(True, None)
    assert outbox.put([batch(STREAM)]) == [STREAM]
    assert claim(outbox, STREAM).id.seq == 1


def test_advance_finds_what_came_while_the_last_frame_was_sent(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    late = batch(STREAM)
    assert outbox.put([late]) == []
    following = outbox.advance(frame, offset="1", lease_for=LONG).following
    assert following is not None
    assert following.events == late.events


def test_advance_by_a_slow_worker_acks_nothing_and_leaves_the_other_alone(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    slow = claim(outbox, STREAM, lease_for=SHORT)
    other = claim_when_free(outbox, STREAM)
    assert outbox.ack(other, offset="1")
    outbox.put([batch(STREAM)])
    assert outbox.advance(slow, offset="1", lease_for=LONG) == Advanced(False, None)
    assert outbox.claim(STREAM, lease_for=LONG) is None, "the other's lease goes on"
    assert pending_events(outbox) == 1
    assert claim(outbox, STREAM, lease=other.lease).id.seq == 1


def test_advance_of_a_frame_that_was_shrunk_removes_what_is_left_of_it(outbox: Outbox) -> None:
    outbox.put([batch(STREAM, "1", "2", "3")])
    frame = claim(outbox, STREAM)
    outbox.shrink(frame, events=1)
    following = outbox.advance(frame, offset="1", lease_for=LONG).following
    assert following is not None
    assert following.events == (b"2", b"3")


def test_two_who_advance_at_the_same_moment_ack_once(outbox: Outbox) -> None:
    for _ in range(10):
        outbox.put([batch(STREAM)])
        one = claim(outbox, STREAM, lease_for=SHORT)
        other = claim_when_free(outbox, STREAM)
        barrier = threading.Barrier(2)
        advanced: list[Advanced] = []

        def work(frame: Frame, barrier: threading.Barrier = barrier, advanced: list[Advanced] = advanced) -> None:
            barrier.wait()
            advanced.append(outbox.advance(frame, offset="1", lease_for=LONG))

        threads = [threading.Thread(target=work, args=(frame,)) for frame in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(each.acked for each in advanced) == [False, True]
        assert [each.following for each in advanced] == [None, None]
        assert pending_events(outbox) == 0


# Park, retry, drop


def test_a_parked_stream_waits_and_others_go_on(outbox: Outbox) -> None:
    outbox.put([batch(STREAM), batch("other")])
    frame = claim(outbox, STREAM)
    outbox.park(frame, "413: too large, ünd")
    assert outbox.claim(STREAM, lease_for=LONG) is None
    assert outbox.claim(STREAM, lease_for=LONG, lease=frame.lease) is None
    assert not outbox.finish(STREAM, lease=frame.lease)
    assert outbox.put([batch(STREAM)]) == []
    assert outbox.due(older_than=0) == ["other"]
    assert len(deliver(outbox, "other")) == 1
    (parked,) = outbox.pending()
    assert (parked.stream, parked.parked, parked.events) == (STREAM, "413: too large, ünd", 2)


def test_retry_gives_the_parked_frame_again(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    outbox.park(frame, "no")
    assert outbox.retry(STREAM)
    again = claim(outbox, STREAM)
    assert (again.id, again.events, again.begun) == (frame.id, frame.events, True)
    assert outbox.pending(STREAM)[0].parked is None


def test_retry_forgets_a_delay(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    outbox.release(claim(outbox, STREAM), delay=LONG)
    assert outbox.retry(STREAM)
    claim(outbox, STREAM)


def test_retry_of_a_stream_with_nothing_to_do_says_so(outbox: Outbox) -> None:
    assert not outbox.retry(STREAM)
    outbox.put([batch(STREAM)])
    deliver(outbox, STREAM)
    assert not outbox.retry(STREAM)


def test_the_sweeper_finds_a_stream_that_was_retried(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    outbox.park(claim(outbox, STREAM), "no")
    assert outbox.due(older_than=0) == []
    outbox.retry(STREAM)
    wait_until(lambda: outbox.due(older_than=SHORT) == [STREAM], what="the sweeper's notice")


def test_only_the_current_frame_can_park_its_stream(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    outbox.ack(frame, offset="1")
    outbox.put([batch(STREAM)])
    outbox.park(frame, "late")
    claim(outbox, STREAM, lease=frame.lease)


def test_a_zombies_ack_of_the_parked_frame_unparks_its_stream(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    outbox.park(frame, "no")
    assert outbox.ack(frame, offset="1")
    outbox.put([batch(STREAM)])
    assert claim(outbox, STREAM).id.seq == 1


@pytest.mark.parametrize("parked", [True, False])
def test_drop_throws_the_streams_batches_away(outbox: Outbox, parked: bool) -> None:
    outbox.put([batch(STREAM, "1", "2", "3"), batch(STREAM), batch("other")])
    frame = claim(outbox, STREAM)
    outbox.ack(frame, offset="1", events=2)
    frame = claim(outbox, STREAM, lease=frame.lease)
    if parked:
        outbox.park(frame, "no")
    assert outbox.drop(STREAM) == 2
    assert outbox.drop(STREAM) == 0
    assert [each.stream for each in outbox.pending()] == ["other"]
    assert outbox.claim(STREAM, lease_for=LONG) is None
    assert not outbox.ack(frame, offset="2")


def test_after_a_drop_the_numbers_begin_again_under_a_higher_epoch(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    frame = claim(outbox, STREAM)
    outbox.drop(STREAM)
    outbox.finish(STREAM, lease=frame.lease)
    assert outbox.put([batch(STREAM)]) == [STREAM]
    after = claim(outbox, STREAM)
    assert after.id.epoch > frame.id.epoch
    assert after.id.seq == 0


# Status and sweeping


def test_pending_counts_what_is_undelivered_oldest_first(outbox: Outbox) -> None:
    def at(stream: str, ms: int, *events: bytes) -> Batch:
        return Batch(stream=stream, events=events, txid="t", created_at=ms)

    outbox.put([at("b", 2_000, b"1", b"2"), at("a", 1_000, b"3"), at("b", 4_000, b"4"), at("c", 3_000, b"5")])
    deliver(outbox, "c")
    found = [(each.stream, each.batches, each.events, each.oldest_at, each.parked) for each in outbox.pending()]
    assert found == [("a", 1, 1, 1_000, None), ("b", 2, 3, 2_000, None)]
    assert outbox.pending("b") == outbox.pending()[1:]
    assert outbox.pending("c") == outbox.pending("never seen") == []


def test_a_lost_wake_up_is_found(outbox: Outbox) -> None:
    outbox.put([batch(STREAM), batch("other")])
    assert outbox.due(older_than=LONG) == []
    found: set[str] = set()
    wait_until(lambda: found.update(outbox.due(older_than=SHORT)) or found == {STREAM, "other"}, what="both")


def test_a_second_sweeper_does_not_wake_the_same_at_once(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    wait_until(lambda: outbox.due(older_than=0.2) == [STREAM], what="the sweeper's notice")
    assert outbox.due(older_than=0.2) == []
    wait_until(lambda: outbox.due(older_than=0.2) == [STREAM], what="the second notice")


def test_due_goes_through_more_streams_than_its_limit(outbox: Outbox) -> None:
    streams = {f"s/{number}" for number in range(25)}
    outbox.put([batch(stream) for stream in streams])
    found: list[str] = []

    def sweep() -> bool:
        few = outbox.due(older_than=SHORT, limit=10)
        assert len(few) <= 10
        found.extend(few)
        return set(found) == streams

    wait_until(sweep, what="every stream")


def test_a_stream_under_a_live_lease_is_not_due_and_after_it_is(outbox: Outbox) -> None:
    outbox.put([batch(STREAM), batch("leased")])
    claim(outbox, "leased")
    claim(outbox, STREAM, lease_for=0.1)
    wait_until(lambda: outbox.due(older_than=SHORT) == [STREAM], what="the end of the lease")
    assert "leased" not in outbox.due(older_than=SHORT)


def test_nothing_is_due_when_everything_is_delivered(outbox: Outbox) -> None:
    outbox.put([batch(f"s/{number}") for number in range(5)])
    for number in range(5):
        deliver(outbox, f"s/{number}")
    assert outbox.due(older_than=0) == []


def test_a_batch_put_to_a_delivered_stream_is_found_again(outbox: Outbox) -> None:
    """The sweeper saw the stream empty in between."""
    outbox.put([batch(STREAM)])
    deliver(outbox, STREAM)
    assert outbox.due(older_than=0) == []
    assert outbox.due(older_than=0) == []
    outbox.put([batch(STREAM)])
    wait_until(lambda: outbox.due(older_than=SHORT) == [STREAM], what="the sweeper's notice")


# Repeated puts


def test_a_push_that_is_repeated_is_applied_once(outbox: Outbox) -> None:
    once, again = batch(STREAM), batch(STREAM)
    outbox.put([once])
    outbox.put([once, again])
    assert deliver(outbox, STREAM) == list(events_of(once, again))


def test_a_push_repeated_after_its_delivery_is_skipped(outbox: Outbox) -> None:
    once = batch(STREAM)
    outbox.put([once])
    deliver(outbox, STREAM)
    outbox.put([once])
    assert outbox.claim(STREAM, lease_for=LONG) is None
    assert outbox.pending() == []
    assert outbox.due(older_than=0) == []


def test_a_closed_outbox_may_be_used_again(outbox: Outbox) -> None:
    outbox.put([batch(STREAM)])
    outbox.close()
    outbox.put([batch(STREAM)])
    assert len(deliver(outbox, STREAM)) == 2


# All at once


def test_workers_that_crash_at_any_step_deliver_each_event_once_and_in_order(outbox: Outbox) -> None:
    """8 workers on 20 streams against a server that keeps its producers' counts, as the protocol asks (5.2.1)."""
    streams = [f"room/{number}" for number in range(20)]
    server = ServerThatCounts()
    written: dict[str, list[bytes]] = defaultdict(list)
    stop = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        dice = random.Random(1)
        for number in range(150):
            batches = [
                batch(s, *(f'"{number}.{n}"' for n in range(dice.randint(1, 4)))) for s in dice.sample(streams, 4)
            ]
            for each in batches:
                written[each.stream] += each.events
            outbox.put(batches)

    def work(seed: int) -> None:
        dice = random.Random(seed)
        try:
            while not stop.is_set():
                relay_with_crashes(outbox, dice.choice(streams), server, dice)
        except BaseException as error:
            failures.append(error)
            raise

    writer = threading.Thread(target=write)
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in (writer, *workers):
        thread.start()
    writer.join()
    try:
        wait_until(lambda: failures or not outbox.pending(), within=60, what="an empty outbox")
    finally:
        stop.set()
        for thread in workers:
            thread.join()
    assert failures == []
    assert server.stored == dict(written)


class ServerThatCounts:
    """Keeps one copy of each (epoch, number), refuses older epochs and gaps."""

    def __init__(self) -> None:
        self.stored: dict[str, list[bytes]] = defaultdict(list)
        self._known: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def append(self, frame: Frame) -> None:
        with self._lock:
            epoch, seq = self._known.get(frame.stream, (0, -1))
            assert frame.id.epoch >= epoch, "an epoch went backwards"
            if frame.id.epoch > epoch:
                seq = -1
            assert frame.id.seq <= seq + 1, "a number was left out"
            if frame.id.seq == seq + 1:
                self.stored[frame.stream] += frame.events
                self._known[frame.stream] = (frame.id.epoch, frame.id.seq)


def relay_with_crashes(outbox: Outbox, stream: str, server: ServerThatCounts, dice: random.Random) -> None:
    """What a relay does with one stream, giving up without a word at one step in twelve."""
    lease: str | None = None
    frame: Frame | None = None
    while True:
        lease_for = dice.choice([0.0, 0.002, 0.05])
        frame = frame or outbox.claim(stream, lease_for=lease_for, lease=lease)
        if frame is None:
            if dice.random() < 0.08 or not outbox.finish(stream, lease=lease):
                return
            continue
        if dice.random() < 0.08:
            return
        if dice.random() < 0.04:
            outbox.release(frame, delay=0.001)
            return
        server.append(frame)
        if dice.random() < 0.08:
            return
        if dice.random() < 0.5:
            frame = outbox.advance(frame, offset=str(frame.id.seq), lease_for=lease_for).following
            if frame is None or dice.random() < 0.08:
                return
            continue
        outbox.ack(frame, offset=str(frame.id.seq))
        if dice.random() < 0.08:
            return
        lease, frame = frame.lease, None


def frames_until_empty(outbox: Outbox) -> list[Frame]:
    frames: list[Frame] = []
    lease = None
    while (frame := outbox.claim(STREAM, lease_for=LONG, lease=lease)) is not None:
        frames.append(frame)
        lease = frame.lease
        assert outbox.ack(frame, offset=None)
    return frames


def pending_events(outbox: Outbox) -> int:
    return sum(each.events for each in outbox.pending(STREAM))


def test_the_rate_is_what_was_acked_in_the_last_ten_seconds(make_outbox: MakeOutbox) -> None:
    """By every process, each of which tells the store when it sweeps; what was acked twice counts once."""
    one, other = make_outbox(), make_outbox()
    assert one.rate() == Rate(0.0, 0.0)
    one.put([batch(STREAM, "1", "2"), batch("another", "3", "4", "5")])
    frame = claim(one, STREAM)
    one.ack(frame, offset="1")
    other.ack(frame, offset="1")
    deliver(other, "another")
    one.due()
    other.due()
    wait_until(lambda: other.rate() == Rate(0.2, 0.5), what="the end of the second")
    one.due()
    assert one.rate() == Rate(0.2, 0.5)
    assert one.pending() == []


def test_the_rate_falls_when_nothing_is_acked(make_outbox: MakeOutbox, monkeypatch: pytest.MonkeyPatch) -> None:
    for store in ("database", "rates", "redis"):
        monkeypatch.setattr(f"broadcastable.outbox.{store}.SECONDS", 1)
    outbox = make_outbox()

    def seen() -> bool:
        outbox.put([batch(STREAM)])
        deliver(outbox, STREAM)
        outbox.due()
        return outbox.rate() != Rate(0.0, 0.0)

    wait_until(seen, what="a rate")
    wait_until(lambda: outbox.rate() == Rate(0.0, 0.0), what="its end")
