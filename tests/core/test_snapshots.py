"""The hand-off: rows and offset with nothing between them, whatever the session was doing before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy import ForeignKey
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from broadcastable import Broadcastable, snapshots, streams, streams_to, suppressing_streams
from broadcastable.durable_streams import AsyncDurableStreams, DurableStreams
from broadcastable.errors import BlankStreamables, StaleSnapshotError, UsageError
from broadcastable.server.embedded import EmbeddedServer, embedded_server
from broadcastable.settings import Settings
from tests import services


class Base(DeclarativeBase):
    type_annotation_map = {str: sa.String(200)}  # noqa: RUF012 - MariaDB wants a length


class Room(Base, Broadcastable):
    __tablename__ = "rooms"
    __streams__ = streams()
    id: Mapped[int] = mapped_column(primary_key=True)


class Message(Base, Broadcastable):
    __tablename__ = "messages"
    __streams__ = (
        streams_to("room", "messages"),
        streams_to(("bodies",), type="body", value=lambda message: {"text": message.body}, key="body"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    room_id: Mapped[int] = mapped_column(ForeignKey("rooms.id"))
    body: Mapped[str]
    secret: Mapped[str] = mapped_column(default="s", info={"stream": False})
    room: Mapped[Room] = relationship()


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with embedded_server(settings=Settings()) as server:
        yield server


@pytest.fixture
def durable_streams(server: EmbeddedServer) -> Iterator[DurableStreams]:
    with DurableStreams(server.settings) as durable_streams:
        yield durable_streams
        for room in range(1, 4):
            durable_streams.client.delete(f"gid://app/Room/{room}/messages")
            durable_streams.client.delete(f"gid://app/Room/{room}")
        durable_streams.client.delete("bodies")


@pytest.fixture
def tables(engine: sa.Engine, durable_streams: DurableStreams) -> sa.Engine:
    Base.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": durable_streams}) as session:
        session.add_all([Room(id=1), Message(id=1, room_id=1, body="one"), Message(id=2, room_id=1, body="two")])
        session.commit()
    assert durable_streams.drain(10)
    return engine


IN_ROOM = sa.select(Message).where(Message.room_id == 1).order_by(Message.id)


def test_rows_then_changes_with_nothing_between(tables: sa.Engine, durable_streams: DurableStreams) -> None:
    with Session(tables, info={"durable_streams": durable_streams}) as session:
        room = session.get_one(Room, 1)
        session.commit()
        snapshot = durable_streams.snapshot(session, IN_ROOM, room, "messages")
        assert not session.in_transaction()
        assert [event["value"] for event in snapshot.events] == [
            {"id": "1", "room_id": "1", "body": "one"},
            {"id": "2", "room_id": "1", "body": "two"},
        ]
        assert {(event["type"], event["headers"]["operation"]) for event in snapshot.events} == {("message", "insert")}
        session.add(Message(id=3, room_id=1, body="three"))
        session.commit()
    assert durable_streams.drain(10)
    page = durable_streams.client.read("gid://app/Room/1/messages", snapshot.offset)
    assert [json.loads(event)["key"] for event in page.events] == ["3"]
    assert durable_streams.gatekeeper.decode(snapshot.token)["stream"] == "gid://app/Room/1/messages"
    assert json.loads(snapshot.json()) == snapshot.as_dict()


def test_a_row_is_told_as_the_declaration_of_that_stream_tells_it(
    tables: sa.Engine, durable_streams: DurableStreams
) -> None:
    with Session(tables) as session:
        snapshot = durable_streams.snapshot(session, IN_ROOM, "bodies")
        assert [(each["type"], each["key"], each["value"]) for each in snapshot.events] == [
            ("body", "one", {"text": "one"}),
            ("body", "two", {"text": "two"}),
        ]
        elsewhere = durable_streams.snapshot(session, IN_ROOM, "rooms/of/mine")
        assert elsewhere.events[0]["value"] == {"id": "1", "room_id": "1", "body": "one"}
    durable_streams.delete_stream("rooms/of/mine")


def test_a_transaction_that_sees_the_present_is_used_and_left_open(
    postgres_url: str, durable_streams: DurableStreams
) -> None:
    engine = services.open_engine(postgres_url)
    Base.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": durable_streams}) as session:
        session.add(Room(id=1))
        session.commit()
        session.get(Room, 1)
        durable_streams.snapshot(session, IN_ROOM, "room")
        assert session.in_transaction()
    engine.dispose()
    durable_streams.delete_stream("room")


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_transaction_that_may_be_older_than_the_offset_is_refused(
    postgres_url: str, durable_streams: DurableStreams, level: str
) -> None:
    """Rows committed between that transaction's snapshot and the offset would be in neither."""
    engine = services.open_engine(postgres_url, isolation_level=level)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.scalars(IN_ROOM).all()
        with pytest.raises(StaleSnapshotError, match="rollback"):
            durable_streams.snapshot(session, IN_ROOM, "room")
        session.rollback()
        durable_streams.snapshot(session, IN_ROOM, "room")
    engine.dispose()
    durable_streams.delete_stream("room")


def test_an_open_sqlite_transaction_is_refused(sqlite_url: str, durable_streams: DurableStreams) -> None:
    engine = services.open_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.scalars(IN_ROOM).all()
        with pytest.raises(StaleSnapshotError):
            durable_streams.snapshot(session, IN_ROOM, "room")
    engine.dispose()
    durable_streams.delete_stream("room")


def test_uncommitted_changes_are_refused(tables: sa.Engine, durable_streams: DurableStreams) -> None:
    with Session(tables) as session:
        session.add(Room(id=9))
        with pytest.raises(StaleSnapshotError, match="not committed"):
            durable_streams.snapshot(session, IN_ROOM, "room")
    durable_streams.delete_stream("room")


