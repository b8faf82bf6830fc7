"""What only the Redis store promises: one slot a script, one round trip a commit, and what it forgets when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from broadcastable.errors import ConfigurationError, UsageError
from broadcastable.outbox import Advanced
from broadcastable.outbox import redis as redis_outbox
from broadcastable.outbox.redis import RedisOutbox
from broadcastable.settings import Settings
from tests.outbox.workers import LONG, SHORT, batch, claim, claim_when_free, deliver, events_of
from tests.services import Valkey, wait_until

LIMITS: dict[str, Any] = {"namespace": "test", "max_frame_bytes": 1 << 20, "max_frame_events": 1_000}


@pytest.fixture
def client(valkey_url: str) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(valkey_url)
    yield client
    client.close()


@pytest.fixture
def outbox(client: redis.Redis) -> RedisOutbox:
    return RedisOutbox(client, **LIMITS)


class CountingConnection(redis.Connection):
    """Counts what goes out in one piece: a command, or a pipeline of them."""

    sent = 0

    def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
        type(self).sent += 1
        super().send_packed_command(*args, **kwargs)


def test_a_commit_is_one_round_trip_whatever_the_number_of_streams(valkey_url: str) -> None:
    pool = redis.ConnectionPool.from_url(valkey_url, connection_class=CountingConnection)
    with redis.Redis(connection_pool=pool) as client:
        outbox = RedisOutbox(client, **LIMITS)
        outbox.put([batch("warm")])
        deliver(outbox, "warm")  # the scripts are loaded now
        for streams in (1, 10, 500):
            before = CountingConnection.sent
            outbox.put([batch(f"s/{number}") for number in range(streams) for _ in range(2)])
            assert CountingConnection.sent - before == 1
        before = CountingConnection.sent
        frame = claim(outbox, "s/0")
        assert outbox.advance(frame, offset="1", lease_for=LONG) == Advanced(True, None)
        assert CountingConnection.sent - before == 2
    pool.disconnect()


def test_a_thousand_events_are_claimed_in_one_round_trip(valkey_url: str) -> None:
    pool = redis.ConnectionPool.from_url(valkey_url, connection_class=CountingConnection)
    with redis.Redis(connection_pool=pool) as client:
        outbox = RedisOutbox(client, **LIMITS)
        outbox.put([batch("s") for _ in range(1_500)])
        claim(outbox, "s", lease_for=0)
        before = CountingConnection.sent
        assert len(claim_when_free(outbox, "s").events) == 1_000
        assert CountingConnection.sent - before == 1
    pool.disconnect()


def test_every_script_touches_the_keys_of_one_slot(outbox: RedisOutbox, client: redis.Redis) -> None:
    """Also run for real: the contract's tests run on a cluster, which refuses a script that does not."""
    calls = scripts_seen(client, lambda: use_everything(outbox))
    assert len(calls) > 100
    for keys in calls:
        assert len({key_slot(key) for key in keys}) == 1
    assert len({key_slot(keys[0]) for keys in calls}) > 4, "the streams are spread over slots"


def test_keys_of_a_stream_share_a_tag_whatever_braces_are_in_its_name(client: redis.Redis) -> None:
    for namespace in ("{}", "{x}", "a}", "{"):
        outbox = RedisOutbox(client, **{**LIMITS, "namespace": namespace})
        for stream in ("}", "{}", "{a}", "a{", "%7D", "}{"):
            calls = scripts_seen(client, lambda: outbox.put([batch(stream)]))  # noqa: B023 - called at once
            assert all(len({key_slot(key) for key in keys}) == 1 for keys in calls)
            assert len(deliver(outbox, stream)) == 1


