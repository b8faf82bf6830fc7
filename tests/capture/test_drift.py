from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from broadcastable import DurableStreams, UsageError
from broadcastable.drift import Drift, find_drift, repair
from broadcastable.server.embedded import EmbeddedServer
from tests.capture.conftest import populate
from tests.capture.models import Board, Card


@pytest.fixture
def durable_streams(stream_server: EmbeddedServer) -> Iterator[DurableStreams]:
    settings = stream_server.settings.replace(gid_app=f"drift-{uuid.uuid4().hex[:8]}")
    durable_streams = DurableStreams(settings)
    yield durable_streams
    durable_streams.close()


@pytest.fixture
def session(sqlite_engine: sa.Engine, durable_streams: DurableStreams) -> Iterator[Session]:
    with Session(sqlite_engine, info={"durable_streams": durable_streams}) as session:
        populate(session)
        session.commit()
        assert durable_streams.drain(10)
        yield session


def behind_our_back(session: Session, statement: str) -> None:
    with session.get_bind().connect() as connection, connection.begin():  # type: ignore[union-attr]
        connection.exec_driver_sql(statement)


def by_stream(session: Session, model: type) -> dict[str, Drift]:
    return {drift.stream.split("/", 3)[3]: drift for drift in find_drift(session, model)}


def test_streams_that_say_what_the_table_says_have_not_drifted(session: Session) -> None:
    seen: list[tuple[int, int]] = []
    assert list(find_drift(session, Card, progress=lambda done, total: seen.append((done, total)))) == []
    assert seen == [(1, 2), (2, 2)]
    assert list(find_drift(session, Board)) == []


def test_missing_stale_and_extra_rows_are_found_and_mended(session: Session, durable_streams: DurableStreams) -> None:
    behind_our_back(session, "INSERT INTO cards (id, title, board_id) VALUES (10, 'unseen', 1)")
    behind_our_back(session, "UPDATE cards SET title = 'else' WHERE id = 1")
    behind_our_back(session, "DELETE FROM cards WHERE id = 2")
    behind_our_back(session, "UPDATE cards SET board_id = 1 WHERE id = 3")
    drifts = by_stream(session, Card)
    first, second = drifts["Board/1/cards"], drifts["Board/2/cards"]
    assert {key: value["title"] for key, value in first.missing.items()} == {"10": "unseen", "3": "three"}
    assert {key: value["title"] for key, value in first.stale.items()} == {"1": "else"}
    assert first.extra == {"2"}
    assert (dict(second.missing), dict(second.stale), second.extra) == ({}, {}, {"3"})
    for drift in drifts.values():
        repair(drift, durable_streams)
    assert durable_streams.drain(10)
    assert by_stream(session, Card) == {}


def test_a_stream_that_was_deleted_misses_all_its_rows(session: Session, durable_streams: DurableStreams) -> None:
    durable_streams.delete_stream(session.get_one(Board, 1), "cards")
    (drift,) = find_drift(session, Card)
    assert drift.missing.keys() == {"1", "2"}
    assert len(drift) == 2


def test_other_types_and_free_json_on_a_stream_are_no_drift(session: Session, durable_streams: DurableStreams) -> None:
    board = session.get_one(Board, 1)
    durable_streams.broadcast_to(board, "cards", typing="me")
    durable_streams.broadcast_event_to(board, "cards", type="other", key="1", value={}, operation="insert")
    session.rollback()
    assert list(find_drift(session, Card)) == []


def test_a_model_without_streams_and_a_session_with_changes_are_refused(session: Session) -> None:
    from tests.capture.test_state_machine import Shelf

    with pytest.raises(UsageError, match="declares no streams"):
        list(find_drift(session, Shelf))
    session.get_one(Card, 1).title = "x"
    with pytest.raises(UsageError, match="not committed"):
        list(find_drift(session, Card))
