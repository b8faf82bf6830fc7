"""Readers that join at any moment, by a snapshot and the tail after it, end with exactly the rows of the table.

`CHAOS_JOINS` sets how many join.
"""

from __future__ import annotations

import json
import os
import random
import threading
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from broadcastable import DurableStreams, Settings, Snapshot
from broadcastable.server.embedded import embedded_server
from tests import services
from tests.chaos.models import Message, Room, create

JOINS = int(os.environ.get("CHAOS_JOINS", "1000"))
READERS = 4
ROOMS = 5


def write_until(stop: threading.Event, engine: sa.Engine, streams: DurableStreams, seed: int) -> None:
    chance = random.Random(seed)
    while not stop.wait(chance.uniform(0, 0.02)):
        with Session(engine, info={"durable_streams": streams}) as session:
            # In the order of their ids, so that two moves do not wait for each other.
            first, second = sorted(chance.sample(range(1, ROOMS + 1), 2))
            rooms = [session.get_one(Room, room, with_for_update=True) for room in (first, second)]
            here, there = chance.sample(rooms, 2)
            message = session.scalars(sa.select(Message).where(Message.room_id == here.id).limit(1)).first()
            here.number += 1
            match chance.choice(("insert", "insert", "edit", "move", "delete")):
                case "edit" if message is not None:
                    message.number = here.number
                case "move" if message is not None:
                    message.room_id = there.id
                case "delete" if message is not None:
                    session.delete(message)
                case _:
                    session.add(Message(room_id=here.id, number=here.number, writer="w", body="x"))
            session.commit()


def join(engine: sa.Engine, streams: DurableStreams, room: int) -> Snapshot:
    with Session(engine) as session:
        in_room = sa.select(Message).where(Message.room_id == room)
        return streams.snapshot(session, in_room, f"gid://app/Room/{room}", "messages")


def tail(streams: DurableStreams, room: int, offset: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    page = streams.client.read(f"gid://app/Room/{room}/messages", offset)
    while page.events:
        events.extend(json.loads(event) for event in page.events)
        page = streams.client.read(f"gid://app/Room/{room}/messages", page.next_offset)
    return events


def fold(events: list[dict[str, Any]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for event in events:
        if event["headers"]["operation"] == "delete":
            rows.pop(event["key"], None)
        else:
            rows[event["key"]] = event["value"]
    return rows


def test_readers_that_join_while_writers_run_miss_nothing(postgres_url: str) -> None:
    create(postgres_url, ROOMS)
    engine = services.open_engine(postgres_url, pool_size=16)
    joined: list[tuple[int, Snapshot]] = []
    with embedded_server(settings=Settings()) as server:
        settings = server.settings.replace(outbox="database", database_url=postgres_url)
        with DurableStreams(settings) as streams:
            stop = threading.Event()
            writers = [threading.Thread(target=write_until, args=(stop, engine, streams, n)) for n in range(4)]

            def read(seed: int) -> None:
                chance = random.Random(seed)
                for _ in range(JOINS // READERS):
                    room = chance.randint(1, ROOMS)
                    joined.append((room, join(engine, streams, room)))

            readers = [threading.Thread(target=read, args=(n,)) for n in range(READERS)]
            for thread in (*writers, *readers):
                thread.start()
            for thread in readers:
                thread.join()
            stop.set()
            for thread in writers:
                thread.join()
            assert streams.drain(60)
            table = {room: fold(list(join(engine, streams, room).events)) for room in range(1, ROOMS + 1)}
            tails: dict[tuple[int, str], list[dict[str, Any]]] = {}
            offsets = {snapshot.offset for _, snapshot in joined}
            for room, snapshot in joined:
                place = (room, snapshot.offset)
                if place not in tails:
                    tails[place] = tail(streams, *place)
                assert fold([*snapshot.events, *tails[place]]) == table[room]
    engine.dispose()
    assert len(joined) == JOINS // READERS * READERS
    # They did join at different moments, and most of them had something to catch up with.
    assert len(offsets) > JOINS / 20
    assert sum(bool(tails[room, snapshot.offset]) for room, snapshot in joined) > JOINS / 2
    print(f"\n{len(joined)} joins at {len(offsets)} offsets, {sum(map(len, table.values()))} rows at the end")
