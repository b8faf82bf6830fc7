"""The relay: claim a frame, one POST, ack; until the stream's queue is empty.

Exactly once rests on three things. A frame keeps its events and its number until it is acked, so a server that
remembers its producers keeps one copy (Durable Streams protocol, 5.2.1). A server may forget them, through its own
kill -9 for one, so after any doubt the relay *looks* at the stream before it sends again. And it never guesses: a
number that the server does not expect leads to a look, a new epoch, and one warning.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from . import jitter
from .circuit import FAILURES, PAUSE, Circuit
from .client import StreamClient
from .counters import counters
from .errors import (
    ConfigurationError,
    FrameTooLarge,
    ProducerFenced,
    ProducerGap,
    StreamClosed,
    StreamConflict,
    StreamError,
    StreamForbidden,
    StreamNotFound,
    StreamRefused,
    StreamTimeout,
    StreamUnavailable,
)
from .events import frame_body
from .names import shard_of
from .outbox import Frame, Outbox
from .outbox.steps import claim_or_finish
from .protocol import BEGINNING, Created
from .provisioner import StreamProvisioner, run
from .settings import Settings, seconds
from .tracing import append_span, deliver_span

log = logging.getLogger(__name__)

BRIEF_RETRIES = 2
"""How often one delivery tries a frame again by itself before it leaves the stream to the sweeper."""

LONGEST_DELAY = 5.0
"""Seconds, at most, between two deliveries of a stream whose server is away."""

SAY_INTERVAL = 30.0
"""Seconds between two lines in the log about settings with which nothing can be sent."""

MOST_STEPS = 12
"""Requests about one frame in one delivery; a server that answers without end in riddles gets a pause."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a look saw: how many of the frame's events are stored, and an offset after them (or the tail)."""

    events: int
    offset: str


@dataclass(frozen=True, slots=True)
class _Doubt:
    """An answer that fits no healthy server: a look decides whether the frame goes out again, under a new epoch.

    `made_again`: perhaps because the stream was deleted and made again since our last frame.
    """

    why: str
    above: int
    made_again: bool = False


class _Unclear(StreamUnavailable):
    """The server answers, but nobody can make sense of it."""


