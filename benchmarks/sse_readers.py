"""Many SSE readers in one process, for `scale.py`: without a client library, so that they cost as little as can be.

Reads one JSON object a line from its input and answers each with one:

    {"open": [[url, token], ...]}    opens them all          {"open": n, "seconds": s, "each": [s, ...]}
    {"expect": key}                  one event has come      {"arrivals": [ns, ...]}, by the monotonic clock
    {"close": true}                  closes them all         {"closed": n, "cpu": s}
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from urllib.parse import urlsplit

AT_ONCE = 50
"""Connections opened at the same time: a crowd that comes back is spread by its own retries, too."""


class Reader(asyncio.Protocol):
    """One GET. The body is only searched for keys of events."""

    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url)
        self._request = (
            f"GET {parts.path}?offset=now&live=sse HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Authorization: Bearer {token}\r\nAccept: text/event-stream\r\n\r\n"
        ).encode()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.arrived: dict[str, int] = {}
        self.transport: asyncio.Transport | None = None
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self._seen += data
        if not self.opened.done():
            # Open is who has been told where the stream stands: from here on no event passes by.
            if b"event: control" not in self._seen and b" 200 " in self._seen[:16]:
                return
            if b" 200 " not in self._seen[:16]:
                self.opened.set_exception(ConnectionError(self._seen[:200].decode("latin-1")))
                return
            self.opened.set_result(None)
        *whole, self._seen = self._seen.split(b"\n")
        for line in whole:
            at = line.find(b'"key":"')
            if at >= 0:
                self.arrived[line[at + 7 : line.index(b'"', at + 7)].decode()] = now

    def connection_lost(self, error: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(error or ConnectionError("closed before it was open"))


async def open_all(addresses: list[list[str]]) -> tuple[list[Reader], list[float]]:
    gate = asyncio.Semaphore(AT_ONCE)
    loop = asyncio.get_running_loop()

    async def one(url: str, token: str) -> tuple[Reader, float]:
        async with gate:
            began = time.perf_counter()
            parts = urlsplit(url)
            _, reader = await loop.create_connection(lambda: Reader(url, token), parts.hostname, parts.port)
            await reader.opened
            return reader, time.perf_counter() - began

    found = await asyncio.gather(*(one(url, token) for url, token in addresses))
    return [reader for reader, _ in found], [took for _, took in found]


async def arrivals(readers: list[Reader], key: str) -> list[int]:
    deadline = time.monotonic() + 60
    while not all(key in reader.arrived for reader in readers):
        if time.monotonic() > deadline:
            raise SystemExit(f"the event {key} did not reach every reader")
        await asyncio.sleep(0.05)
    return [reader.arrived.pop(key) for reader in readers]


async def main() -> None:
    readers: list[Reader] = []
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        if "open" in order:
            began = time.perf_counter()
            readers, each = await open_all(order["open"])
            answer = {"open": len(readers), "seconds": time.perf_counter() - began, "each": each}
        elif "expect" in order:
            answer = {"arrivals": await arrivals(readers, order["expect"])}
        else:
            for reader in readers:
                assert reader.transport is not None
                reader.transport.abort()
            answer, readers = {"closed": len(readers), "cpu": time.process_time()}, []
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
