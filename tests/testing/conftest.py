from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from broadcastable.durable_streams import DurableStreams
from tests.services import open_engine
from tests.testing.chat import Base, Room


@pytest.fixture
def engine(sqlite_url: str) -> Iterator[sa.Engine]:
    engine = open_engine(sqlite_url)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: sa.Engine, durable_streams: DurableStreams) -> Iterator[Session]:
    with Session(engine, expire_on_commit=False) as session:
        yield session


@pytest.fixture
def room(session: Session) -> Room:
    """A room that is there before anything is recorded."""
    room = Room(name="Lobby")
    session.add(room)
    session.commit()
    return room
