"""What the process broadcasts, kept instead of sent, for as long as somebody looks.

There is one recorder in a process, since a broadcast may come from any thread: that of a server under test, of a thread
pool that was started before, or of an event loop. It listens while it is held, by a fixture or by a block.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, overload
from urllib.parse import urlsplit
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.orm import Session, object_session

from broadcastable.client import stand_ins
from broadcastable.counters import counters
from broadcastable.declarations import declarations_of
from broadcastable.durable_streams import DurableStreams, current, intercepting
from broadcastable.events import Batch
from broadcastable.mixin import Broadcastable
from broadcastable.names import Streamable
from broadcastable.transactions import waiting
from broadcastable.unsent import Reason, Unsent, listening

from .broadcasts import Broadcast, broadcasts_in
from .expectations import target_from


class Mark(NamedTuple):
    """Where a record stands: how much of everything there is."""

    broadcasts: int
    unsent: int
    counts: Mapping[str, int]


class Recorder:
    """Keeps everything that is broadcast in this process while it is held. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holders = 0
        self._listening = ExitStack()
        self._sessions: WeakSet[Session] = WeakSet()
        self._broadcasts: list[Broadcast] = []
        self._unsent: list[Unsent] = []
        self._kept: list[tuple[DurableStreams, Sequence[Batch]]] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Record until the last holder lets go; then everything is forgotten."""
        with self._lock:
            if self._holders == 0:
                self._listen()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._listening.close()
                    self._broadcasts, self._unsent, self._kept = [], [], []

    def _listen(self) -> None:
        self._listening.enter_context(intercepting(self))
        self._listening.enter_context(listening(self._note))
        self._sessions = WeakSet()
        for name in ("after_begin", "after_attach", "after_flush"):
            event.listen(Session, name, self._notice)
            self._listening.callback(event.remove, Session, name, self._notice)

    def _notice(self, session: Session, *_: object) -> None:
        with self._lock:
            self._sessions.add(session)

    def _note(self, unsent: Unsent) -> None:
        with self._lock:
            self._unsent.append(unsent)

    def intercept(self, batches: Sequence[Batch], *, sender: DurableStreams, deferred: bool, joined: bool) -> bool:
        """Record *batches*, and keep them unless they reach a server inside this process at once."""
        seen = [each for batch in batches for each in broadcasts_in(batch, deferred=deferred, joined=joined)]
        keep = deferred or not all(_origin(url) in stand_ins for url in sender.settings.server_urls)
        with self._lock:
            self._broadcasts += seen
            if keep:
                self._kept.append((sender, batches))
        return keep

    def mark(self) -> Mark:
        """Where the record stands, for `since`."""
        with self._lock:
            return Mark(len(self._broadcasts), len(self._unsent), counters.snapshot())

    def since(self, start: Mark) -> list[Broadcast]:
        """What was broadcast since *start*, oldest first."""
        with self._lock:
            return self._broadcasts[start.broadcasts :]

    def counted_since(self, start: Mark) -> Counter[str]:
        """What the package has counted since *start*."""
        return Counter(counters.snapshot()) - Counter(start.counts)

    def unsent_since(self, start: Mark, records: Iterable[object] = ()) -> list[Unsent]:
        """What was not sent since *start*, and what waits for a flush or in an open transaction now.

        Args:
            records: Ask their sessions too: one that has done nothing while this listened is not known otherwise.
        """
        with self._lock:
            unsent = self._unsent[start.unsent :]
            sessions = {*self._sessions, *filter(None, map(object_session, records))}
        for session in sessions:
            for stream, count in waiting(session).items():
                unsent += [Unsent(Reason.OPEN, stream=stream)] * count
            unsent += [Unsent(Reason.UNFLUSHED, model=type(record).__name__) for record in _unflushed(session)]
        return unsent

    def deliver(self) -> None:
        """Send what is kept, in order, each through its sender's own outbox and relay, in this thread.

        Raises:
            AssertionError: Something stays behind: a stream is parked or its server does not answer. Everything else is
                delivered.
        """
        with self._lock:
            kept, self._kept = self._kept, []
        for sender, batches in kept:
            sender.outbox.put(batches)
            for stream in dict.fromkeys(batch.stream for batch in batches):
                sender.relay.deliver(stream)
        _refuse_leftovers(*dict.fromkeys(sender for sender, _ in kept))


def _unflushed(session: Session) -> Iterator[object]:
    """The records of *session* that would be broadcast if somebody flushed it."""
    changed = (record for record in session.dirty if session.is_modified(record))
    for record in (*session.new, *changed, *session.deleted):
        if isinstance(record, Broadcastable) and declarations_of(type(record)):
            yield record


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


recorder = Recorder()
"""The recorder of this process."""

_recordings: dict[int, Recording] = {}  # by identity, not by equality


class Recording(Sequence[Broadcast]):
    """Everything broadcast since it began, oldest first. Grows as the test goes on. Compares with lists."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew: forget what was broadcast up to now, as after setting the stage."""
        self._start = recorder.mark()

    def on(self, *streamables: Streamable, exact: bool = False) -> list[Broadcast]:
        """Those on the streams of *streamables*; a lone record means its own stream and those beneath it.

        Args:
            exact: Only that very stream.
        """
        target = target_from(streamables, exact=exact)
        return [each for each in self._seen() if target.covers(each.stream)]

    def begun(self) -> Mark:
        """Where in the record it begins."""
        return self._start

    def _seen(self) -> list[Broadcast]:
        return recorder.since(self._start)

    @overload
    def __getitem__(self, index: int) -> Broadcast: ...

    @overload
    def __getitem__(self, index: slice) -> list[Broadcast]: ...

    def __getitem__(self, index: Any) -> Any:
        return self._seen()[index]

    def __len__(self) -> int:
        return len(self._seen())

    def __eq__(self, other: object) -> bool:
        return self._seen() == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Recording of {len(self)} broadcasts>"


@contextmanager
def recording() -> Iterator[Recording]:
    """Record, and send nothing, until the end of the block. Assertions without a block look at what is in here."""
    with recorder.held():
        began = Recording()
        _recordings[id(began)] = began
        try:
            yield began
        finally:
            del _recordings[id(began)]


def drain(durable_streams: DurableStreams | None = None, timeout: float = 5.0) -> None:
    """Have everything broadcast so far delivered to the stream server, so that readers can be tested.

    What is kept while recording is delivered in this thread, each by its own sender; for everything else of
    *durable_streams* (`current()` when None) this waits for the worker, up to *timeout* seconds.

    Raises:
        AssertionError: Something stays behind; the message says which streams, and why.
    """
    recorder.deliver()
    instance = durable_streams if durable_streams is not None else current()
    instance.drain(timeout)
    _refuse_leftovers(instance)


def _refuse_leftovers(*senders: DurableStreams) -> None:
    left = [
        f"  {each.stream}: {each.parked or 'its server does not take it, see the log'}"
        for sender in senders
        for each in sender.outbox.pending()
    ]
    if left:
        raise AssertionError("\n".join(["Not delivered:", *left]))


def current_recording() -> Recording | None:
    """The innermost recording; None when nothing is recorded."""
    return next(reversed(_recordings.values()), None)


def nothing_recorded(asking: str) -> str:
    """What to do where *asking* was called without a block and without a recording."""
    return (
        f"{asking}() without a block looks at what was broadcast since the fixture `broadcasts` began, and this test "
        f"does not use it. Ask for the fixture, or write `with {asking}(...):`"
    )
