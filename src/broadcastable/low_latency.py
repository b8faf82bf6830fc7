"""A consumer for Dramatiq's RedisBroker that waits in Redis for the next message instead of sleeping between polls.

The stock consumer sleeps up to a second when idle. This one asks Redis to *block*: `BLMOVE q q LEFT LEFT t` takes the
head of the queue's own list and puts it back in one step, so it looks without taking, and producers stay as they are
(Redis 6.2 or Valkey). It wraps the stock consumer, which still fetches, decodes, acks and requeues. Where Dramatiq has
changed, or Redis does not know the command, it steps aside with one warning: slower, still right.

On our own queue the stock fetch is sent right behind the wait, so that Redis runs it as soon as there is something. If
the connection breaks before the answer, the messages that Redis gave then are this worker's until it ends. A wake-up
may be lost, for the sweeper finds its stream; a message of the application's own may not, and costs another trip.

A message would wake every process that blocks so. Therefore one of them at a time is on *watch* (`q.watch` says who);
the others wait until it passes the watch on (`q.relief`), which it does when it is busy. So a message wakes one
process, however many are idle. The watch runs out with whoever held it, and is taken by the next one who looks.
"""

from __future__ import annotations

import contextlib
import copy
import heapq
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from typing import Any

import redis
from dramatiq import Broker, Consumer, Message, MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import current_millis, q_name
from dramatiq.errors import ConnectionClosed
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from . import jitter
from .dispatch import Command, commands_of

log = logging.getLogger(__name__)

HEARTBEAT = 5.0
"""Seconds, at most, between two commands that tell Redis that this worker lives (a quarter of the broker's timeout, if
that is less). Without them another worker would run again what this one is still running."""

PAUSE = 0.1
"""Seconds between two fetches while Redis answers those but not the wait."""

WATCH_MARGIN = 0.5
"""Seconds that the watch lasts beyond the wait of who holds it. If that one is killed, the others see to it after that
and after their own wait: a message lies for two to three seconds."""

ANSWER_MARGIN = 5.0
"""Seconds that an answer may take beyond the time for which Redis was asked to block."""

_BROKER_PARTS = ("client", "namespace", "heartbeat_timeout", "maintenance_chance", "scripts", "consumer_class")
_CONSUMER_PARTS = ("message_cache", "outstanding_message_count", "prefetch", "queue_name", "timeout")


def install(broker: Broker, queues: Collection[str] | None, *, expendable: Collection[str] = ()) -> bool:
    """Let the consumers of *broker* block in Redis. Before a worker boots; may be repeated, and adds up.

    Args:
        queues: For these queues only, with their delay queues; None means all.
        expendable: Queues whose messages may be lost with a connection.

    Returns:
        Whether they will. False for other brokers, which push messages anyway, and for a RedisBroker unlike the one
        that this was written for, with a warning.
    """
    if not isinstance(broker, RedisBroker):
        return False
    already = vars(broker).get("consume")
    if isinstance(already, _BlockingConsume):
        already.add(queues, expendable)
        already.is_stopping = False
        return True
    missing = [part for part in _BROKER_PARTS if not hasattr(broker, part)]
    if missing:
        _warn(f"the broker has no {', '.join(missing)}")
        return False
    # On the instance: the class, and other brokers of the process, stay as they are.
    broker.consume = _BlockingConsume(broker, queues, expendable)  # type: ignore[method-assign]
    return True


def stop_fetching(broker: Broker) -> None:
    """The worker of *broker* shuts down: leave what comes to the others, and only keep its heart beating.

    Dramatiq stops consumers after it has waited for the worker's threads, which may be at it for ten minutes.
    """
    consume = vars(broker).get("consume")
    if isinstance(consume, _BlockingConsume):
        consume.is_stopping = True


def _warn(reason: str) -> None:
    log.warning(
        "Wake-ups take up to a second: Dramatiq's RedisBroker is not as expected (%s), so its stock consumer polls. "
        "The environment variable dramatiq_worker_timeout=20 makes it poll more often",
        reason,
    )


