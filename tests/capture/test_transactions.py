"""What each ending of a transaction does with what was captured in it."""

from __future__ import annotations

import gc
import logging
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from broadcastable import ConfigurationError, UsageError, confirm_txid, transactions, txid
from broadcastable.events import ChangeEvent, Operation
from broadcastable.settings import Settings
from tests.capture.conftest import populate
from tests.capture.models import Board, Card
from tests.capture.recorder import Recorder

CARDS_OF_BOARD_1 = "gid://app/Board/1/cards"


def change(session: Session, title: str, card: int = 1) -> None:
    session.get_one(Card, card).title = title
    session.flush()


def titles(recorder: Recorder) -> list[str]:
    return [event["value"]["title"] for event in recorder.events()]


# One row each: what the session does after `change(session, "a")`, and the titles that go out.


def commit(session: Session) -> None:
    session.commit()


def rollback(session: Session) -> None:
    session.rollback()


def close(session: Session) -> None:
    session.close()


def reset(session: Session) -> None:
    session.reset()


def invalidate(session: Session) -> None:
    session.invalidate()


def savepoint_released_then_commit(session: Session) -> None:
    with session.begin_nested():
        change(session, "b")
    session.commit()


def savepoint_released_then_rollback(session: Session) -> None:
    with session.begin_nested():
        change(session, "b")
    session.rollback()


def savepoint_released_then_close(session: Session) -> None:
    with session.begin_nested():
        change(session, "b")
    session.close()


def savepoint_rolled_back_then_commit(session: Session) -> None:
    savepoint = session.begin_nested()
    change(session, "b")
    savepoint.rollback()
    session.commit()


def error_in_savepoint_then_commit(session: Session) -> None:
    with pytest.raises(ZeroDivisionError), session.begin_nested():
        change(session, "b")
        raise ZeroDivisionError
    session.commit()


def inner_released_outer_rolled_back(session: Session) -> None:
    outer = session.begin_nested()
    change(session, "b")
    with session.begin_nested():
        change(session, "c")
    outer.rollback()
    session.commit()


def inner_rolled_back_outer_released(session: Session) -> None:
    with session.begin_nested():
        change(session, "b")
        inner = session.begin_nested()
        change(session, "c")
        inner.rollback()
    session.commit()


def outer_rolled_back_over_an_open_inner(session: Session) -> None:
    outer = session.begin_nested()
    change(session, "b")
    session.begin_nested()
    change(session, "c")
    outer.rollback()
    session.commit()


def three_deep_released(session: Session) -> None:
    with session.begin_nested(), session.begin_nested(), session.begin_nested():
        change(session, "d")
    session.commit()


def commit_over_an_open_savepoint(session: Session) -> None:
    session.begin_nested()
    change(session, "b")
    session.commit()


def root_commits_over_open_savepoints(session: Session) -> None:
    root = session.get_transaction()
    assert root is not None
    session.begin_nested()
    session.begin_nested()
    session.get_one(Card, 1).title = "flushed by the commit"
    root.commit()


def rollback_over_an_open_savepoint(session: Session) -> None:
    session.begin_nested()
    change(session, "b")
    session.rollback()


def failed_flush_then_rollback(session: Session) -> None:
    session.add(Card(id=9))
    with pytest.raises(IntegrityError):
        session.flush()
    session.rollback()


def failed_flush_then_close(session: Session) -> None:
    session.add(Card(id=9))
    with pytest.raises(IntegrityError):
        session.flush()
    session.close()


def failed_flush_in_savepoint_then_commit(session: Session) -> None:
    with pytest.raises(IntegrityError), session.begin_nested():
        session.get_one(Card, 1).title = "b"
        session.add(Card(id=9))
        session.flush()
    session.commit()


def failed_flush_then_commit_refused_then_rollback(session: Session) -> None:
    session.add(Card(id=9))
    with pytest.raises(IntegrityError):
        session.flush()
    with pytest.raises(PendingRollbackError):
        session.commit()
    session.rollback()


def flushed_by_the_commit(session: Session) -> None:
    session.get_one(Card, 1).title = "b"
    session.commit()


