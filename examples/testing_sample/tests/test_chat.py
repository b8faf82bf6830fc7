from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import httpx
import pytest
import sqlalchemy as sa
from models import Message, Room
from sqlalchemy.ext.asyncio import AsyncSession

from broadcastable import DurableStreams
from broadcastable.testing import (
    MemoryStreams,
    Recording,
    assert_broadcasts,
    assert_no_broadcasts,
    capture_broadcasts,
    freeze_txid,
)

pytestmark = pytest.mark.anyio


async def test_a_new_room_is_seen_on_the_list_of_rooms(client: httpx.AsyncClient) -> None:
    async with assert_broadcasts("rooms", count=1, operation="insert", value={"name": "Kitchen"}):
        await client.post("/rooms", json={"name": "Kitchen"})


async def test_a_message_is_seen_in_its_room_and_nowhere_else(
    client: httpx.AsyncClient, room: Room, session: AsyncSession
) -> None:
    cellar = Room(name="Cellar")
    session.add(cellar)
    await session.commit()
    async with assert_broadcasts(room, "messages", count=1, type="message"), assert_no_broadcasts(cellar):
        response = await client.post(f"/rooms/{room.id}/messages", json={"author": "Ada", "text": "Hi"})
    assert response.status_code == 201


async def test_the_page_is_told_the_id_under_which_its_change_arrives(client: httpx.AsyncClient, room: Room) -> None:
    async with capture_broadcasts(room, "messages") as seen:
        response = await client.post(f"/rooms/{room.id}/messages", json={"author": "Ada", "text": "Hi"})
    assert [each.txid for each in seen] == [response.json()["txid"]]


async def test_a_refused_request_is_not_seen(client: httpx.AsyncClient, room: Room) -> None:
    async with assert_no_broadcasts():
        assert (await client.post("/rooms/999/messages", json={"author": "Ada", "text": "Hi"})).status_code == 404
        assert (await client.post(f"/rooms/{room.id}/messages", json={"author": "Ada"})).status_code == 422


async def test_a_draft_is_seen_once_it_is_published(
    client: httpx.AsyncClient, room: Room, broadcasts: Recording
) -> None:
    draft = {"author": "Ada", "text": "Hi", "draft": True}
    message = (await client.post(f"/rooms/{room.id}/messages", json=draft)).json()["id"]
    assert_no_broadcasts(room, "messages")
    await client.put(f"/messages/{message}", json={**draft, "draft": False})
    assert_broadcasts(room, "messages", count=1, operation="insert", key=message)
    await client.put(f"/messages/{message}", json=draft)
    assert_broadcasts(room, "messages", count=1, operation="delete", key=message)


async def test_saving_without_a_change_is_not_seen(client: httpx.AsyncClient, room: Room) -> None:
    new = {"author": "Ada", "text": "Hi"}
    message = (await client.post(f"/rooms/{room.id}/messages", json=new)).json()["id"]
    async with assert_no_broadcasts():
        await client.put(f"/messages/{message}", json=new)


async def test_typing_is_told_at_once_and_not_stored(
    client: httpx.AsyncClient, room: Room, session: AsyncSession, memory_streams: MemoryStreams
) -> None:
    async with assert_broadcasts(room, "typing", count=1, value={"author": "Ada"}):
        await client.post(f"/rooms/{room.id}/typing?author=Ada")
    assert memory_streams.events(room, "typing") == [{"author": "Ada"}]
    assert await session.scalar(sa.select(sa.func.count()).select_from(Message)) == 0


async def test_the_readers_of_a_room_learn_that_it_is_closed(client: httpx.AsyncClient, room: Room) -> None:
    async with capture_broadcasts(room) as seen:
        await client.delete(f"/rooms/{room.id}")
    told = {each.stream: each.payload if each.operation is None else each.operation for each in seen}
    assert told == {f"gid://app/Room/{room.id}": "delete", f"gid://app/Room/{room.id}/messages": {"closed": True}}


async def test_a_visitor_may_read_the_messages_of_the_room_and_gets_them(
    client: httpx.AsyncClient,
    room: Room,
    durable_streams: DurableStreams,
    memory_streams: MemoryStreams,
    drain: Callable[[], None],
) -> None:
    url = (await client.get(f"/rooms/{room.id}")).json()["messages"]
    token = httpx.URL(url).params["token"]
    claims = durable_streams.gatekeeper.decode(token)
    assert (claims["stream"], claims["permissions"]) == (f"gid://app/Room/{room.id}/messages", ["read"])

    await client.post(f"/rooms/{room.id}/messages", json={"author": "Ada", "text": "Hi"})
    drain()
    async with httpx.AsyncClient(transport=memory_streams) as visitor:
        events = (await visitor.get(url)).json()
    assert [each["value"]["text"] for each in events] == ["Hi"]


async def test_an_event_is_what_the_page_expects_to_the_letter(client: httpx.AsyncClient, room: Room) -> None:
    with freeze_txid("tx-1", clock=datetime(2026, 1, 1, tzinfo=UTC)):
        async with capture_broadcasts(room, "messages") as seen:
            response = await client.post(f"/rooms/{room.id}/messages", json={"author": "Ada", "text": "Hi"})
    key = str(response.json()["id"])
    assert [each.payload for each in seen] == [
        {
            "type": "message",
            "key": key,
            "value": {"id": key, "room_id": str(room.id), "author": "Ada", "text": "Hi", "draft": False},
            "headers": {"operation": "insert", "txid": "tx-1", "timestamp": "2026-01-01T00:00:00.000Z"},
        }
    ]
