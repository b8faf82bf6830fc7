"""Statements that pass the unit of work: warned of, refused, ignored, or captured."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, registry

from broadcastable import Broadcastable, BulkStatementError, streams
from broadcastable.bulk import UncapturedBulkStatement
from tests import services
from tests.capture.models import Base, Board, Card, Team
from tests.capture.recorder import Recorder

CARDS_1 = "gid://app/Board/1/cards"
CARDS_2 = "gid://app/Board/2/cards"

BULK: list[Callable[[Session], object]] = [
    lambda session: session.execute(sa.insert(Team).values(id=9, name="x")),
    lambda session: session.execute(sa.insert(Team), [{"id": 9, "name": "x"}]),
    lambda session: session.execute(sa.insert(Team.__table__).values(id=9, name="x")),
    lambda session: session.execute(sa.update(Team).values(name="x")),
    lambda session: session.execute(sa.update(Team), [{"id": 1, "name": "x"}]),
    lambda session: session.execute(sa.delete(Team).where(Team.id == 99)),
    lambda session: session.scalars(sa.insert(Team).returning(Team.id), [{"id": 9, "name": "x"}]).all(),
    lambda session: session.scalar(sa.delete(Team).where(Team.id == 99).returning(Team.id)),
    lambda session: session.query(Team).update({"name": "x"}),
    lambda session: session.query(Team).filter_by(id=99).delete(),
    lambda session: session.bulk_insert_mappings(Team, [{"id": 9, "name": "x"}]),  # type: ignore[arg-type]
    lambda session: session.bulk_update_mappings(Team, [{"id": 1, "name": "x"}]),  # type: ignore[arg-type]
    lambda session: session.bulk_save_objects([Team(id=9, name="x")]),
]


@pytest.mark.parametrize("statement", BULK, ids=range(len(BULK)))
def test_a_bulk_statement_is_warned_of_refused_or_ignored(
    session: Session, recorder: Recorder, statement: Callable[[Session], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UncapturedBulkStatement, match=r"Team.__stream_bulk__ to \"capture\"") as caught:
        statement(session)
    assert caught[0].filename == __file__
    session.rollback()
    monkeypatch.setattr(Team, "__stream_bulk__", "raise")
    with pytest.raises(BulkStatementError):
        statement(session)
    session.rollback()
    with Team.suppressing_streams():
        statement(session)
    session.rollback()
    monkeypatch.setattr(Team, "__stream_bulk__", "ignore")
    statement(session)
    session.commit()
    assert recorder.batches == []


@pytest.mark.parametrize("statement", BULK, ids=range(len(BULK)))
def test_a_bulk_statement_is_captured_where_the_model_says_so(
    session: Session, recorder: Recorder, statement: Callable[[Session], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Team, "__stream_bulk__", "capture")
    statement(session)
    session.rollback()
    assert recorder.batches == []
    statement(session)
    session.commit()
    rows = {row.id: row.name for row in session.execute(sa.select(Team.id, Team.name))}
    changed = {str(key): name for key, name in rows.items() if name == "x"}
    assert {event["key"]: event["value"]["name"] for event in recorder.events()} == changed
    operations = {event["headers"]["operation"] for event in recorder.events()}
    assert operations in ({"insert"} if 9 in rows else {"update"}, set())


def test_a_warning_comes_once_for_each_call_site(session: Session) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            session.execute(sa.update(Team).values(name="x"))
        session.execute(sa.update(Team).values(name="x"))
    assert [warning.category for warning in caught] == [UncapturedBulkStatement] * 2


def test_the_call_site_is_found_under_asyncio(sqlite_url: str) -> None:
    import asyncio

    async def main() -> None:
        engine = services.open_async_engine(sqlite_url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            with pytest.warns(UncapturedBulkStatement) as caught:
                await session.execute(sa.update(Team).values(name="x"))
            assert caught[0].filename == __file__
        await engine.dispose()

    asyncio.run(main())


def test_results_are_what_the_caller_asked_for(session: Session) -> None:
    """With or without RETURNING of the caller's own, also where RETURNING was added."""
    assert session.execute(sa.update(Card).values(title="x").where(Card.board_id == 1)).rowcount == 2  # type: ignore[attr-defined]
    if session.get_bind().dialect.update_returning:
        returned = session.execute(sa.update(Card).values(title="y").where(Card.id == 1).returning(Card.id, Card.title))
        assert list(returned.keys()) == ["id", "title"]
        assert returned.all() == [(1, "y")]
    inserted = session.execute(sa.insert(Card).values(title="z", board_id=1))
    assert inserted.inserted_primary_key[0] > 3  # type: ignore[attr-defined]
    cards = session.scalars(sa.insert(Card).returning(Card), [{"title": "a"}, {"title": "b"}]).all()
    assert [card.title for card in cards] == ["a", "b"]
    assert session.query(Card).filter(Card.title == "a").update({"title": "c"}) == 1
    assert session.execute(sa.delete(Card).where(Card.title.in_(["b", "c"]))).rowcount == 2  # type: ignore[attr-defined]


def test_one_set_of_parameters_is_as_good_as_many(session: Session, recorder: Recorder) -> None:
    """SQLAlchemy gives another result than for one row with `values()`: it does not tell the key."""
    card = {"title": "z", "board_id": 1}
    if not session.get_bind().dialect.insert_returning:
        with pytest.warns(UncapturedBulkStatement, match="no RETURNING"):
            session.execute(sa.insert(Card), card)
        return
    session.execute(sa.insert(Card), card)
    assert session.scalar(sa.insert(Card).returning(Card.title), card) == "z"
    session.execute(sa.insert(Card), card, execution_options={"dml_strategy": "orm"})
    session.execute(sa.insert(Card.__table__), card)
    session.commit()
    assert [operation for operation, _ in recorder.by_stream()[CARDS_1]] == ["insert"] * 4