def _lost(error: redis.RedisError) -> ConnectionClosed:
    return ConnectionClosed(error)  # type: ignore[no-untyped-call]


class _NotHere(Exception):
    """This Redis has no blocking peek, or does not let us use it."""


def _is_refused(error: redis.ResponseError) -> bool:
    return isinstance(error, NoPermissionError) or "unknown command" in str(error).lower()


class _BlockingConsume:
    """Stands in for `broker.consume`, until it steps aside for good."""

    def __init__(self, broker: RedisBroker, queues: Collection[str] | None, expendable: Collection[str]) -> None:
        self._broker = broker
        self._stock = broker.consume
        self._queues = None if queues is None else set(queues)
        self._expendable = set(expendable)
        self._lock = threading.Lock()
        self.is_aside = False
        self.is_stopping = False

    def add(self, queues: Collection[str] | None, expendable: Collection[str]) -> None:
        self._queues = None if queues is None or self._queues is None else self._queues | set(queues)
        self._expendable |= set(expendable)

    def __call__(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> Consumer:
        stock = self._stock(queue_name, prefetch, timeout)
        if self.is_aside or (self._queues is not None and q_name(queue_name) not in self._queues):
            return stock
        missing = [part for part in _CONSUMER_PARTS if not hasattr(stock, part)]
        if missing:
            self.step_aside(f"its consumer has no {', '.join(missing)}")
            return stock
        return BlockingConsumer(stock, self._broker, self, fetch_at_once=q_name(queue_name) in self._expendable)

    def step_aside(self, reason: str) -> None:
        """Leave this broker's queues to the stock consumer from now on."""
        with self._lock:
            if self.is_aside:
                return
            self.is_aside = True
        _warn(reason)


def _blocking_client(client: redis.Redis) -> redis.Redis:
    """A client of our own of the same server: its connection is always in use, and waits longer for its answers."""
    pool = client.connection_pool
    options = {
        **pool.connection_kwargs,
        "socket_timeout": HEARTBEAT + ANSWER_MARGIN,
        "retry": Retry(NoBackoff(), 0),
    }
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **options))


class _Watch:
    """Who blocks on the queue's own list, among the consumers that wait for a message in it. Belongs to one thread.

    It only saves work: two on watch wake both, and with nobody on watch for a moment the next wait takes it.

    Args:
        fetch: The commands to send behind the wait, to fetch so many messages; none if they are not fetched at once.
    """

    def __init__(self, client: redis.Redis, queue: str, fetch: Callable[[int], list[Command]]) -> None:
        self._client = client
        self._fetch = fetch
        self._queue = queue
        self._holder = f"{queue}.watch"
        self._relief = f"{queue}.relief"
        self._own = uuid.uuid4().hex
        self._after_others = False
        self.is_ours = False

    def wait(self, seconds: float, room: int) -> tuple[bool, list[bytes | None] | None]:
        """Wait until the queue has a message, up to *seconds*.

        Returns:
            Whether there is one, which is not known after a wait that was for the watch; and up to *room* messages
            where they are fetched at once, or None.
        """
        if not self.is_ours:
            began = time.monotonic()
            self._wait_for_it(seconds)
            seconds -= time.monotonic() - began
        return self._peek(seconds, room) if self.is_ours and seconds > 0.0 else (False, None)

    def _wait_for_it(self, seconds: float) -> None:
        with self._client.pipeline(transaction=False) as pipeline:
            if self._after_others:
                pipeline.blpop([self._relief], _timeout(seconds))
            # After the whole wait, too: who was on watch may have been killed.
            pipeline.set(self._holder, self._own, nx=True, px=_life(seconds))
            self.is_ours = bool(pipeline.execute()[-1])
        self._after_others = True

    def _peek(self, seconds: float, room: int) -> tuple[bool, list[bytes | None] | None]:
        pipeline: Any
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.get(self._holder)
            pipeline.pexpire(self._holder, _life(seconds))
            pipeline.blmove(self._queue, self._queue, _timeout(seconds), "LEFT", "LEFT")
            for command in self._fetch(room):
                pipeline.execute_command(*command)
            holder, expires, message, *fetched = pipeline.execute(raise_on_error=False)
        messages = fetched[0] if fetched and isinstance(fetched[0], list) else None
        if not messages:  # else what was refused will be the next time, too
            for answer in (holder, expires, message, *fetched):
                if isinstance(answer, Exception):
                    raise answer
        self.is_ours = _text(holder) == self._own
        return message is not None, messages

    def pass_on(self) -> None:
        """Let one of those who wait for it have the watch; or the next one who comes."""
        self.is_ours = False
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.delete(self._holder)
            pipeline.rpush(self._relief, b"")
            pipeline.ltrim(self._relief, 0, 0)
            pipeline.pexpire(self._relief, _life(HEARTBEAT))
            pipeline.execute()


