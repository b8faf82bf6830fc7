"""`assert_broadcasts`, `assert_no_broadcasts` and `capture_broadcasts`: around a block, or over the test so far.

A call that is a statement of its own checks at once what the fixture `broadcasts` has recorded, and so does `await`.
Any other call makes an object for `with` or `async with`, which records for the length of its block even where there is
no fixture. One that nobody enters has checked nothing: the pytest plugin fails such a test.
"""

from __future__ import annotations

import dis
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any, Self, overload

from broadcastable.errors import UsageError
from broadcastable.names import Streamable

from .broadcasts import Broadcast
from .expectations import Target, Wanted, target_from, wanted_from
from .recorder import Mark, current_recording, nothing_recorded, recorder
from .reports import report


class _Block:
    """The block of a `with`, which records from its beginning to its end. One at a time.

    Attributes:
        start: Where in the record the block begins; None outside of it.
    """

    def __init__(self) -> None:
        self.start: Mark | None = None
        self._holding = ExitStack()

    def begin(self, name: str) -> None:
        """Begin the block of what is called *name*.

        Raises:
            UsageError: It has begun already, and would overlook what came before.
        """
        if self.start is not None:
            raise UsageError(
                f"{name} is in use already. A block within its block, or beside it in another thread or task, needs "
                "one of its own"
            )
        self._holding.enter_context(recorder.held())
        self.start = recorder.mark()

    @contextmanager
    def ending(self) -> Iterator[Mark]:
        """End the block, once everything in it has been looked at from where it began."""
        assert self.start is not None
        with self._holding:
            try:
                yield self.start
            finally:
                self.start = None


class BroadcastAssertion:
    """An assertion about the broadcasts of a block, sync or async; made by `assert_broadcasts`.

    Attributes:
        used: Somebody has entered it, or has it checked otherwise.
    """

    def __init__(self, called: str, target: Target, wanted: Wanted, count: int | None, caller: FrameType) -> None:
        self._called = called
        self._target = target
        self._wanted = wanted
        self._count = count
        self._made_at = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        self.used = False
        self._block = _Block()
        # Pytest has its plugin before anybody imports this module, so the plugin is the one to keep them.
        plugin = sys.modules.get("pytest_broadcastable")
        if plugin is not None:
            plugin.keep(self)

    def check_since(self, start: Mark) -> None:
        """Look at what was broadcast since *start*.

        Raises:
            AssertionError: It is not what was expected; the message shows what was.
        """
        __tracebackhide__ = True
        self.used = True
        seen = recorder.since(start)
        found = sum(self._target.covers(each.stream) and self._wanted.matches(each) for each in seen)
        if found != self._count if self._count is not None else not found:
            unsent = recorder.unsent_since(start, self._target.records)
            counted = recorder.counted_since(start)
            raise AssertionError(report(self._target, self._wanted, self._count, seen, unsent, counted))

    def check_so_far(self) -> None:
        """Look at what the test has broadcast so far.

        Raises:
            AssertionError: See `check_since`.
            UsageError: Nothing is recorded.
        """
        __tracebackhide__ = True
        self.used = True
        recording = current_recording()
        if recording is None:
            raise UsageError(nothing_recorded(self._called))
        self.check_since(recording.begun())

    def __await__(self) -> Generator[None]:
        __tracebackhide__ = True
        self.check_so_far()
        yield from ()

    def __bool__(self) -> bool:
        self.used = True
        raise UsageError(
            f"{self._called}(...) is neither true nor false, so `assert` and `if` ask it in vain. Write it as a "
            f"statement of its own, or `with {self._called}(...):`"
        )

    def __enter__(self) -> None:
        self.used = True
        self._block.begin(f"{self._called}(...) at {self._made_at}")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        with self._block.ending() as start:
            # What the block raised says more than a broadcast that is missing for it.
            if kind is None:
                self.check_since(start)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        self.__exit__(kind, value, traceback)

    def __del__(self) -> None:
        if not self.used:
            warnings.warn(self.in_vain(), RuntimeWarning, stacklevel=2)

    def in_vain(self) -> str:
        """What to say where nobody has used it."""
        called = f"{self._called}(...) at {self._made_at}"
        return f"{called} was neither entered nor a statement of its own: nothing was checked"