def scripts_seen(client: redis.Redis, use: Callable[[], object]) -> list[list[bytes]]:
    """The keys of each EVALSHA while *use* runs, as the server saw them."""
    seen: list[list[bytes]] = []
    with client.monitor() as monitor:
        use()
        client.echo("the end")
        for command in monitor.listen():
            words = split(command["command"])
            if command["client_type"] == "lua":
                continue
            if words[0].upper() == "EVALSHA":
                seen.append([word.encode("latin-1") for word in words[3 : 3 + int(words[2])]])
            if words[0].upper() == "ECHO":
                return seen
    raise AssertionError("the monitor ended early")


def split(command: str) -> list[str]:
    # redis-py takes the quotes off but joins the words with blanks; our keys and the first words hold none here.
    return command.split(" ")


def use_everything(outbox: RedisOutbox) -> None:
    streams = [f"s/{number}" for number in range(20)]
    outbox.put([batch(stream, "1", "2", "3") for stream in streams])
    outbox.due(older_than=0)
    for stream in streams:
        frame = outbox.anchor(claim(outbox, stream), "0")
        frame = outbox.shrink(outbox.renew(frame, above=1), events=2)
        outbox.ack(frame, offset="1", events=1)
        frame = claim(outbox, stream, lease=frame.lease)
        outbox.park(frame, "no")
        outbox.retry(stream)
        outbox.release(claim(outbox, stream), delay=0)
        outbox.finish(stream, lease=None)
        outbox.drop(stream)
    outbox.pending()
    outbox.due(older_than=0)
    outbox.reserve("first", streams)
    outbox.reserve("second", streams)
    outbox.put([replace(batch(stream), turn="second") for stream in streams])
    outbox.withdraw("first", streams)


def test_scripts_are_loaded_again_when_the_server_forgot_them(outbox: RedisOutbox, client: redis.Redis) -> None:
    batches = [batch("s") for _ in range(3)]
    outbox.put(batches[:1])
    client.script_flush()
    outbox.put(batches[1:2])
    client.script_flush()
    outbox.put(batches[2:])
    client.script_flush()
    assert deliver(outbox, "s") == list(events_of(*batches))


def test_a_lost_state_means_a_higher_epoch(outbox: RedisOutbox, client: redis.Redis) -> None:
    outbox.put([batch("s")])
    before = claim(outbox, "s")
    time.sleep(0.002)  # the server's clock moves on; its epochs count milliseconds
    client.delete("test:{s}:state")
    after = claim(outbox, "s")
    assert after.id.epoch > before.id.epoch
    assert (after.id.seq, after.events, after.begun, after.anchor) == (0, before.events, False, None)


def test_the_epoch_is_the_servers_time(outbox: RedisOutbox, client: redis.Redis) -> None:
    outbox.put([batch("s")])
    now, _ = client.time()
    assert abs(claim(outbox, "s").id.epoch / 1000 - now) < 30


def test_what_waits_never_expires_and_what_is_idle_does(outbox: RedisOutbox, client: redis.Redis) -> None:
    queue, state, ids = "test:{s}:queue", "test:{s}:state", "test:{s}:ids"
    outbox.put([batch("s"), batch("s")])
    assert (client.ttl(queue), client.ttl(state)) == (-1, -1)
    assert 0 < client.ttl(ids) <= 600
    frame = claim(outbox, "s")
    outbox.ack(frame, offset="1", events=1)
    assert (client.ttl(queue), client.ttl(state)) == (-1, -1)
    frame = claim(outbox, "s", lease=frame.lease)
    outbox.ack(frame, offset="2")
    outbox.finish("s", lease=frame.lease)
    assert client.exists(queue) == 0
    assert 5 * 86_400 < client.ttl(state) <= 6 * 86_400
    outbox.put([batch("s")])
    assert (client.ttl(queue), client.ttl(state)) == (-1, -1)
    outbox.drop("s")
    assert client.exists(queue) == 0
    assert 5 * 86_400 < client.ttl(state) <= 6 * 86_400