def savepoint_flushed_by_its_release(session: Session) -> None:
    with session.begin_nested():
        session.get_one(Card, 1).title = "b"
    session.commit()


ENDINGS: list[tuple[Callable[[Session], None], list[str]]] = [
    (commit, ["a"]),
    (rollback, []),
    (close, []),
    (reset, []),
    (invalidate, []),
    (savepoint_released_then_commit, ["b"]),
    (savepoint_released_then_rollback, []),
    (savepoint_released_then_close, []),
    (savepoint_rolled_back_then_commit, ["a"]),
    (error_in_savepoint_then_commit, ["a"]),
    (inner_released_outer_rolled_back, ["a"]),
    (inner_rolled_back_outer_released, ["b"]),
    (outer_rolled_back_over_an_open_inner, ["a"]),
    (three_deep_released, ["d"]),
    (commit_over_an_open_savepoint, ["b"]),
    (root_commits_over_open_savepoints, ["flushed by the commit"]),
    (rollback_over_an_open_savepoint, []),
    (failed_flush_then_rollback, []),
    (failed_flush_then_close, []),
    (failed_flush_in_savepoint_then_commit, ["a"]),
    (failed_flush_then_commit_refused_then_rollback, []),
    (flushed_by_the_commit, ["b"]),
    (savepoint_flushed_by_its_release, ["b"]),
]


@pytest.mark.parametrize("transactional", [False, True], ids=["after commit", "in the transaction"])
@pytest.mark.parametrize(("end", "expected"), ENDINGS, ids=[end.__name__ for end, _ in ENDINGS])
def test_events_go_out_for_what_is_committed_and_nothing_else(
    session: Session, recorder: Recorder, end: Callable[[Session], None], expected: list[str], transactional: bool
) -> None:
    recorder.transactional = transactional
    change(session, "a")
    end(session)
    assert titles(recorder) == expected
    # Whatever happened, the session is as good as new.
    recorder.clear()
    session.rollback()
    change(session, "afterwards")
    session.commit()
    assert titles(recorder) == ["afterwards"]


def test_nothing_goes_out_before_the_commit(session: Session, recorder: Recorder) -> None:
    with session.begin_nested():
        change(session, "a")
    assert recorder.batches == []


def test_a_transaction_sends_one_batch_for_each_stream(session: Session, recorder: Recorder) -> None:
    session.add_all([Card(id=10, title="x", board_id=1), Card(id=11, title="y", board_id=2)])
    session.flush()
    change(session, "a")
    session.get_one(Board, 1).name = "renamed"
    session.commit()
    assert sorted(recorder.streams) == [
        "gid://app/Board/1",
        "gid://app/Board/1/cards",
        "gid://app/Board/2/cards",
        "gid://app/Team/1/boards",
    ]
    assert len({batch.txid for batch in recorder.batches}) == 1
    assert len({batch.id for batch in recorder.batches}) == 4


def test_a_begin_block_commits_at_its_end(board_engine: sa.Engine, recorder: Recorder) -> None:
    make = sessionmaker(board_engine, info={"durable_streams": recorder})
    with make.begin() as session:
        populate(session)
        assert recorder.batches == []
    assert len(recorder.events(CARDS_OF_BOARD_1)) == 2
    recorder.clear()
    with pytest.raises(ZeroDivisionError), make.begin() as session:
        change(session, "a")
        raise ZeroDivisionError
    assert recorder.batches == []


def test_a_scoped_session_is_a_session(board_engine: sa.Engine, recorder: Recorder) -> None:
    scoped = scoped_session(sessionmaker(board_engine, info={"durable_streams": recorder}))
    populate(scoped())
    assert txid(scoped()) == txid(scoped)
    scoped.commit()
    scoped.remove()
    assert len(recorder.events(CARDS_OF_BOARD_1)) == 2


