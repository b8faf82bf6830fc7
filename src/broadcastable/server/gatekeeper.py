"""The gate in front of a stream server: pure ASGI, for any app that speaks the Durable Streams protocol.

A request gets through with a token for exactly its stream and its kind of request; what the app behind the gate sees
is one canonical path, no token, and no body that is too large or was cut short. A read ends when its token expires and
when its reader has left. Refusals say 400, 401, 403, 404 or 413, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import parse_qs

from broadcastable.errors import ConfigurationError, InvalidStreamName, TokenError
from broadcastable.tokens import Gatekeeper

from .addressing import readdressed, stream_in, wire_path
from .asgi import App, Headers, Message, Receive, Scope, Send, answer, header_values
from .credentials import AmbiguousToken, take_token, without_credentials
from .origins import Origins
from .verdicts import Verdicts, seconds_left

_NEEDED: Final = {"GET": "read", "HEAD": "read", "POST": "write"}
_READS: Final = frozenset({"GET", "HEAD"})
_CANCEL_AGAIN_SECONDS: Final = 1.0
_LAST_WORD_SECONDS: Final = 5.0

MAX_BODY: Final = 8 << 20
"""Bytes of the largest body of a request, unless said otherwise."""


def permits(claims: Mapping[str, Any], method: str, stream: str, *, closing: bool = False) -> bool:
    """Whether *claims* allow *method* on *stream*.

    A server token allows everything; a client's token GET and HEAD with `read`, POST with `write`, on its one stream,
    but for a POST that closes the stream for everybody. All other methods belong to the server.
    """
    if claims.get("server") is True:
        return True
    permissions = claims.get("permissions")
    return (
        claims.get("stream") == stream
        and isinstance(permissions, list)
        and method in _NEEDED
        and _NEEDED[method] in permissions
        and not closing
    )


class GatekeeperMiddleware:
    """Lets requests through to *app* that carry the right token.

    Args:
        app: The stream server.
        gatekeeper: Verifies the tokens. Its keys are read at once, so a wrong setting shows when the server starts.
        mount: Where the streams are in the path that clients send, whatever app this one is mounted in. The rest of
            the path is the stream's name; everything outside is 404.
        allowed_origins: Origins of pages that may call (CORS), or `*`; none by default.
        max_body: Bytes of the largest body of a request; 413 above.
        remembered_tokens: How many verified tokens to keep.

    Raises:
        ConfigurationError: No key, a key that is no ES256 key, or something that is no origin.
    """

    def __init__(
        self,
        app: App,
        gatekeeper: Gatekeeper,
        *,
        mount: str = "/v1/streams",
        allowed_origins: Iterable[str] = (),
        max_body: int = MAX_BODY,
        remembered_tokens: int = 10_000,
    ) -> None:
        if not mount.startswith("/") or mount.endswith("/"):
            raise ConfigurationError(f"mount begins with a slash and ends without one, as /v1/streams; got {mount!r}")
        self.app = app
        self._mount = mount
        self._prefix = mount.encode() + b"/"
        self._origins = Origins(allowed_origins)
        self._max_body = max_body
        self._remembered_tokens = remembered_tokens
        self._reads: set[_Read] = set()
        self.use(gatekeeper)

    @property
    def live_reads(self) -> int:
        """Reads that are being answered now, SSE and long-poll included."""
        return len(self._reads)

    def use(self, gatekeeper: Gatekeeper) -> None:
        """Verify with *gatekeeper* from now on; reads whose token it does not accept end. From any thread.

        Rotate keys without a restart: first a gatekeeper that knows both keys, and one without the old key later.
        """
        gatekeeper.jwks()
        self._verdicts = Verdicts(gatekeeper, self._remembered_tokens)
        for read in list(self._reads):
            try:
                gatekeeper.decode(read.token)
            except TokenError:
                read.end(401)

    def end_reads(self) -> None:
        """End all reads, so that a server stops at once; readers come back to where they were. From any thread."""
        for read in list(self._reads):
            read.end(503)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _lifespan(self.app, scope, receive, send)
        else:
            with suppress(AmbiguousToken):
                take_token(scope)  # out of the log
            await send({"type": "websocket.close", "code": 1008})

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Decide, in an order that tells a stranger nothing: token, then path, then right, then size."""
        method: str = scope["method"]
        origin = next(iter(header_values(scope, b"origin")), None)
        reply = _Reply(send, self._origins.headers_for(origin))
        try:
            token = take_token(scope)
        except AmbiguousToken:
            return await reply.refuse(400)
        path = wire_path(scope)
        if not path.startswith(self._prefix):
            return await answer(send, 404)
        if method == "OPTIONS" and origin is not None and header_values(scope, b"access-control-request-method"):
            allowed = self._origins.preflight(origin)
            return await answer(send, 403 if allowed is None else 204, allowed or ())
        if token is None:
            return await reply.refuse(401)
        verdicts = self._verdicts
        try:
            claims = verdicts.claims_of(token)
            stream = stream_in(path.removeprefix(self._prefix))
        except TokenError:
            return await reply.refuse(401)
        except InvalidStreamName:
            return await reply.refuse(400)
        closing = method == "POST" and bool(header_values(scope, b"stream-closed"))
        if not permits(claims, method, stream, closing=closing):
            return await reply.refuse(403)
        inner = {**scope, **readdressed(scope, self._mount, stream), "headers": without_credentials(scope)}
        if method in _READS:
            read = _Read(token, claims)
            self._reads.add(read)
            if verdicts is not self._verdicts:
                read.end(401)  # `use` in another thread, which did not see this read, wants it verified anew
            return await self._read(read, inner, receive, reply)
        return await self._write(inner, receive, reply)

    async def _write(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        """Hand over a body that is complete: half of one, after its sender was cut off, is never stored."""
        declared = next(iter(header_values(scope, b"content-length")), b"0")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > self._max_body):
            return await reply.refuse(413)
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body:
                return await reply.refuse(413)
            more = message.get("more_body", False)
        return await self.app(scope, _replayed(bytes(body), receive), reply.send)

    async def _read(self, read: _Read, scope: Scope, receive: Receive, reply: _Reply) -> None:
        """Run the app until it has answered, the reader has left, the token has expired, or somebody ends the read."""
        left = asyncio.ensure_future(_departure(receive))
        running = asyncio.ensure_future(self.app(scope, _replayed(b"", _never), reply.send))
        try:
            done, _ = await asyncio.wait(
                {running, left, read.ended}, timeout=seconds_left(read.claims), return_when=asyncio.FIRST_COMPLETED
            )
            if running in done or reply.complete:
                return await running
        finally:
            self._reads.discard(read)
            reply.over = True
            await _stopped(running, left)
        if left not in done:
            # A reader that has stopped reading would keep even the last word from leaving.
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    reply.cut_short(read.status if read.ended.done() else 401, scope), _LAST_WORD_SECONDS
                )
        return None


