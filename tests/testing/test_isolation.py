"""`isolated_durable_streams`, `drain` and `freeze_txid`: everything an application needs, and none of it real."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy.orm import Session

from broadcastable import AsyncDurableStreams, DurableStreams, current
from broadcastable.durable_streams import current_async
from broadcastable.errors import UsageError
from broadcastable.server import EmbeddedServer
from broadcastable.settings import configure, current_settings, override
from broadcastable.testing import (
    MemoryStreams,
    Recording,
    assert_broadcasts,
    capture_broadcasts,
    drain,
    freeze_txid,
    isolated_durable_streams,
)
from broadcastable.tokens import generate_key_pair
from tests.testing.chat import Message, Room

Drain = Callable[..., None]


def test_the_instance_is_the_default_in_every_thread() -> None:
    """Also in a pool that was started before, which no context reaches."""
    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(current_settings).result()
        with isolated_durable_streams() as isolated:
            assert current() is isolated
            assert pool.submit(current).result() is isolated
        assert pool.submit(current_settings).result() == before
    assert current_settings() == before


def test_it_stays_the_default_when_the_application_configures_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broadcastable.settings._default", None)
    with isolated_durable_streams() as isolated:
        configure(gid_app="chat")
        assert current() is isolated
    assert current_settings().gid_app == "chat"


def test_it_is_another_one_for_each_test_and_keeps_the_application_s_own_settings() -> None:
    own = override(gid_app="chat", keys_as_strings=False, signed_stream_url_expires_in=60)
    with own, isolated_durable_streams() as first, isolated_durable_streams(gid_app="other") as second:
        assert first is not second
        assert first.settings.server_url != second.settings.server_url
        assert first.settings.signing_key != second.settings.signing_key
        assert (first.settings.gid_app, second.settings.gid_app) == ("chat", "other")
        assert not first.settings.keys_as_strings
        assert first.settings.signed_stream_url_expires_in == 60


def test_signing_and_provisioning_need_no_server(
    durable_streams: DurableStreams, memory_streams: MemoryStreams, room: Room
) -> None:
    url, token = durable_streams.signed_stream_primitives(room, "messages", permissions=["read", "write"])
    assert url == f"{memory_streams.url}/gid://app/Room/1/messages"
    assert durable_streams.gatekeeper.decode(token)["stream"] == "gid://app/Room/1/messages"
    assert memory_streams.names() == ["gid://app/Room/1/messages"]
    assert durable_streams.ensure_stream_exists("rooms") == "rooms"
    before = durable_streams.stream_offset("rooms")
    durable_streams.broadcast_to("rooms", name="a")
    assert durable_streams.stream_offset("rooms") != before


def test_the_asynchronous_default_reaches_the_same_streams(
    durable_streams: DurableStreams, memory_streams: MemoryStreams
) -> None:
    async def scenario() -> None:
        verbs = current_async()
        assert verbs.sync is durable_streams
        assert await verbs.signed_stream_url("rooms")
        await verbs.broadcast_to("rooms", name="a")
        assert await verbs.stream_offset("rooms")
        await verbs.close()

    asyncio.run(scenario())
    assert memory_streams.events("rooms") == [{"name": "a"}]


def test_an_override_within_the_test_still_reaches_no_network(
    durable_streams: DurableStreams, memory_streams: MemoryStreams
) -> None:
    with override(token_audience="browsers"):
        current().broadcast_to("rooms", name="a")
        current().close()
    assert memory_streams.events("rooms") == [{"name": "a"}]


# Delivering


def test_deferred_events_are_read_back_once_they_are_drained(
    room: Room, session: Session, broadcasts: Recording, memory_streams: MemoryStreams, drain: Drain
) -> None:
    session.add(Message(room=room, body="Hi"))
    session.commit()
    assert memory_streams.events(room, "messages") == []
    drain()
    assert memory_streams.events(room, "messages") == [each.payload for each in broadcasts.on(room, "messages")]
    drain()
    assert len(memory_streams.events(room, "messages")) == 1


def test_immediate_events_are_read_back_at_once(
    durable_streams: DurableStreams, broadcasts: Recording, memory_streams: MemoryStreams
) -> None:
    durable_streams.broadcast_to("rooms", name="a")
    assert memory_streams.events("rooms") == [{"name": "a"}]
    assert [each.payload for each in broadcasts] == [{"name": "a"}]
    assert broadcasts[0].stream == "rooms"
    assert repr(broadcasts) == "<Recording of 1 broadcasts>"


def test_where_nothing_is_recorded_the_worker_delivers_and_drain_waits_for_it() -> None:
    memory = MemoryStreams()
    key = generate_key_pair().private_pem
    with DurableStreams(server_url=memory.url, signing_key=key, transport=memory) as own:
        for n in range(50):
            own.broadcast_later_to("rooms", n=n)
        drain(own, timeout=20.0)
    assert memory.events("rooms") == [{"n": n} for n in range(50)]


def test_each_instance_s_events_are_delivered_by_itself(broadcasts: Recording) -> None:
    """A tenant's own instance, with a transport of its own."""
    memory = MemoryStreams()
    with isolated_durable_streams(memory) as tenant:
        tenant.broadcast_later_to("rooms", name="a")
        drain()
        assert memory.events("rooms") == [{"name": "a"}]


