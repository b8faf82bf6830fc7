"""What each operation of the unit of work becomes."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, make_transient, mapped_column, object_session

from broadcastable import Broadcastable, streams_to
from broadcastable.counters import counters
from broadcastable.transactions import Change, Changes, coalesce
from tests.capture.models import Board, Card, Team
from tests.capture.recorder import Recorder

KEY = ("card", "1")
CARDS_1 = "gid://app/Board/1/cards"
CARDS_2 = "gid://app/Board/2/cards"

INSERT: Change = (False, True, b"inserted", None, None)
UPDATE: Change = (True, True, b"updated", b"before", None)
DELETE: Change = (True, False, None, b"before", None)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([INSERT, UPDATE], (False, True, b"updated", None, None)),
        ([INSERT, (True, False, None, None, None)], None),
        ([UPDATE, (True, True, b"again", b"between", None)], (True, True, b"again", b"before", None)),
        ([UPDATE, (True, False, None, b"between", None)], (True, False, None, b"before", None)),
        ([DELETE, INSERT], (True, True, b"inserted", b"before", None)),
        ([DELETE, INSERT, DELETE], (True, False, None, b"before", None)),
        ([INSERT, DELETE, INSERT], INSERT),
    ],
)
def test_changes_of_one_key_become_one(steps: list[Change], expected: Change | None) -> None:
    changes: Changes = {}
    for step in steps:
        coalesce(changes, KEY, step)
    assert changes.get(KEY) == expected


@given(st.booleans(), st.lists(st.binary(min_size=1), max_size=6))
def test_any_history_coalesces_to_its_ends(there: bool, bodies: list[bytes]) -> None:
    """Alternating deletes and inserts or updates, from any start: only whether it was there and is there counts."""
    changes: Changes = {}
    now = there
    last: bytes | None = None
    for index, body in enumerate(bodies):
        delete = now and index % 2 == 1
        coalesce(changes, KEY, (now, not delete, None if delete else body, None, None))
        now, last = not delete, None if delete else body
    found = changes.get(KEY)
    if not bodies or (not there and not now):
        assert found is None
    else:
        assert found is not None
        assert found[:3] == (there, now, last)


def test_a_batch_says_what_happened_in_the_transaction(session: Session, recorder: Recorder) -> None:
    session.add(Card(id=9, title="brief", board_id=1))
    session.flush()
    session.delete(session.get_one(Card, 9))
    new = Card(id=10, title="draft", board_id=1)
    session.add(new)
    session.flush()
    new.title = "final"
    session.get_one(Card, 1).title = "changed"
    session.flush()
    session.delete(session.get_one(Card, 1))
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("insert", "10"), ("delete", "1")]}
    assert recorder.events(CARDS_1)[0]["value"]["title"] == "final"


def test_rows_arrive_in_the_order_in_which_they_were_added(session: Session, recorder: Recorder) -> None:
    session.add_all([Card(title=f"{number}", board_id=1) for number in range(50)])
    session.commit()
    assert [event["value"]["title"] for event in recorder.events(CARDS_1)] == [f"{number}" for number in range(50)]


def test_an_event_says_the_whole_row_with_keys_as_text(session: Session, recorder: Recorder) -> None:
    session.get_one(Card, 1).title = "changed"
    session.commit()
    (event,) = recorder.events()
    assert event["value"] == {"id": "1", "title": "changed", "label": None, "board_id": "1"}
    assert "old_value" not in event


def move_by_key(session: Session) -> None:
    session.get_one(Card, 1).board_id = 2


def move_by_parent(session: Session) -> None:
    session.get_one(Card, 1).board = session.get_one(Board, 2)


def move_by_collection(session: Session) -> None:
    board = session.get_one(Board, 2)
    board.cards.append(session.get_one(Card, 1))


def move_to_a_new_parent_in_the_same_flush(session: Session) -> None:
    session.add(Board(id=2_000, name="new", team_id=2, cards=[session.get_one(Card, 1)]))


def move_while_expired(session: Session) -> None:
    card = session.get_one(Card, 1)
    session.expire(card)
    card.board_id = 2


def move_while_expired_by_parent(session: Session) -> None:
    card, board = session.get_one(Card, 1), session.get_one(Board, 2)
    session.expire(card)
    card.board = board


def move_by_expression(session: Session) -> None:
    session.get_one(Card, 1).board_id = Card.board_id + 1  # type: ignore[assignment]


@pytest.mark.parametrize(
    "move",
    [
        move_by_key,
        move_by_parent,
        move_by_collection,
        move_to_a_new_parent_in_the_same_flush,
        move_while_expired,
        move_while_expired_by_parent,
        move_by_expression,
    ],
    ids=lambda move: move.__name__,
)
def test_a_move_is_a_delete_there_and_an_insert_here(
    session: Session, recorder: Recorder, move: Callable[[Session], None]
) -> None:
    move(session)
    session.commit()
    found = {stream: events for stream, events in recorder.by_stream().items() if stream.endswith("/cards")}
    new = next(stream for stream in found if stream != CARDS_1)
    assert new in {CARDS_2, "gid://app/Board/2000/cards"}
    assert found == {CARDS_1: [("delete", "1")], new: [("insert", "1")]}


def test_a_move_there_and_back_is_an_update(session: Session, recorder: Recorder) -> None:
    card = session.get_one(Card, 1)
    card.board_id = 2
    session.flush()
    card.board_id = 1
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("update", "1")]}


def test_a_row_without_a_parent_is_on_no_stream(session: Session, recorder: Recorder) -> None:
    session.add(Card(id=9, title="loose"))
    session.get_one(Card, 1).board = None
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("delete", "1")]}
    recorder.clear()
    session.get_one(Card, 9).title = "still loose"
    session.commit()
    assert recorder.batches == []


def test_a_changed_key_is_a_delete_and_an_insert(session: Session, recorder: Recorder) -> None:
    session.get_one(Card, 1).id = 77
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("delete", "1"), ("insert", "77")]}


def test_keys_that_change_hands_within_a_flush_end_up_with_their_new_owner(
    session: Session, recorder: Recorder
) -> None:
    """SQLAlchemy makes a deleted row and a new one with its key one UPDATE."""
    session.delete(session.get_one(Card, 1))
    session.add(Card(id=1, title="new owner", board_id=2))
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("delete", "1")], CARDS_2: [("insert", "1")]}
    recorder.clear()
    session.delete(session.get_one(Card, 1))
    session.add(Card(id=1, title="newest", board_id=2, label=None))
    session.commit()
    assert recorder.by_stream() == {CARDS_2: [("update", "1")]}


def test_an_update_that_changes_nothing_is_no_event(session: Session, recorder: Recorder) -> None:
    card = session.get_one(Card, 1)
    card.title = card.title
    card.board = card.board
    card.title = "else"
    card.title = "one"
    session.commit()
    assert recorder.batches == []


def test_an_expression_is_read_back(session: Session, recorder: Recorder) -> None:
    session.get_one(Card, 1).title = Card.title + "!"  # type: ignore[assignment]
    session.commit()
    assert [event["value"]["title"] for event in recorder.events()] == ["one!"]


def test_values_are_those_of_the_flush_whatever_becomes_of_the_objects(session: Session, recorder: Recorder) -> None:
    session.add(Card(id=9, title="forgotten", board_id=1))
    session.flush()
    gc.collect()
    card = session.get_one(Card, 1)
    card.title = "expunged"
    session.flush()
    session.expunge(card)
    card.title = "not the session's any more"
    other = session.get_one(Card, 2)
    other.title = "expired"
    session.flush()
    session.expire(other)
    make_transient(card)
    session.expunge_all()
    session.commit()
    titles = {event["key"]: event["value"]["title"] for event in recorder.events()}
    assert titles == {"9": "forgotten", "1": "expunged", "2": "expired"}


def test_an_expired_record_that_is_changed_is_sent_whole(session: Session, recorder: Recorder) -> None:
    card = session.get_one(Card, 1)
    session.expire(card)
    card.title = "changed"
    session.commit()
    assert recorder.events() == [
        recorder.events()[0] | {"value": {"id": "1", "title": "changed", "label": None, "board_id": "1"}}
    ]


def test_an_expired_record_that_is_deleted_leaves_its_stream(session: Session, recorder: Recorder) -> None:
    card = session.get_one(Card, 1)
    session.expire(card)
    session.delete(card)
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("delete", "1")]}


def test_a_record_moved_and_then_deleted_leaves_the_stream_it_was_on(session: Session, recorder: Recorder) -> None:
    card = session.get_one(Card, 1)
    card.board_id = 2
    session.delete(card)
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("delete", "1")]}


def test_children_that_lose_their_parent_leave_its_stream(session: Session, recorder: Recorder) -> None:
    session.delete(session.get_one(Board, 1))
    session.commit()
    assert recorder.by_stream()[CARDS_1] == [("delete", "1"), ("delete", "2")]
    assert recorder.by_stream()["gid://app/Team/1/boards"] == [("delete", "1")]


def test_merge_sends_what_it_changes(session: Session, recorder: Recorder) -> None:
    session.merge(Card(id=1, title="merged", board_id=1))
    session.merge(Card(id=9, title="merged in", board_id=1))
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("insert", "9"), ("update", "1")]} or recorder.by_stream() == {
        CARDS_1: [("update", "1"), ("insert", "9")]
    }


def test_several_declarations_each_get_the_event(session: Session, recorder: Recorder) -> None:
    session.get_one(Board, 1).name = "renamed"
    session.commit()
    assert recorder.by_stream() == {
        "gid://app/Board/1": [("update", "1")],
        "gid://app/Team/1/boards": [("update", "1")],
    }


def test_a_row_that_vanishes_behind_our_back_before_the_commit_is_no_event(
    session: Session, recorder: Recorder
) -> None:
    """What an expression gave is read before the commit; by then raw SQL may have deleted the row."""
    session.get_one(Card, 1).title = Card.title + "!"  # type: ignore[assignment]
    session.get_one(Card, 2).title = Card.title + "!"  # type: ignore[assignment]
    session.flush()
    session.execute(sa.text("DELETE FROM cards WHERE id = 1"))
    session.commit()
    assert recorder.summary() == [("update", "card", "2")]


@pytest.mark.parametrize("functions", [False, True], ids=["columns alone", "with a function"])
def test_server_defaults_that_the_flush_does_not_fetch_are_read_with_one_select(
    engine: sa.Engine, recorder: Recorder, functions: bool
) -> None:
    loud = [streams_to("loud", when=lambda entry: entry.state == "new")] if functions else []

    class Lazy(DeclarativeBase):
        type_annotation_map = {str: sa.String(50)}  # noqa: RUF012 - MariaDB wants a length

    class Entry(Lazy, Broadcastable):
        __tablename__ = "entries"
        __streams__ = (streams_to("entries"), *loud)
        __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012 - as SQLAlchemy has it
        id: Mapped[int] = mapped_column(primary_key=True)
        state: Mapped[str] = mapped_column(server_default="new")
        edits: Mapped[int] = mapped_column(server_default="0", onupdate=sa.text("edits + 1"))

    Lazy.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": recorder}) as session:
        entries = [Entry() for _ in range(20)]

        def add() -> None:
            session.add_all(entries)
            session.commit()

        # Before the commit; or already in the flush, where a function of the application is going to look.
        assert sum(each.startswith("SELECT") for each in statements(engine, add)) == 1
        assert [event["value"]["state"] for event in recorder.events("entries")] == ["new"] * 20
        assert len(recorder.events("loud")) == (20 if functions else 0)
        recorder.clear()
        entries[0].state = "old"
        session.commit()
        (event,) = recorder.events("entries")
        assert (event["value"]["state"], event["value"]["edits"]) == ("old", 1)
        assert recorder.summary("loud") == ([("delete", "entry", "1")] if functions else [])


def test_what_a_failed_flush_has_noted_is_forgotten(session: Session, recorder: Recorder) -> None:
    """A flush that fails does not reach its end; the next one must not take its old values for today's."""
    session.add(Board(id=3, name="other"))
    session.commit()
    recorder.clear()
    card = session.get_one(Card, 1)
    savepoint = session.begin_nested()
    session.expire(card)
    card.board_id = 2
    session.add(Card(id=90))  # its title is missing
    with pytest.raises(IntegrityError):
        session.flush()
    savepoint.rollback()
    session.execute(sa.update(Card).where(Card.id == 1).values(board_id=2))
    card.board_id = 3
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("delete", "1")], "gid://app/Board/3/cards": [("insert", "1")]}


