"""The three assertions, around a block and without one."""

from __future__ import annotations

import asyncio
import enum
import subprocess
import sys
import threading
from collections import UserList, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from broadcastable.durable_streams import AsyncDurableStreams, DurableStreams, current
from broadcastable.errors import BlankStreamables, UnsavedRecordError, UsageError
from broadcastable.testing import (
    Recording,
    assert_broadcasts,
    assert_no_broadcasts,
    capture_broadcasts,
    recording,
)
from tests.services import open_async_engine
from tests.testing.chat import Base, Message, Room, Seat


def insert(durable_streams: DurableStreams, *streamables: object, key: str = "1", **value: object) -> None:
    durable_streams.broadcast_event_to(*streamables, type="message", key=key, value=value, operation="insert")


# A block


def test_a_committed_change_is_seen_on_the_stream_of_its_parent(
    room: Room, session: Session, broadcasts: Recording
) -> None:
    with assert_broadcasts(room, "messages", count=1, type="message", operation="insert", value={"body": "Hi"}):
        session.add(Message(room=room, body="Hi"))
        session.commit()


def test_at_least_one_is_enough_without_a_count(durable_streams: DurableStreams) -> None:
    with assert_broadcasts("rooms"):
        insert(durable_streams, "rooms", name="a")
        insert(durable_streams, "rooms", name="b")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_count_is_exact(durable_streams: DurableStreams, count: int) -> None:
    with pytest.raises(AssertionError, match="there were 2"), assert_broadcasts("rooms", count=count):
        insert(durable_streams, "rooms", name="a")
        insert(durable_streams, "rooms", name="b")


def test_the_block_counts_only_what_is_broadcast_within_it(durable_streams: DurableStreams) -> None:
    insert(durable_streams, "rooms", name="before")
    with assert_broadcasts("rooms", count=1):
        insert(durable_streams, "rooms", name="within")
    insert(durable_streams, "rooms", name="after")


def test_blocks_nest(durable_streams: DurableStreams) -> None:
    with assert_broadcasts("rooms", count=2), assert_no_broadcasts("notices"):
        insert(durable_streams, "rooms", name="outer")
        with assert_broadcasts("rooms", count=1), capture_broadcasts("rooms") as inner:
            insert(durable_streams, "rooms", name="inner")
    assert [each.value for each in inner] == [{"name": "inner"}]


def test_an_assertion_is_not_entered_again_within_its_own_block(durable_streams: DurableStreams) -> None:
    """The inner block would begin the outer one anew, which then overlooks what came before."""
    once = assert_broadcasts("rooms", count=1)
    with pytest.raises(UsageError, match=r"assert_broadcasts\(\.\.\.\) at .*:\d+ is in use.* of its own"), once:
        insert(durable_streams, "rooms", name="outer")
        with once:
            insert(durable_streams, "rooms", name="inner")
    for _ in range(2):
        with once:
            insert(durable_streams, "rooms", name="after")


def test_a_capture_is_not_entered_again_within_its_own_block(durable_streams: DurableStreams) -> None:
    seen = capture_broadcasts("rooms")
    with seen:
        insert(durable_streams, "rooms", name="outer")
        with pytest.raises(UsageError, match=r"capture_broadcasts\(\.\.\.\) is in use"):
            seen.__enter__()
        insert(durable_streams, "rooms", name="outer")
    assert len(seen) == 2
    with seen:
        pass
    assert seen == []


def test_what_the_block_raises_is_not_hidden_by_the_missing_broadcast(durable_streams: DurableStreams) -> None:
    with pytest.raises(ZeroDivisionError), assert_broadcasts("rooms"):
        1 / 0


def test_a_block_needs_no_fixture_and_sends_nothing() -> None:
    """No server listens at this address: a request would raise."""
    with DurableStreams(server_url="http://127.0.0.1:9/v1/streams") as durable_streams:
        with assert_broadcasts("rooms", count=2):
            insert(durable_streams, "rooms", name="now")
            durable_streams.broadcast_later_to("rooms", name="later")
        assert list(durable_streams.outbox.pending()) == []


def test_nothing_is_remembered_once_nobody_looks(durable_streams: DurableStreams) -> None:
    with assert_broadcasts("rooms"):
        insert(durable_streams, "rooms", name="a")
    with capture_broadcasts("rooms") as seen:
        pass
    assert seen == []


# Which streams