def test_what_cannot_be_delivered_is_named(
    durable_streams: DurableStreams, broadcasts: Recording, drain: Drain
) -> None:
    durable_streams.ensure_stream_exists("closed")
    durable_streams.close_stream("closed")
    durable_streams.broadcast_later_to("closed", name="late")
    with pytest.raises(AssertionError, match=r"Not delivered:\n  closed: .*closed"):
        drain()


def test_what_can_be_delivered_is_although_something_else_cannot(
    durable_streams: DurableStreams, memory_streams: MemoryStreams, broadcasts: Recording, drain: Drain
) -> None:
    """Also that of other instances, and everything that cannot is named at once."""
    tenants = MemoryStreams()
    with isolated_durable_streams(tenants) as tenant:
        for streams in (durable_streams, tenant):
            streams.ensure_stream_exists("closed")
            streams.close_stream("closed")
        durable_streams.broadcast_later_to("closed", name="late")
        tenant.broadcast_later_to("closed", name="late")
        tenant.broadcast_later_to("rooms", name="a")
        durable_streams.broadcast_later_to("rooms", name="b")
        with pytest.raises(AssertionError) as failure:
            drain()
        assert str(failure.value).count("closed:") == 2
        assert tenants.events("rooms") == [{"name": "a"}]
        assert memory_streams.events("rooms") == [{"name": "b"}]


def test_events_reach_a_real_server_when_they_are_drained(stream_server: EmbeddedServer) -> None:
    with isolated_durable_streams(server_url=stream_server.url, signing_key=stream_server.settings.signing_key) as real:
        with capture_broadcasts("drained") as seen:
            real.broadcast_later_to("drained", name="later")
            real.broadcast_to("drained", name="now")
            drain(real)
        page = real.client.read("drained")
    assert [each.payload for each in seen] == [{"name": "later"}, {"name": "now"}]
    assert list(page.events) == [b'{"name":"later"}', b'{"name":"now"}']


# Readers


def test_a_reader_of_the_application_s_own_can_be_tested(
    durable_streams: DurableStreams, memory_streams: MemoryStreams
) -> None:
    url = durable_streams.signed_stream_url("rooms")
    durable_streams.broadcast_to("rooms", name="a")
    with httpx.Client(transport=memory_streams) as reader:
        first = reader.get(url, params={**httpx.URL(url).params, "offset": "-1", "live": "long-poll"})
        offset = first.headers["Stream-Next-Offset"]
        again = reader.get(url, params={**httpx.URL(url).params, "offset": offset, "live": "long-poll"})
        stream = reader.get(url, params={**httpx.URL(url).params, "offset": "-1", "live": "sse"})
    assert first.json() == [{"name": "a"}]
    assert again.status_code == 204
    assert stream.text == (
        'event: data\ndata: [{"name":"a"}]\n\n'
        f'event: control\ndata: {{"streamNextOffset": "{offset}", "streamCursor": "{offset}", "upToDate": true}}\n\n'
    )