def test_flushed_changes_that_are_not_committed_are_refused(postgres_url: str, durable_streams: DurableStreams) -> None:
    """Under READ COMMITTED the statement would show them, and a rollback would take them away without an event."""
    engine = services.open_engine(postgres_url)
    Base.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": durable_streams}) as session:
        session.add(Room(id=9))
        session.flush()
        with pytest.raises(StaleSnapshotError, match="not committed"):
            durable_streams.snapshot(session, sa.select(Room), "room")
    engine.dispose()
    durable_streams.delete_stream("room")


def test_rows_that_the_session_holds_are_told_as_they_are_now(
    tables: sa.Engine, durable_streams: DurableStreams
) -> None:
    """What an object remembers may be older than the offset; that change would never be read again."""
    with Session(tables, expire_on_commit=False) as session:
        held = session.get_one(Message, 1)
        session.commit()
        for number, read in enumerate((_bodies, _streamed_bodies)):
            with Session(tables, info={"durable_streams": durable_streams}) as other:
                other.get_one(Message, 1).body = f"changed {number}"
                other.commit()
            assert durable_streams.drain(10)
            assert read(durable_streams, session) == [f"changed {number}", "two"]
            assert held in session


def _bodies(durable_streams: DurableStreams, session: Session) -> list[str]:
    snapshot = durable_streams.snapshot(session, IN_ROOM, "gid://app/Room/1", "messages")
    return [event["value"]["body"] for event in snapshot.events]


def _streamed_bodies(durable_streams: DurableStreams, session: Session) -> list[str]:
    pieces = durable_streams.stream_snapshot(session, IN_ROOM, "gid://app/Room/1", "messages")
    return [event["value"]["body"] for event in json.loads(b"".join(pieces))["events"]]


def test_wrong_arguments_are_refused_before_anything_is_done(
    tables: sa.Engine, durable_streams: DurableStreams
) -> None:
    with Session(tables) as session:
        with pytest.raises(UsageError, match="one mapped class"):
            durable_streams.snapshot(session, sa.select(Message.id, Message.body), "room")
        with pytest.raises(BlankStreamables):
            durable_streams.snapshot(session, IN_ROOM, None)


def test_it_can_wait_until_the_outbox_has_caught_up(tables: sa.Engine, durable_streams: DurableStreams) -> None:
    with Session(tables, info={"durable_streams": durable_streams}) as session:
        for n in range(10, 60):
            session.add(Message(id=n, room_id=1, body=str(n)))
            session.commit()
        snapshot = durable_streams.snapshot(session, IN_ROOM, "gid://app/Room/1", "messages", wait=10)
    assert len(snapshot.events) == 52
    assert durable_streams.client.read("gid://app/Room/1/messages", snapshot.offset).events == ()


def test_a_large_result_comes_in_pieces(tables: sa.Engine, durable_streams: DurableStreams) -> None:
    with Session(tables, info={"durable_streams": durable_streams}) as session:
        session.add_all([Message(id=n, room_id=1, body="x") for n in range(3, 2503)])
        session.commit()
        pieces = list(durable_streams.stream_snapshot(session, IN_ROOM, "gid://app/Room/1", "messages"))
        assert len(pieces) == 5
        assert len(session.identity_map) == 0
    whole = json.loads(b"".join(pieces))
    assert [event["key"] for event in whole["events"]] == [str(n) for n in range(1, 2503)]
    assert set(whole) == {"offset", "url", "token", "events"}


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_the_asynchronous_twin_does_the_same(
    backend: str, request: pytest.FixtureRequest, durable_streams: DurableStreams
) -> None:
    engine = services.open_async_engine(request.getfixturevalue(f"{backend}_url"))

    async def main() -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncDurableStreams(durable_streams) as twin, AsyncSession(engine) as session:
            session.info["durable_streams"] = twin
            session.add_all([Room(id=1), Message(id=1, room_id=1, body="one")])
            await session.commit()
            assert await twin.drain(10)
            snapshot = await twin.snapshot(session, IN_ROOM, "gid://app/Room/1", "messages", wait=5)
            assert [event["key"] for event in snapshot.events] == ["1"]
            pieces = [piece async for piece in twin.stream_snapshot(session, IN_ROOM, "gid://app/Room/1", "messages")]
            assert json.loads(b"".join(pieces))["events"][0]["key"] == "1"
            session.add(Message(id=2, room_id=1, body="two"))
            await session.commit()
            assert await twin.drain(10)
            page = await twin.client.read("gid://app/Room/1/messages", snapshot.offset)
            assert [json.loads(event)["key"] for event in page.events] == ["2"]
        await engine.dispose()

    asyncio.run(main())


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_a_reader_that_leaves_an_asynchronous_snapshot_leaves_the_session_as_it_was(
    backend: str, request: pytest.FixtureRequest, durable_streams: DurableStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """The cursor is closed where its driver can be awaited, not by the collector."""
    engine = services.open_async_engine(request.getfixturevalue(f"{backend}_url"))

    async def main() -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncDurableStreams(durable_streams) as twin, AsyncSession(engine) as session:
            with suppressing_streams():
                session.add(Room(id=1))
                session.add_all([Message(id=n, room_id=1, body="one") for n in range(2 * snapshots.CHUNK_ROWS)])
                await session.commit()
            pieces = twin.stream_snapshot(session, IN_ROOM, "gid://app/Room/1", "messages")
            assert await anext(pieces)
            assert await anext(pieces)
            await pieces.aclose()
            assert not session.in_transaction()
            assert await session.scalar(sa.select(sa.func.count()).select_from(Message)) == 2 * snapshots.CHUNK_ROWS
        await engine.dispose()

    asyncio.run(main())
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