def test_sessions_do_not_mix(session: Session, board_engine: sa.Engine, recorder: Recorder) -> None:
    other_recorder = Recorder()
    change(session, "mine")
    session.commit()
    with Session(board_engine, info={"durable_streams": other_recorder}) as other:
        change(other, "theirs", card=3)
        assert other_recorder.batches == []
        other.commit()
    assert (titles(recorder), titles(other_recorder)) == (["mine"], ["theirs"])


# Joined into somebody else's transaction


def test_a_commit_inside_an_outer_transaction_is_marked_as_joined(board_engine: sa.Engine, recorder: Recorder) -> None:
    """The recommended test fixture: the session commits, the connection's transaction is rolled back at the end."""
    with board_engine.connect() as connection:
        outer = connection.begin()
        with Session(
            connection, join_transaction_mode="create_savepoint", info={"durable_streams": recorder}
        ) as session:
            populate(session)
            session.commit()
            assert recorder.batches == []
            assert {batch.stream for batch in recorder.joined} >= {CARDS_OF_BOARD_1}
            recorder.clear()
            change(session, "a")
            session.rollback()
            assert recorder.joined == []
        outer.rollback()


@pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only"])
def test_a_session_that_leaves_the_commit_to_its_connection_is_joined(
    board_engine: sa.Engine, recorder: Recorder, mode: Any
) -> None:
    with (
        board_engine.connect() as connection,
        connection.begin(),
        Session(connection, join_transaction_mode=mode, info={"durable_streams": recorder}) as session,
    ):
        populate(session)
        session.commit()
    assert recorder.batches == []
    assert recorder.joined


def test_a_session_that_commits_its_connection_is_not_joined(board_engine: sa.Engine, recorder: Recorder) -> None:
    with board_engine.connect() as connection:
        connection.begin()
        info = {"durable_streams": recorder}
        with Session(connection, join_transaction_mode="control_fully", info=info) as session:
            populate(session)
            session.commit()
        assert not connection.in_transaction()
        with Session(connection, info=info) as session:
            change(session, "a")
            session.commit()
    assert recorder.joined == []
    assert len(recorder.events(CARDS_OF_BOARD_1)) == 3


def test_two_sessions_on_one_connection_keep_apart(board_engine: sa.Engine, recorder: Recorder) -> None:
    inner_recorder = Recorder()
    with board_engine.connect() as connection, connection.begin():
        mode: Any = "create_savepoint"
        with (
            Session(connection, join_transaction_mode=mode, info={"durable_streams": recorder}) as outer,
            Session(connection, join_transaction_mode=mode, info={"durable_streams": inner_recorder}) as inner,
        ):
            populate(outer)
            outer.flush()
            change(inner, "theirs")
            inner.commit()
            assert len(inner_recorder.joined) == 1
            assert recorder.joined == []
            outer.rollback()
    assert recorder.joined == []


# Explicit events


def explicit(key: str = "1", value: Any = "said") -> ChangeEvent:
    return ChangeEvent(type="card", key=key, operation=Operation.UPDATE, value={"title": value})


@pytest.mark.parametrize(("end", "expected"), ENDINGS, ids=[end.__name__ for end, _ in ENDINGS])
def test_a_deferred_event_shares_the_fate_of_its_transaction(
    session: Session, recorder: Recorder, end: Callable[[Session], None], expected: list[str], caplog: Any
) -> None:
    session.begin()
    transactions.defer(session, recorder, "room", explicit())
    end(session)
    assert ("room" in recorder.streams) is bool(expected)


def test_a_deferred_event_keeps_its_place_and_stops_coalescing(session: Session, recorder: Recorder) -> None:
    change(session, "a")
    change(session, "b")
    transactions.defer(session, recorder, CARDS_OF_BOARD_1, explicit(value="said"))
    change(session, "c")
    change(session, "d")
    session.commit()
    assert titles(recorder) == ["b", "said", "d"]


def test_what_was_captured_before_a_deferred_event_goes_out_once(session: Session, recorder: Recorder) -> None:
    change(session, "a")
    transactions.defer(session, recorder, CARDS_OF_BOARD_1, explicit(value="said"))
    session.commit()
    assert titles(recorder) == ["a", "said"]


