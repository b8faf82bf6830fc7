"""The two stream clients: connections and sending, nothing else.

Each keeps its connections alive and makes them when first needed: once per process (a forked child makes its own), and
for the asynchronous one once per event loop. What a request means is in `protocol`.

They use httpx's transports, which keep the connections, and not its clients: redirects, cookies and a line in the log
for each request are a third of its work, and none of them is wanted.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
import time
from contextlib import aclosing, closing
from weakref import WeakKeyDictionary

import httpx

from . import jitter
from .errors import StreamTimeout, StreamUnavailable
from .names import shard_of
from .outbox import FrameId
from .protocol import (
    BEGINNING,
    Appended,
    Created,
    ReadPage,
    StreamRequest,
    StreamResponse,
    append_request,
    close_request,
    create_request,
    delete_request,
    head_request,
    read_appended,
    read_closed,
    read_created,
    read_deleted,
    read_head,
    read_page,
    read_request,
    retry_after,
)
from .settings import Settings, seconds
from .tokens import Gatekeeper

ATTEMPTS = 3
"""How often a repeatable request is sent before its error is raised."""

# Below the 5 s after which the npm reference server drops an idle connection (measured): a request on a connection
# that is just being closed gets no answer, and nobody knows whether it took effect.
_LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=4.0)
_LONGEST_WAIT = 2.0

stand_ins: dict[str, httpx.MockTransport] = {}
"""Origins (`http://host`) that are answered inside this process, for tests; see `testing.MemoryStreams`."""


def _stand_in(request: httpx.Request) -> httpx.MockTransport | None:
    return stand_ins.get(f"{request.url.scheme}://{request.url.netloc.decode()}") if stand_ins else None


def certificates_for(*urls: str) -> ssl.SSLContext:
    """Whom a client of *urls* trusts: the authorities of certifi, or those that `SSL_CERT_FILE` or `SSL_CERT_DIR` name.

    To read them takes 50 ms, so not where no server has a certificate. Of the environment only these two count: a proxy
    for the world outside must not come between an application and its stream server.
    """
    if any(url.startswith("https:") for url in urls):
        return httpx.create_ssl_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody


def _remedy_for(reason: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return "Of a private authority, name the certificate in the environment: SSL_CERT_FILE"
    return "Is it running, and is server_url right?"


class _Sending:
    """What both clients share: URLs, headers, what an httpx error means, and when to try again."""

    def __init__(self, settings: Settings, gatekeeper: Gatekeeper) -> None:
        self._bases = settings.server_urls
        self._timeouts = httpx.Timeout(seconds(settings.request_timeout)).as_dict()
        self._gatekeeper = gatekeeper

    def _http_request(self, request: StreamRequest) -> httpx.Request:
        return httpx.Request(
            request.method,
            f"{self._bases[shard_of(request.stream, len(self._bases))]}/{request.path}",
            headers={
                **request.headers,
                "Authorization": f"Bearer {self._gatekeeper.server_token()}",
                "User-Agent": "broadcastable",
            },
            content=request.body,
            extensions={"timeout": self._timeouts},
        )

    def _failure(self, request: StreamRequest, error: httpx.TransportError) -> StreamUnavailable:
        reason = str(error) or type(error).__name__
        where = self._bases[shard_of(request.stream, len(self._bases))]
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.UnsupportedProtocol):
            return StreamUnavailable(
                f"The stream server at {where} cannot be reached (stream {request.stream!r}): "
                f"{reason}. {_remedy_for(reason)}",
                stream=request.stream,
            )
        return StreamTimeout(
            f"The stream server at {where} gave no answer (stream {request.stream!r}): {reason}. The request "
            "may or may not have taken effect",
            stream=request.stream,
        )

    @staticmethod
    def _again(request: StreamRequest, attempt: int, outcome: StreamResponse | StreamUnavailable) -> float | None:
        """Seconds to wait before the next attempt, or None when *outcome* is final."""
        if isinstance(outcome, StreamTimeout):
            wanted = None if request.repeatable else -1.0
        elif isinstance(outcome, StreamUnavailable):
            wanted = None
        elif outcome.status == 429 or outcome.status >= 500:
            # An answered request was not stored, so even one that is not repeatable may be sent again.
            wanted = retry_after(outcome.headers.get("Retry-After"))
        else:
            return None
        if attempt >= ATTEMPTS or wanted == -1.0 or (wanted or 0) > _LONGEST_WAIT:
            return None
        return wanted if wanted is not None else 0.05 * 2**attempt * jitter.between(0.5, 1.0)


class StreamClient(_Sending):
    """Sends requests to the stream server, from any thread. Use as a context manager, or `close()`.

    Args:
        transport: An httpx transport in place of the network, for tests and `testing.MemoryStreams`.
    """

    def __init__(
        self, settings: Settings, gatekeeper: Gatekeeper, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        super().__init__(settings, gatekeeper)
        self._transport = transport
        self._lock = threading.Lock()
        self._http: httpx.BaseTransport | None = None
        self._pid = 0

    def _connections(self) -> httpx.BaseTransport:
        http = self._http
        if http is not None and self._pid == os.getpid():
            return http
        with self._lock:
            # A child that shared its parent's sockets would read the parent's answers.
            if self._http is None or self._pid != os.getpid():
                self._http = self._transport or httpx.HTTPTransport(
                    limits=_LIMITS, trust_env=False, verify=certificates_for(*self._bases)
                )
                self._pid = os.getpid()
            return self._http

    def _send(self, request: httpx.Request) -> StreamResponse:
        transport = _stand_in(request) or self._connections()
        with closing(transport.handle_request(request)) as response:
            return StreamResponse(response.status_code, response.headers, response.read())

    def prepare(self) -> None:
        """Load what the first request needs, which takes up to 100 ms; connects to nothing."""
        self._connections()

    def send(self, request: StreamRequest, *, attempts: int = ATTEMPTS) -> StreamResponse:
        """Send *request*; a repeatable one up to *attempts* times, with backoff, jitter and `Retry-After`.

        Raises:
            StreamUnavailable: Not reached.
            StreamTimeout: No answer; only after the last attempt, or at once when it is not repeatable.
        """
        attempt = ATTEMPTS - attempts
        while True:
            attempt += 1
            outcome: StreamResponse | StreamUnavailable
            try:
                outcome = self._send(self._http_request(request))
            except httpx.TransportError as error:
                outcome = self._failure(request, error)
                outcome.__cause__ = error
            wait = self._again(request, attempt, outcome)
            if wait is not None:
                time.sleep(wait)
            elif isinstance(outcome, StreamUnavailable):
                raise outcome
            else:
                return outcome

    def create(self, stream: str, *, ttl: int | None = None) -> Created:
        """Make *stream* unless it exists. Repeatable."""
        return read_created(self.send(create_request(stream, ttl=ttl)), stream)

    def append(self, stream: str, body: bytes, frame: FrameId | None = None, *, attempts: int = ATTEMPTS) -> Appended:
        """Store the JSON array *body* at the end of *stream*.

        Safe to repeat with the same *frame* while the server keeps its producer state (protocol, 5.2.1). Without a
        frame a `StreamTimeout` is raised at once, and sending again may store *body* twice.

        Raises:
            StreamNotFound: No such stream; provision and try again.
            StreamUnavailable: Not reached, too slow, 429 or 5xx.
        """
        response = self.send(append_request(stream, body, frame), attempts=attempts)
        return read_appended(response, stream, produced=frame is not None)

    def head(self, stream: str) -> str:
        """The tail offset of *stream*. Repeatable."""
        return read_head(self.send(head_request(stream)), stream)

    def read(self, stream: str, offset: str = BEGINNING) -> ReadPage:
        """Events after *offset*, as many as the server gives at once. Repeatable."""
        return read_page(self.send(read_request(stream, offset)), stream)

    def delete(self, stream: str) -> bool:
        """Delete *stream*; False when there was none. Repeatable."""
        return read_deleted(self.send(delete_request(stream)), stream)

    def close_stream(self, stream: str) -> str | None:
        """Let nothing be appended to *stream* any more; its final offset. Repeatable."""
        return read_closed(self.send(close_request(stream)), stream)

    def close(self) -> None:
        """Close the connections. The client may be used again; it connects anew."""
        with self._lock:
            http, self._http = self._http, None
        if http is not None and self._pid == os.getpid():
            http.close()


class AsyncStreamClient(_Sending):
    """`StreamClient` for asyncio: the same methods, awaited. One set of connections for each event loop."""

    def __init__(
        self, settings: Settings, gatekeeper: Gatekeeper, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        super().__init__(settings, gatekeeper)
        self._transport = transport
        self._https: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncBaseTransport] = WeakKeyDictionary()

    def _connections(self) -> httpx.AsyncBaseTransport:
        loop = asyncio.get_running_loop()
        http = self._https.get(loop)
        if http is None:
            http = self._https[loop] = self._transport or httpx.AsyncHTTPTransport(
                limits=_LIMITS, trust_env=False, verify=certificates_for(*self._bases)
            )
        return http

    async def _send(self, request: httpx.Request) -> StreamResponse:
        transport = _stand_in(request) or self._connections()
        async with aclosing(await transport.handle_async_request(request)) as response:
            return StreamResponse(response.status_code, response.headers, await response.aread())

    async def send(self, request: StreamRequest, *, attempts: int = ATTEMPTS) -> StreamResponse:
        """See `StreamClient.send`."""
        attempt = ATTEMPTS - attempts
        while True:
            attempt += 1
            outcome: StreamResponse | StreamUnavailable
            try:
                outcome = await self._send(self._http_request(request))
            except httpx.TransportError as error:
                outcome = self._failure(request, error)
                outcome.__cause__ = error
            wait = self._again(request, attempt, outcome)
            if wait is not None:
                await asyncio.sleep(wait)
            elif isinstance(outcome, StreamUnavailable):
                raise outcome
            else:
                return outcome

    async def create(self, stream: str, *, ttl: int | None = None) -> Created:
        """See `StreamClient.create`."""
        return read_created(await self.send(create_request(stream, ttl=ttl)), stream)

    async def append(
        self, stream: str, body: bytes, frame: FrameId | None = None, *, attempts: int = ATTEMPTS
    ) -> Appended:
        """See `StreamClient.append`."""
        response = await self.send(append_request(stream, body, frame), attempts=attempts)
        return read_appended(response, stream, produced=frame is not None)

    async def head(self, stream: str) -> str:
        """See `StreamClient.head`."""
        return read_head(await self.send(head_request(stream)), stream)

    async def read(self, stream: str, offset: str = BEGINNING) -> ReadPage:
        """See `StreamClient.read`."""
        return read_page(await self.send(read_request(stream, offset)), stream)

    async def delete(self, stream: str) -> bool:
        """See `StreamClient.delete`."""
        return read_deleted(await self.send(delete_request(stream)), stream)

    async def close_stream(self, stream: str) -> str | None:
        """See `StreamClient.close_stream`."""
        return read_closed(await self.send(close_request(stream)), stream)

    async def close(self) -> None:
        """Close this event loop's connections."""
        http = self._https.pop(asyncio.get_running_loop(), None)
        if http is not None:
            await http.aclose()
