"""A stream server inside the process: what is appended can be read back, without a socket, a thread or a wait.

It speaks enough of the Durable Streams Protocol for an application's own writers and readers: PUT, POST with producer
headers, HEAD, GET with offsets, DELETE and closing. It checks no tokens and never waits: a live read answers with what
there is and ends, and its reader comes back from the offset it was given.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote_to_bytes

import httpx
import msgspec

from broadcastable.client import stand_ins
from broadcastable.errors import ConfigurationError
from broadcastable.names import Streamable, stream_name_from
from broadcastable.protocol import BEGINNING, JSON, is_json

_numbers = itertools.count(1)


@dataclass(slots=True)
class _Stream:
    content_type: str
    ttl: str | None
    events: list[bytes] = field(default_factory=list)
    producers: dict[str, tuple[int, int]] = field(default_factory=dict)
    closed: bool = False
    last_frame: tuple[str, str, str] | None = None

    @property
    def tail(self) -> str:
        return f"{len(self.events):016d}"

    def after(self, offset: str) -> int | None:
        """How many events lie before *offset*; None when it is no offset of this stream."""
        if offset == BEGINNING:
            return 0
        if offset == "now":
            return len(self.events)
        return int(offset) if offset.isdecimal() and int(offset) <= len(self.events) else None


class MemoryStreams(httpx.MockTransport):
    """An httpx transport, for asyncio too, that keeps streams in memory. Thread safe.

    Give it to a `DurableStreams`, an `AsyncDurableStreams` or an httpx client of your own:

    >>> memory = MemoryStreams()
    >>> durable_streams = DurableStreams(server_url=memory.url, signing_key=key, transport=memory)
    >>> durable_streams.broadcast_to("news", headline="Rain")
    True
    >>> memory.events("news")
    [{'headline': 'Rain'}]

    The fixture `durable_streams` has one already: `memory_streams`.

    Args:
        path: The path under which it has its streams: that of the `server_url` with which it is used. A request for
            another path raises `ConfigurationError`. The host does not matter.

    Attributes:
        url: Where its streams are. No other object has the same, and no network knows it.
    """

    def __init__(self, *, path: str = "/v1/streams") -> None:
        super().__init__(self._answer)
        # RFC 6761, 6.4: names under .invalid never resolve, so what goes past this object fails at once.
        self._origin = f"http://streams-{next(_numbers)}.memory.invalid"
        self.url = f"{self._origin}/{path.strip('/')}".rstrip("/")
        self._root = httpx.URL(f"{self.url}/").raw_path
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The streams there are, in the order in which they were made."""
        with self._lock:
            return list(self._streams)

    def events(self, *streamables: Streamable) -> list[Any]:
        """Everything on one stream, oldest first, as parsed JSON; the empty list when there is no such stream."""
        with self._lock:
            stream = self._streams.get(stream_name_from(*streamables))
            stored = [] if stream is None else list(stream.events)
        return [json.loads(event) for event in stored]

    def clear(self) -> None:
        """Forget all streams, as a server that lost its memory."""
        with self._lock:
            self._streams.clear()

    @contextmanager
    def reachable(self) -> Iterator[None]:
        """Let every instance whose `server_url` is `url` reach this object, from all threads, until the end."""
        stand_ins[self._origin] = self
        try:
            yield
        finally:
            del stand_ins[self._origin]

    def _answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.split(b"?")[0]
        if not path.startswith(self._root):
            # A 404 would do for a reader, but a writer's streams would then be missing from `events` without a word.
            raise ConfigurationError(
                f"This MemoryStreams has its streams under {self._root.decode()} and is asked for {path.decode()}. "
                "Give it the path of the server_url: MemoryStreams(path=...)"
            )
        try:
            name = unquote_to_bytes(path.removeprefix(self._root)).decode()
        except UnicodeDecodeError:
            return httpx.Response(400)
        with self._lock:
            match request.method:
                case "PUT":
                    return self._create(name, request)
                case "POST":
                    return self._append(name, request)
                case "GET" | "HEAD":
                    return self._read(name, request)
                case "DELETE":
                    return httpx.Response(204 if self._streams.pop(name, None) else 404)
        return httpx.Response(405)

    def _create(self, name: str, request: httpx.Request) -> httpx.Response:
        content_type = request.headers.get("Content-Type") or "application/octet-stream"
        ttl = request.headers.get("Stream-TTL")
        closed = _closes(request)
        stream = self._streams.get(name)
        new = stream is None
        if stream is None:
            try:
                events = _events_of(request.content, _essence(content_type))
            except ValueError:
                return httpx.Response(400)
            stream = self._streams[name] = _Stream(content_type, ttl, events, closed=closed)
        elif (_essence(stream.content_type), stream.ttl, stream.closed) != (_essence(content_type), ttl, closed):
            return httpx.Response(409)
        return _response(201 if new else 200, stream, {"location": str(request.url)})

    def _append(self, name: str, request: httpx.Request) -> httpx.Response:
        stream = self._streams.get(name)
        if stream is None:
            return httpx.Response(404)
        closing = _closes(request)
        if stream.closed:
            frame = _frame(request)
            if frame is not None and frame == stream.last_frame:
                return _response(204, stream, {"producer-epoch": frame[1], "producer-seq": frame[2]})
            return _response(204 if closing and not request.content else 409, stream)
        content_type = request.headers.get("Content-Type")
        if request.content and content_type is None:
            return httpx.Response(400)
        if content_type is not None and request.content and _essence(content_type) != _essence(stream.content_type):
            return httpx.Response(409)
        try:
            events = _events_of(request.content, _essence(stream.content_type))
        except ValueError:
            return httpx.Response(400)
        if not events and not closing:
            return httpx.Response(400)
        produced, refused = _produced(stream, request)
        if refused is not None:
            return refused
        stream.events += events
        stream.closed = closing
        stream.last_frame = _frame(request)
        return _response(204 if produced is None else 200, stream, produced)

    def _read(self, name: str, request: httpx.Request) -> httpx.Response:
        stream = self._streams.get(name)
        if stream is None:
            return httpx.Response(404)
        if request.method == "HEAD":
            return _response(200, stream, None if stream.ttl is None else {"stream-ttl": stream.ttl})
        # The decoded form would turn a plus sign in an offset into a space.
        query = parse_qs(request.url.query.decode())
        live = query.get("live", [None])[0]
        start = stream.after(query.get("offset", [BEGINNING])[0])
        if start is None or (live is not None and "offset" not in query):
            return httpx.Response(400)
        body = b"".join(stream.events[start:])
        if _essence(stream.content_type) == JSON:
            body = b"[" + b",".join(stream.events[start:]) + b"]"
        headers = {"stream-up-to-date": "true", "cache-control": "no-store"}
        if live == "sse":
            return httpx.Response(
                200,
                headers={"content-type": "text/event-stream"},
                content=_sse(stream, body, start < len(stream.events)),
            )
        if live == "long-poll":
            headers["stream-cursor"] = stream.tail
            if start == len(stream.events):
                return _response(204, stream, headers)
        return _response(200, stream, headers, body)


