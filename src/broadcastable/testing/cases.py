"""The testing kit for `unittest`."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from broadcastable.durable_streams import DurableStreams
from broadcastable.errors import UsageError

from .asserting import assert_broadcasts, assert_no_broadcasts, capture_broadcasts
from .isolation import isolated_durable_streams
from .memory import MemoryStreams
from .recorder import Recording, drain, recording

if TYPE_CHECKING:
    # A mixin for `TestCase` and `IsolatedAsyncioTestCase` alike, which this lets the type checker know.
    _TestCase = unittest.TestCase
else:
    _TestCase = object


class BroadcastTestCase(_TestCase):
    """Mixin: `class RoomTest(BroadcastTestCase, unittest.TestCase)`; with `IsolatedAsyncioTestCase` just so.

    Each test records its broadcasts and sends nothing, from before its `setUp` until after its clean-ups.

    Attributes:
        broadcasts: Everything broadcast in the test so far.
        durable_streams: The default instance of this test, without a server; see `isolated_durable_streams`.
        memory_streams: What `drain` has delivered.
    """

    broadcasts: Recording
    durable_streams: DurableStreams
    memory_streams: MemoryStreams

    assert_broadcasts = staticmethod(assert_broadcasts)
    assert_no_broadcasts = staticmethod(assert_no_broadcasts)
    capture_broadcasts = staticmethod(capture_broadcasts)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if unittest.TestCase in cls.__mro__[: cls.__mro__.index(BroadcastTestCase)]:
            # Its run() would be found first, and that asks no other class.
            raise UsageError(
                f"{cls.__name__}: BroadcastTestCase comes before TestCase, or nothing is isolated. Write "
                f"class {cls.__name__}(BroadcastTestCase, unittest.TestCase)"
            )

    def run(self, result: unittest.TestResult | None = None) -> unittest.TestResult | None:
        # Not in setUp: one of the application's own that forgets super() would send its broadcasts out.
        with self._isolated():
            return super().run(result)

    def debug(self) -> None:
        with self._isolated():
            super().debug()

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        self.memory_streams = MemoryStreams()
        with isolated_durable_streams(self.memory_streams) as self.durable_streams, recording() as self.broadcasts:
            yield

    def drain(self, timeout: float = 5.0) -> None:
        """Deliver what is kept, so that it can be read; see `testing.drain`."""
        drain(self.durable_streams, timeout)
