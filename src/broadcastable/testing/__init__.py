"""For the tests of applications: assert on what is broadcast with no server, no Redis and no worker.

With pytest the fixtures `broadcasts`, `durable_streams`, `memory_streams`, `stream_server` and `drain` are there once
the package is installed; with unittest there is `BroadcastTestCase`.
"""

from __future__ import annotations

from .asserting import (
    BroadcastAssertion,
    CapturedBroadcasts,
    assert_broadcasts,
    assert_no_broadcasts,
    capture_broadcasts,
)
from .broadcasts import Broadcast
from .cases import BroadcastTestCase
from .isolation import freeze_txid, isolated_durable_streams
from .memory import MemoryStreams
from .recorder import Recording, drain, recording

__all__ = [
    "Broadcast",
    "BroadcastAssertion",
    "BroadcastTestCase",
    "CapturedBroadcasts",
    "MemoryStreams",
    "Recording",
    "assert_broadcasts",
    "assert_no_broadcasts",
    "capture_broadcasts",
    "drain",
    "freeze_txid",
    "isolated_durable_streams",
    "recording",
]
