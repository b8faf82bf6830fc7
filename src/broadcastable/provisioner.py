"""Making sure that a stream exists: a set in this process, then Redis, then one PUT.

A stream must exist before it is read or appended to (protocol, 5.1). The PUT is idempotent, so all of this only saves
requests: with Redis one process makes it for all; without Redis, or while Redis is down, each process makes it once.

The logic is written once, as generators that yield what they need (`Step`) and are sent the answer; `run` and `arun`
perform the steps, with a thread's means and with asyncio's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import redis
import redis.asyncio
from redis.asyncio.client import Pipeline as AsyncPipeline
from redis.client import Pipeline

from .client import AsyncStreamClient, StreamClient
from .errors import BroadcastableError, StreamConflict
from .protocol import (
    Created,
    StreamRequest,
    StreamResponse,
    create_request,
    head_request,
    read_created,
    read_existing,
)
from .settings import Settings, seconds

log = logging.getLogger(__name__)

T = TypeVar("T")

LOCAL_NAMES = 200_000
"""Names kept in the process, about 230 bytes each; the oldest are forgotten first."""

REDIS_TIMEOUT = 0.5
"""Seconds. Redis only saves a PUT here, so waiting longer than a PUT takes would be a loss."""

REDIS_PAUSE = 1.0
"""Seconds for which Redis is not asked again after it failed."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Step: who makes this stream? Answered by a `Standing`."""

    stream: str


@dataclass(frozen=True, slots=True)
class Remember:
    """Step: the stream exists; tell the other processes."""

    stream: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Step: the stream is gone, or could not be made; tell the other processes."""

    stream: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Step: wait."""

    seconds: float


_Shared: TypeAlias = Claim | Remember | Forget
_Pipeline: TypeAlias = Pipeline | AsyncPipeline
Step: TypeAlias = StreamRequest | _Shared | Pause
Flow: TypeAlias = Generator[Step, object, T]

EXISTS = "exists"
OURS = "ours"
BUSY = "busy"


