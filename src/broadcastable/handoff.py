"""From a committed transaction to the outbox: in the order of the commits, and never raising into one.

`Handoff.submit` puts batches into the outbox at once where that is safe and cheap. Under an event loop, or while the
store does not answer, a daemon thread does it: a bounded buffer keeps the order, and a failing store is asked again
once an interval, so that a commit is slowed by at most one short connect timeout in that interval.

Between the end of COMMIT and the hand-over a thread may lose the processor, and a transaction that waited for the same
row would overtake it. So a transaction takes its `Turn` before it commits, while it still holds its locks, and goes
behind all that took theirs earlier on one of its streams: here among the threads and tasks of this process, and in a
store that `reserves`, among all processes.
"""

from __future__ import annotations

import asyncio
import atexit
import bisect
import itertools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from sqlalchemy.util.concurrency import await_only, in_greenlet

from .counters import counters
from .errors import OutboxFull
from .events import Batch
from .outbox import Outbox

log = logging.getLogger(__name__)

RETRY_INTERVAL = 0.5
"""Seconds between two attempts to reach a store that failed."""

SAY_INTERVAL = 5.0
"""Seconds between two lines in the log about dropped batches."""

EXIT_GRACE = 3.0
"""Seconds that interpreter exit waits for what is still in the buffer."""

RESERVE_PATIENCE = 0.25
"""Seconds for which a commit under asyncio waits for its place."""

RESERVERS = 4
"""Threads that reserve places for the transactions of event loops."""

PATIENCE = 1.0
"""Seconds for which a transaction waits for an earlier one that was announced, and neither commits nor fails."""


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """The place of a transaction among those of this process that commit at the same time.

    Attributes:
        streams: Where it keeps its place; none for batches that nobody announced.
        owner: The task or thread. It does not wait for itself: a session may commit in another one's hook.
        name: What a store that `reserves` knows it by. Names of one process sort like their numbers.
    """

    number: int
    streams: frozenset[str]
    owner: object
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """Batches in the buffer."""

    batches: tuple[Batch, ...]
    turn: Turn
    since: float

    @property
    def size(self) -> int:
        return sum(batch.size for batch in self.batches)