def _essence(content_type: str) -> str:
    """The media type without its parameters."""
    return content_type.partition(";")[0].strip().lower()


def _closes(request: httpx.Request) -> bool:
    return bool(request.headers.get("Stream-Closed", "").lower() == "true")


def _frame(request: httpx.Request) -> tuple[str, str, str] | None:
    named = [request.headers.get(name) for name in ("Producer-Id", "Producer-Epoch", "Producer-Seq")]
    return None if None in named else (named[0], named[1], named[2])


def _events_of(body: bytes, content_type: str) -> list[bytes]:
    """The events in *body*; ValueError where they should be JSON and are not."""
    if content_type != JSON:
        return [body] if body else []
    if not body:
        return []
    if not is_json(body):
        raise ValueError("not JSON")
    # An array is taken apart by one level, anything else is one event (protocol, 7.1).
    if body.lstrip().startswith(b"["):
        return [bytes(event) for event in msgspec.json.decode(body, type=list[msgspec.Raw])]
    return [bytes(msgspec.json.decode(body, type=msgspec.Raw))]


def _produced(stream: _Stream, request: httpx.Request) -> tuple[dict[str, str] | None, httpx.Response | None]:
    """What an idempotent producer is told (protocol, 5.2.1): headers, or a refusal; both None without a producer."""
    producer = request.headers.get("Producer-Id")
    if producer is None:
        return None, None
    try:
        epoch, seq = int(request.headers["Producer-Epoch"]), int(request.headers["Producer-Seq"])
    except (KeyError, ValueError):
        return None, httpx.Response(400)
    known_epoch, known_seq = stream.producers.get(producer, (epoch, -1))
    if epoch < known_epoch:
        return None, httpx.Response(403, headers={"producer-epoch": str(known_epoch)})
    if epoch > known_epoch:
        if seq != 0:
            return None, httpx.Response(400)
        known_seq = -1
    if seq <= known_seq:
        return None, httpx.Response(204, headers={"producer-epoch": str(epoch), "producer-seq": str(known_seq)})
    if seq != known_seq + 1:
        expected = {"producer-expected-seq": str(known_seq + 1), "producer-received-seq": str(seq)}
        return None, httpx.Response(409, headers=expected)
    stream.producers[producer] = (epoch, seq)
    return {"producer-epoch": str(epoch), "producer-seq": str(seq)}, None


def _response(
    status: int, stream: _Stream, headers: dict[str, str] | None = None, content: bytes | None = None
) -> httpx.Response:
    headers = {"stream-next-offset": stream.tail, "content-type": stream.content_type, **(headers or {})}
    if stream.closed:
        headers["stream-closed"] = "true"
    return httpx.Response(status, headers=headers, content=content)


def _sse(stream: _Stream, body: bytes, some: bool) -> bytes:
    """What there is as one data event, then the control event that says where to go on (protocol, 5.8)."""
    control: dict[str, Any] = {"streamNextOffset": stream.tail}
    control |= {"streamClosed": True} if stream.closed else {"streamCursor": stream.tail, "upToDate": True}
    data = b"event: data\n" + b"".join(b"data: " + line + b"\n" for line in body.splitlines()) + b"\n"
    return (data if some else b"") + b"event: control\ndata: " + json.dumps(control).encode() + b"\n\n"