class Own(DeclarativeBase):
    type_annotation_map = {str: sa.String(50)}  # noqa: RUF012 - MariaDB wants a length


class Wordless:
    """A key as applications have them, but it cannot say what it is."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Wordless) and other.number == self.number

    def __hash__(self) -> int:
        return self.number

    def __lt__(self, other: Wordless) -> bool:
        return self.number < other.number

    def __str__(self) -> str:
        raise ZeroDivisionError("on purpose")

    __repr__ = __str__


class WordlessKey(sa.TypeDecorator[Wordless]):
    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: Wordless | None, dialect: Any) -> int | None:
        return None if value is None else value.number

    def process_result_value(self, value: int | None, dialect: Any) -> Wordless | None:
        return None if value is None else Wordless(value)


class Item(Own, Broadcastable):
    __tablename__ = "items"
    __streams__ = (streams_to("items", old_value=True), streams_to("listed", when=lambda item: item.name is not None))
    id: Mapped[Wordless] = mapped_column(WordlessKey(), primary_key=True)
    name: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="new")


def test_a_key_that_has_no_text_costs_events_and_no_commit(engine: sa.Engine, recorder: Recorder) -> None:
    Own.metadata.create_all(engine)
    failed = counters["events_failed"]
    with Session(engine, info={"durable_streams": recorder}) as session:
        items = [Item(id=Wordless(1), name="a"), Item(id=Wordless(2), name="b")]
        session.add_all(items)
        session.commit()
        for item in items:
            item.name = "c"
        session.commit()
        session.delete(items[0])
        session.commit()
        assert session.scalars(sa.select(Item.name)).all() == ["c"]
    assert recorder.batches == []
    assert counters["events_failed"] > failed


class Asked(Own, Broadcastable):
    __tablename__ = "asked"
    __streams__ = (streams_to("direct"), streams_to("asked", when=lambda record: asks_in_vain(record)))
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def asks_in_vain(record: Asked) -> bool:
    if record.name == "ask":
        session = object_session(record)
        assert session is not None
        session.execute(sa.text("SELECT nothing_of_the_kind"))
    return True


def test_an_error_of_the_database_in_a_function_is_the_flushs_own(engine: sa.Engine, recorder: Recorder) -> None:
    """PostgreSQL has given up the transaction then, and its COMMIT would be a ROLLBACK that nobody hears of."""
    Own.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": recorder}) as session:
        session.add_all([Asked(id=1, name="ask"), Asked(id=2, name="quiet")])
        with pytest.raises(DBAPIError):
            session.commit()
        session.rollback()
        assert recorder.batches == []
        assert session.scalars(sa.select(Asked)).all() == []
        session.add(Asked(id=3, name="quiet"))
        session.commit()
        assert recorder.by_stream() == {"direct": [("insert", "3")], "asked": [("insert", "3")]}
        recorder.clear()
        session.get_one(Asked, 3).name = "ask"
        with pytest.raises(DBAPIError):
            session.commit()
        session.rollback()
    assert recorder.batches == []


def statements(engine: Any, step: Callable[[], None]) -> list[str]:
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        step()
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
    return [each for each in seen if not each.startswith(("BEGIN", "SAVEPOINT"))]


def test_a_thousand_rows_on_a_hundred_streams_cost_no_statement(session: Session, recorder: Recorder) -> None:
    engine = session.get_bind()
    session.add_all([Board(id=number, name="x", team_id=1) for number in range(100, 200)])
    session.commit()
    recorder.clear()

    def insert() -> None:
        session.add_all([Card(title="x", board_id=100 + number % 100) for number in range(1000)])
        session.commit()

    assert {each.split()[0] for each in statements(engine, insert)} == {"INSERT"}
    assert len(recorder.batches) == 100
    assert len(recorder.events()) == 1000
    recorder.clear()
    cards = session.scalars(sa.select(Card).where(Card.board_id >= 100)).all()

    def update() -> None:
        for card in cards:
            card.title = "changed"
            card.board_id = 100 + (card.id + 1) % 100
        session.commit()

    assert {each.split()[0] for each in statements(engine, update)} == {"UPDATE"}
    recorder.clear()

    def move_expired(board_id: int) -> None:
        cards = session.scalars(sa.select(Card).where(Card.board_id >= 100)).all()
        session.commit()
        for card in cards:
            card.board_id = board_id
        session.commit()

    # SQLAlchemy itself reads each expired row again; where the rows were before is one SELECT more for all of them.
    with Card.suppressing_streams():
        alone = statements(engine, lambda: move_expired(100))
    watched = statements(engine, lambda: move_expired(101))
    assert len(watched) == len(alone) + 1
    assert len(recorder.events("gid://app/Board/101/cards")) == 1000
    cards = session.scalars(sa.select(Card).where(Card.board_id >= 100)).all()

    def delete() -> None:
        for card in cards:
            session.delete(card)
        session.commit()

    assert {each.split()[0] for each in statements(engine, delete)} == {"DELETE"}


def test_a_session_without_models_with_streams_is_left_alone(board_engine: sa.Engine) -> None:
    from tests.capture.test_state_machine import Base, Shelf

    Base.metadata.create_all(board_engine)
    with Session(board_engine) as session:
        session.add(Shelf(id=1))
        session.flush()
        assert session.info == {}
        session.rollback()


def test_text_that_json_must_escape_arrives_as_it_is(session: Session, recorder: Recorder) -> None:
    title = 'quote " backslash \\ newline \n emoji 🐙 null-like \u2028'
    session.add(Team(id=7, name=title))
    session.commit()
    (body,) = (body for batch in recorder.batches for body in batch.events)
    assert json.loads(body)["value"]["name"] == title
