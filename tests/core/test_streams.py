"""The verbs of both twins against a real stream server behind the gatekeeper."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from broadcastable import aio, verbs
from broadcastable.durable_streams import AsyncDurableStreams, DurableStreams, current
from broadcastable.errors import (
    BlankStreamables,
    ConfigurationError,
    InvalidStreamName,
    StreamClosed,
    StreamConflict,
    StreamUnavailable,
    UnknownPermission,
    UsageError,
)
from broadcastable.protocol import create_request, head_request
from broadcastable.server.embedded import EmbeddedServer, embedded_server
from broadcastable.settings import Settings, override
from tests import services


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with embedded_server(settings=Settings()) as server:
        yield server


@pytest.fixture
def streams(server: EmbeddedServer) -> Iterator[DurableStreams]:
    with DurableStreams(server.settings) as streams:
        yield streams


@pytest.fixture
def name() -> str:
    return f"rooms/{uuid.uuid4()}"


def read(streams: DurableStreams, name: str) -> list[Any]:
    return [json.loads(event) for event in streams.client.read(name).events]


def public_methods(cls: type) -> dict[str, Any]:
    return {name: each for name, each in inspect.getmembers(cls, inspect.isfunction) if not name.startswith("_")}


ONLY_SYNC = {"use_broker", "stage", "announce", "withdraw", "committed"}


def test_the_twins_have_the_same_verbs() -> None:
    sync, twin = public_methods(DurableStreams), public_methods(AsyncDurableStreams)
    assert set(sync) - ONLY_SYNC == set(twin)
    for verb, method in twin.items():
        theirs = inspect.signature(sync[verb])
        assert str(inspect.signature(method)).replace("Async", "") == str(theirs).replace("Async", ""), verb
        if verb == "stream_snapshot":
            assert inspect.isasyncgenfunction(method)
        elif verb not in {"stream_name_from", "client_url_of"}:
            assert inspect.iscoroutinefunction(method), verb


def test_every_verb_is_a_function_of_both_front_doors() -> None:
    for verb in set(public_methods(AsyncDurableStreams)) - {"stream_name_from", "client_url_of", "append_now", "close"}:
        method = inspect.signature(getattr(DurableStreams, verb))
        for module in (verbs, aio):
            parameters = list(inspect.signature(getattr(module, verb)).parameters)
            assert [each for each in parameters if each != "self"] == list(method.parameters)[1:], verb


def test_an_event_is_there_when_the_verb_returns(streams: DurableStreams, name: str) -> None:
    txid = streams.broadcast_event_to(name, type="message", key=5, value={"body": "Hi"}, operation="insert")
    (event,) = read(streams, name)
    assert event.pop("headers").items() >= {"operation": "insert", "txid": txid}.items()
    assert event == {"type": "message", "key": "5", "value": {"body": "Hi"}}


def test_deferred_events_keep_their_order(streams: DurableStreams, name: str) -> None:
    for n in range(200):
        assert streams.broadcast_event_later_to(name, type="n", key=n, value={"n": n}, operation="upsert")
    streams.broadcast_later_to(name, typing=True)
    assert streams.drain(20)
    *events, typing = read(streams, name)
    assert [event["value"]["n"] for event in events] == list(range(200))
    assert typing == {"typing": True}


def test_an_upsert_is_written_as_the_published_schema_wants_it(streams: DurableStreams, name: str) -> None:
    streams.broadcast_event_to(name, type="n", key=1, value={}, operation="upsert", old_value={"a": 1})
    (event,) = read(streams, name)
    assert (event["headers"]["operation"], event["old_value"]) == ("update", {"a": 1})


@pytest.mark.parametrize("blank", [(), (None,), ("",), ([None, ""], ())])
def test_blank_streamables_send_nothing(blank: tuple[Any, ...]) -> None:
    streams = DurableStreams(server_url="http://127.0.0.1:9/nobody")
    event = {"type": "n", "key": 1, "operation": "delete"}
    assert streams.broadcast_event_to(*blank, **event) is None
    assert streams.broadcast_event_later_to(*blank, **event) is None
    assert streams.broadcast_to(*blank, a=1) is None
    assert streams.broadcast_later_to(*blank, a=1) is None
    for verb in (streams.signed_stream_url, streams.stream_offset, streams.close_stream, streams.delete_stream):
        with pytest.raises(BlankStreamables, match="Name a stream"):
            verb(*blank)


@pytest.mark.parametrize("bad", ["a/../b", "a?b", "__ds/x", "a//b", "/a", "a/", "a#b", "a\\b", "a\nb", "x" * 513])
def test_a_bad_name_is_refused_before_any_request(bad: str) -> None:
    streams = DurableStreams(server_url="http://127.0.0.1:9/nobody")
    for verb in (streams.signed_stream_url, streams.stream_offset, streams.ensure_stream_exists, streams.delete_stream):
        with pytest.raises(InvalidStreamName):
            verb(bad)
    with pytest.raises(InvalidStreamName):
        streams.broadcast_to(bad, a=1)


def test_wrong_arguments_are_named(streams: DurableStreams, name: str) -> None:
    with pytest.raises(UnknownPermission, match="read, write"):
        streams.signed_stream_url(name, permissions=("read", "admin"))
    with pytest.raises(UnknownPermission):
        streams.signed_stream_url(name, permissions=())
    with pytest.raises(UnknownPermission, match="got None"):
        streams.signed_stream_url(name, permissions=None)  # type: ignore[arg-type]
    for verb in (streams.signed_stream_url, streams.signed_stream_primitives):
        with pytest.raises(UsageError, match="a timedelta or a number of seconds; got '1h'"):
            verb(name, expires_in="1h")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="insert, update, upsert, delete"):
        streams.broadcast_event_to(name, type="n", key=1, value={}, operation="create")
    with pytest.raises(UsageError):
        streams.broadcast_event_to(name, type="", key=1, value={}, operation="insert")
    assert name not in streams.provisioner._names


def test_without_a_key_the_setting_and_the_command_are_named(server: EmbeddedServer, name: str) -> None:
    streams = DurableStreams(Settings(server_url=server.url))
    for verb in (streams.signed_stream_url, streams.stream_offset):
        with pytest.raises(ConfigurationError, match=r"signing_key[\s\S]*broadcastable keys generate"):
            verb(name)


def test_a_signed_url_reads_its_own_stream_only(streams: DurableStreams, name: str) -> None:
    url = streams.signed_stream_url(name, identity="ann", expires_in=60)
    streams.broadcast_to(name, a=1)
    assert httpx.get(url).json() == [{"a": 1}]
    other = streams.client_url_of(streams.ensure_stream_exists(name, "other"))
    token = url.partition("token=")[2]
    assert httpx.get(other, params={"token": token}).status_code == 403
    assert httpx.post(url, json={"a": 2}).status_code == 403
    assert streams.gatekeeper.decode(token).items() >= {"identity": "ann", "permissions": ["read"]}.items()


def test_an_offset_hides_what_was_there_and_shows_what_comes(streams: DurableStreams, name: str) -> None:
    streams.broadcast_to(name, n=1)
    offset = streams.stream_offset(name)
    streams.broadcast_to(name, n=2)
    assert [json.loads(event) for event in streams.client.read(name, offset).events] == [{"n": 2}]


def test_a_deleted_stream_heals(streams: DurableStreams, name: str) -> None:
    """Somebody deletes the stream behind our back, twice: both kinds of verbs make it again."""
    for verb in (streams.broadcast_to, streams.broadcast_later_to):
        verb(name, n=1)
        assert streams.drain(10)
        streams.client.delete(name)
        verb(name, n=2)
        assert streams.drain(20)
        assert read(streams, name) == [{"n": 2}]
    streams.client.delete(name)
    assert streams.stream_offset(name)


def test_a_wiped_server_heals(name: str) -> None:
    with embedded_server(settings=Settings()) as first:
        port = int(first.url.split(":")[2].split("/")[0])
        streams = DurableStreams(first.settings)
        streams.broadcast_later_to(name, n=1)
        assert streams.drain(10)
        settings = first.settings
    with embedded_server(port=port, settings=settings):
        streams.broadcast_later_to(name, n=2)
        streams.broadcast_to(f"{name}/now", n=3)
        assert streams.drain(20)
        assert read(streams, name) == [{"n": 2}]
        streams.close()


def test_redis_that_is_down_fails_no_broadcast(
    server: EmbeddedServer, name: str, valkey_server: services.Valkey
) -> None:
    valkey_server.kill()
    with DurableStreams(server.settings, redis_url=valkey_server.url) as streams:
        streams.broadcast_to(name, n=1)
        assert read(streams, name) == [{"n": 1}]


def test_a_closed_stream_takes_nothing_more(streams: DurableStreams, name: str) -> None:
    streams.broadcast_to(name, n=1)
    streams.close_stream(name)
    streams.close_stream(name)
    with pytest.raises(StreamClosed):
        streams.broadcast_to(name, n=2)
    assert streams.delete_stream(name) is True
    assert streams.delete_stream(name) is False


def test_a_closed_stream_is_followed_by_a_process_that_never_saw_it(streams: DurableStreams, name: str) -> None:
    """Its events are complete, and stay; what comes later is refused for the true reason."""
    streams.broadcast_to(name, n=1)
    streams.close_stream(name)
    with DurableStreams(streams.settings) as later:
        assert later.stream_offset(name) == streams.stream_offset(name)
        assert httpx.get(later.signed_stream_url(name)).json() == [{"n": 1}]
        with pytest.raises(StreamClosed):
            later.broadcast_to(name, n=2)
    with DurableStreams(streams.settings) as later:
        later.broadcast_later_to(name, n=2)
        assert later.drain(10)
        assert "is closed" in str(later.outbox.pending()[0].parked)


def test_a_stream_keeps_the_lifetime_that_it_was_made_with(
    streams: DurableStreams, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = [name, f"{name}/2"]
    for each in names:
        streams.broadcast_to(each, n=1)
    with DurableStreams(streams.settings, stream_ttl=3_600) as later:
        for each in names:
            later.broadcast_to(each, n=2)
            later.broadcast_later_to(each, n=3)
        assert later.drain(10)
        assert [read(later, each) for each in names] == [[{"n": 1}, {"n": 2}, {"n": 3}]] * 2
        later.broadcast_to(f"{name}/3", n=1)
        assert later.client.send(head_request(f"{name}/3")).headers["Stream-TTL"] == "3600"
    assert [record.levelname for record in caplog.records if "another lifetime" in record.message] == ["WARNING"]


def test_a_stream_of_another_content_type_is_named_so(streams: DurableStreams, name: str) -> None:
    made = replace(create_request(name), headers={"Content-Type": "text/plain"})
    assert streams.client.send(made).status == 201
    for verb in (streams.broadcast_to, streams.signed_stream_url):
        with pytest.raises(StreamConflict, match="holds text/plain"):
            verb(name)


def test_a_server_that_answers_500_leaves_nothing_half_done(name: str, server: EmbeddedServer) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(500))
    streams = DurableStreams(server.settings, transport=transport)
    with pytest.raises(StreamUnavailable, match="500"):
        streams.broadcast_to(name, n=1)
    with pytest.raises(StreamUnavailable):
        streams.signed_stream_url(name)
    assert name not in streams.provisioner._names


def test_override_changes_the_current_instance_and_gives_it_back(server: EmbeddedServer, name: str) -> None:
    outside = current()
    with override(server_url=server.url, signing_key=server.settings.signing_key):
        inside = current()
        assert inside is current()
        assert inside is not outside
        verbs.broadcast_to(name, n=1)
        assert read(inside, name) == [{"n": 1}]
        inside.close()
    assert current() is outside


@pytest.fixture
def run(server: EmbeddedServer) -> Iterator[Callable[..., Any]]:
    streams = DurableStreams(server.settings)

    def run(scenario: Callable[[AsyncDurableStreams], Any]) -> Any:
        async def main() -> Any:
            async with AsyncDurableStreams(streams) as twin:
                return await scenario(twin)

        return asyncio.run(main())

    yield run
    streams.close()


def test_the_asynchronous_verbs_do_the_same(run: Callable[..., Any], name: str) -> None:
    async def scenario(streams: AsyncDurableStreams) -> None:
        event = {"type": "n", "key": 1, "value": {}, "operation": "insert"}
        assert await streams.broadcast_event_to(name, **event)
        assert await streams.broadcast_event_later_to(name, **event)
        assert await streams.drain(10)
        assert await streams.broadcast_to(name, n=1)
        assert await streams.broadcast_later_to(name, n=2)
        assert await streams.drain(10)
        assert len((await streams.client.read(name)).events) == 4
        url, token = await streams.signed_stream_primitives(name)
        async with httpx.AsyncClient() as http:
            assert len((await http.get(url, params={"token": token})).json()) == 4
        await streams.client.delete(name)
        assert await streams.stream_offset(name)
        await streams.client.delete(name)
        await streams.broadcast_to(name, n=3)
        assert (await streams.client.read(name)).events == (b'{"n":3}',)
        await streams.close_stream(name)
        assert await streams.delete_stream(name)
        assert await streams.broadcast_to("", n=1) is None

    run(scenario)


def test_many_tasks_and_threads_at_once(streams: DurableStreams, name: str, run: Callable[..., Any]) -> None:
    threads = [
        threading.Thread(target=lambda i=i: [streams.broadcast_to(name, t=i, n=n) for n in range(10)]) for i in range(8)
    ]
    for thread in threads:
        thread.start()

    async def scenario(twin: AsyncDurableStreams) -> None:
        await asyncio.gather(*(twin.broadcast_to(name, t="task", n=n) for n in range(20)))

    run(scenario)
    for thread in threads:
        thread.join()
    events = read(streams, name)
    assert len(events) == 100
    for i in range(8):
        assert [event["n"] for event in events if event["t"] == i] == list(range(10))
