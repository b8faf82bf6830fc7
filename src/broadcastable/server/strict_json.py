"""JSON bodies are checked before a stream server stores them.

Python's own parser takes NaN, infinities and lone surrogates, and rakaia writes them down again: one such event, and no
browser can parse the stream any more, from then on.
"""

from __future__ import annotations

from broadcastable.protocol import JSON, is_json

from .asgi import App, Message, Receive, Scope, Send, answer, header_values


def with_strict_json(app: App) -> App:
    """*app*, whose writers get 400 for a body that is declared to be JSON (RFC 8259) and is not."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in {"POST", "PUT"} or not _declares_json(scope):
            await app(scope, receive, send)
            return
        received = [await receive()]
        while received[-1]["type"] == "http.request" and received[-1].get("more_body"):
            received.append(await receive())
        body = b"".join(message.get("body", b"") for message in received)
        if body and not is_json(body):
            await answer(send, 400)
            return

        async def replay() -> Message:
            return received.pop(0) if received else await receive()

        try:
            await app(scope, replay, send)
        except RecursionError:
            # Nested just less deeply than is_json refuses; nothing is stored or answered before the body is parsed.
            await answer(send, 400)

    return checked


def _declares_json(scope: Scope) -> bool:
    return any(value.split(b";")[0].strip().lower() == JSON.encode() for value in header_values(scope, b"content-type"))
