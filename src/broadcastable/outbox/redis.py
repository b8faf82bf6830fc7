"""The outbox in Redis (6.2 or later) or Valkey: shared by all processes, and it outlives each of them.

Give it an eviction policy that leaves keys without an expiry alone (`noeviction`, `volatile-*`): what waits has none.

Every stream has a queue, a state and the ids of its latest batches, under one hash tag, so each script touches one
slot of a cluster. A script is one step that happens as a whole or not at all; all clocks are the server's.

The index of streams with something to deliver lives in other slots, so it cannot be written in the same step. What
keeps a wake-up from being lost:

1. `put` lists the stream as active *before* it appends to the queue. A crash in between leaves a listed stream with an
   empty queue, which costs one look; the other order could leave a queue that nobody ever looks at.
2. Delivery never unlists. Only the sweeper does, and only a stream that it has seen empty twice, `IDLE_FOR` apart: at
   first it moves it from the active ones to the idle ones. An append that was announced before the first look has long
   arrived by the second, since both commands leave in one pipeline; one announced later lists the stream as active
   again by itself.
3. A look at a stream that has something, but is leased or delayed, sets the time of the next look and leaves it listed.

Processes push after their commits, each at its own pace. So that a stream has the order of the commits all the same, a
transaction reserves its place before it commits (`reserve`), and what arrives ahead of its turn is held until the
earlier places are taken, withdrawn, or too old. Where workers take their wake-ups from the same Redis, the wake-up of a
stream that slept when its place was reserved leaves with the push.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Any
from urllib.parse import quote
from zlib import crc32

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import MovedError, NoScriptError
from redis.retry import Retry

from broadcastable.errors import ConfigurationError, UsageError
from broadcastable.events import Batch
from broadcastable.settings import Settings

from . import Advanced, BatchMark, Frame, FrameId, PendingStream, Rate
from .framing import Limits, first_events, new_lease, parts_of
from .rates import SECONDS, Tally, rate_of

SHARDS = 4
"""Slots that share the index of streams."""

IDS_KEPT_FOR = 10 * 60_000
"""Milliseconds for which the id of a batch is remembered, so that a repeated push is applied once."""

IDLE_FOR = 30_000
"""Milliseconds between the two looks that unlist a stream; far more than a pipeline takes from end to end."""

LOOK_AGAIN_AFTER = 1_000
"""Milliseconds, at most, between two looks at a stream that waits for anything but a delay."""

STATE_KEPT_FOR = 6 * 86_400_000
"""Milliseconds for which the epoch, number and anchor of an empty stream are kept: less than the seven days for which
stream servers remember a producer, so that a number is never used against a count that is gone."""

TURN_PATIENCE = 2_000
"""Milliseconds for which a pushed batch waits for a transaction that reserved its place earlier on that stream: longer
than a COMMIT takes, and how long a stream stands still after an application is killed in the middle of one."""

TURNS_KEPT = 1_000
"""Reserved places of which it is remembered whether their streams slept."""

RESERVE_TIMEOUT = 0.25
"""Seconds to wait for a place. The commit holds its locks meanwhile, and goes without one when Redis is slower."""

STREAMS_A_TRIP = 500
"""Scripts sent in one round trip where every stream is asked."""

PAGES_A_SWEEP = 10
"""Pages of the index that one sweep reads; the next sweep goes on with those that were looked at longest ago."""

RING = 2 * SECONDS
"""Seconds of which it is kept what was acked in them."""

_HEAD = struct.Struct(">dBI")


@dataclass(frozen=True, slots=True)
class _Call:
    """One command about one slot: the script or command, its keys and its arguments."""

    name: str
    keys: tuple[str, ...]
    args: tuple[str | bytes | int | float, ...] = ()

    def command(self) -> tuple[Any, ...]:
        if self.name.isupper():
            return (self.name, *self.keys, *self.args)
        return ("EVALSHA", _script(self.name).sha, len(self.keys), *self.keys, *self.args)


class RedisOutbox:
    """An `Outbox` in Redis or Valkey, single or Cluster. Thread and fork safe, as its client is.

    A commit is two round trips, whatever the number of streams (three on a cluster): one before it, to reserve its
    place, and one after. A third one wakes the workers, where the second could not. The client made from a URL waits a
    second at most, a quarter of one before the commit, and never repeats a command by itself: the caller decides, and a
    repeated `put` is applied once.

    Args:
        client_or_url: A `redis.Redis` or `redis.RedisCluster` that returns bytes, or a `redis://` URL. A client of
            yours is never closed here. Give it short timeouts and no retries, for a commit waits for it.
        namespace: Prefix of every key and of the producer id.
        timeout: Seconds to connect, and to wait for an answer; for a client made from a URL.
        wake: The commands that queue a wake-up of streams in this same Redis; none, and `put` names all the streams.
    """

    transactional = False
    reserves = True

    def __init__(
        self,
        client_or_url: redis.Redis | RedisCluster | str,
        *,
        namespace: str,
        max_frame_bytes: int,
        max_frame_events: int,
        timeout: float = 1.0,
        wake: Callable[[Sequence[str]], Iterable[tuple[Any, ...]]] = lambda streams: (),
    ) -> None:
        self._owned = isinstance(client_or_url, str)
        self._client: Any = client_or_url
        self._reserving: Any = client_or_url
        if isinstance(client_or_url, str):
            self._client = _impatient_client(client_or_url, timeout)
            self._reserving = _impatient_client(client_or_url, min(timeout, RESERVE_TIMEOUT))
        if self._client.get_encoder().decode_responses:
            raise ConfigurationError("The redis outbox stores bytes: give it a client with decode_responses=False")
        self._prefix = _without_braces(namespace)
        self._producer_id = f"{quote(namespace)}-redis"
        self._limits = Limits(max_frame_bytes, max_frame_events)
        self._acked = Tally()
        self._wake = wake
        # By turn, the streams that slept when it was reserved.
        self._asleep: dict[str, frozenset[str]] = {}

    @classmethod
    def from_settings(
        cls, settings: Settings, *, wake: Callable[[Sequence[str]], Iterable[tuple[Any, ...]]] = lambda streams: ()
    ) -> RedisOutbox:
        """An outbox on `redis_url`.

        Raises:
            ConfigurationError: There is none.
        """
        if not settings.redis_url:
            raise ConfigurationError("The redis outbox needs redis_url (BROADCASTABLE_REDIS_URL)")
        return cls(
            settings.redis_url,
            namespace=settings.namespace,
            max_frame_bytes=settings.max_frame_bytes,
            max_frame_events=settings.max_frame_events,
            wake=wake,
        )

    def put(self, batches: Sequence[Batch]) -> list[str]:
        """See `Outbox.put`. Never raises `OutboxFull`: what Redis has no memory for, it refuses itself."""
        by_stream: dict[str, list[Batch]] = {}
        for batch in batches:
            by_stream.setdefault(batch.stream, []).append(batch)
        announcements = self._announce(by_stream)
        pushes = [self._push(stream, some) for stream, some in by_stream.items()]
        if isinstance(self._client, RedisCluster):
            # The nodes of a cluster keep no order among themselves.
            self._call(announcements)
            woken, answers = frozenset[str](), self._call(pushes)
        else:
            asleep = self._asleep_before(batches)
            woken, answers = self._put_and_wake([*announcements, *pushes], asleep)
        return [
            stream
            for stream, needs_waking in zip(by_stream, answers[-len(pushes) :], strict=True)
            if needs_waking and stream not in woken
        ]

    def _asleep_before(self, batches: Sequence[Batch]) -> list[str]:
        """The streams of *batches* that slept when their places were reserved, each once."""
        slept: dict[str, frozenset[str]] = {}
        for turn in {batch.turn for batch in batches if batch.turn is not None}:
            slept[turn] = self._asleep.pop(turn, frozenset())
        return sorted({batch.stream for batch in batches if batch.stream in slept.get(batch.turn or "", ())})

    def _put_and_wake(self, calls: Sequence[_Call], asleep: Sequence[str]) -> tuple[frozenset[str], list[Any]]:
        """Those of *asleep* that were woken in the same round trip, and the answers to *calls*."""
        wakes = [_Call("EVALSHA", (), command[1:]) for command in (self._wake(asleep) if asleep else ())]
        answers = _round_trip(self._client, [*calls, *wakes])
        # Only if all went well at once: a worker must not look before the batches are there.
        is_woken = wakes and not any(isinstance(answer, Exception) for answer in answers)
        return frozenset(asleep if is_woken else ()), self._settled(calls, answers[: len(calls)], self._client)

    def _announce(self, streams: Iterable[str]) -> list[_Call]:
        shards: dict[int, list[str]] = {}
        for stream in streams:
            shards.setdefault(_shard(stream), []).append(stream)
        return [_Call("announce", self._index(shard)[:1], tuple(members)) for shard, members in shards.items()]

    def _push(self, stream: str, batches: Iterable[Batch]) -> _Call:
        args: list[str | bytes | int] = [IDS_KEPT_FOR, TURN_PATIENCE]
        for batch in batches:
            elements = _elements(batch, self._limits)
            args += (batch.id, batch.turn or "", len(batch.events), len(elements), *elements)
        return _Call("push", (*self._ordered_keys(stream), self._key(stream, "ids")), tuple(args))

    def reserve(self, turn: str, streams: Collection[str]) -> None:
        """See `Outbox.reserve`. One round trip."""
        calls = [_Call("reserve", self._ordered_keys(stream)[1:], (turn, TURN_PATIENCE)) for stream in streams]
        answers = self._call(calls, self._reserving)
        asleep = frozenset(stream for stream, is_asleep in zip(streams, answers, strict=True) if is_asleep)
        if asleep:
            self._asleep[turn] = asleep
            for forgotten in list(self._asleep)[:-TURNS_KEPT]:
                self._asleep.pop(forgotten, None)

    def withdraw(self, turn: str, streams: Collection[str]) -> list[str]:
        """See `Outbox.withdraw`."""
        self._asleep.pop(turn, None)
        answers = self._call(
            [_Call("withdraw", self._ordered_keys(stream), (turn, TURN_PATIENCE)) for stream in streams]
        )
        return [stream for stream, needs_waking in zip(streams, answers, strict=True) if needs_waking]

    def stage(self, connection: Any, batches: Sequence[Batch]) -> None:
        """Not for this store: it takes no part in a database transaction. Put the batches after the commit."""
        raise UsageError('The redis outbox takes batches after the commit: call put(), or choose outbox="database"')

    def staged(self, streams: Sequence[str]) -> list[str]:
        """Nothing was staged."""
        return []

    def claim(self, stream: str, *, lease_for: float, lease: str | None = None) -> Frame | None:
        """See `Outbox.claim`. One round trip."""
        return self._claimed(stream, self._stream("claim", stream, *self._claiming(lease, lease_for)))

    def _claiming(self, lease: str | None, lease_for: float) -> tuple[str | int, ...]:
        limits = self._limits
        return (lease or "", new_lease(), _milliseconds(lease_for), limits.max_bytes, limits.max_events)

    def _claimed(self, stream: str, answer: Any) -> Frame | None:
        if answer is None:
            return None
        begun, given, frozen = answer
        return self._frame(stream, frozen, begun=bool(begun), lease=given.decode())

    def anchor(self, frame: Frame, offset: str) -> Frame:
        """See `Outbox.anchor`."""
        known = frame.anchor is not None
        return self._current(frame, self._frozen("anchor", frame, int(known), frame.anchor or "", offset))

    def ack(self, frame: Frame, *, offset: str | None, events: int | None = None) -> bool:
        """See `Outbox.ack`."""
        removed = len(frame.events) if events is None else events
        return self._note_acked(self._frozen("ack", frame, *_acking(removed, offset)), removed)

    def _note_acked(self, answer: Any, events: int) -> bool:
        if answer:
            self._acked.add(events)
        return bool(answer)

    def advance(self, frame: Frame, *, offset: str | None, lease_for: float) -> Advanced:
        """See `Outbox.advance`. One round trip."""
        acked, claimed = self._frozen(
            "advance", frame, *_acking(len(frame.events), offset), *self._claiming(frame.lease, lease_for)
        )
        return Advanced(self._note_acked(acked, len(frame.events)), self._claimed(frame.stream, claimed))

    def renew(self, frame: Frame, *, above: int) -> Frame:
        """See `Outbox.renew`."""
        return self._current(frame, self._frozen("renew", frame, above))

    def shrink(self, frame: Frame, *, events: int) -> Frame:
        """See `Outbox.shrink`."""
        return self._current(frame, self._frozen("shrink", frame, events))

    def release(self, frame: Frame, *, delay: float) -> None:
        """See `Outbox.release`."""
        self._stream("release", frame.stream, frame.lease, _milliseconds(delay))

    def finish(self, stream: str, *, lease: str | None) -> bool:
        """See `Outbox.finish`."""
        return bool(self._stream("finish", stream, lease or ""))

    def park(self, frame: Frame, error: str) -> None:
        """See `Outbox.park`."""
        self._frozen("park", frame, error)

    def retry(self, stream: str) -> bool:
        """See `Outbox.retry`."""
        unparked, _ = self._call(
            [_Call("retry", self._ordered_keys(stream)), _Call("ZADD", self._index(_shard(stream))[:1], (0, stream))]
        )
        return bool(unparked)

    def drop(self, stream: str) -> int:
        """See `Outbox.drop`."""
        return int(self._call([_Call("drop", self._ordered_keys(stream), (STATE_KEPT_FOR,))])[0])

    def due(self, *, older_than: float = 1.0, limit: int = 1_000) -> list[str]:
        """See `Outbox.due`. Two or three round trips for each thousand streams that have something to deliver."""
        due: list[str] = []
        upto = [""] * SHARDS
        page = min(limit, STREAMS_A_TRIP)
        while True:
            candidates = [_Call("candidates", self._index(shard), (upto[shard], page)) for shard in range(SHARDS)]
            found = self._call([*candidates, *self._count_acked()])[:SHARDS]
            upto = [answer[0].decode() for answer in found]
            listed = [(shard, *seen) for shard, answer in enumerate(found) for seen in _listed(answer)]
            looks = listed[: limit - len(due)]
            due += self._look(looks, _milliseconds(older_than))
            if len(due) >= limit or len(listed) == 0:
                return due

    def _count_acked(self) -> list[_Call]:
        frames, events = self._acked.take()
        return [_Call("acked", (self._ring(),), (frames, events, RING))] if frames else []

    def _look(self, listed: Sequence[tuple[int, str, bool]], older_than: int) -> list[str]:
        """Look at streams of the index, and write down in it what was found; those that are due."""
        answers = self._call(
            [
                _Call("look", self._ordered_keys(stream), (older_than, LOOK_AGAIN_AFTER, TURN_PATIENCE))
                for _, stream, _ in listed
            ]
        )
        found: dict[int, list[str | int]] = {}
        for (shard, stream, idle), (_, again) in zip(listed, answers, strict=True):
            found.setdefault(shard, []).extend((stream, int(idle), again))
        self._call([_Call("looked", self._index(shard), (IDLE_FOR, *some)) for shard, some in found.items()])
        return [stream for (_, stream, _), (is_due, _) in zip(listed, answers, strict=True) if is_due]

    def pending(self, stream: str | None = None) -> list[PendingStream]:
        """See `Outbox.pending`. One round trip, or one for each 500 streams listed."""
        if stream is not None:
            streams = [stream]
        else:
            listed = self._call(
                [_Call("ZRANGE", (key,), (0, -1)) for shard in range(SHARDS) for key in self._index(shard)]
            )
            streams = list(dict.fromkeys(name.decode() for names in listed for name in names))
        pending: list[PendingStream] = []
        for start in range(0, len(streams), STREAMS_A_TRIP):
            some = streams[start : start + STREAMS_A_TRIP]
            answers = self._call([_Call("peek", self._ordered_keys(name)) for name in some])
            for name, answer in zip(some, answers, strict=True):
                if answer is not None:
                    batches, events, oldest_at, parked = answer
                    error = None if parked is None else parked.decode()
                    pending.append(PendingStream(name, int(batches), int(events), int(oldest_at), error))
        return sorted(pending, key=lambda each: each.oldest_at or 0)

    def rate(self) -> Rate:
        """See `Outbox.rate`. One round trip."""
        ((frames, events),) = self._call([_Call("rate", (self._ring(),), (SECONDS, RING))])
        return rate_of(int(frames), int(events))

    def close(self) -> None:
        """Close the connections of the client, unless it is yours."""
        if self._owned:
            self._client.close()
            self._reserving.close()

    # Keys

    def _key(self, stream: str, kind: str) -> str:
        return f"{self._prefix}:{{{_without_braces(stream)}}}:{kind}"

    def _keys(self, stream: str) -> tuple[str, str]:
        return self._key(stream, "queue"), self._key(stream, "state")

    def _ordered_keys(self, stream: str) -> tuple[str, str, str, str]:
        return *self._keys(stream), self._key(stream, "turns"), self._key(stream, "held")

    def _index(self, shard: int) -> tuple[str, str]:
        return f"{self._prefix}:index:{{{shard}}}:active", f"{self._prefix}:index:{{{shard}}}:idle"

    def _ring(self) -> str:
        return f"{self._prefix}:index:{{0}}:acked"

    # Calls

    def _stream(self, script: str, stream: str, *args: str | int) -> Any:
        return self._call([_Call(script, self._keys(stream), args)])[0]

    def _frozen(self, script: str, frame: Frame, *args: str | int) -> Any:
        return self._stream(script, frame.stream, frame.id.epoch, frame.id.seq, *args)

    def _call(self, calls: Sequence[_Call], client: Any = None) -> list[Any]:
        """Run *calls* in one round trip; a second one after a restart of the server, which forgets its scripts.

        Each is about another stream, so that running some of them again later changes no order.
        """
        client = client or self._client
        return self._settled(calls, _round_trip(client, calls), client)

    def _settled(self, calls: Sequence[_Call], answers: list[Any], client: Any) -> list[Any]:
        again = [number for number, answer in enumerate(answers) if isinstance(answer, NoScriptError | MovedError)]
        if again:
            if any(isinstance(answers[number], MovedError) for number in again):
                client.nodes_manager.initialize()
            for name in sorted({calls[number].name for number in again} - {"ZADD", "ZRANGE"}):
                client.script_load(_script(name).text)
            for number, answer in zip(again, _round_trip(client, [calls[n] for n in again]), strict=True):
                answers[number] = answer
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    # Frames

    def _current(self, frame: Frame, answer: Any) -> Frame:
        whose, held = answer
        if whose == b"own":
            epoch, seq, count, anchor = held
            return replace(
                first_events(frame, int(count)),
                id=FrameId(self._producer_id, int(epoch), int(seq)),
                anchor=None if anchor is None else anchor.decode(),
            )
        if held is None:
            return replace(frame, begun=True)
        return self._frame(frame.stream, held, begun=True, lease=frame.lease)

    def _frame(self, stream: str, frozen: Any, *, begun: bool, lease: str) -> Frame:
        epoch, seq, skip, count, anchor, elements = frozen
        events, marks = _read(elements, int(skip), int(count))
        return Frame(
            stream=stream,
            id=FrameId(self._producer_id, int(epoch), int(seq)),
            events=events,
            batches=marks,
            anchor=None if anchor is None else anchor.decode(),
            begun=begun,
            lease=lease,
        )


# Elements of a queue; lua/common.lua has their layout.


def _elements(batch: Batch, limits: Limits) -> list[bytes]:
    """*batch* as one element, or as several when it is too large for a frame, so that a claim reads what it sends."""
    about = msgspec.msgpack.encode((batch.id, batch.txid, batch.trace))
    bounds = parts_of(map(len, batch.events), limits)
    return [
        b"".join(
            (
                _HEAD.pack(batch.created_at, end == len(batch.events), end - start),
                struct.pack(f">{end - start}I", *map(len, batch.events[start:end])),
                struct.pack(">I", len(about)),
                about,
                *batch.events[start:end],
            )
        )
        for start, end in pairwise(bounds)
    ]


def _read(elements: Sequence[bytes], skip: int, count: int) -> tuple[tuple[bytes, ...], tuple[BatchMark, ...]]:
    """The first *count* events after *skip*, and the marks of their batches."""
    events: list[bytes] = []
    marks: list[BatchMark] = []
    for element in elements:
        created_at, _, number = _HEAD.unpack_from(element, 8)
        at = 8 + _HEAD.size
        lengths = struct.unpack_from(f">{number}I", element, at)
        at += 4 * number
        (about,) = struct.unpack_from(">I", element, at)
        at += 4
        batch_id, txid, trace = msgspec.msgpack.decode(element[at : at + about])
        at += about + sum(lengths[:skip])
        before = len(events)
        for length in lengths[skip : skip + count - before]:
            events.append(element[at : at + length])
            at += length
        skip = 0
        mark = BatchMark(batch_id, txid, len(events) - before, int(created_at), trace)
        if marks and marks[-1].id == batch_id:
            mark = replace(mark, events=mark.events + marks.pop().events)
        marks.append(mark)
    return tuple(events), tuple(marks)


# Talking to the server


_LIBRARIES = {
    **dict.fromkeys(("ack", "advance", "anchor", "claim", "finish", "park", "renew", "shrink"), "frames"),
    **dict.fromkeys(("look", "push", "reserve", "withdraw"), "turns"),
}


@dataclass(frozen=True, slots=True)
class _Script:
    text: str
    sha: str


@cache
def _script(name: str) -> _Script:
    folder = resources.files("broadcastable.outbox") / "lua"
    parts = ("common", _LIBRARIES[name], name) if name in _LIBRARIES else ("common", name)
    text = "\n".join((folder / f"{part}.lua").read_text() for part in parts)
    return _Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _impatient_client(url: str, timeout: float) -> redis.Redis:
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=Retry(NoBackoff(), 0),
        decode_responses=False,
    )


def _round_trip(client: Any, calls: Sequence[_Call]) -> list[Any]:
    """The answers to *calls*, errors of the server among them. One round trip to each node that is concerned."""
    if not isinstance(client, RedisCluster):
        return _pipelined(client, calls)
    cluster: Any = client  # redis-py's own annotations allow no node at all here
    nodes: dict[str, list[int]] = {}
    for number, call in enumerate(calls):
        nodes.setdefault(cluster.get_node_from_key(call.keys[0]).name, []).append(number)
    answers: list[Any] = [None] * len(calls)
    for name, numbers in nodes.items():
        connection = cluster.get_redis_connection(cluster.get_node(node_name=name))
        for number, answer in zip(numbers, _pipelined(connection, [calls[n] for n in numbers]), strict=True):
            answers[number] = answer
    return answers


def _pipelined(client: Any, calls: Sequence[_Call]) -> list[Any]:
    """The answers to *calls*, errors among them. On the connection itself: redis-py's pipelines cost a commit more."""
    if not calls:
        return []
    pool = client.connection_pool
    connection = pool.get_connection()
    try:
        connection.send_packed_command(connection.pack_commands([call.command() for call in calls]))
        return [_answer(connection) for _ in calls]
    except BaseException:  # Dramatiq interrupts threads, too; what nobody has read would answer the next command
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _listed(answer: Sequence[Any]) -> list[tuple[str, bool]]:
    """Streams in a shard's answer, each with whether it was listed as idle only."""
    _, active, idle = answer
    return [(name.decode(), name not in active) for name in dict.fromkeys([*active, *idle])]


def _shard(stream: str) -> int:
    return crc32(stream.encode()) % SHARDS


def _without_braces(text: str) -> str:
    """*text* such that braces around it make a hash tag of all of it (Redis Cluster specification, hash tags)."""
    return text.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")


def _acking(events: int, offset: str | None) -> tuple[str | int, ...]:
    return (events, int(offset is not None), offset or "", STATE_KEPT_FOR)


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))