def test_a_lone_record_stands_for_the_streams_beneath_it(room: Room, durable_streams: DurableStreams) -> None:
    with assert_broadcasts(room, count=2), assert_broadcasts([room], count=2):
        insert(durable_streams, room, name="own")
        insert(durable_streams, room, "messages", body="beneath")


def test_exact_means_the_record_s_own_stream_alone(room: Room, durable_streams: DurableStreams) -> None:
    with assert_broadcasts(room, count=1, exact=True):
        insert(durable_streams, room, name="own")
        insert(durable_streams, room, "messages", body="beneath")
    with assert_no_broadcasts(room, exact=True):
        insert(durable_streams, room, "messages", body="beneath")


def test_one_record_s_streams_are_not_those_of_a_longer_key(session: Session, durable_streams: DurableStreams) -> None:
    session.add_all([Room(id=1, name="one"), Room(id=12, name="twelve")])
    session.commit()
    with assert_no_broadcasts(session.get(Room, 1)):
        insert(durable_streams, session.get(Room, 12), "messages", body="Hi")


def test_a_name_and_a_sequence_mean_one_stream(room: Room, durable_streams: DurableStreams) -> None:
    with assert_no_broadcasts("rooms"), assert_no_broadcasts(room, "messages"):
        insert(durable_streams, "rooms/1", name="beneath the name")
        insert(durable_streams, room, "messages", "7", body="beneath the sequence")


@pytest.mark.parametrize(
    "written", [("a", "b"), (["a", "b"],), (("a", ["b", None]), ""), ("a/b",)], ids=["flat", "list", "nested", "joined"]
)
def test_names_are_made_as_in_production(written: tuple[object, ...], durable_streams: DurableStreams) -> None:
    with assert_broadcasts(*written, count=1):
        insert(durable_streams, "a", "b", name="x")


def test_no_streamable_means_every_stream(durable_streams: DurableStreams) -> None:
    with assert_broadcasts(count=2):
        insert(durable_streams, "rooms", name="a")
        insert(durable_streams, "notices", name="b")
    with assert_no_broadcasts():
        pass


@pytest.mark.parametrize("blank", [(None,), ("",), ([],), (None, "")])
def test_blank_streamables_do_not_mean_every_stream(blank: tuple[object, ...]) -> None:
    with pytest.raises(BlankStreamables):
        assert_no_broadcasts(*blank)


def test_a_record_without_an_identity_is_refused() -> None:
    with pytest.raises(UnsavedRecordError):
        assert_broadcasts(Room(name="new"))


# Which events


def test_the_arguments_select_the_events_that_count(durable_streams: DurableStreams) -> None:
    verb = durable_streams.broadcast_event_to
    with (
        assert_broadcasts("rooms", count=3),
        assert_broadcasts("rooms", count=2, type="message"),
        assert_broadcasts("rooms", count=1, operation="delete"),
        assert_broadcasts("rooms", count=1, operation="upsert"),
        assert_broadcasts("rooms", count=2, key=7),
        assert_broadcasts("rooms", count=1, type="message", key="7"),
        assert_broadcasts("rooms", count=0, type="notice"),
    ):
        verb("rooms", type="message", key=7, operation="delete")
        verb("rooms", type="message", key=8, value={}, operation="insert")
        verb("rooms", type="room", key=7, value={}, operation="upsert")


VALUE = {"id": "1", "at": "2026-01-01T10:00:00Z", "tags": [{"a": 1, "b": 2}, {"a": 3}], "ok": True, "none": None}


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"id": "1"},
        {"at": datetime(2026, 1, 1, 10, tzinfo=UTC)},
        {"tags": [{"a": 1}, {}]},
        {"tags": mock.ANY},
        {"ok": True, "none": None},
        VALUE,
    ],
    ids=repr,
)
def test_a_value_holds_what_is_wanted_of_it(wanted: dict[str, object], durable_streams: DurableStreams) -> None:
    with assert_broadcasts("rooms", value=wanted):
        insert(durable_streams, "rooms", **VALUE)


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ({"id": 1}, "value.id: expected 1, was '1'"),
        ({"at": date(2026, 1, 1)}, "value.at: expected datetime.date(2026, 1, 1), was '2026-01-01T10:00:00Z'"),
        ({"tags": [{"a": 1}]}, "value.tags: expected [{'a': 1}], was [{'a': 1, 'b': 2}, {'a': 3}]"),
        ({"tags": [{"a": 2}, {}]}, "value.tags[0].a: expected 2, was 1"),
        ({"ok": 1}, "value.ok: expected 1, was True"),
        ({"no": None}, "value.no: expected None, was not there"),
        ({"id": {"x": 1}}, "value.id: expected {'x': 1}, was '1'"),
        ({"id": object}, "value.id: expected <class 'object'>, was '1'"),
    ],
)
def test_a_value_that_differs_is_shown_where_it_differs(
    wanted: dict[str, object], line: str, durable_streams: DurableStreams
) -> None:
    with pytest.raises(AssertionError) as failure, assert_broadcasts("rooms", value=wanted):
        insert(durable_streams, "rooms", **VALUE)
    assert line in str(failure.value)


