"""`dramatiq tests.chaos.worker`: the ready worker, but it may die by its own hand at a named step of the relay.

`CHAOS_KILL_AT` names the step and how many times to pass it first: `ack:3`. The steps are those between which state
changes somewhere: before and after each call of the outbox, and of the stream server.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from broadcastable.client import StreamClient
from broadcastable.durable_streams import current
from broadcastable.worker import broker

__all__ = ["broker"]


_lock = threading.Lock()
_left = 0


def _pass(step: str, wanted: str) -> None:
    global _left
    if step != wanted:
        return
    with _lock:
        _left -= 1
        if _left < 0:
            os.killpg(os.getpgid(0), signal.SIGKILL)


def _dying(method: Callable[..., Any], name: str, wanted: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        _pass(f"before {name}", wanted)
        result = method(*args, **kwargs)
        _pass(f"after {name}", wanted)
        return result

    return call


def die_at(plan: str) -> None:
    global _left
    wanted, _, times = plan.partition(":")
    _left = int(times or 0)
    outbox = type(current().outbox)
    for name in ("claim", "anchor", "advance", "finish"):
        setattr(outbox, name, _dying(getattr(outbox, name), name, wanted))
    StreamClient.append = _dying(StreamClient.append, "append", wanted)  # type: ignore[method-assign]
    send = StreamClient.send

    def send_or_die(self: StreamClient, request: Any, **kwargs: Any) -> Any:
        if request.method == "PUT":
            return _dying(send, "create", wanted)(self, request, **kwargs)
        return send(self, request, **kwargs)

    StreamClient.send = send_or_die  # type: ignore[method-assign]


if os.environ.get("CHAOS_KILL_AT"):
    die_at(os.environ["CHAOS_KILL_AT"])
