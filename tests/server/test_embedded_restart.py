"""A stream server that is stopped and started again in the same process."""

from __future__ import annotations

import httpx
import pytest

from broadcastable.durable_streams import DurableStreams
from broadcastable.server.embedded import embedded_server
from broadcastable.settings import Settings


def read_live(durable_streams: DurableStreams, wanted: str) -> None:
    url = durable_streams.signed_stream_url("room")
    with httpx.stream("GET", f"{url}&offset=-1&live=sse", timeout=10) as response:
        assert any(wanted in line for line in response.iter_lines())


def test_a_restarted_server_has_the_same_address_and_streams() -> None:
    """`start` after `stop`: what was in memory is still there, and readers are told of what is new."""
    with embedded_server(settings=Settings()) as server, DurableStreams(server.settings) as durable_streams:
        durable_streams.broadcast_to("room", first=1)
        read_live(durable_streams, "upToDate")
        server.stop()
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)

        server.start()
        read_live(durable_streams, '"first":1')
        url = durable_streams.signed_stream_url("room")
        with httpx.stream("GET", f"{url}&offset=now&live=sse", timeout=10) as response:
            lines = response.iter_lines()
            assert any("upToDate" in line for line in lines)
            durable_streams.broadcast_to("room", second=2)
            assert any('"second":2' in line for line in lines)
