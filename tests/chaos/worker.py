"""`dramatiq tests.chaos.worker`: the ready worker, but it may die at a named step of the relay.

The steps are those between which state changes somewhere: before and after each call of the outbox, and of the stream
server.
"""

from __future__ import annotations

from typing import Any

from broadcastable.client import StreamClient
from broadcastable.durable_streams import current
from broadcastable.worker import broker
from tests.chaos.dying import Death

__all__ = ["broker"]

death = Death()
for name in ("claim", "anchor", "advance", "finish"):
    death.at(type(current().outbox), name)
death.at(StreamClient, "append")

_send = StreamClient.send


def _send_or_die(self: StreamClient, request: Any, **kwargs: Any) -> Any:
    if request.method == "PUT":
        return death.around(_send, "create")(self, request, **kwargs)
    return _send(self, request, **kwargs)


StreamClient.send = _send_or_die  # type: ignore[method-assign]