class _Read:
    """A read that is being answered, and the means to end it."""

    def __init__(self, token: str, claims: Mapping[str, Any]) -> None:
        self.token = token
        self.claims = claims
        self.status = 503
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def end(self, status: int) -> None:
        """End it with *status* if its response has not begun; in the middle of one, end that."""
        self.status = status
        with suppress(RuntimeError):  # its loop is closed, and the read with it
            self._loop.call_soon_threadsafe(self._end_here)

    def _end_here(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class _Reply:
    """Passes the app's response on, with our CORS headers in place of its own, and for no shared cache to keep."""

    def __init__(self, send: Send, cors: Headers) -> None:
        self._send = send
        self._cors = cors
        self.started = False
        self.complete = False
        self.over = False

    async def send(self, message: Message) -> None:
        if self.over:
            raise asyncio.CancelledError  # the app was told so, and has not heard it
        if message["type"] == "http.response.start":
            self.started = True
            message = {**message, "headers": [*map(_kept_private, _without_cors(message)), *self._cors]}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
        await self._send(message)

    async def refuse(self, status: int) -> None:
        headers: Headers = [(b"cache-control", b"no-store"), *self._cors]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if status == 413:
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        await answer(self._send, status, headers)

    async def cut_short(self, status: int, scope: Scope) -> None:
        """End a response that has begun; answer a long-poll that waits at the tail as one that has run out of time."""
        if self.started:
            return await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        query = parse_qs(scope["query_string"].decode("latin-1"))
        offset, cursor = (query.get(name, [""])[0] for name in ("offset", "cursor"))
        if query.get("live") != ["long-poll"] or offset in {"now", "-1"} or not _fit_for_a_header(offset):
            return await self.refuse(status)
        headers: Headers = [
            (b"stream-next-offset", offset.encode()),
            (b"stream-up-to-date", b"true"),
            (b"cache-control", b"no-store"),
        ]
        if _fit_for_a_header(cursor):
            headers.append((b"stream-cursor", cursor.encode()))
        return await answer(self._send, 204, [*headers, *self._cors])


def _fit_for_a_header(text: str) -> bool:
    return text.isascii() and text.isprintable() and text != ""


def _without_cors(message: Message) -> Headers:
    return [
        (name, value) for name, value in message.get("headers", ()) if not name.lower().startswith(b"access-control-")
    ]


def _kept_private(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    name, value = header
    # `public` would let a shared cache serve a response to those who have no token (RFC 9111, 3.5).
    return (name, value.replace(b"public", b"private")) if name.lower() == b"cache-control" else header


def _replayed(body: bytes, afterwards: Receive) -> Receive:
    told = False

    async def receive() -> Message:
        nonlocal told
        if told:
            return await afterwards()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _never() -> Message:
    """What the app hears of its reader's departure: nothing, for it is cancelled instead."""
    forever: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    return await forever


async def _stopped(*tasks: asyncio.Future[Any]) -> None:
    """Cancel *tasks*, and wait for their end.

    Again after a while: `asyncio.wait_for` of Python 3.11 keeps a cancellation to itself when what it waits for has
    just come, and an app would wait on for the next event.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # the body of a read, which means nothing


async def _lifespan(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    """Let *app* take part in start-up and shutdown, and answer for it when it ignores them."""
    heard: list[str] = []
    said: list[str] = []

    async def hear() -> Message:
        message = await receive()
        heard.append(message["type"])
        return message

    async def say(message: Message) -> None:
        said.append(message["type"])
        await send(message)

    await app(scope, hear, say)
    for phase in ("lifespan.startup", "lifespan.shutdown"):
        if f"{phase}.failed" in said:
            break
        if phase not in heard:
            await receive()
        if f"{phase}.complete" not in said:
            await send({"type": f"{phase}.complete"})