class Handoff:
    """One for each outbox. Thread safe; a forked child begins with an empty buffer of its own.

    Args:
        wake: Told which streams have something to deliver; what it raises is logged.
        max_bytes: What the buffer may hold; batches beyond it are dropped, logged and counted.
        blocking: Whether `put` does network I/O, so that an event loop must not call it.
    """

    def __init__(
        self, outbox: Outbox, wake: Callable[[Sequence[str]], object], *, max_bytes: int, blocking: bool
    ) -> None:
        self._outbox = outbox
        self._wake = wake
        self._max_bytes = max_bytes
        self._blocking = blocking
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._writer = uuid.uuid4().hex
        self._numbers = itertools.count()
        # Transactions by stream that are announced and neither in the outbox nor in the buffer, the earliest first.
        self._open: dict[str, list[Turn]] = {}
        self._delivering: set[Turn] = set()
        # Those that asked the outbox for a place, until they are handed over or withdrawn.
        self._reserved: set[Turn] = set()
        # Those whose question had no answer: the place may appear later, even after what it was for.
        self._unsure: set[Turn] = set()
        self._buffer: list[_Waiting] = []  # in the order of the turns
        self._bytes = 0
        self._changed = threading.Condition()
        self._sender: threading.Thread | None = None
        self._reservers: ThreadPoolExecutor | None = None
        self._is_failing = False  # since the store last failed, nothing has got into it
        self._retry_at = 0.0
        self._sending = False
        self._say_dropped_at = 0.0

    def announce(self, streams: Iterable[str]) -> Turn:
        """Before COMMIT, with its locks held: the next turn on *streams*, to `submit` with or to `withdraw`.

        Where the outbox reserves places, one round trip to it. Under asyncio that is awaited, for a quarter of a second
        at most, if SQLAlchemy's greenlet is there to do so; elsewhere on an event loop nothing is reserved. While the
        store fails nothing is asked of it here but by one transaction an interval. Never raises for the outbox.
        """
        if self._pid != os.getpid():
            self._reset()
        on_loop = _on_event_loop()
        with self._changed:
            reserves = self._outbox.reserves and (not on_loop or in_greenlet()) and self._may_ask()
            turn = self._next_turn(streams)
            for name in turn.streams:
                self._open.setdefault(name, []).append(turn)
            if reserves:
                self._reserved.add(turn)
        try:
            if reserves and on_loop:
                await_only(self._reserve_aside(turn))
            elif reserves:
                self._reserve(turn)
        except BaseException:  # the task was cancelled: nobody has the turn
            with self._changed:
                self._end(turn)
            raise
        return turn

    def _may_ask(self) -> bool:
        """Whether this transaction may ask the store. The caller holds the lock."""
        if not self._is_failing:
            return True
        if self._buffer or time.monotonic() < self._retry_at:
            return False  # with something in the buffer the sender asks
        self._retry_at = time.monotonic() + RETRY_INTERVAL
        return True

    def _next_turn(self, streams: Iterable[str]) -> Turn:
        number = next(self._numbers)
        return Turn(number, frozenset(streams), _owner(), f"{self._writer}:{number:012}")

    def _reserve(self, turn: Turn) -> None:
        try:
            self._outbox.reserve(turn.name, turn.streams)
        except Exception as error:  # any store, any driver: the order of arrival has to do
            self._unsure.add(turn)
            self._failed(error)
        else:
            self._is_failing = False

    async def _reserve_aside(self, turn: Turn) -> None:
        """`_reserve` in threads that the application cannot fill: it holds locks that those may be waiting for."""
        with self._changed:
            if self._reservers is None:
                self._reservers = ThreadPoolExecutor(RESERVERS, thread_name_prefix="broadcastable-reserve")

        def reserve() -> None:
            if turn in self._reserved and not self._is_failing:
                self._reserve(turn)
                if turn not in self._reserved:  # given up meanwhile
                    self._give_up(turn, turn.streams)

        asked = asyncio.get_running_loop().run_in_executor(self._reservers, reserve)
        _, late = await asyncio.wait([asked], timeout=RESERVE_PATIENCE)
        if late:
            with self._changed:
                self._reserved.discard(turn)

    def withdraw(self, turn: Turn) -> None:
        """The transaction of *turn* has nothing to hand over after all. Does nothing after `submit`."""
        with self._changed:
            is_reserved = turn in self._reserved
            self._unsure.discard(turn)
            self._end(turn)
        if is_reserved:
            self._give_up(turn, turn.streams)

    def _give_up(self, turn: Turn, streams: Collection[str]) -> None:
        """Let others pass on *streams* at once; the store would after a while."""
        if self._is_failing:
            return  # asking would only take the caller's time
        if _on_event_loop():
            if self._reservers is not None:
                self._reservers.submit(self._give_up, turn, streams)
            return
        try:
            self._woken(self._outbox.withdraw(turn.name, streams))
        except Exception as error:
            log.debug("A reserved place is left to its end (%s)", error)

    def submit(self, batches: Sequence[Batch], turn: Turn | None = None) -> None:
        """Take *batches* of a committed transaction, in order. Never raises and never blocks an event loop.

        Args:
            turn: From `announce`. Without one the batches go behind those that were submitted before.
        """
        if self._pid != os.getpid():
            self._reset()
        if not batches:
            return
        if turn is None:
            turn = self._next_turn(())
        has_place = turn in self._reserved
        given = tuple(replace(batch, turn=turn.name) for batch in batches) if self._outbox.reserves else tuple(batches)
        self._submit(given, turn)
        if has_place:
            unused = turn.streams.difference(batch.stream for batch in given)
            if unused:
                self._give_up(turn, unused)

    def _submit(self, batches: tuple[Batch, ...], turn: Turn) -> None:
        on_loop = _on_event_loop()
        with self._changed:
            if (on_loop and self._blocking) or not self._may_pass(turn, wait=not on_loop):
                self._enqueue(batches, turn)
                return
            self._delivering.add(turn)
        try:
            self._deliver(batches)
        except OutboxFull as error:
            self._dropped(batches, error)
        except Exception as error:  # any store, any driver: the row is stored, so the commit must not fail
            self._failed(error)
            with self._changed:
                self._enqueue(batches, turn)
            return
        with self._changed:
            self._end(turn)
        self._clear_up((turn,))

    def _clear_up(self, turns: Iterable[Turn]) -> None:
        """Give up the places of *turns*, whose batches are in the outbox, that may have come after them."""
        for turn in self._unsure.intersection(turns):
            self._unsure.discard(turn)
            self._give_up(turn, turn.streams)

    def _may_pass(self, turn: Turn, *, wait: bool) -> bool:
        """Whether it is *turn*'s turn, past the buffer; may wait for that where a commit before it has just ended."""
        if wait:
            self._changed.wait_for(lambda: self._is_behind() or not any(self._before(turn)), PATIENCE)
        return not self._is_behind() and not any(self._before(turn))

    def _is_behind(self) -> bool:
        return bool(self._buffer) or self._sending or time.monotonic() < self._retry_at

    def _before(self, turn: Turn) -> Iterator[Turn]:
        """Open turns that *turn* must not overtake."""
        for name in turn.streams:
            for earlier in self._open.get(name, ()):
                if earlier.number >= turn.number:
                    break
                if earlier.owner != turn.owner:
                    yield earlier

    def _end(self, turn: Turn) -> None:
        self._delivering.discard(turn)
        self._reserved.discard(turn)
        for name in turn.streams:
            turns = self._open.get(name)
            if turns is not None and turn in turns:
                turns.remove(turn)
                if not turns:
                    del self._open[name]
        self._changed.notify_all()

    def _deliver(self, batches: tuple[Batch, ...]) -> None:
        if self._outbox.transactional:
            streams = self._outbox.staged(list(dict.fromkeys(batch.stream for batch in batches)))
        else:
            streams = self._outbox.put(batches)
        self._is_failing = False
        self._woken(streams)

    def _woken(self, streams: Sequence[str]) -> None:
        if streams:
            try:
                self._wake(streams)
            except Exception as error:  # a lost wake-up costs a second: the sweeper finds the streams
                log.warning("%d streams could not be woken (%s); the sweeper will find them", len(streams), error)

    def _dropped(self, batches: Sequence[Batch], why: object) -> None:
        counters.increment("batches_dropped", len(batches))
        if time.monotonic() >= self._say_dropped_at:
            # A flood of losses is one line an interval in the log; the count has them all.
            self._say_dropped_at = time.monotonic() + SAY_INTERVAL
            log.error("%d batches dropped, the first for stream %s: %s", len(batches), batches[0].stream, why)

    def _failed(self, error: Exception) -> None:
        self._is_failing = True
        self._retry_at = time.monotonic() + RETRY_INTERVAL
        log.error(
            "The outbox cannot be reached (%s: %s). Up to %d bytes are kept here and sent when it is back",
            type(error).__name__,
            error,
            self._max_bytes,
        )

    def _enqueue(self, batches: tuple[Batch, ...], turn: Turn) -> None:
        """Put *batches* into the buffer where their turn is. The caller holds the lock."""
        self._end(turn)
        waiting = _Waiting(batches, turn, time.monotonic())
        if self._bytes + waiting.size > self._max_bytes:
            self._dropped(batches, f"the local buffer of {self._max_bytes} bytes is full")
            return
        bisect.insort(self._buffer, waiting, key=lambda each: each.turn.number)
        self._bytes += waiting.size
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_all, name="broadcastable-handoff", daemon=True)
            self._sender.start()
            atexit.register(self.flush, EXIT_GRACE)

    def _send_all(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                ready: list[_Waiting] = []
                while not ready:
                    if self._sender is not me:
                        return
                    ready = self._ready()
                    if not ready:
                        self._changed.wait(PATIENCE / 4 if self._buffer else None)
                self._sending = True
            batches = tuple(batch for waiting in ready for batch in waiting.batches)
            sent = True
            try:
                self._deliver(batches)
            except OutboxFull as error:
                self._dropped(batches, error)
            except Exception as error:
                self._failed(error)
                sent = False
            with self._changed:
                self._sending = False
                if sent:
                    gone = set(ready)
                    self._buffer = [waiting for waiting in self._buffer if waiting not in gone]
                    self._bytes = sum(waiting.size for waiting in self._buffer)
                    self._changed.notify_all()
                else:
                    self._changed.wait_for(lambda: self._sender is not me, RETRY_INTERVAL)
            if sent:
                self._clear_up(waiting.turn for waiting in ready)

    def _ready(self) -> list[_Waiting]:
        """What the buffer has and no open turn must precede. The caller holds the lock."""
        ready: list[_Waiting] = []
        held: set[str] = set()
        for waiting in self._buffer:
            streams = {batch.stream for batch in waiting.batches}
            if held.isdisjoint(streams) and not self._must_wait(waiting):
                ready.append(waiting)
            else:
                held |= streams
        return ready

    def _must_wait(self, waiting: _Waiting) -> bool:
        before = list(self._before(waiting.turn))
        if before and time.monotonic() - waiting.since > PATIENCE:
            for turn in {*before} - self._delivering:
                log.warning(
                    "A transaction has been committing for more than %.0f s; a later one overtakes it on stream %s",
                    PATIENCE,
                    waiting.batches[0].stream,
                )
                self._end(turn)
            before = list(self._before(waiting.turn))
        return bool(before)

    def flush(self, timeout: float) -> bool:
        """Wait until everything submitted so far is in the outbox; False when *timeout* seconds were not enough."""
        if self._pid != os.getpid():
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._buffer, timeout)

    def close(self, timeout: float) -> None:
        """Give what is in the buffer *timeout* seconds to get into the outbox, and drop the rest. May be used again."""
        if self._pid != os.getpid():
            return
        self.flush(timeout)
        with self._changed:
            left = [batch for waiting in self._buffer for batch in waiting.batches]
            if left:
                self._dropped(left, "closed before the outbox could be reached")
            self._buffer, self._bytes = [], 0
            sender, self._sender = self._sender, None
            reservers, self._reservers = self._reservers, None
            self._changed.notify_all()
        if reservers is not None:
            reservers.shutdown(wait=False)
        if sender is not None:
            sender.join()
            atexit.unregister(self.flush)

    @property
    def buffered(self) -> int:
        """Batches that wait in this process."""
        return sum(len(waiting.batches) for waiting in self._buffer)


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _owner() -> object:
    return (asyncio.current_task() if _on_event_loop() else None) or threading.get_ident()
