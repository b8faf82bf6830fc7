"""Both clients: what goes out on the wire, what comes back as a result, and when a request is sent again."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import httpx
import pytest

from broadcastable import errors
from broadcastable.client import AsyncStreamClient, StreamClient
from broadcastable.outbox import FrameId
from broadcastable.protocol import retry_after
from broadcastable.settings import Settings
from broadcastable.tokens import Gatekeeper
from tests.core.origin import Origin, answer, lose_answer, lose_request, refuse_connection

ROOM = "gid://app/Room/1"
FRAME = FrameId("p", 1, 0)


@pytest.fixture
def client(origin: Origin, settings: Settings) -> Iterator[StreamClient]:
    client = StreamClient(settings, Gatekeeper(settings), transport=origin.transport())
    yield client
    client.close()


def test_the_twins_have_the_same_methods() -> None:
    for name, method in inspect.getmembers(StreamClient, inspect.isfunction):
        if name.startswith("_") or name == "prepare":  # that is for workers, which are threads
            continue
        twin = getattr(AsyncStreamClient, name)
        assert inspect.signature(method) == inspect.signature(twin), name
        assert inspect.iscoroutinefunction(twin), name


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (ROOM, "/v1/streams/gid://app/Room/1"),
        ("rooms/1 & 2;a=b,c", "/v1/streams/rooms/1%20&%202;a=b,c"),
        ("räume/日本", "/v1/streams/r%C3%A4ume/%E6%97%A5%E6%9C%AC"),
        ("gid://app/Doc/a%2Fb", "/v1/streams/gid://app/Doc/a%252Fb"),
        ("100%", "/v1/streams/100%25"),
    ],
)
def test_the_path_goes_out_as_written(client: StreamClient, origin: Origin, name: str, path: str) -> None:
    client.create(name)
    assert origin.requests == [("PUT", path)]
    assert list(origin.streams) == [name]


def test_every_operation_of_the_protocol(client: StreamClient) -> None:
    assert client.create(ROOM).new
    assert not client.create(ROOM).new
    assert not client.append(ROOM, b'[{"n":1},{"n":2}]', FRAME).duplicate
    assert client.append(ROOM, b'[{"n":1},{"n":2}]', FRAME).duplicate
    offset = client.head(ROOM)
    client.append(ROOM, b'[{"n":3}]')
    page = client.read(ROOM, offset)
    assert (page.events, page.up_to_date) == ((b'{"n":3}',), True)
    client.close_stream(ROOM)
    with pytest.raises(errors.StreamClosed):
        client.append(ROOM, b"[1]")
    assert client.delete(ROOM)
    assert not client.delete(ROOM)
    with pytest.raises(errors.StreamNotFound):
        client.head(ROOM)


VERBS: dict[str, Callable[[StreamClient], object]] = {
    "create": lambda client: client.create(ROOM),
    "append": lambda client: client.append(ROOM, b"[1]"),
    "append a frame": lambda client: client.append(ROOM, b"[1]", FRAME),
    "head": lambda client: client.head(ROOM),
    "read": lambda client: client.read(ROOM),
    "delete": lambda client: client.delete(ROOM),
    "close": lambda client: client.close_stream(ROOM),
}
ANSWERS: list[tuple[int, dict[str, str], type[errors.StreamError]]] = [
    (400, {}, errors.StreamRefused),
    (401, {}, errors.StreamForbidden),
    (403, {}, errors.StreamForbidden),
    (403, {"Producer_Epoch": "7"}, errors.ProducerFenced),
    (404, {}, errors.StreamNotFound),
    (405, {}, errors.StreamRefused),
    (409, {}, errors.StreamConflict),
    (409, {"Producer_Expected_Seq": "3"}, errors.ProducerGap),
    (409, {"Stream_Closed": "true"}, errors.StreamClosed),
    (410, {}, errors.StreamNotFound),
    (413, {}, errors.FrameTooLarge),
    (429, {}, errors.StreamUnavailable),
    (500, {}, errors.StreamUnavailable),
    (503, {"Retry_After": "60"}, errors.StreamUnavailable),
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("status", "headers", "error"), ANSWERS)
def test_every_refusal_has_a_name_for_every_operation(
    client: StreamClient,
    origin: Origin,
    verb: str,
    status: int,
    headers: dict[str, str],
    error: type[errors.StreamError],
) -> None:
    origin.faulty_methods = {"PUT", "POST", "HEAD", "GET", "DELETE"}
    origin.faults.extend([answer(status, **headers)] * 3)
    if verb == "delete" and status in {404, 410}:
        assert VERBS[verb](client) is False
        return
    if verb == "close" and headers.get("Stream_Closed"):
        VERBS[verb](client)
        return
    with pytest.raises(error) as raised:
        VERBS[verb](client)
    assert raised.value.stream == ROOM
    assert raised.value.status == status
    assert raised.value.retryable is (status == 429 or status >= 500)


@pytest.mark.parametrize("verb", ["create", "append", "append a frame", "head", "read"])
def test_a_success_that_no_stream_server_sent_is_none(settings: Settings, verb: str) -> None:
    """A maintenance page with 200 for everything, or a `server_url` that names another service."""
    page = httpx.Response(200, html="<p>We are back soon</p>")
    other = StreamClient(settings, Gatekeeper(settings), transport=httpx.MockTransport(lambda request: page))
    with pytest.raises(errors.StreamUnavailable, match="no Durable Streams server") as raised:
        VERBS[verb](other)
    assert raised.value.retryable


@pytest.mark.parametrize("body", [b"[NaN]", b"{}", b"[1,", b"[" * 100_000 + b"]" * 100_000])
def test_a_stream_that_holds_no_json_is_a_stream_error(settings: Settings, body: bytes) -> None:
    """Another writer's server may be less strict than ours; its readers catch one family of errors."""
    headers = {"Stream-Next-Offset": "1"}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, headers=headers, content=body))
    with_it = StreamClient(settings, Gatekeeper(settings), transport=transport)
    with pytest.raises(errors.StreamError, match="no JSON array") as raised:
        with_it.read(ROOM)
    assert (raised.value.stream, raised.value.retryable) == (ROOM, False)