class StreamProvisioner:
    """Remembers which streams exist. Thread safe; shared by both clients of one `DurableStreams`."""

    def __init__(self, settings: Settings) -> None:
        self._ttl = None if settings.stream_ttl is None else max(1, int(seconds(settings.stream_ttl)))
        # A name is remembered for less time than the stream lives, so that an expired one is made again in time.
        lifetime = seconds(settings.provisioned_for)
        self._remember_for = int(lifetime if self._ttl is None else max(1.0, min(lifetime, self._ttl / 2)))
        self._patience = seconds(settings.request_timeout)
        # Not a dict: finding the oldest of one steps over all that were deleted before it (measured: 32 us, here 0.2).
        self._names: OrderedDict[str, float] = OrderedDict()
        self._being_made: dict[str, float] = {}
        self._lock = threading.Lock()
        server = hashlib.blake2b("\n".join(settings.server_urls).encode(), digest_size=6).hexdigest()
        self._prefix = f"{settings.namespace}:provisioned:{server}:"
        self._redis_url = settings.redis_url
        self._redis: redis.Redis | None = None
        self._redis_by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, redis.asyncio.Redis] = WeakKeyDictionary()
        self._redis_again_at = 0.0
        self._said_otherwise = False

    def ensure(self, stream: str) -> Flow[str | None]:
        """Make *stream* exist. Returns its tail offset if this call made the request, else None.

        Threads and processes that come together wait for the first one's PUT, and make their own if it fails.
        """
        give_up_at = time.monotonic() + self._patience
        pause = 0.002
        while True:
            standing = self._begin(stream)
            if standing is OURS:
                break
            if standing is EXISTS:
                return None
            if time.monotonic() > give_up_at:
                break
            yield Pause(pause)
            pause = min(pause * 1.5, 0.05)
        try:
            while time.monotonic() < give_up_at:
                shared = yield Claim(stream)
                if shared == EXISTS:
                    self._made(stream)
                    return None
                if shared == OURS:
                    break
                yield Pause(pause)
                pause = min(pause * 1.5, 0.05)
            created = yield from self.create(stream)
            return created.offset
        finally:
            self._being_made.pop(stream, None)

    def create(self, stream: str) -> Flow[Created]:
        """PUT *stream* whatever is remembered, and remember it.

        One that is closed, or was made with another lifetime, can be read, and says itself what cannot be appended.
        """
        try:
            response = yield create_request(stream, ttl=self._ttl)
            assert isinstance(response, StreamResponse)
            try:
                created = read_created(response, stream)
            except StreamConflict:
                response = yield head_request(stream)
                assert isinstance(response, StreamResponse)
                existing = read_existing(response, stream)
                if not existing.closed:
                    self._lives_otherwise(stream)
                created = Created(existing.offset, False)
        except BroadcastableError:
            yield Forget(stream)
            raise
        self._made(stream)
        yield Remember(stream)
        return created

    def _lives_otherwise(self, stream: str) -> None:
        if not self._said_otherwise:
            self._said_otherwise = True
            log.warning(
                "Stream %s was made with another lifetime than stream_ttl says, and keeps it, as others may; delete "
                "a stream to have it made anew. This is said once",
                stream,
            )

    def forget(self, stream: str) -> Flow[None]:
        """The server says that *stream* is gone: every process is to ask again."""
        self._names.pop(stream, None)
        yield Forget(stream)

    def reset(self) -> None:
        """Forget every name that this process remembers. No I/O; Redis keeps its own."""
        self._names.clear()

    def _begin(self, stream: str) -> str:
        now = time.monotonic()
        remembered = self._names.get(stream)
        if remembered is not None and remembered > now:
            return EXISTS
        with self._lock:
            if self._being_made.get(stream, 0.0) > now:
                return BUSY
            remembered = self._names.get(stream)
            if remembered is not None and remembered > now:
                return EXISTS
            self._being_made[stream] = now + 2 * self._patience
            return OURS

    def _made(self, stream: str) -> None:
        with self._lock:
            self._names[stream] = time.monotonic() + self._remember_for
            while len(self._names) > LOCAL_NAMES:
                self._names.popitem(last=False)

    # --- Redis: one key a stream, "?" while somebody makes it, "1" once it exists ---

    def _key(self, stream: str) -> str:
        return self._prefix + stream

    def _redis_wanted(self) -> bool:
        return self._redis_url is not None and time.monotonic() >= self._redis_again_at

    def _redis_failed(self, error: Exception) -> None:
        self._redis_again_at = time.monotonic() + REDIS_PAUSE
        log.warning("Redis does not answer (%s); streams are provisioned by this process alone meanwhile", error)

    def shared(self, step: _Shared) -> str | None:
        """Perform *step* on Redis. Never raises: Redis being down costs a PUT and nothing else."""
        if not self._redis_wanted():
            return OURS
        if self._redis is None:
            self._redis = redis.Redis.from_url(
                str(self._redis_url), socket_timeout=REDIS_TIMEOUT, socket_connect_timeout=REDIS_TIMEOUT, retry=None
            )
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                self._commands(pipe, step)
                return self._standing(step, pipe.execute())
        except redis.RedisError as error:
            self._redis_failed(error)
            return OURS

    async def ashared(self, step: _Shared) -> str | None:
        """`shared` for asyncio."""
        if not self._redis_wanted():
            return OURS
        loop = asyncio.get_running_loop()
        client = self._redis_by_loop.get(loop)
        if client is None:
            client = self._redis_by_loop[loop] = redis.asyncio.Redis.from_url(
                str(self._redis_url), socket_timeout=REDIS_TIMEOUT, socket_connect_timeout=REDIS_TIMEOUT, retry=None
            )
        try:
            async with client.pipeline(transaction=False) as pipe:
                self._commands(pipe, step)
                return self._standing(step, await pipe.execute())
        except redis.RedisError as error:
            self._redis_failed(error)
            return OURS

    def _commands(self, pipe: Pipeline | AsyncPipeline, step: _Shared) -> None:
        key = self._key(step.stream)
        match step:
            case Claim():
                # SET NX GET in one command needs Redis 7; the pair needs 6.2, and a race between them costs a PUT.
                pipe.set(key, "?", nx=True, px=int(2000 * self._patience))
                pipe.get(key)
            case Remember():
                pipe.set(key, "1", ex=self._remember_for)
            case Forget():
                pipe.delete(key)

    @staticmethod
    def _standing(step: _Shared, answers: list[object]) -> str | None:
        if not isinstance(step, Claim):
            return None
        made, value = answers
        if made:
            return OURS
        return EXISTS if value in {b"1", "1"} else BUSY

    def close(self) -> None:
        """Close the Redis connection of the synchronous side."""
        client, self._redis = self._redis, None
        if client is not None:
            client.close()

    async def aclose(self) -> None:
        """Close this event loop's Redis connection."""
        client = self._redis_by_loop.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()


def run(flow: Flow[T], client: StreamClient, provisioner: StreamProvisioner) -> T:
    """Perform the steps of *flow* in this thread; its result."""
    answer: object = None
    error: BroadcastableError | None = None
    while True:
        try:
            step = flow.send(answer) if error is None else flow.throw(error)
        except StopIteration as done:
            result: T = done.value
            return result
        answer, error = None, None
        try:
            match step:
                case StreamRequest():
                    answer = client.send(step)
                case Pause():
                    time.sleep(step.seconds)
                case Claim() | Remember() | Forget():
                    answer = provisioner.shared(step)
        except BroadcastableError as raised:
            error = raised


async def arun(flow: Flow[T], client: AsyncStreamClient, provisioner: StreamProvisioner) -> T:
    """Perform the steps of *flow* on the event loop; its result."""
    answer: object = None
    error: BroadcastableError | None = None
    while True:
        try:
            step = flow.send(answer) if error is None else flow.throw(error)
        except StopIteration as done:
            result: T = done.value
            return result
        answer, error = None, None
        try:
            match step:
                case StreamRequest():
                    answer = await client.send(step)
                case Pause():
                    await asyncio.sleep(step.seconds)
                case Claim() | Remember() | Forget():
                    answer = await provisioner.ashared(step)
        except BroadcastableError as raised:
            error = raised