def test_a_deferred_event_of_a_rolled_back_savepoint_is_dropped(session: Session, recorder: Recorder) -> None:
    change(session, "a")
    savepoint = session.begin_nested()
    transactions.defer(session, recorder, CARDS_OF_BOARD_1, explicit())
    savepoint.rollback()
    with session.begin_nested():
        transactions.defer(session, recorder, CARDS_OF_BOARD_1, b'{"typing": true}')
        change(session, "b")
    session.commit()
    bodies = [body for batch in recorder.batches for body in batch.events]
    assert b'{"typing": true}' in bodies
    assert len(bodies) == 3


def test_a_deferred_event_carries_the_transactions_id_unless_it_has_its_own(
    session: Session, recorder: Recorder
) -> None:
    session.begin()
    own = ChangeEvent(type="card", key="1", operation=Operation.DELETE, txid="mine")
    transactions.defer(session, recorder, "room", own)
    transactions.defer(session, recorder, "room", explicit())
    known = txid(session)
    session.commit()
    assert [event["headers"]["txid"] for event in recorder.events("room")] == ["mine", known]
    assert all("timestamp" in event["headers"] for event in recorder.events("room")[1:])


def test_a_deferred_event_needs_a_transaction(sqlite_engine: sa.Engine, recorder: Recorder) -> None:
    with Session(sqlite_engine) as session, pytest.raises(UsageError, match="in no transaction"):
        transactions.defer(session, recorder, "room", explicit())


