"""A reader of a stream, as a careful client is one: it goes on from its last offset, and takes what it is sure of."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx


async def tail(
    http: httpx.AsyncClient, url: str, token: Callable[[], str], *, offset: str = "-1"
) -> AsyncIterator[tuple[Any, str]]:
    """Every event after *offset*, with the offset after it, by SSE, for ever.

    Connects again with a new token when the response ends or is refused. A control event vouches for the data before it
    (protocol, 5.8): data without one is read again.
    """
    while True:
        pending: list[Any] = []
        kind, data = "", ""
        params = {"offset": offset, "live": "sse", "token": token()}
        async with http.stream("GET", url, params=params) as response:
            if response.status_code == 401:
                continue
            response.raise_for_status()
            async for line in response.aiter_lines():
                name, _, value = line.partition(":")
                if name == "event":
                    kind = value.strip()
                elif name == "data":
                    data += value
                elif line == "":
                    if kind == "data":
                        pending += json.loads(data)
                    elif kind == "control":
                        offset = json.loads(data)["streamNextOffset"]
                        for event in pending:
                            yield event, offset
                        pending = []
                    kind, data = "", ""
