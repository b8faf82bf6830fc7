"""`broadcastable.js` on the embedded stream server: what becomes of a page whose stream is not the one it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

import pytest
from playwright.sync_api import Browser, Page, Route

from broadcastable import static
from broadcastable.durable_streams import DurableStreams
from broadcastable.server.embedded import EmbeddedServer


@pytest.fixture
def streams(stream_server: EmbeddedServer) -> Iterator[DurableStreams]:
    streams = DurableStreams(stream_server.settings)
    yield streams
    streams.close()


class Room:
    """A stream whose rows an application keeps; each row is put on the stream at once."""

    def __init__(self, streams: DurableStreams, name: str) -> None:
        self._streams = streams
        self.name = name
        self.rows: list[str] = []

    def put(self, *keys: str) -> None:
        for key in keys:
            self.rows.append(key)
            self._streams.broadcast_event_to(self.name, type="row", key=key, value={"key": key}, operation="insert")

    def make_anew(self, *keys: str) -> None:
        """Delete the stream, and everything that was on it, and fill it again."""
        self._streams.delete_stream(self.name)
        self.rows.clear()
        self.put(*keys)

    def snapshot(self) -> dict[str, Any]:
        url, token = self._streams.signed_stream_primitives(self.name)
        events = [
            {"type": "row", "key": key, "value": {"key": key}, "headers": {"operation": "insert"}} for key in self.rows
        ]
        return {"url": url, "token": token, "offset": self._streams.client.head(self.name), "events": events}


@pytest.fixture
def room(streams: DurableStreams, request: pytest.FixtureRequest) -> Room:
    return Room(streams, f"browser/{id(request):x}")


@pytest.fixture
def page(browser: Browser, room: Room, stream_server: EmbeddedServer) -> Iterator[Page]:
    """A page that follows the room, with its rows in `shown()`."""
    # Of the stream server's own origin: Chromium lets no page from elsewhere ask a machine's own addresses.
    address = urljoin(stream_server.url, "/page/")

    def serve(route: Route) -> None:
        if route.request.url.endswith(".js"):
            route.fulfill(content_type="text/javascript", body=static.MODULE.read_text("utf-8"))
        else:
            route.fulfill(content_type="text/html", body="<!doctype html><title>empty</title>")

    context = browser.new_context()
    page = context.new_page()
    page.route(f"{address}**", serve)
    page.expose_function("snapshot", room.snapshot)
    page.goto(address)
    page.evaluate("""async () => {
      const { Rows, follow } = await import("/page/broadcastable.js");
      const rows = new Rows();
      globalThis.states = [];
      globalThis.shown = () => [...rows.of("row").keys()];
      globalThis.subscription = follow(null, {
        firstDelay: 50,
        longestDelay: 50,
        onSnapshot: (events) => { rows.clear(); rows.apply(events); },
        onEvents: (events) => rows.apply(events),
        onState: ({ state }) => states.push(state),
        refreshSnapshot: () => snapshot(),
      });
    }""")
    page.wait_for_function("subscription.state === 'live'")
    yield page
    context.close()


def test_a_stream_that_was_made_anew_and_grew_past_the_page_s_place_is_taken_anew(page: Page, room: Room) -> None:
    """While the page was away, so that it never met a 404. No row of the old stream stays."""
    room.put("1", "2", "3")
    page.wait_for_function("shown().length === 3")
    page.route("**/v1/streams/**", lambda route: route.abort())
    page.evaluate("subscription.reconnect()")
    page.wait_for_function("subscription.state === 'offline'")

    room.make_anew("a", "b", "c", "d", "e", "f")
    page.unroute("**/v1/streams/**")

    page.wait_for_function("subscription.state === 'live'")
    page.wait_for_function("shown().length === 6")
    room.put("g")
    page.wait_for_function("shown().length === 7")
    assert page.evaluate("shown()") == ["a", "b", "c", "d", "e", "f", "g"]


def test_a_page_that_is_connected_while_its_stream_is_made_anew_takes_it_anew(page: Page, room: Room) -> None:
    room.put("1", "2", "3")
    page.wait_for_function("shown().length === 3")

    room.make_anew("a", "b", "c", "d", "e", "f")

    page.wait_for_function("shown().includes('f')")
    assert page.evaluate("shown()") == ["a", "b", "c", "d", "e", "f"]
