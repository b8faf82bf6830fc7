from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests import services
from tests.capture.models import Base, Board, Card, Team
from tests.capture.recorder import Recorder


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def sqlite_engine(sqlite_url: str) -> Iterator[sa.Engine]:
    """For what does not depend on the backend."""
    engine = services.open_engine(sqlite_url)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def board_engine(engine: sa.Engine) -> sa.Engine:
    """Each backend, with the tables of `models`."""
    Base.metadata.create_all(engine)
    return engine


def populate(session: Session) -> None:
    """Two teams, two boards, three cards: 1 and 2 on board 1, 3 on board 2."""
    session.add_all([Team(id=1, name="red"), Team(id=2, name="blue")])
    session.flush()
    session.add_all([Board(id=1, name="todo", team_id=1), Board(id=2, name="done", team_id=2)])
    session.flush()
    session.add_all(
        [
            Card(id=1, title="one", board_id=1),
            Card(id=2, title="two", board_id=1),
            Card(id=3, title="three", board_id=2),
        ]
    )
    if session.get_bind().dialect.name == "postgresql":
        session.flush()
        session.execute(sa.text("SELECT setval(pg_get_serial_sequence('cards', 'id'), 100)"))


@pytest.fixture
def session(board_engine: sa.Engine, recorder: Recorder) -> Iterator[Session]:
    """A session with the rows of `populate` committed and nothing recorded yet, once for each backend."""
    with Session(board_engine, info={"durable_streams": recorder}) as session:
        populate(session)
        session.commit()
        recorder.clear()
        yield session


@pytest.fixture(params=("sqlite", "postgres"))
def async_database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a new, empty database, once for each backend that has an asyncio driver here."""
    return str(request.getfixturevalue(f"{request.param}_url"))