def test_of_free_json_the_whole_event_is_the_value(durable_streams: DurableStreams) -> None:
    with assert_broadcasts("rooms", count=1, value={"id": UUID(int=1)}), assert_no_broadcasts("notices"):
        durable_streams.broadcast_to("rooms", id=UUID(int=1), headers="none")
    unlike = pytest.raises(AssertionError, match="type: expected 'message', was None")
    with unlike, assert_broadcasts("rooms", type="message"):
        durable_streams.broadcast_to("rooms", type="message")


class Colour(enum.Enum):
    RED = "red"


@pytest.mark.parametrize("key", [7, Colour.RED, b"\x01\xff", UUID(int=1), date(2026, 1, 1)], ids=repr)
def test_a_key_is_written_as_in_production(key: object, durable_streams: DurableStreams) -> None:
    with assert_broadcasts("rooms", count=1, key=key):
        durable_streams.broadcast_event_to("rooms", type="room", key=key, operation="delete")


@pytest.mark.parametrize("sequence", [tuple, list])
def test_a_composite_key_is_written_in_its_parts(session: Session, sequence: Callable[[object], object]) -> None:
    with assert_broadcasts("seats", count=1, key=sequence((1, "a/b"))):
        session.add_all([Seat(row=1, place="a/b"), Seat(row=1, place="a")])
        session.commit()


@pytest.mark.parametrize("key", ["", ()])
def test_a_key_that_no_event_has_is_refused(key: object) -> None:
    with pytest.raises(UsageError, match="key is text that is not empty"):
        assert_broadcasts("rooms", count=0, key=key)


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(UsageError, match="operation is one of insert, update, upsert, delete; got 'create'"):
        assert_broadcasts("rooms", operation="create")


# Without a block


def test_a_statement_of_its_own_looks_at_the_test_so_far(
    durable_streams: DurableStreams, broadcasts: Recording
) -> None:
    assert_no_broadcasts("rooms")
    insert(durable_streams, "rooms", name="a")
    assert_broadcasts("rooms", count=1)
    with pytest.raises(AssertionError, match="there was 1"):
        assert_no_broadcasts("rooms")
    with pytest.raises(AssertionError, match="there was 1"):
        assert_broadcasts("rooms", count=2)


def test_the_test_so_far_can_be_forgotten(durable_streams: DurableStreams, broadcasts: Recording) -> None:
    insert(durable_streams, "rooms", name="setting the stage")
    broadcasts.clear()
    assert_no_broadcasts()


def test_a_recording_compares_with_lists(durable_streams: DurableStreams, broadcasts: Recording) -> None:
    assert broadcasts == []
    insert(durable_streams, "rooms", name="a")
    assert broadcasts != []
    assert broadcasts == [broadcasts[0]] == capture_broadcasts("rooms") == broadcasts
    with recording() as inner:
        assert broadcasts != inner
        broadcasts.clear()
        assert broadcasts == inner
        insert(durable_streams, "rooms", name="b")
    broadcasts.clear()
    insert(durable_streams, "rooms", name="c")
    assert_broadcasts("rooms", count=1, value={"name": "c"})


def test_of_recordings_within_each_other_the_innermost_is_looked_at(
    durable_streams: DurableStreams, broadcasts: Recording
) -> None:
    insert(durable_streams, "rooms", name="outer")
    with recording() as inner:
        assert_no_broadcasts()
        insert(durable_streams, "rooms", name="inner")
        assert_broadcasts("rooms", count=1)
        assert len(inner) == 1
    assert_broadcasts("rooms", count=2)
    assert len(broadcasts) == 2


def test_a_statement_that_spans_lines_or_takes_a_starred_argument_is_one_too(broadcasts: Recording) -> None:
    wanted = {"count": 1}
    names = ["rooms"]
    with pytest.raises(AssertionError):
        assert_broadcasts(
            "rooms",
            count=1,
        )
    with pytest.raises(AssertionError):
        assert_broadcasts(*names, **wanted)
    if True:
        with pytest.raises(AssertionError):
            assert_broadcasts("rooms")


