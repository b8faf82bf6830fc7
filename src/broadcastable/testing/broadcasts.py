"""One event that was broadcast, as a test looks at it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from broadcastable.events import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """One event on one stream, as readers get it.

    Attributes:
        stream: The stream's name.
        payload: The whole event as parsed JSON.
        txid: Its transaction's id.
        deferred: It went through the outbox (a committed change, a `_later` verb) rather than straight to the server.
        joined: Its session was joined into an outer transaction: outside tests it would not have been sent.
    """

    stream: str
    payload: Any
    txid: str
    deferred: bool
    joined: bool = False

    @property
    def type(self) -> Any:
        """The change event's type; None for free JSON, as from `broadcast_to`. So are key, value and operation."""
        return self._of_change("type")

    @property
    def key(self) -> Any:
        return self._of_change("key")

    @property
    def value(self) -> Any:
        return self._of_change("value")

    @property
    def old_value(self) -> Any:
        return self._of_change("old_value")

    @property
    def operation(self) -> str | None:
        """ "insert", "update" or "delete". An upsert travels as an update."""
        return self.payload["headers"]["operation"] if self.is_change else None

    @property
    def timestamp(self) -> str | None:
        return self.payload["headers"].get("timestamp") if self.is_change else None

    @property
    def is_change(self) -> bool:
        """Whether it is a change event of the State Protocol."""
        headers = self.payload.get("headers") if isinstance(self.payload, dict) else None
        return isinstance(headers, dict) and "operation" in headers

    def _of_change(self, name: str) -> Any:
        return self.payload.get(name) if self.is_change else None


def broadcasts_in(batch: Batch, *, deferred: bool, joined: bool) -> list[Broadcast]:
    """The events of *batch*, in order."""
    return [
        Broadcast(stream=batch.stream, payload=json.loads(event), txid=batch.txid, deferred=deferred, joined=joined)
        for event in batch.events
    ]