class Relay:
    """Delivers streams from the outbox to the stream server. Thread safe; meant for worker threads.

    Args:
        clock: Seconds, for the pauses between the tries of a server that gives no answer.
    """

    def __init__(
        self,
        outbox: Outbox,
        client: StreamClient,
        provisioner: StreamProvisioner,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outbox = outbox
        self._client = client
        self._provisioner = provisioner
        # A little longer than one request: whoever still waits for an answer then has none to get.
        self._lease_for = seconds(settings.request_timeout) + 1.0
        self._circuits = [Circuit(url, patience=self._lease_for, clock=clock) for url in settings.server_urls]
        self._clock = clock
        self._say_unconfigured_at = clock()
        self._failures: dict[str, int] = {}
        self._failures_lock = threading.Lock()

    def prepare(self) -> None:
        """Load what the first delivery needs, so that no event has to wait for it."""
        self._client.prepare()

    def deliver(self, stream: str, *, give_way: Callable[[], bool] = lambda: False) -> bool:
        """Send everything that waits for *stream*, frame after frame.

        Trouble with the stream server or the settings never raises: the stream is released for a later attempt, or
        parked. While its server gives no answer at all, nothing is done: the stream is left to the sweeper.
        Safe to call at any time, from several workers at once, and after any crash.

        Args:
            give_way: Asked between two frames; when it says yes, the stream is released as it is.

        Returns:
            False when nothing was done because of the server.

        Raises:
            Exception: What the outbox itself raises when its store cannot be reached.
        """
        with self._circuit_of(stream).attempt() as may_try:
            if may_try:
                self._deliver(stream, give_way)
            return may_try

    def _deliver(self, stream: str, give_way: Callable[[], bool]) -> None:
        frame = claim_or_finish(self._outbox, stream, lease_for=self._lease_for, lease=None)
        while frame is not None:
            delay: float | None = 0.0
            try:
                with deliver_span(frame):
                    delay, following = self._send(frame)
            finally:
                # Also when Dramatiq interrupts this thread: the next worker need not wait for the lease.
                if delay is not None:
                    self._outbox.release(frame, delay=delay)
            frame = following
            if frame is not None and give_way():
                self._outbox.release(frame, delay=0.0)
                return

    def _circuit_of(self, stream: str) -> Circuit:
        return self._circuits[shard_of(stream, len(self._circuits))]

    def _send(self, frame: Frame) -> tuple[float | None, Frame | None]:
        """Get *frame* stored and acked, or parked.

        Returns:
            The seconds to wait when it could not be done now, and otherwise the stream's next frame, if any.
        """
        server = self._circuit_of(frame.stream)
        try:
            following = self._store(frame)
        except StreamUnavailable as error:
            if _is_unanswered(error):
                server.unanswered(times=FAILURES)
                return self._delayed(frame, error, PAUSE * jitter.between(0.5, 1.0)), None
            server.answered()
            return self._backoff(frame, error, error.retry_after), None
        except StreamForbidden as error:
            server.answered()
            # Our own keys or settings: parking every stream for that would be worse than waiting for the operator.
            return self._backoff(frame, error, None), None
        except ConfigurationError as error:
            return self._unconfigured(frame, error), None
        except (StreamClosed, StreamConflict, StreamRefused) as error:
            server.answered()
            log.error("Stream %s is parked with %d events: %s", frame.stream, len(frame.events), error)
            counters.increment("frames_parked")
            self._outbox.park(frame, str(error))
            return None, self._claim_next(frame)
        self._failures.pop(frame.stream, None)
        return None, following

    def _claim_next(self, frame: Frame) -> Frame | None:
        return claim_or_finish(self._outbox, frame.stream, lease_for=self._lease_for, lease=frame.lease)

    def _backoff(self, frame: Frame, error: StreamError, wanted: float | None) -> float:
        with self._failures_lock:
            failures = self._failures[frame.stream] = self._failures.get(frame.stream, 0) + 1
            while len(self._failures) > 10_000:
                del self._failures[next(iter(self._failures))]
        delay = max(min(LONGEST_DELAY, 0.25 * 2.0 ** min(failures, 10)) * jitter.between(0.5, 1.0), wanted or 0.0)
        return self._delayed(frame, error, delay, level=logging.WARNING if failures == 1 else logging.DEBUG)

    def _unconfigured(self, frame: Frame, error: ConfigurationError) -> float:
        """Nothing of any stream can be sent before the operator has mended it, so one line is enough."""
        if self._clock() >= self._say_unconfigured_at:
            self._say_unconfigured_at = self._clock() + SAY_INTERVAL
            log.error("Nothing can be delivered, and stream %s and others wait: %s", frame.stream, error)
        return self._delayed(frame, error, LONGEST_DELAY * jitter.between(0.5, 1.0))

    def _delayed(self, frame: Frame, error: Exception, delay: float, *, level: int = logging.DEBUG) -> float:
        counters.increment("deliveries_delayed")
        log.log(level, "Stream %s waits %.1f s: %s", frame.stream, delay, error)
        return delay

    def _store(self, frame: Frame) -> Frame | None:
        """Send *frame* until the server has it, and ack it; what comes after it."""
        server = self._circuit_of(frame.stream)
        look = frame.begun and frame.anchor is not None
        doubt: _Doubt | None = None
        is_healed = False
        failures = 0
        if frame.anchor is None:
            # Nothing was ever sent: the tail as it is now lies before everything that will be.
            frame = self._outbox.anchor(frame, self._create(frame.stream).offset)
        for _ in range(MOST_STEPS):
            if look or doubt is not None:
                found = self._look(frame)
                if found.events:
                    return self._ack(frame, found.offset, found.events)
                if doubt is not None:
                    # Only a look that came after the doubtful answer proves that the frame is not there.
                    frame = self._renew(frame, doubt)
                look, doubt = False, None
            try:
                with append_span(frame):
                    appended = self._client.append(frame.stream, frame_body(frame.events), frame.id, attempts=1)
            except StreamTimeout:
                look, failures = True, self._brief(frame, failures, answered=False)
            except StreamNotFound as error:
                if is_healed:
                    what = f"Stream {frame.stream!r} is gone again, right after it was provisioned anew"
                    raise _Unclear(what, stream=frame.stream) from error
                frame, is_healed = self._heal(frame), True
            except ProducerFenced as error:
                doubt = _Doubt("it knows a newer epoch", above=error.epoch)
            except ProducerGap as error:
                why = f"it expects number {error.expected}, not {frame.id.seq}"
                doubt = _Doubt(why, above=frame.id.epoch, made_again=True)
            except FrameTooLarge:
                if len(frame.events) == 1:
                    raise
                frame = self._outbox.shrink(frame, events=_half(frame))
            except StreamRefused as error:
                # 400 is also the answer to a new epoch that does not start at 0 (5.2.1): a server restored from an
                # older copy knows an epoch below ours.
                if error.status != 400 or frame.id.seq == 0:
                    raise
                doubt = _Doubt(f"it refuses number {frame.id.seq}", above=frame.id.epoch, made_again=True)
            except StreamUnavailable as error:
                if error.retry_after is not None:
                    raise
                failures = self._brief(frame, failures, answered=not _is_unanswered(error))
            else:
                server.answered()
                if not appended.duplicate:
                    return self._ack(frame, appended.offset, len(frame.events))
                # Stored by an earlier request of ours, by a slower worker, or never: our store may have gone back in
                # time and given an old number to new events.
                doubt = _Doubt("it claims a frame that it does not have", above=frame.id.epoch)
        raise _Unclear(f"Stream {frame.stream!r}: no clear answer in {MOST_STEPS} requests", stream=frame.stream)

    def _brief(self, frame: Frame, failures: int, *, answered: bool) -> int:
        """Wait a moment before the same request again; the error being handled goes on once that was tried enough."""
        server = self._circuit_of(frame.stream)
        if answered:
            server.answered()
        else:
            server.unanswered()
        if failures >= BRIEF_RETRIES or server.is_open:
            raise  # noqa: PLE0704 - called from an except block only
        time.sleep(0.05 * 2**failures * jitter.between(0.5, 1.0))
        return failures + 1

    def _ack(self, frame: Frame, offset: str | None, events: int) -> Frame | None:
        """Remove the first *events* of *frame*, which are stored; the next frame."""
        if events == len(frame.events):
            advanced = self._outbox.advance(frame, offset=offset, lease_for=self._lease_for)
            acked, following = advanced.acked, advanced.following
        else:
            acked = self._outbox.ack(frame, offset=offset, events=events)
            following = self._claim_next(frame)
        if acked:
            counters.increment("events_delivered", events)
            counters.increment("frames_delivered")
            now = time.time_ns() // 1_000_000
            for batch in frame.batches:
                counters.duration("commit_to_append", max(0, now - batch.created_at) / 1000)
        return following

    def _create(self, stream: str) -> Created:
        return run(self._provisioner.create(stream), self._client, self._provisioner)

    def _heal(self, frame: Frame) -> Frame:
        """The stream is gone: provision it anew. Its producers are gone with it, so the numbers start again."""
        level = logging.DEBUG if frame.stream in self._failures else logging.WARNING  # it did not help the last time
        log.log(level, "Stream %s was gone from the server; it is provisioned anew", frame.stream)
        counters.increment("streams_healed")
        run(self._provisioner.forget(frame.stream), self._client, self._provisioner)
        created = self._create(frame.stream)
        if frame.id.seq:
            frame = self._outbox.renew(frame, above=frame.id.epoch)
        return self._outbox.anchor(frame, created.offset)

    def _renew(self, frame: Frame, doubt: _Doubt) -> Frame:
        log.warning("Stream %s: the server lost count of our frames (%s); a new epoch begins", frame.stream, doubt.why)
        counters.increment("epochs_renewed")
        frame = self._outbox.renew(frame, above=doubt.above)
        if doubt.made_again:
            # The anchor may be of a stream that is no more; what is there now lies before everything to come.
            frame = self._outbox.anchor(frame, self._client.head(frame.stream))
        return frame

    def _look(self, frame: Frame) -> Found:
        """Read the stream from the anchor: are the frame's events there, one after the other?

        Other producers may write to the stream too, so they may stand anywhere after the anchor. A server killed in
        the middle of an append may have kept only the first of them, at its very end.
        """
        counters.increment("looks")
        wanted = [_comparable(event) for event in frame.events]
        try:
            stored, offset = self._read_from(frame.stream, frame.anchor or BEGINNING)
        except StreamNotFound as error:
            if error.status == 410:
                stored, offset = self._read_from(frame.stream, BEGINNING)
            else:
                return Found(0, BEGINNING)
        except StreamRefused:
            # The stream was made again, and the anchor is an offset of the old one.
            stored, offset = self._read_from(frame.stream, BEGINNING)
        for start in range(len(stored)):
            here = stored[start : start + len(wanted)]
            if here == wanted[: len(here)] and (len(here) == len(wanted) or start + len(here) == len(stored)):
                return Found(len(here), offset)
        return Found(0, offset)

    def _read_from(self, stream: str, offset: str) -> tuple[list[object], str]:
        stored: list[object] = []
        while True:
            page = self._client.read(stream, offset)
            stored.extend(_comparable(event) for event in page.events)
            if page.up_to_date or page.next_offset == offset:
                return stored, page.next_offset
            offset = page.next_offset


def _comparable(event: bytes) -> object:
    """An event as a value, without what servers add on reading (the npm reference server adds `headers.offset`)."""
    value = msgspec.json.decode(event)
    if isinstance(value, dict) and isinstance(value.get("headers"), dict):
        return {**value, "headers": {name: text for name, text in value["headers"].items() if name != "offset"}}
    return value


def _is_unanswered(error: StreamUnavailable) -> bool:
    return error.status is None and not isinstance(error, _Unclear)


def _half(frame: Frame) -> int:
    """How many events to keep of a frame that is too large: about half, at the end of a batch where there is one."""
    most = len(frame.events) // 2
    whole, best = 0, 0
    for batch in frame.batches:
        whole += batch.events
        if whole > most:
            break
        best = whole
    return best or max(1, most)
