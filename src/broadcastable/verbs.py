"""The verbs as functions, on the configured default: `broadcastable.broadcast_event_to(...)`.

Each is the method of `DurableStreams` of the same name, called on `durable_streams.current()` at the time of the call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from .durable_streams import DurableStreams, current

P = ParamSpec("P")
T = TypeVar("T")


def _on_current(method: Callable[Concatenate[DurableStreams, P], T]) -> Callable[P, T]:
    @functools.wraps(method)
    def verb(*args: P.args, **kwargs: P.kwargs) -> T:
        return method(current(), *args, **kwargs)

    signature = inspect.signature(method)
    verb.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    verb.__qualname__ = method.__name__
    verb.__module__ = __name__
    return verb


broadcast_event_to = _on_current(DurableStreams.broadcast_event_to)
broadcast_event_later_to = _on_current(DurableStreams.broadcast_event_later_to)
broadcast_to = _on_current(DurableStreams.broadcast_to)
broadcast_later_to = _on_current(DurableStreams.broadcast_later_to)
signed_stream_primitives = _on_current(DurableStreams.signed_stream_primitives)
signed_stream_url = _on_current(DurableStreams.signed_stream_url)
stream_offset = _on_current(DurableStreams.stream_offset)
snapshot = _on_current(DurableStreams.snapshot)
stream_snapshot = _on_current(DurableStreams.stream_snapshot)
ensure_stream_exists = _on_current(DurableStreams.ensure_stream_exists)
close_stream = _on_current(DurableStreams.close_stream)
delete_stream = _on_current(DurableStreams.delete_stream)
drain = _on_current(DurableStreams.drain)