def test_looking_at_streams_that_do_not_exist_leaves_no_keys(outbox: RedisOutbox, client: redis.Redis) -> None:
    assert outbox.claim("s", lease_for=LONG) is None
    assert not outbox.finish("s", lease=None)
    assert outbox.pending("s") == []
    assert outbox.drop("s") == 0
    assert client.keys() == []


# Turns: the order of commits among processes


def test_a_batch_waits_for_the_turns_that_were_reserved_before_its_own(outbox: RedisOutbox) -> None:
    first, second, third, elsewhere = batch("s"), batch("s"), batch("s"), batch("s/2")
    for turn in ("first", "second", "third"):
        outbox.reserve(turn, ["s"])
    assert outbox.put([replace(third, turn="third"), elsewhere]) == ["s/2"]
    assert outbox.put([replace(second, turn="second")]) == []
    assert outbox.claim("s", lease_for=LONG) is None
    assert not outbox.finish("s", lease=None)
    assert [(each.batches, each.events) for each in outbox.pending("s")] == [(2, 2)]
    assert outbox.put([replace(first, turn="first")]) == ["s"]
    assert tuple(deliver(outbox, "s")) == events_of(first, second, third)
    assert outbox.pending("s") == []


def test_a_turn_that_is_withdrawn_lets_the_next_one_pass_and_wakes_the_stream(outbox: RedisOutbox) -> None:
    outbox.reserve("first", ["s", "s/2"])
    outbox.reserve("second", ["s"])
    second = batch("s")
    assert outbox.put([replace(second, turn="second")]) == []
    assert outbox.withdraw("first", ["s", "s/2"]) == ["s"]
    assert outbox.withdraw("first", ["s", "s/2"]) == []
    assert tuple(deliver(outbox, "s")) == events_of(second)


def test_a_batch_without_a_turn_goes_behind_those_that_wait(outbox: RedisOutbox) -> None:
    waiting, without = batch("s"), batch("s")
    outbox.reserve("first", ["s"])
    outbox.reserve("second", ["s"])
    assert outbox.put([replace(waiting, turn="second")]) == outbox.put([without]) == []
    outbox.withdraw("first", ["s"])
    assert tuple(deliver(outbox, "s")) == events_of(waiting, without)


def test_a_batch_whose_turn_has_no_place_goes_before_the_later_ones_of_its_writer(outbox: RedisOutbox) -> None:
    """So are those that could not reserve one while Redis was away, and those that then waited for too long."""
    outbox.reserve("other:1", ["s"])
    outbox.reserve("own:4", ["s"])
    outbox.reserve("other:2", ["s"])
    second, third = replace(batch("s"), turn="own:2"), replace(batch("s"), turn="own:3")
    fourth, other = replace(batch("s"), turn="own:4"), replace(batch("s"), turn="other:1")
    last = replace(batch("s"), turn="own:5")
    outbox.put([second, third])
    outbox.put([fourth, last])
    outbox.withdraw("other:2", ["s"])
    assert outbox.claim("s", lease_for=LONG) is None
    outbox.put([other])
    assert tuple(deliver(outbox, "s")) == events_of(other, second, third, fourth, last)


def test_all_batches_of_a_turn_wait_with_it(outbox: RedisOutbox) -> None:
    outbox.reserve("first", ["s"])
    outbox.reserve("second", ["s"])
    some = [replace(batch("s", text), turn="second") for text in "123"]
    outbox.put(some[:2])
    outbox.put(some[2:])
    outbox.withdraw("first", ["s"])
    assert tuple(deliver(outbox, "s")) == events_of(*some)


def test_a_push_that_is_repeated_takes_its_turn_once(outbox: RedisOutbox) -> None:
    outbox.reserve("first", ["s"])
    outbox.reserve("second", ["s"])
    first, second = replace(batch("s"), turn="first"), replace(batch("s"), turn="second")
    for _ in range(2):
        outbox.put([second])
    for _ in range(2):
        outbox.put([first, second])
    assert tuple(deliver(outbox, "s")) == events_of(first, second)


