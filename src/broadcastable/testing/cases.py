"""The testing kit for `unittest`."""

from __future__ import annotations

import unittest
from typing import TYPE_CHECKING

from broadcastable.durable_streams import DurableStreams

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

    Each test records its broadcasts and sends nothing. A `setUp` of your own calls `super().setUp()` first.

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

    def setUp(self) -> None:
        super().setUp()
        self.memory_streams = MemoryStreams()
        self.durable_streams = self.enterContext(isolated_durable_streams(self.memory_streams))
        self.broadcasts = self.enterContext(recording())

    def drain(self, timeout: float = 5.0) -> None:
        """Deliver what is kept, so that it can be read; see `testing.drain`."""
        drain(self.durable_streams, timeout)
