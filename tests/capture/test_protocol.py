"""What captured changes say follows the State Protocol, whatever a model declares."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from broadcastable import Broadcastable, streams_to
from broadcastable.counters import counters
from broadcastable.errors import UsageError
from broadcastable.events import Batch, ChangeEvent, Operation
from broadcastable.settings import Settings
from broadcastable.snapshots import row_encoder
from tests import services
from tests.capture.models import Board, Card
from tests.capture.recorder import Recorder
from tests.state_protocol import Tap


class Base(DeclarativeBase):
    pass


class Wrong(Base, Broadcastable):
    """Each route breaks one rule, for a note of which the function says it."""

    __tablename__ = "wrong"
    __streams__ = (
        streams_to("empty key", key=lambda record: "" if "!" in record.text else record.id),
        streams_to("no key", key=lambda record: None if "!" in record.text else record.id),
        streams_to("surrogate key", key=lambda record: "\ud800" if "!" in record.text else record.id),
        streams_to("no value", value=lambda record: None if "!" in record.text else {"id": record.id}),
        streams_to("list", value=lambda record: [1] if "!" in record.text else {"id": record.id}),
        streams_to("string", value=lambda record: "x" if "!" in record.text else {"id": record.id}),
        streams_to("right"),
    )
    __stream_bulk__ = "capture"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Silent(Base, Broadcastable):
    """Its own `to_stream_value` gives nothing."""

    __tablename__ = "silent"
    __streams__ = streams_to("silent")

    id: Mapped[int] = mapped_column(primary_key=True)

    def to_stream_value(self) -> Any:
        return None


class Named(Base, Broadcastable):
    """Its primary key is a text, which the database lets be empty."""

    __tablename__ = "named"
    __streams__ = (streams_to("named"), streams_to("old", old_value=True), streams_to("by path", when=lambda _: True))
    __stream_bulk__ = "capture"

    name: Mapped[str] = mapped_column(primary_key=True)
    note: Mapped[str | None]


WRONG_STREAMS = ("empty key", "no key", "surrogate key", "no value", "list", "string")


@pytest.fixture
def session(sqlite_url: str, recorder: Recorder) -> Iterator[Session]:
    engine = services.open_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": recorder}) as session:
        yield session
    engine.dispose()


def insert(session: Session) -> None:
    session.add(Wrong(id=1, text="one!"))
    session.commit()


def update(session: Session) -> None:
    session.add(Wrong(id=1, text="one"))
    session.commit()
    session.get_one(Wrong, 1).text = "one!"
    session.commit()


def update_back(session: Session) -> None:
    insert(session)
    session.get_one(Wrong, 1).text = "one"
    session.commit()


def delete(session: Session) -> None:
    insert(session)
    session.delete(session.get_one(Wrong, 1))
    session.commit()


def in_bulk(session: Session) -> None:
    for statement in (
        sa.insert(Wrong).values(id=1, text="one!"),
        sa.update(Wrong).values(text="two!"),
        sa.delete(Wrong),
    ):
        session.execute(statement)
        session.commit()


@pytest.mark.parametrize("change", [insert, update, update_back, delete, in_bulk], ids=lambda each: each.__name__)
def test_a_key_or_value_that_no_reader_takes_costs_its_own_event_alone(
    session: Session, recorder: Recorder, caplog: pytest.LogCaptureFixture, change: Callable[[Session], None]
) -> None:
    """Nothing that breaks the protocol is sent, the failure is logged and counted, and the other streams go on."""
    failed = counters["events_failed"]
    change(session)
    for event in recorder.events():  # each is held to the protocol
        assert event["key"] == "1"
        assert isinstance(event.get("value", {}), dict)
    assert recorder.events("right")[-1]["headers"]["operation"]
    assert counters["events_failed"] > failed
    assert any(record.levelno == logging.ERROR for record in caplog.records)


def test_a_row_that_cannot_be_told_is_not_sent(session: Session, recorder: Recorder) -> None:
    insert(session)
    assert recorder.streams == ["right"]


def test_a_stream_value_of_none_is_not_sent(session: Session, recorder: Recorder) -> None:
    """`"value": null` ends the session of the reference client."""
    session.add(Silent(id=1))
    session.commit()
    assert recorder.events() == []


@pytest.mark.parametrize("bulk", [False, True])
def test_a_primary_key_that_is_an_empty_text_is_not_sent(session: Session, recorder: Recorder, bulk: bool) -> None:
    session.add_all([Named(name=""), Named(name="a")])
    session.commit()
    if bulk:
        session.execute(sa.update(Named).values(note="x"))
        session.execute(sa.delete(Named))
    else:
        for name in ("", "a"):
            session.get_one(Named, name).note = "x"
        session.commit()
        for name in ("", "a"):
            session.delete(session.get_one(Named, name))
    session.commit()
    assert {event["key"] for event in recorder.events()} == {"a"}
    assert set(recorder.streams) == {"named", "old", "by path"}


@pytest.mark.parametrize("stream", WRONG_STREAMS)
def test_a_snapshot_refuses_what_capture_does_not_send(session: Session, recorder: Recorder, stream: str) -> None:
    insert(session)
    with pytest.raises(UsageError):
        row_encoder(stream, Settings())(session.get_one(Wrong, 1))
    assert stream not in recorder.streams


def test_a_record_verb_refuses_a_value_that_is_no_object(session: Session) -> None:
    del session.info["durable_streams"]
    session.add(record := Silent(id=1))
    session.flush()
    with pytest.raises(UsageError, match="JSON object"):
        record.stream_update_later()


def test_every_captured_event_passes_the_tap(
    sqlite_engine: sa.Engine, recorder: Recorder, every_event_follows_the_state_protocol: Tap
) -> None:
    """The fixture that holds the suite to the protocol sees what a commit sends, not only what verbs encode."""
    tap = every_event_follows_the_state_protocol
    with Session(sqlite_engine, info={"durable_streams": recorder}) as session:
        session.add(Board(id=1, name="todo"))
        session.add(card := Card(id=1, title="one", board_id=1))
        for step in (lambda: None, lambda: setattr(card, "title", "two"), lambda: session.delete(card)):
            step()
            before, sent = tap.seen, len(recorder.events())
            session.commit()
            assert tap.seen - before == len(recorder.events()) - sent > 0


def test_the_tap_notices_a_batch_that_breaks_the_protocol(every_event_follows_the_state_protocol: Tap) -> None:
    tap = every_event_follows_the_state_protocol
    body = ChangeEvent(type="n", key="1", operation=Operation.INSERT, value={}).encode()
    assert not tap.faults
    Batch(stream="s", events=(body.replace(b'"key":"1"', b'"key":""'), b'{"typing":true}'), txid="t")
    assert len(tap.faults) == 1
    tap.faults.clear()