def _timeout(seconds: float) -> Any:
    return max(seconds, 0.001)  # 0 would be for ever; redis-py's annotations allow whole seconds only


def _life(seconds: float) -> int:
    return round((max(seconds, 0.0) + WATCH_MARGIN) * 1000)


def _text(answer: Any) -> str | None:
    # The application chose whether its client decodes.
    return answer.decode() if isinstance(answer, bytes) else answer


class BlockingConsumer(Consumer):
    """Wraps the stock *stock* consumer of one queue. Like that, it belongs to one thread but for `ack` and `nack`."""

    def __init__(self, stock: Any, broker: RedisBroker, consume: _BlockingConsume, *, fetch_at_once: bool) -> None:
        self._stock = stock
        self._broker = broker
        self._consume = consume
        self._client = _blocking_client(broker.client)
        self._key = f"{broker.namespace}:{stock.queue_name}"
        self._longest_wait = stock.timeout / 1000
        # How many messages make this worker one that is busy, of twice as many places as it has threads. With more
        # threads one message that came while nothing else did is no reason to wake another process.
        self._busy_with = max(1, min(2, stock.prefetch // 2))
        self._heartbeat = min(HEARTBEAT, broker.heartbeat_timeout / 4000)
        self._maintenance_interval = broker.heartbeat_timeout / 4000
        # The same broker and worker to Redis, but each of its commands puts back what dead workers held.
        self._maintainer = copy.copy(broker)
        self._maintainer.maintenance_chance = sys.maxsize
        self._maintenance_at = time.monotonic() + self._maintenance_interval * jitter.between(0.5, 1.0)
        self._beat_at = 0.0
        self._room = threading.Event()
        self._etas: list[tuple[int, str]] = []
        self._delayed: set[str] = set()
        self._dry = False
        self._fetch_at_once = fetch_at_once
        self._watch = _Watch(self._client, self._key, self._fetch_behind)

    def __next__(self) -> MessageProxy | None:
        try:
            if not self._consume.is_aside and not self._stock.message_cache and not self._filled():
                return None
            return self._remember_eta(next(self._stock))
        except redis.TimeoutError as error:
            # The stock consumer knows connection errors only, and Dramatiq takes anything else for a defect of its own.
            raise _lost(error) from None

    def _filled(self) -> bool:
        """Wait for messages, up to the worker's timeout; False when it is time to look around without one."""
        try:
            return self._wait_and_fetch()
        except redis.ConnectionError as error:
            raise _lost(error) from None
        except (_NotHere, AttributeError, KeyError, TypeError) as error:
            self._consume.step_aside(str(error))
            return True

    def _wait_and_fetch(self) -> bool:
        room = self._free_places()
        wait = min(self._longest_wait, self._until_fetch(), self._until_eta())
        is_busy = self._stock.outstanding_message_count >= self._busy_with
        if self._watch.is_ours and (is_busy or self._consume.is_stopping):
            self._pass_watch_on()
        messages: list[bytes | None] | None = None
        if room <= 0 or self._consume.is_stopping:
            self._room.wait(wait)
            room = 0 if self._consume.is_stopping else self._free_places()
            if room > 0:
                messages = self._fetch(room)
        elif self._dry and wait > 0.0:
            messages = self._fetch_on_watch(wait, room)
        else:
            messages = self._fetch(room)
        if messages is None and self._until_fetch() <= 0.0:
            messages = self._fetch(0)  # a heartbeat
        if messages is None:
            return False
        if messages and self._consume.is_stopping:
            self._stock.requeue([Message.decode(data) for data in messages if data is not None])
            messages = []
        # Fewer than there was room for: there are no more.
        self._dry = len(messages) < max(room, 1)
        self._stock.message_cache = messages
        return bool(messages)

    def _fetch_on_watch(self, wait: float, room: int) -> list[bytes | None] | None:
        began = time.monotonic()
        try:
            has_message, messages = self._watch.wait(wait, room)
        except redis.RedisError as error:
            self._pause(error)
            has_message, messages = True, None
        if messages is not None:
            self._beat_at = began + self._heartbeat
        elif has_message:
            messages = self._fetch(room)
        return messages

    def _fetch_behind(self, room: int) -> list[Command]:
        """What is sent behind the wait."""
        if not self._fetch_at_once:
            return []
        return commands_of(self._broker, lambda broker: broker.do_fetch(self._stock.queue_name, room))

    def _pass_watch_on(self) -> None:
        try:
            self._watch.pass_on()
        except redis.RedisError as error:
            self._pause(error)

    @staticmethod
    def _pause(error: redis.RedisError) -> None:
        """Whether Redis is away is for the fetch to find out, with the retries that the application chose.

        It also loads the script that a Redis that was started again has forgotten.
        """
        if isinstance(error, redis.ResponseError) and _is_refused(error):
            raise _NotHere(f"Redis 6.2 or Valkey is needed: {error}") from error
        time.sleep(PAUSE)

    def _free_places(self) -> int:
        self._room.clear()  # before counting: a message acked in between sets it again
        return int(self._stock.prefetch - self._stock.outstanding_message_count)

    def _fetch(self, room: int) -> list[bytes | None]:
        now = time.monotonic()
        broker = self._broker
        if now >= self._maintenance_at:
            self._maintenance_at = now + self._maintenance_interval * jitter.between(0.8, 1.2)
            broker = self._maintainer
        messages: list[bytes | None] = broker.do_fetch(self._stock.queue_name, max(room, 0))
        self._beat_at = time.monotonic() + self._heartbeat
        return messages

    def _until_fetch(self) -> float:
        """Seconds to the next heartbeat or maintenance, which are fetches too."""
        due: float = min(self._beat_at, self._maintenance_at)
        return due - time.monotonic()

    # --- delayed messages: Dramatiq looks at them only between two messages, so be back when one is due ---

    def _remember_eta(self, message: MessageProxy | None) -> MessageProxy | None:
        eta = None if message is None else message.options.get("eta")
        if message is not None and isinstance(eta, int | float):
            heapq.heappush(self._etas, (int(eta), message.message_id))
            self._delayed.add(message.message_id)
        return message

    def _until_eta(self) -> float:
        while self._etas and self._etas[0][1] not in self._delayed:
            heapq.heappop(self._etas)
        return (self._etas[0][0] - current_millis()) / 1000 if self._etas else self._longest_wait

    # --- the rest is the stock consumer's ---

    def ack(self, message: MessageProxy) -> None:
        try:
            self._stock.ack(message)
        except redis.TimeoutError as error:
            raise _lost(error) from None  # acked again later, which changes nothing
        finally:
            self._done(message)

    def nack(self, message: MessageProxy) -> None:
        try:
            self._stock.nack(message)
        except redis.TimeoutError as error:
            raise _lost(error) from None
        finally:
            self._done(message)

    def _done(self, message: MessageProxy) -> None:
        self._delayed.discard(message.message_id)
        self._room.set()

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        self._stock.requeue(messages)

    def close(self) -> None:
        self._stock.close()
        if self._watch.is_ours:
            with contextlib.suppress(redis.RedisError):
                self._watch.pass_on()
        self._client.connection_pool.disconnect()
