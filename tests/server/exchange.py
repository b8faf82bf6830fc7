"""One request, told to an ASGI app without a server between, so that any bytes can be said; and what is behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Exchange:
    """A request and what came back."""

    method: str = "GET"
    path: bytes = b"/"
    query: bytes = b""
    headers: Sequence[tuple[bytes, bytes]] = ()
    body: Sequence[bytes] = (b"",)
    scope: dict[str, Any] = field(init=False)
    sent: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.scope = {
            "type": "http",
            "method": self.method,
            "path": "/as the server decoded it",
            "raw_path": self.path,
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
            "scheme": "http",
            "server": ("127.0.0.1", 80),
        }

    async def with_app(self, app: Any) -> Exchange:
        """Hold the exchange; the client stays until it has its response, and its body arrives in the pieces given."""
        pieces = list(self.body)

        async def receive() -> dict[str, Any]:
            if pieces:
                piece = pieces.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
            return await forever()

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)

        await app(self.scope, receive, send)
        return self

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.sent[0]["headers"] if key.decode().lower() == name.lower()]
        return b", ".join(values).decode() if values else None

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent[1:]).decode()


async def forever() -> Any:
    return await asyncio.get_running_loop().create_future()


class Inside:
    """A stream server that keeps the scope and the body of all that reached it, and answers 200."""

    def __init__(self, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self._headers = list(headers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.scopes.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await send({"type": "http.response.body", "body": b"inside"})