def test_deferred_events_lost_to_a_close_without_commit_are_worth_a_warning(
    session: Session, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """A commit that was forgotten: a rollback is meant, a close may be a mistake."""
    session.begin()
    transactions.defer(session, recorder, "room", explicit())
    transactions.defer(session, recorder, "room", explicit())
    session.close()
    assert [(record.levelno, record.args) for record in caplog.records] == [(logging.WARNING, (2,))]
    caplog.clear()
    session.begin()
    transactions.defer(session, recorder, "room", explicit())
    session.rollback()
    change(session, "a")  # captured, not said: SQLAlchemy's own business
    session.close()
    assert caplog.records == []


# The transaction's id


def test_the_txid_is_known_before_the_commit_and_new_for_the_next(session: Session, recorder: Recorder) -> None:
    first = txid(session)
    change(session, "a")
    with session.begin_nested():
        assert txid(session) == first
        change(session, "b", card=3)
    session.commit()
    assert {event["headers"]["txid"] for event in recorder.events()} == {first} == {b.txid for b in recorder.batches}
    second = txid(session)
    assert second != first
    change(session, "c")
    session.rollback()
    assert txid(session) != second


def test_the_caller_may_bring_a_txid_for_one_transaction(session: Session, recorder: Recorder) -> None:
    session.info[transactions.TXID_KEY] = "from-the-browser"
    change(session, "a")
    session.rollback()
    change(session, "a")  # tried again
    assert txid(session) == "from-the-browser"
    session.commit()
    change(session, "b")
    session.commit()
    first, second = (batch.txid for batch in recorder.batches)
    assert first == "from-the-browser"
    assert second != first


def test_a_txid_that_was_given_out_is_used_up_by_a_commit_without_events(session: Session, recorder: Recorder) -> None:
    session.info[transactions.TXID_KEY] = "from-the-browser"
    with session.begin_nested():
        assert txid(session) == "from-the-browser"
    assert txid(session) == "from-the-browser"
    session.commit()
    change(session, "a")
    session.commit()
    (batch,) = recorder.batches
    assert batch.txid != "from-the-browser"


@pytest.mark.parametrize("wrong", ["", 7])
def test_a_txid_is_text(session: Session, wrong: Any) -> None:
    session.info[transactions.TXID_KEY] = wrong
    with pytest.raises(UsageError, match="text"):
        txid(session)


@pytest.mark.parametrize("transactional", [False, True])
def test_a_txid_that_cannot_be_used_is_refused_before_anything_is_stored(
    session: Session, recorder: Recorder, transactional: bool
) -> None:
    """After the commit it would be too late: the events of the whole transaction would be lost."""
    recorder.transactional = transactional
    session.info[transactions.TXID_KEY] = uuid.uuid4()
    change(session, "a")
    with pytest.raises(UsageError, match="text"):
        session.commit()
    session.rollback()
    assert session.get_one(Card, 1).title == "one"
    del session.info[transactions.TXID_KEY]
    change(session, "b")
    session.commit()
    assert titles(recorder) == ["b"]


def test_the_database_may_give_the_txid(session: Session, recorder: Recorder) -> None:
    recorder.settings = Settings(txid_from="postgres")
    change(session, "a")
    if session.get_bind().dialect.name != "postgresql":
        with pytest.raises(ConfigurationError, match="needs PostgreSQL"):
            session.commit()
        session.rollback()
        assert recorder.batches == []
        return
    expected = session.scalar(sa.text("SELECT pg_current_xact_id()::text"))
    session.commit()
    assert [batch.txid for batch in recorder.batches] == [expected]


def test_a_transaction_that_changed_nothing_can_be_confirmed(session: Session, recorder: Recorder) -> None:
    session.begin()
    awaited = confirm_txid(session, session.get_one(Board, 1), "cards")
    session.commit()
    (event,) = recorder.events(CARDS_OF_BOARD_1)
    assert event == {
        "type": "$tx",
        "key": awaited,
        "headers": {"operation": "delete", "txid": awaited, "timestamp": event["headers"]["timestamp"]},
    }


def test_a_confirmation_is_left_out_where_an_event_carries_the_txid(session: Session, recorder: Recorder) -> None:
    session.begin()
    confirm_txid(session, "gid://app/Board/1", "cards")
    confirm_txid(session, None)
    change(session, "a")
    session.commit()
    assert recorder.summary() == [("update", "card", "1")]


# Harmless


def test_the_buffers_live_and_die_with_the_session(session: Session) -> None:
    change(session, "a")
    assert len(session.info) == 2
    session.commit()
    assert list(session.info) == ["durable_streams"]


def test_a_session_nobody_closes_takes_its_events_with_it(board_engine: sa.Engine, recorder: Recorder) -> None:
    session = Session(board_engine, info={"durable_streams": recorder})
    populate(session)
    session.flush()
    connection = session.connection()
    del session
    gc.collect()
    connection.close()
    assert recorder.batches == []


def test_a_delivery_that_raises_does_not_disturb_the_commit(
    session: Session, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(batches: Any, *, joined: bool = False) -> None:
        raise ConnectionError("no")

    monkeypatch.setattr(recorder, "committed", broken)
    change(session, "a")
    session.commit()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert session.get_one(Card, 1).title == "a"
    monkeypatch.undo()
    change(session, "b")
    session.commit()
    assert titles(recorder) == ["b"]


def test_staging_that_fails_aborts_the_commit(session: Session, recorder: Recorder, monkeypatch: Any) -> None:
    """An event exists if and only if its row does."""
    recorder.transactional = True

    def broken(connection: Any, batches: Any) -> None:
        raise ConnectionError("no")

    monkeypatch.setattr(recorder, "stage", broken)
    change(session, "a")
    with pytest.raises(ConnectionError):
        session.commit()
    session.rollback()
    assert session.get_one(Card, 1).title == "one"
    assert recorder.batches == []


def test_changes_made_by_the_applications_own_commit_hooks_are_captured(session: Session, recorder: Recorder) -> None:
    recorder.transactional = True

    @event.listens_for(session, "before_commit")
    def touch(session: Session) -> None:
        session.get_one(Card, 3).title = "touched"

    change(session, "a")
    session.commit()
    assert sorted(titles(recorder)) == ["a", "touched"]


def test_listeners_can_be_removed_and_installed_again(session: Session, recorder: Recorder) -> None:
    from broadcastable import mixin

    mixin.remove()
    try:
        change(session, "unseen")
        session.commit()
        assert recorder.batches == []
    finally:
        mixin.install()
    change(session, "seen")
    session.commit()
    assert titles(recorder) == ["seen"]
