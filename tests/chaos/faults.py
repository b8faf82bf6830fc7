"""A proxy between relay and stream server that loses, delays and repeats what passes."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import httpx


class FaultyTransport(httpx.BaseTransport):
    """Sends requests on to a real server, and does harm to *share* of them.

    Lost on the way there, lost on the way back (the server has it), held up, sent twice, or cut off: each is what a
    network or a proxy may do to one HTTP request.
    """

    def __init__(self, *, share: float, seed: int) -> None:
        self._server = httpx.HTTPTransport(limits=httpx.Limits(keepalive_expiry=2.0))
        self._random = random.Random(seed)
        self._share = share
        self._lock = threading.Lock()
        self.harm: Counter[str] = Counter()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        with self._lock:
            kinds = ("lose request", "lose answer", "delay", "repeat", "refuse")
            kind = self._random.choice(kinds) if self._random.random() < self._share else None
            pause = self._random.uniform(0.001, 0.05)
        if kind is None:
            return self._send(request)
        self.harm[kind] += 1
        match kind:
            case "lose request":
                raise httpx.ReadTimeout("the request was lost", request=request)
            case "refuse":
                raise httpx.ConnectError("the connection was refused", request=request)
            case "delay":
                time.sleep(pause)
                return self._send(request)
            case "repeat":
                self._send(request)
                return self._send(request)
            case _:
                self._send(request)
                raise httpx.RemoteProtocolError("the answer was lost", request=request)

    def _send(self, request: httpx.Request) -> httpx.Response:
        response = self._server.handle_request(request)
        content = response.read()
        response.close()
        return httpx.Response(response.status_code, headers=response.headers, content=content, request=request)

    def close(self) -> None:
        self._server.close()