def test_the_sweeper_finds_what_waits_for_a_process_that_died(
    outbox: RedisOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_outbox, "TURN_PATIENCE", 300)
    outbox.reserve("dead", ["s"])
    outbox.reserve("alive", ["s"])
    alive, late = batch("s"), batch("s")
    assert outbox.put([replace(alive, turn="alive")]) == []
    assert outbox.due(older_than=60) == []
    wait_until(lambda: outbox.due(older_than=60) == ["s"], what="the end of patience")
    assert tuple(deliver(outbox, "s")) == events_of(alive)
    # It was not dead after all: what it has goes to the end.
    assert outbox.put([replace(late, turn="dead")]) == ["s"]
    assert tuple(deliver(outbox, "s")) == events_of(late)


def test_what_waits_for_its_turn_never_expires_and_a_turn_alone_does(outbox: RedisOutbox, client: redis.Redis) -> None:
    turns, held, state = "test:{s}:turns", "test:{s}:held", "test:{s}:state"
    outbox.reserve("first", ["s"])
    assert 0 < client.ttl(turns) <= 20
    outbox.reserve("second", ["s"])
    outbox.put([replace(batch("s"), turn="second")])
    outbox.reserve("third", ["s"])
    assert (client.ttl(turns), client.ttl(held), client.ttl(state)) == (-1, -1, -1)
    outbox.withdraw("first", ["s"])
    assert client.exists(held) == 0
    assert 0 < client.ttl(turns) <= 20
    outbox.withdraw("third", ["s"])
    deliver(outbox, "s")
    assert client.exists(turns) == 0