def test_streams_can_be_forgotten_as_by_a_server_that_lost_its_memory(
    durable_streams: DurableStreams, memory_streams: MemoryStreams
) -> None:
    durable_streams.broadcast_to("rooms", name="a")
    memory_streams.clear()
    durable_streams.broadcast_to("rooms", name="b")
    assert memory_streams.events("rooms") == [{"name": "b"}]


# Whole events


def test_ids_and_time_can_be_frozen(room: Room, session: Session, broadcasts: Recording) -> None:
    with freeze_txid("tx-1", clock=datetime(2026, 1, 1, 12, tzinfo=UTC)):
        session.add(Message(room=room, body="Hi"))
        session.commit()
    assert [each.payload for each in broadcasts] == [
        {
            "type": "message",
            "key": "1",
            "value": {"id": "1", "room_id": "1", "body": "Hi"},
            "headers": {"operation": "insert", "txid": "tx-1", "timestamp": "2026-01-01T12:00:00.000Z"},
        }
    ]


def test_each_transaction_takes_the_next_id_and_the_last_ones_share_the_last(
    durable_streams: DurableStreams, broadcasts: Recording
) -> None:
    def event() -> str | None:
        return durable_streams.broadcast_event_to("rooms", type="room", key=1, value={}, operation="insert")

    with freeze_txid(["a", "b"]):
        assert [event() for _ in range(4)] == ["a", "b", "b", "b"]
    assert event() not in {"a", "b", None}
    with freeze_txid():
        assert event() == "txid"


def test_a_clock_may_go_on(durable_streams: DurableStreams, broadcasts: Recording) -> None:
    moments = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=n) for n in range(9))
    with freeze_txid(clock=lambda: next(moments)):
        for key in range(2):
            durable_streams.broadcast_event_to("rooms", type="room", key=key, value={}, operation="insert")
    assert [each.timestamp for each in broadcasts] == ["2026-01-01T00:00:00.000Z", "2026-01-01T00:00:01.000Z"]


@pytest.mark.parametrize("txid", [[], "", [""], [1], 5, None, b"tx"], ids=repr)
def test_what_is_no_id_is_refused(txid: Any) -> None:
    with pytest.raises(UsageError, match=r"^freeze_txid\(\)"), freeze_txid(txid):
        pass


def test_what_is_no_id_is_refused_when_its_turn_comes(durable_streams: DurableStreams, session: Session) -> None:
    """The ids may have no end, so they are not looked through before."""
    with freeze_txid(itertools.chain(["tx"], itertools.repeat(1))):  # type: ignore[arg-type]
        session.add(Room(name="Lobby"))
        session.commit()
        session.add(Room(name="Attic"))
        with pytest.raises(UsageError, match=r"^freeze_txid\(\) takes ids .* got 1$"):
            session.commit()
        session.rollback()


@pytest.mark.parametrize("clock", [date(2026, 1, 1), "2026-01-01T00:00:00Z", 0], ids=repr)
def test_what_is_no_clock_is_refused(clock: Any) -> None:
    """Each event would be lost after its commit."""
    with pytest.raises(UsageError, match=r"^freeze_txid\(clock=\.\.\.\)"), freeze_txid(clock=clock):
        pass


def test_a_frozen_id_holds_in_other_threads(durable_streams: DurableStreams) -> None:
    with ThreadPoolExecutor(1) as pool, freeze_txid("tx"), assert_broadcasts("rooms", count=1):
        event = pool.submit(
            durable_streams.broadcast_event_to, "rooms", type="room", key=1, value={}, operation="insert"
        )
        assert event.result() == "tx"


def test_the_asynchronous_twin_is_recorded_too(durable_streams: DurableStreams, broadcasts: Recording) -> None:
    async def scenario() -> None:
        async with AsyncDurableStreams(durable_streams) as verbs:
            await verbs.broadcast_to("rooms", name="now")
            await verbs.broadcast_later_to("rooms", name="later")

    asyncio.run(scenario())
    assert [(each.payload["name"], each.deferred) for each in broadcasts] == [("now", False), ("later", True)]