def test_dicts_without_keys_are_captured_and_left_as_they_are(session: Session, recorder: Recorder) -> None:
    cards: list[dict[str, object]] = [{"title": "a", "board_id": 1}, {"title": "b", "board_id": 1, "label": "x"}]
    given = copy.deepcopy(cards)
    session.bulk_insert_mappings(Card, cards)  # type: ignore[arg-type]
    session.bulk_insert_mappings(Card, cards)  # type: ignore[arg-type]
    session.bulk_insert_mappings(Card, [])  # type: ignore[arg-type]
    session.bulk_insert_mappings(Card, [{"id": 90, "title": "c", "board_id": 1}])  # type: ignore[arg-type]
    session.commit()
    assert cards == given
    values = {event["key"]: event["value"]["title"] for event in recorder.events(CARDS_1)}
    assert sorted(values.values()) == ["a", "a", "b", "b", "c"]
    assert values == {
        str(key): title for key, title in session.execute(sa.select(Card.id, Card.title).where(Card.id > 3))
    }
    assert {operation for operation, _, _ in recorder.summary(CARDS_1)} == {"insert"}


def test_dicts_get_the_keys_that_the_caller_wants(session: Session, recorder: Recorder) -> None:
    cards: list[dict[str, object]] = [{"title": "a", "board_id": 1}]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*before 2.0.32", UncapturedBulkStatement)
        session.bulk_insert_mappings(Card, cards, return_defaults=True)  # type: ignore[arg-type]
    session.commit()
    assert [event["value"]["id"] for event in recorder.events(CARDS_1)] == [
        str(each["id"]) for each in cards if "id" in each
    ]


def test_rows_moved_in_bulk_leave_the_one_stream_and_reach_the_other(session: Session, recorder: Recorder) -> None:
    session.execute(sa.update(Card).values(board_id=2))
    session.commit()
    assert recorder.by_stream() == {
        CARDS_1: [("delete", "1"), ("delete", "2")],
        CARDS_2: [("insert", "1"), ("insert", "2")],
    }


def test_keys_changed_in_bulk_are_deletes_and_inserts_where_the_database_returns_them(
    session: Session, recorder: Recorder
) -> None:
    statement = sa.update(Card).values(id=Card.id + 100).where(Card.board_id == 1)
    if not session.get_bind().dialect.update_returning:
        with pytest.warns(UncapturedBulkStatement, match="changes primary keys"):
            session.execute(statement)
        return
    session.execute(statement)
    session.commit()
    assert sorted(recorder.by_stream()[CARDS_1]) == [
        ("delete", "1"),
        ("delete", "2"),
        ("insert", "101"),
        ("insert", "102"),
    ]


def test_an_upsert_is_sent_as_what_it_does_to_each_row(session: Session, recorder: Recorder) -> None:
    rows = [{"id": key, "title": "new", "board_id": 1} for key in (1, 9)]
    if session.get_bind().dialect.name == "mysql":
        on_duplicate = mysql.insert(Card).values(rows)
        session.execute(on_duplicate.on_duplicate_key_update(title=on_duplicate.inserted.title))
    else:
        insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
        on_conflict = insert(Card).values(rows)
        statement = on_conflict.on_conflict_do_update(index_elements=["id"], set_={"title": on_conflict.excluded.title})
        session.execute(statement)
    session.commit()
    assert sorted(recorder.by_stream()[CARDS_1]) == [("insert", "9"), ("update", "1")]


def test_nothing_is_captured_of_a_statement_that_fails(session: Session, recorder: Recorder) -> None:
    with session.begin_nested() as savepoint:
        session.execute(sa.update(Card).values(title="x"))
        with pytest.raises(sa.exc.IntegrityError):
            session.execute(sa.insert(Card).values(id=1, title="twice"))
        savepoint.rollback()
    session.commit()
    assert recorder.batches == []


def test_a_copy_of_a_models_table_is_another_table(session: Session, recorder: Recorder) -> None:
    copied = Team.__table__.to_metadata(sa.MetaData(), name="old_teams")  # type: ignore[attr-defined]
    copied.create(session.connection())
    session.execute(sa.insert(copied).values(id=1, name="old"))
    session.execute(sa.update(copied).values(name="older"))
    session.commit()
    assert recorder.batches == []
    copied.drop(session.connection())
    session.commit()


def test_a_table_of_a_class_that_is_mapped_no_more_is_nobodys(session: Session, recorder: Recorder) -> None:
    mapped = registry()
    table = sa.Table("imports", mapped.metadata, sa.Column("id", sa.Integer, primary_key=True))

    class Import(Broadcastable):
        __streams__ = streams()
        __stream_bulk__ = "raise"

    mapped.map_imperatively(Import, table)
    mapped.dispose()
    table.create(session.connection())
    session.execute(sa.insert(table).values(id=1))
    session.commit()
    assert recorder.batches == []
    table.drop(session.connection())
    session.commit()


def test_statements_on_other_tables_pass(session: Session, recorder: Recorder) -> None:
    session.execute(sa.text("UPDATE teams SET name = 'x'"))
    session.execute(sa.select(Team))
    session.commit()
    assert recorder.batches == []
    assert session.get_one(Board, 1).team is not None