def test_a_repeatable_request_is_sent_again(client: StreamClient, origin: Origin) -> None:
    client.create(ROOM)
    origin.faults.extend([lose_answer, answer(503)])
    assert client.append(ROOM, b"[1]", FRAME).duplicate
    assert origin.events(ROOM) == [1]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("told", "pauses"), [("0", [0.0]), ("1", [1.0]), ("1.5", None), (None, None), ("3", []), ("60", [])]
)
def test_the_next_attempt_comes_when_the_server_says_so(
    origin: Origin,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    told: str | None,
    pauses: list[float] | None,
    asynchronous: bool,
) -> None:
    """As long as `Retry-After` says, where that is not too long; else a short pause of our own."""
    slept: list[float] = []

    async def sleep(pause: float) -> None:
        slept.append(pause)

    # The module's own names, not the functions themselves: other threads of the process sleep too.
    monkeypatch.setattr("broadcastable.client.time", SimpleNamespace(sleep=slept.append))
    loops = {"sleep": sleep, "get_running_loop": asyncio.get_running_loop}
    monkeypatch.setattr("broadcastable.client.asyncio", SimpleNamespace(**loops))
    origin.faulty_methods = {"HEAD"}
    origin.faults.append(answer(503, **({} if told is None else {"Retry_After": told})))
    expected = pytest.raises(errors.StreamUnavailable) if pauses == [] else nullcontext()
    keeper = Gatekeeper(settings)
    with expected:
        if asynchronous:

            async def main() -> None:
                client = AsyncStreamClient(settings, keeper, transport=origin.transport())
                await client.create(ROOM)
                await client.head(ROOM)

            asyncio.run(main())
        else:
            client = StreamClient(settings, keeper, transport=origin.transport())
            client.create(ROOM)
            client.head(ROOM)
    if pauses is None:
        (pause,) = slept
        assert 0 < pause < 0.2
    else:
        assert slept == pauses


