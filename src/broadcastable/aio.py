"""The verbs for asyncio, on the configured default: `await broadcastable.aio.broadcast_event_to(...)`.

The same names as in `broadcastable`, awaited. Each is the method of `AsyncDurableStreams` of the same name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from .durable_streams import AsyncDurableStreams, current_async

P = ParamSpec("P")
T = TypeVar("T")


def _on_current(
    method: Callable[Concatenate[AsyncDurableStreams, P], Awaitable[T]],
) -> Callable[P, Awaitable[T]]:
    @functools.wraps(method)
    async def verb(*args: P.args, **kwargs: P.kwargs) -> T:
        return await method(current_async(), *args, **kwargs)

    signature = inspect.signature(method)
    verb.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    verb.__qualname__ = method.__name__
    verb.__module__ = __name__
    return verb


broadcast_event_to = _on_current(AsyncDurableStreams.broadcast_event_to)
broadcast_event_later_to = _on_current(AsyncDurableStreams.broadcast_event_later_to)
broadcast_to = _on_current(AsyncDurableStreams.broadcast_to)
broadcast_later_to = _on_current(AsyncDurableStreams.broadcast_later_to)
signed_stream_primitives = _on_current(AsyncDurableStreams.signed_stream_primitives)
signed_stream_url = _on_current(AsyncDurableStreams.signed_stream_url)
stream_offset = _on_current(AsyncDurableStreams.stream_offset)
snapshot = _on_current(AsyncDurableStreams.snapshot)
ensure_stream_exists = _on_current(AsyncDurableStreams.ensure_stream_exists)
close_stream = _on_current(AsyncDurableStreams.close_stream)
delete_stream = _on_current(AsyncDurableStreams.delete_stream)
drain = _on_current(AsyncDurableStreams.drain)


@functools.wraps(AsyncDurableStreams.stream_snapshot)
def stream_snapshot(*args: Any, **kwargs: Any) -> AsyncIterator[bytes]:
    """See `DurableStreams.stream_snapshot`."""
    return current_async().stream_snapshot(*args, **kwargs)


async def close() -> None:
    """Close this event loop's connections to the stream server and Redis; for the end of an application's lifespan."""
    await current_async().close()