def test_a_call_whose_result_goes_somewhere_waits_for_its_block(broadcasts: Recording) -> None:
    """None of these must check at once, and with that fail."""
    assigned = assert_broadcasts("rooms")
    listed = [assert_broadcasts("rooms"), (lambda: assert_broadcasts("rooms"))()]
    with ExitStack() as stack, pytest.raises(AssertionError):
        stack.enter_context(assert_broadcasts("rooms"))
        for each in (assigned, *listed):
            with pytest.raises(AssertionError), each:
                pass
        stack.close()


def test_an_assertion_that_a_function_returns_waits_for_its_block(
    durable_streams: DurableStreams, broadcasts: Recording
) -> None:
    def one_room() -> object:
        return assert_broadcasts("rooms", count=1)

    with one_room():  # type: ignore[attr-defined]
        insert(durable_streams, "rooms", name="a")


def test_without_a_block_and_without_the_fixture_it_says_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"Ask for the fixture, or write `with assert_broadcasts\(\.\.\.\):`"):
        assert_broadcasts("rooms")
    with pytest.raises(UsageError, match="`with assert_no_broadcasts"):
        assert_no_broadcasts("rooms")
    with pytest.raises(UsageError, match="`with capture_broadcasts"):
        len(capture_broadcasts("rooms"))


def test_an_assertion_that_is_never_entered_is_told_of() -> None:
    """Where no plugin fails the test for it, as with unittest."""
    code = (
        "from broadcastable.testing import assert_broadcasts\n"
        "def helper():\n"
        "    return assert_broadcasts('rooms')\n"
        "helper()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        "RuntimeWarning: assert_broadcasts(...) at <string>:3 was neither entered nor a statement of its own: nothing "
        "was checked" in done.stderr
    )


def test_an_assertion_is_neither_true_nor_false(room: Room, broadcasts: Recording) -> None:
    """`assert assert_broadcasts(room)` would pass whatever is broadcast."""
    with pytest.raises(UsageError, match=r"as a statement of its own, or `with assert_broadcasts\(\.\.\.\):`"):
        assert assert_broadcasts(room)
    with pytest.raises(UsageError, match="assert_no_broadcasts"):
        assert not assert_no_broadcasts(room)


def test_an_assertion_that_is_awaited_looks_at_the_test_so_far(
    durable_streams: DurableStreams, broadcasts: Recording
) -> None:
    async def scenario() -> None:
        await assert_no_broadcasts("rooms")
        insert(durable_streams, "rooms", name="a")
        await assert_broadcasts("rooms", count=1)
        with pytest.raises(AssertionError, match="there was 1"):
            await assert_broadcasts("rooms", count=2)

    asyncio.run(scenario())


@pytest.mark.parametrize("count", [-1, True, 1.0, "1"])
def test_a_count_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(UsageError, match="count is a number of events"):
        assert_broadcasts("rooms", count=count)


@pytest.mark.parametrize("sequence", [UserList, deque, iter, lambda each: dict(enumerate(each)).values()])
def test_a_lone_record_is_one_in_any_sequence(
    room: Room, durable_streams: DurableStreams, sequence: Callable[[list[object]], object]
) -> None:
    with assert_broadcasts(sequence([room])):
        insert(durable_streams, room, "messages", body="beneath")


# Captured


def test_a_capture_has_what_was_sent_in_order(room: Room, session: Session) -> None:
    with capture_broadcasts(room, "messages") as seen:
        assert seen == []
        session.add(Message(room=room, body="Hi"))
        session.commit()
        assert len(seen) == 1
        session.delete(session.scalars(sa.select(Message)).one())
        session.commit()
    assert [(each.operation, each.type, each.key) for each in seen] == [
        ("insert", "message", "1"),
        ("delete", "message", "1"),
    ]
    first = seen[0]
    assert first.value == {"id": "1", "room_id": "1", "body": "Hi"}
    assert first.stream == "gid://app/Room/1/messages"
    assert first.txid == first.payload["headers"]["txid"]
    assert first.timestamp is not None
    assert first.deferred
    assert not first.joined