def test_an_append_without_a_frame_is_not_sent_again_when_nobody_knows(client: StreamClient, origin: Origin) -> None:
    client.create(ROOM)
    origin.faults.append(lose_answer)
    with pytest.raises(errors.StreamTimeout, match="may or may not"):
        client.append(ROOM, b"[1]")
    assert origin.events(ROOM) == [1]


@pytest.mark.parametrize("fault", [refuse_connection, answer(503), answer(429, Retry_After="0")])
def test_an_append_that_certainly_was_not_stored_is_sent_again(
    client: StreamClient, origin: Origin, fault: Callable[..., httpx.Response]
) -> None:
    client.create(ROOM)
    origin.faults.append(fault)
    client.append(ROOM, b"[1]")
    assert origin.events(ROOM) == [1]


def test_a_server_that_nobody_runs_is_named_with_what_to_do(settings: Settings) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        here = settings.replace(server_url=f"http://127.0.0.1:{unused.getsockname()[1]}/v1/streams")
        client = StreamClient(here, Gatekeeper(here))
        with pytest.raises(errors.StreamUnavailable, match="Is it running, and is server_url right") as raised:
            client.create(ROOM)
        assert not isinstance(raised.value, errors.StreamTimeout)
        client.close()


def test_no_error_shows_a_token(client: StreamClient, origin: Origin) -> None:
    origin.faulty_methods = {"PUT"}
    origin.faults.extend([lose_request] * 3)
    with pytest.raises(errors.StreamTimeout) as raised:
        client.create(ROOM)
    assert "eyJ" not in repr(raised.value)
    assert "eyJ" not in str(raised.value.__cause__)


def test_each_stream_goes_to_the_same_server_of_several(origin: Origin, settings: Settings) -> None:
    here = settings.replace(server_url=("http://a.test/v1/streams", "http://b.test/v1/streams"))
    hosts: dict[str, set[str]] = {}

    def handle(request: httpx.Request) -> httpx.Response:
        hosts.setdefault(request.url.path, set()).add(request.url.host)
        return origin.handle(request)

    client = StreamClient(here, Gatekeeper(here), transport=httpx.MockTransport(handle))
    for n in range(40):
        client.create(f"rooms/{n}")
        client.append(f"rooms/{n}", b"[1]")
    client.close()
    assert all(len(each) == 1 for each in hosts.values())
    assert set.union(*hosts.values()) == {"a.test", "b.test"}


def test_a_forked_child_has_connections_of_its_own(stream_server: object, settings: Settings) -> None:
    here = settings.replace(server_url=stream_server.url)  # type: ignore[attr-defined]
    client = StreamClient(here, Gatekeeper(here))
    client.create("forked")
    of_the_parent = client._connections()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            client.append("forked", b'["child"]')
            # Its own: on a shared socket either could read the other's answer, which seldom shows.
            os.write(write, b"ok" if client._connections() is not of_the_parent else b"no")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert os.read(read, 2) == b"ok"
    os.close(read)
    assert client._connections() is of_the_parent
    client.append("forked", b'["parent"]')
    assert client.read("forked").events == (b'"child"', b'"parent"')
    client.delete("forked")
    client.close()


def test_the_asynchronous_twin_works_in_several_event_loops(origin: Origin, settings: Settings) -> None:
    client = AsyncStreamClient(settings, Gatekeeper(settings), transport=origin.transport())

    async def append() -> None:
        await client.create(ROOM)
        origin.faults.append(answer(503))
        await client.append(ROOM, b"[1]")
        await client.close()

    asyncio.run(append())
    asyncio.run(append())
    assert origin.events(ROOM) == [1, 1]


@pytest.mark.parametrize(
    ("text", "wait"), [(None, None), ("3", 3.0), ("x", None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0)]
)
def test_retry_after(text: str | None, wait: float | None) -> None:
    assert retry_after(text) == wait