def test_the_state_of_a_frame_that_is_sent_after_it_waited_for_its_turn_never_expires(
    outbox: RedisOutbox, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue was empty meanwhile, and the state of an idle stream expires."""
    monkeypatch.setattr(redis_outbox, "TURN_PATIENCE", 60_000)
    outbox.put([batch("s")])
    frame = claim(outbox, "s")
    outbox.reserve("first", ["s"])
    outbox.reserve("second", ["s"])
    outbox.put([replace(batch("s"), turn="second")])
    outbox.ack(frame, offset="1")
    assert client.ttl("test:{s}:state") > 0
    outbox.withdraw("first", ["s"])
    claim(outbox, "s", lease=frame.lease)
    assert client.ttl("test:{s}:state") == -1


def test_a_turn_is_not_withdrawn_from_under_what_it_holds(outbox: RedisOutbox) -> None:
    """A reservation that nobody waited for may reach Redis, and be withdrawn, after the push."""
    outbox.reserve("first", ["s"])
    held = replace(batch("s"), turn="second")
    outbox.put([held])
    outbox.reserve("second", ["s"])
    outbox.withdraw("second", ["s"])
    outbox.withdraw("first", ["s"])
    assert tuple(deliver(outbox, "s")) == events_of(held)


def test_what_is_held_is_delivered_though_the_turns_are_gone(outbox: RedisOutbox, client: redis.Redis) -> None:
    outbox.reserve("first", ["s"])
    held = [replace(batch("s"), turn=f"own:{number}") for number in (2, 3)]
    outbox.put(held)
    client.delete("test:{s}:turns")
    assert outbox.due(older_than=0) == ["s"]
    assert tuple(deliver(outbox, "s")) == events_of(*held)


def test_a_retry_finds_what_only_waits_for_its_turn(outbox: RedisOutbox) -> None:
    outbox.reserve("first", ["s"])
    outbox.put([replace(batch("s"), turn="second")])
    assert outbox.retry("s")


def test_what_waits_for_its_turn_is_dropped_with_the_stream(outbox: RedisOutbox, client: redis.Redis) -> None:
    outbox.put([batch("s", "1")])
    outbox.reserve("first", ["s"])
    outbox.reserve("second", ["s"])
    outbox.put([replace(batch("s", "2", "3"), turn="second")])
    assert outbox.drop("s") == 3
    assert client.keys("test:{s}:[qth]*") == []
    assert outbox.pending("s") == []


def test_a_large_batch_waits_for_its_turn_in_all_its_parts(client: redis.Redis) -> None:
    outbox = RedisOutbox(client, **{**LIMITS, "max_frame_events": 10})
    outbox.reserve("first", ["s"])
    outbox.reserve("second", ["s"])
    large = batch("s", *map(str, range(95)))
    outbox.put([replace(large, turn="second")])
    outbox.withdraw("first", ["s"])
    assert tuple(deliver(outbox, "s")) == events_of(large)


# The index of active streams


def test_a_crash_between_the_announcement_and_the_append_loses_no_wake_up(
    outbox: RedisOutbox, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweeper meets the announced stream while it is still empty; the append comes after that."""
    monkeypatch.setattr(redis_outbox, "IDLE_FOR", 50)
    late = batch("s")
    outbox._call(outbox._announce(["s"]))
    assert outbox.due(older_than=0) == []
    assert client.zcard(outbox._index(redis_outbox._shard("s"))[1]) == 1
    outbox._call([outbox._push("s", [late])])
    wait_until(lambda: outbox.due(older_than=0) == ["s"], what="the second look")
    assert deliver(outbox, "s") == [late.events[0]]


def test_delivered_streams_leave_the_index(
    outbox: RedisOutbox, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_outbox, "IDLE_FOR", 20)
    outbox.put([batch(f"s/{number}") for number in range(10)])
    for number in range(10):
        deliver(outbox, f"s/{number}")

    def swept() -> bool:
        assert outbox.due(older_than=0) == []
        return client.keys("test:index:*:active") + client.keys("test:index:*:idle") == []

    wait_until(swept, what="an empty index")


def test_a_sweep_goes_on_past_streams_that_are_not_due(outbox: RedisOutbox) -> None:
    busy = [f"busy/{number}" for number in range(60)]
    outbox.put([batch(stream) for stream in busy])
    for stream in busy:
        claim(outbox, stream)
    outbox.put([batch("lost")])
    assert outbox.due(older_than=0, limit=10) == ["lost"]


# Splitting


def test_a_batch_larger_than_a_frame_is_stored_in_parts(outbox: RedisOutbox, client: redis.Redis) -> None:
    large = batch("s", *(str(number) for number in range(2_500)))
    outbox.put([large, batch("s")])
    assert client.llen("test:{s}:queue") == 4
    assert [(each.batches, each.events) for each in outbox.pending()] == [(2, 2_501)]
    frame = claim(outbox, "s")
    outbox.ack(frame, offset="1")
    assert [(each.batches, each.events) for each in outbox.pending()] == [(2, 1_501)]
    frame = claim(outbox, "s", lease=frame.lease)
    assert len(frame.events) == 1_000
    outbox.ack(frame, offset="2")
    frame = claim(outbox, "s", lease=frame.lease)
    assert [mark.events for mark in frame.batches] == [500, 1]
    outbox.ack(frame, offset="3")
    assert outbox.pending() == []


def test_a_reader_with_smaller_limits_than_the_writer_splits_and_one_with_larger_joins(client: redis.Redis) -> None:
    writer = RedisOutbox(client, **{**LIMITS, "max_frame_events": 4})
    small = RedisOutbox(client, **{**LIMITS, "max_frame_events": 3})
    large = RedisOutbox(client, **LIMITS)
    batches = [batch("s", *"1234567"), batch("s", *"89"), batch("t", *"1234567"), batch("t", *"89")]
    writer.put(batches)
    sizes = []
    lease = None
    while (frame := small.claim("s", lease_for=LONG, lease=lease)) is not None:
        sizes.append([mark.events for mark in frame.batches])
        lease = frame.lease
        small.ack(frame, offset=None)
    assert sizes == [[3], [3], [1, 2]]
    frame = claim(large, "t")
    assert [(mark.id, mark.events) for mark in frame.batches] == [(batches[2].id, 7), (batches[3].id, 2)]


# The server in trouble


def test_a_push_that_timed_out_but_took_effect_is_not_applied_twice(valkey_server: Valkey) -> None:
    outbox = RedisOutbox(valkey_server.url, **LIMITS, timeout=0.3)
    outbox.put([batch("warm")])
    once = batch("s")
    valkey_server.pause()
    started = time.monotonic()
    with pytest.raises(redis.TimeoutError):
        outbox.put([once])
    assert time.monotonic() - started < 5, "no retries of the client's own"
    valkey_server.resume()
    outbox.put([once])
    assert deliver(outbox, "s") == [once.events[0]]
    outbox.close()


def test_an_unreachable_server_is_an_error_at_once(valkey_server: Valkey) -> None:
    outbox = RedisOutbox(valkey_server.url, **LIMITS)
    outbox.put([batch("s")])
    valkey_server.kill()
    with pytest.raises(redis.ConnectionError):
        outbox.put([batch("s")])
    valkey_server.start()
    outbox.put([batch("s")])
    assert len(deliver(outbox, "s")) == 1, "nothing was kept on disk, so only the later batch is there"
    outbox.close()


def test_a_restarted_server_with_a_log_has_everything(make_valkey: Callable[..., Valkey]) -> None:
    server = make_valkey(appendonly="yes", appendfsync="always")
    outbox = RedisOutbox(server.url, **LIMITS)
    outbox.put([batch("s")])
    before = claim(outbox, "s", lease_for=SHORT)
    server.kill()
    server.start()
    after = claim_when_free(outbox, "s")
    assert (after.id, after.events, after.begun) == (before.id, before.events, True)
    outbox.close()


# Clients and settings


def test_namespaces_do_not_meet(client: redis.Redis) -> None:
    one = RedisOutbox(client, **{**LIMITS, "namespace": "one"})
    two = RedisOutbox(client, **{**LIMITS, "namespace": "two"})
    one.put([batch("s")])
    assert two.pending() == two.due(older_than=0) == []
    two.put([batch("s")])
    assert claim(one, "s").id.producer_id != claim(two, "s").id.producer_id


def test_settings_say_where_the_server_is(valkey_url: str) -> None:
    outbox = RedisOutbox.from_settings(Settings(outbox="redis", redis_url=valkey_url, namespace="shop"))
    outbox.put([batch("s")])
    assert claim(outbox, "s").id.producer_id == "shop-redis"
    outbox.close()
    with pytest.raises(ConfigurationError, match="BROADCASTABLE_REDIS_URL"):
        RedisOutbox.from_settings(Settings())


def test_a_client_that_decodes_is_refused(valkey_url: str) -> None:
    with (
        redis.Redis.from_url(valkey_url, decode_responses=True) as client,
        pytest.raises(ConfigurationError, match="decode_responses"),
    ):
        RedisOutbox(client, **LIMITS)


def test_a_client_of_ones_own_is_not_closed(outbox: RedisOutbox, client: redis.Redis) -> None:
    with client.client() as mine:
        outbox.close()
        assert mine.ping()


def test_stage_says_what_to_do_instead(outbox: RedisOutbox) -> None:
    with pytest.raises(UsageError, match="put"):
        outbox.stage(None, [batch("s")])
    assert outbox.staged(["s"]) == []
    assert not outbox.transactional


def test_puts_of_many_threads_keep_each_threads_order(outbox: RedisOutbox) -> None:
    written: dict[int, list[bytes]] = {}

    def write(number: int) -> None:
        batches = [batch("s", f'"{number}.{n}"') for n in range(100)]
        written[number] = list(events_of(*batches))
        for each in batches:
            outbox.put([each])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    delivered = deliver(outbox, "s")
    assert len(delivered) == 600
    for number, events in written.items():
        assert [event for event in delivered if event.startswith(f'"{number}.'.encode())] == events