def test_a_capture_without_a_block_has_the_test_so_far(durable_streams: DurableStreams, broadcasts: Recording) -> None:
    assert capture_broadcasts("rooms") == []
    insert(durable_streams, "rooms", name="a")
    seen = capture_broadcasts("rooms")
    insert(durable_streams, "rooms", name="b")
    assert [each.value["name"] for each in seen] == ["a"]
    assert not seen[0].deferred
    assert seen == capture_broadcasts("rooms")[:1]
    assert seen != capture_broadcasts("rooms")
    assert repr(seen) == repr([seen[0]])


def test_a_capture_stays_as_it_is_after_its_block(durable_streams: DurableStreams) -> None:
    with capture_broadcasts("rooms") as seen:
        insert(durable_streams, "rooms", name="a")
    insert(durable_streams, "rooms", name="b")
    assert [each.value["name"] for each in seen] == ["a"]


# Threads and event loops


def test_broadcasts_of_other_threads_are_seen(durable_streams: DurableStreams) -> None:
    with ThreadPoolExecutor(4) as pool:
        pool.submit(threading.get_ident).result()
        with assert_broadcasts("rooms", count=200):
            list(pool.map(lambda n: current().broadcast_later_to("rooms", n=n), range(200)))


def test_blocks_in_several_threads_do_not_end_each_other(durable_streams: DurableStreams) -> None:
    """The first to leave must not take the others' recording with it."""
    together = threading.Barrier(4)

    def block(n: int) -> None:
        with assert_broadcasts(f"rooms/{n}", count=n):
            together.wait(10)
            for _ in range(n):
                insert(durable_streams, f"rooms/{n}", name="x")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(block, range(1, 5)))


def test_with_asyncio_blocks_are_entered_with_async_with(sqlite_url: str, durable_streams: DurableStreams) -> None:
    async def scenario() -> None:
        engine = open_async_engine(sqlite_url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        verbs = AsyncDurableStreams(durable_streams)
        async with AsyncSession(engine, expire_on_commit=False) as session:
            room = Room(name="Lobby")
            session.add(room)
            await session.commit()
            async with assert_broadcasts(room, count=3), capture_broadcasts(room) as seen:
                session.add(Message(room=room, body="Hi"))
                await session.commit()
                await verbs.broadcast_to(room, "typing", who="ann")
                await verbs.broadcast_later_to(room, "typing", who="bob", session=session)
            async with assert_no_broadcasts(room):
                await asyncio.sleep(0)
            with pytest.raises(AssertionError):
                async with assert_broadcasts(room):
                    pass
        await verbs.close()
        await engine.dispose()
        assert [each.payload.get("who", each.type) for each in seen] == ["message", "ann", "bob"]

    asyncio.run(scenario())


# Fixtures that roll everything back


def test_a_test_that_rolls_everything_back_sees_its_commits(
    engine: sa.Engine, broadcasts: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    with engine.connect() as connection, connection.begin() as outer:
        with Session(connection, join_transaction_mode="create_savepoint", expire_on_commit=False) as session:
            room = Room(name="Lobby")
            session.add(room)
            with assert_broadcasts(operation="insert", type="room"):
                session.commit()
            with assert_no_broadcasts():
                session.add(Message(room=room, body="Hi"))
                session.rollback()
            with assert_broadcasts(room, count=1):
                session.add(Message(room=room, body="Ho"))
                session.commit()
        outer.rollback()
    assert all(each.joined for each in broadcasts)
    assert caplog.text == ""


def test_an_asyncio_test_that_rolls_everything_back_sees_its_commits(sqlite_url: str, broadcasts: Recording) -> None:
    async def scenario() -> None:
        engine = open_async_engine(sqlite_url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with engine.connect() as connection:
            outer = await connection.begin()
            session = AsyncSession(connection, join_transaction_mode="create_savepoint", expire_on_commit=False)
            async with session:
                session.add(Room(name="Lobby"))
                async with assert_broadcasts(count=1, operation="insert"):
                    await session.commit()
            await outer.rollback()
        await engine.dispose()

    asyncio.run(scenario())
    assert len(broadcasts) == 1


def test_the_file_of_the_kit_is_not_in_the_traceback(pytester: pytest.Pytester) -> None:
    """What a developer sees ends at the own line, as with pytest's own helpers."""
    pytester.makepyfile(
        """
        from broadcastable.testing import assert_broadcasts

        def test_it(broadcasts):
            assert_broadcasts("rooms")
        """
    )
    output = pytester.runpytest_inprocess("-p", "no:cacheprovider").stdout.str()
    assert Path(__file__).parent.as_posix() not in output
    assert "asserting.py" not in output
    assert '>       assert_broadcasts("rooms")' in output
