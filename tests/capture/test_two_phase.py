"""Two-phase commit, on a PostgreSQL of its own: the default configuration allows no prepared transactions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests import services
from tests.capture.conftest import populate
from tests.capture.models import Base, Card
from tests.capture.recorder import Recorder

CARDS = "gid://app/Board/1/cards"


@pytest.fixture(scope="module")
def two_phase_server() -> Iterator[sa.URL]:
    with services.postgresql(max_prepared_transactions=8) as url:
        yield url


@pytest.fixture
def session(two_phase_server: sa.URL, recorder: Recorder) -> Iterator[Session]:
    with services.fresh_database(two_phase_server) as url:
        engine = sa.create_engine(url)
        Base.metadata.create_all(engine)
        with Session(engine, twophase=True, info={"durable_streams": recorder}) as session:
            populate(session)
            yield session
        engine.dispose()


def test_what_is_prepared_is_staged_and_goes_out_with_the_commit(session: Session, recorder: Recorder) -> None:
    recorder.transactional = True
    session.prepare()
    assert [batch.stream for batch in recorder.staged].count(CARDS) == 1
    assert recorder.batches == []
    session.commit()
    assert len(recorder.events(CARDS)) == 2


def test_what_is_prepared_and_rolled_back_is_dropped(session: Session, recorder: Recorder) -> None:
    session.commit()
    recorder.clear()
    session.get_one(Card, 1).title = "a"
    session.prepare()
    session.rollback()
    assert recorder.batches == []
    assert session.get_one(Card, 1).title == "one"


def test_a_commit_prepares_by_itself(session: Session, recorder: Recorder) -> None:
    with session.begin_nested():
        session.get_one(Card, 1).title = "a"
    session.commit()
    assert {event["value"]["title"] for event in recorder.events(CARDS)} == {"a", "two"}
