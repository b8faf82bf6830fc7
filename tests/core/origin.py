"""A stream server at the edge of the tests: an httpx transport with the protocol's rules and faults on demand."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote

import httpx


@dataclass
class Log:
    events: list[object] = field(default_factory=list)
    producers: dict[str, tuple[int, int]] = field(default_factory=dict)
    closed: bool = False


class Origin:
    """Keeps streams in memory and follows protocol 5.1 to 5.5 and 5.2.1.

    `faults` holds what happens to the next requests with a body or, with `only`, of one method: a callable that is
    given the request and a function that performs it, and returns or raises what the client sees.
    """

    def __init__(self) -> None:
        self.streams: dict[str, Log] = {}
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[tuple[str | None, bytes]] = []
        self.faults: deque[Callable[[httpx.Request, Callable[[], httpx.Response]], httpx.Response]] = deque()
        self.faulty_methods = {"POST"}
        self.most_bytes = 1 << 30
        self._lock = threading.Lock()

    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self.handle)

    def count(self, method: str) -> int:
        return sum(1 for each, _ in self.requests if each == method)

    def events(self, name: str) -> list[object]:
        return self.streams[name].events

    def handle(self, request: httpx.Request) -> httpx.Response:
        with self._lock:
            self.requests.append((request.method, request.url.raw_path.decode()))
            if self.faults and request.method in self.faulty_methods:
                return self.faults.popleft()(request, lambda: self._perform(request))
            return self._perform(request)

    def _perform(self, request: httpx.Request) -> httpx.Response:
        raw = request.url.raw_path.decode().partition("?")[0]
        name = unquote(raw.removeprefix("/v1/streams/"))
        if request.method == "PUT":
            made = name not in self.streams
            log = self.streams.setdefault(name, Log())
            return httpx.Response(201 if made else 200, headers=self._headers(log))
        found = self.streams.get(name)
        if found is None:
            return httpx.Response(404)
        if request.method == "POST":
            return self._append(request, found)
        if request.method == "HEAD":
            return httpx.Response(200, headers=self._headers(found))
        if request.method == "DELETE":
            del self.streams[name]
            return httpx.Response(204)
        offset = request.url.params.get("offset", "-1")
        start = 0 if offset == "-1" else int(offset)
        if start > len(found.events):
            return httpx.Response(400)
        return httpx.Response(
            200,
            # Not by `json=`, whose separators differ between versions of httpx.
            content=json.dumps(found.events[start:], separators=(",", ":")),
            headers=self._headers(found) | {"Stream-Up-To-Date": "true"},
        )

    def _append(self, request: httpx.Request, log: Log) -> httpx.Response:
        headers = request.headers
        self.bodies.append((headers.get("Producer-Seq"), request.content))
        if headers.get("Stream-Closed") == "true" and not request.content:
            log.closed = True
            return httpx.Response(204, headers=self._headers(log) | {"Stream-Closed": "true"})
        if log.closed:
            return httpx.Response(409, headers={"Stream-Closed": "true"})
        if len(request.content) > self.most_bytes:
            return httpx.Response(413)
        producer = headers.get("Producer-Id")
        if producer is not None:
            epoch, seq = int(headers["Producer-Epoch"]), int(headers["Producer-Seq"])
            known = log.producers.get(producer)
            if known is not None and epoch < known[0]:
                return httpx.Response(403, headers={"Producer-Epoch": str(known[0])})
            if known is None or epoch > known[0]:
                if seq != 0:
                    if known is None:
                        return httpx.Response(
                            409, headers={"Producer-Expected-Seq": "0", "Producer-Received-Seq": str(seq)}
                        )
                    return httpx.Response(400)
            elif seq <= known[1]:
                return httpx.Response(204, headers={"Producer-Seq": str(known[1])})
            elif seq > known[1] + 1:
                return httpx.Response(
                    409, headers={"Producer-Expected-Seq": str(known[1] + 1), "Producer-Received-Seq": str(seq)}
                )
            log.producers[producer] = (epoch, seq)
        body = json.loads(request.content)
        log.events.extend(body if isinstance(body, list) else [body])
        return httpx.Response(200 if producer else 204, headers=self._headers(log))

    @staticmethod
    def _headers(log: Log) -> dict[str, str]:
        return {"Stream-Next-Offset": f"{len(log.events):012d}"}


def answer(status: int, **headers: str) -> Callable[..., httpx.Response]:
    """Fault: the request is not performed; this is the answer."""
    return lambda request, perform: httpx.Response(
        status, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


def lose_request(request: httpx.Request, perform: Callable[[], httpx.Response]) -> httpx.Response:
    """Fault: the request never arrives, and no answer comes."""
    raise httpx.ReadTimeout("lost on the way there", request=request)


def lose_answer(request: httpx.Request, perform: Callable[[], httpx.Response]) -> httpx.Response:
    """Fault: the request takes effect, and its answer is lost."""
    perform()
    raise httpx.ReadError("lost on the way back", request=request)


def repeat(request: httpx.Request, perform: Callable[[], httpx.Response]) -> httpx.Response:
    """Fault: the request arrives twice; the client sees the second answer."""
    perform()
    return perform()


def refuse_connection(request: httpx.Request, perform: Callable[[], httpx.Response]) -> httpx.Response:
    """Fault: nobody listens."""
    raise httpx.ConnectError("connection refused", request=request)