def assert_broadcasts(
    *streamables: Streamable,
    count: int | None = None,
    type: str | None = None,
    operation: str | None = None,
    key: object = None,
    value: Any = None,
    exact: bool = False,
) -> BroadcastAssertion:
    """Assert that something is broadcast, by the block or, as a statement of its own, in the test so far.

    >>> with assert_broadcasts(room, count=1, operation="insert", value={"body": "Hi"}):
    ...     session.add(Message(room=room, body="Hi"))
    ...     session.commit()

    Any thread and any task may broadcast. Nothing is sent. Changes count once they are committed, also where the
    commit is part of an outer transaction that the test rolls back.

    Args:
        streamables: The stream, named as in production. A lone record means its own stream and those beneath it;
            nothing at all means every stream.
        count: How many events, exactly; at least one when None. Only those count that the other arguments fit.
        type: The events' type.
        operation: "insert", "update", "upsert" (which travels as an update) or "delete".
        key: The events' key.
        value: What the events' value holds: mappings as subsets, at every depth; dates, UUIDs and the like may be given
            as such. Of free JSON (`broadcast_to`), what the whole event holds.
        exact: Of a lone record, only its own stream.

    Raises:
        AssertionError: At the end of the block, or at once where there is none.
        UsageError: There is neither a block nor the fixture `broadcasts`; or *count* or *operation* is none.
    """
    __tracebackhide__ = True
    if count is not None and (count.__class__ is not int or count < 0):
        raise UsageError(f"count is a number of events, 0 or more, or None for at least one; got {count!r}")
    wanted = wanted_from(type=type, operation=operation, key=key, value=value)
    return _assertion("assert_broadcasts", target_from(streamables, exact=exact), wanted, count, sys._getframe(1))


def assert_no_broadcasts(*streamables: Streamable, exact: bool = False) -> BroadcastAssertion:
    """Assert that nothing is broadcast; see `assert_broadcasts`. Without *streamables*, on no stream at all."""
    __tracebackhide__ = True
    return _assertion("assert_no_broadcasts", target_from(streamables, exact=exact), Wanted(), 0, sys._getframe(1))


def _assertion(called: str, target: Target, wanted: Wanted, count: int | None, caller: FrameType) -> BroadcastAssertion:
    """What *caller* gets, checked already where it keeps nothing."""
    __tracebackhide__ = True
    assertion = BroadcastAssertion(called, target, wanted, count, caller)
    if _is_statement(caller):
        assertion.check_so_far()
    return assertion


def _is_statement(caller: FrameType) -> bool:
    """Whether the result of the call that *caller* is making is thrown away: then no `with` will ever enter it.

    Turbo's helpers ask whether they were given a block. Python has no such question, and an assertion that is made and
    forgotten would be a test that cannot fail.
    """
    code = caller.f_code.co_code
    following = next((opcode for opcode in code[caller.f_lasti + 2 :: 2] if opcode != _CACHE), None)
    return following == _POP_TOP


_CACHE = 0
_POP_TOP = dis.opmap["POP_TOP"]


class CapturedBroadcasts(Sequence[Broadcast]):
    """The broadcasts of a block, or of the test so far; made by `capture_broadcasts`. Compares with lists."""

    def __init__(self, target: Target, so_far: list[Broadcast] | None) -> None:
        self._target = target
        self._seen = so_far
        self._block = _Block()

    def __enter__(self) -> Self:
        self._block.begin("capture_broadcasts(...)")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._block.ending() as start:
            self._seen = _covered(self._target, start)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, value, traceback)

    def _now(self) -> list[Broadcast]:
        start = self._block.start
        if start is not None:
            return _covered(self._target, start)
        if self._seen is None:
            raise UsageError(nothing_recorded("capture_broadcasts"))
        return self._seen

    @overload
    def __getitem__(self, index: int) -> Broadcast: ...

    @overload
    def __getitem__(self, index: slice) -> list[Broadcast]: ...

    def __getitem__(self, index: Any) -> Any:
        return self._now()[index]

    def __len__(self) -> int:
        return len(self._now())

    def __eq__(self, other: object) -> bool:
        return self._now() == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._now())


def capture_broadcasts(*streamables: Streamable, exact: bool = False) -> CapturedBroadcasts:
    """The broadcasts on a stream, as a sequence: of a block, or without one of the test so far.

    >>> with capture_broadcasts(room, "messages") as seen:
    ...     session.add(Message(room=room, body="Hi"))
    ...     session.commit()
    >>> [each.value["body"] for each in seen]
    ['Hi']

    The sequence grows with the block and stays as it is after its end. For the arguments see `assert_broadcasts`.
    """
    target = target_from(streamables, exact=exact)
    recording = current_recording()
    return CapturedBroadcasts(target, None if recording is None else _covered(target, recording.begun()))


def _covered(target: Target, start: Mark) -> list[Broadcast]:
    return [each for each in recorder.since(start) if target.covers(each.stream)]
