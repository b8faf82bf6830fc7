"""What a captured bulk statement says of each row: what the database made of it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, with_loader_criteria

from broadcastable import Broadcastable, streams_to
from broadcastable.bulk import BulkStatementError, UncapturedBulkStatement
from broadcastable.counters import counters
from tests.capture.conftest import populate
from tests.capture.models import Base, Card, Team
from tests.capture.recorder import Recorder
from tests.conftest import BACKENDS

CARDS_1 = "gid://app/Board/1/cards"
CARDS_2 = "gid://app/Board/2/cards"

cards = Card.__table__


class DocumentBase(DeclarativeBase):
    type_annotation_map = {str: sa.String(50)}  # noqa: RUF012 - MariaDB wants a length


def _refusing(document: Any) -> dict[str, Any]:
    if document.title == "bad":
        raise ValueError("no value for it")
    if document.title == "sql":
        session_under_test[0].execute(sa.text("SELECT nonsense"))
    return {"title": document.title}


session_under_test: list[Session] = []


class Document(DocumentBase, Broadcastable):
    __tablename__ = "documents"
    __stream_bulk__ = "capture"
    __streams__ = (
        streams_to("documents", value=_refusing),
        streams_to("history", old_value=True),
        streams_to("arrivals", on=["insert"]),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    slug: Mapped[str | None] = mapped_column(unique=True)
    size: Mapped[int] = mapped_column(default=0)


class Tag(DocumentBase, Broadcastable):
    __tablename__ = "tags"
    __table_args__ = {"implicit_returning": False}  # noqa: RUF012 - as on a database without RETURNING
    __stream_bulk__ = "capture"
    __streams__ = streams_to("tags")

    name: Mapped[str] = mapped_column(primary_key=True)


@pytest.fixture
def documents(engine: sa.Engine, recorder: Recorder) -> Iterator[Session]:
    """Documents 1 and 2, with the slugs "a" and "b"."""
    DocumentBase.metadata.create_all(engine)
    with Session(engine, info={"durable_streams": recorder}) as session:
        session.add_all([Document(title="one", slug="a"), Document(title="two", slug="b")])
        session.commit()
        recorder.clear()
        session_under_test[:] = [session]
        yield session


def upsert(session: Session, model: type[Any]) -> Any:
    return (postgresql if session.get_bind().dialect.name == "postgresql" else sqlite).insert(model)


only_with_on_conflict = pytest.mark.parametrize(
    "database_url", [each for each in BACKENDS if each != "mariadb"], indirect=True
)


only_on_postgresql = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


# Failures


def test_a_value_that_cannot_be_made_leaves_the_row_where_it_is(documents: Session, recorder: Recorder) -> None:
    """The row is still there, so no reader may be told that it is gone."""
    failed = counters["events_failed"]
    documents.execute(sa.update(Document).where(Document.id == 1).values(title="bad"))
    documents.commit()
    assert recorder.by_stream() == {"history": [("update", "1")]}
    assert counters["events_failed"] == failed + 1


def test_where_a_row_was_may_be_unknown_and_it_is_still_told_what_it_is(
    documents: Session, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (route, *_) = Document.__dict__["__stream_plan__"].routes
    monkeypatch.setattr(route, "when", lambda document: document.nothing if document.title == "one" else True)
    documents.execute(sa.update(Document).values(title="x").where(Document.id == 1))
    documents.commit()
    assert recorder.by_stream()["documents"] == [("update", "1")]


def test_an_sql_error_in_a_function_of_the_application_is_raised(documents: Session, recorder: Recorder) -> None:
    """PostgreSQL has given up the transaction then: its COMMIT would be a rollback, and events of it phantoms."""
    with pytest.raises(sa.exc.DBAPIError):
        documents.execute(sa.update(Document).values(title="sql"))
    documents.rollback()
    documents.commit()
    assert recorder.batches == []


# Which rows


def test_the_criteria_of_a_statement_spare_rows(session: Session, recorder: Recorder) -> None:
    only_1 = with_loader_criteria(Card, Card.id == 1)
    session.execute(sa.update(Card).values(title="x").options(only_1))
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("update", "1")]}
    recorder.clear()
    session.execute(sa.delete(Card).options(only_1))
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("delete", "1")]}
    assert session.scalars(sa.select(Card.id).order_by(Card.id)).all() == [2, 3]


@pytest.fixture
def hiding() -> Iterator[Callable[[Callable[[Any], None]], None]]:
    """Installs a `do_orm_execute` hook for the length of a test."""
    hooks: list[Callable[[Any], None]] = []

    def install(hook: Callable[[Any], None]) -> None:
        event.listen(Session, "do_orm_execute", hook)
        hooks.append(hook)

    yield install
    for hook in hooks:
        event.remove(Session, "do_orm_execute", hook)


def test_rows_that_the_application_hides_from_queries_are_seen(
    session: Session, recorder: Recorder, hiding: Callable[..., None]
) -> None:
    """As a soft-delete recipe does; the statement changes them all the same."""
    session.get_one(Card, 1).label = "archived"
    session.commit()
    recorder.clear()

    def hide(state: Any) -> None:
        if state.is_select:
            state.statement = state.statement.options(with_loader_criteria(Card, Card.label.is_(None)))

    hiding(hide)
    session.execute(sa.update(Card).values(board_id=2))
    session.commit()
    assert sorted(recorder.by_stream()[CARDS_1]) == [("delete", "1"), ("delete", "2")]
    recorder.clear()
    session.execute(sa.delete(Card))
    session.commit()
    assert sorted(recorder.by_stream()[CARDS_2]) == [("delete", "1"), ("delete", "2"), ("delete", "3")]


def test_rows_that_the_application_spares_are_not_told_of(
    session: Session, recorder: Recorder, hiding: Callable[..., None]
) -> None:
    """As a multi-tenant recipe does, which no part of the statement shows."""

    def spare(state: Any) -> None:
        if state.is_update or state.is_delete:
            state.statement = state.statement.options(with_loader_criteria(Card, Card.id == 2))

    hiding(spare)
    session.execute(sa.update(Card).values(title="x"))
    session.execute(sa.delete(Card))
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("delete", "2")]}


def test_a_delete_that_the_application_makes_an_update_is_one(
    session: Session, recorder: Recorder, hiding: Callable[..., None]
) -> None:
    def soften(state: Any) -> None:
        if state.is_delete:
            state.statement = sa.update(Card).where(state.statement.whereclause).values(label="deleted")

    hiding(soften)
    session.execute(sa.delete(Card).where(Card.id == 1))
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("update", "1")]}


def test_a_statement_on_another_schema_reads_that_schema(
    session: Session, recorder: Recorder, request: pytest.FixtureRequest, tmp_path: Any
) -> None:
    options = {"schema_translate_map": {None: "tenant"}}
    name = session.get_bind().dialect.name
    if name == "mysql":
        options = {"schema_translate_map": {None: session.get_bind().url.database}}  # type: ignore[union-attr]
    elif name == "sqlite":
        session.rollback()
        session.get_bind().dispose()  # type: ignore[union-attr]
        file = tmp_path / "tenant.db"
        event.listen(session.get_bind(), "connect", lambda raw, _: raw.execute(f"ATTACH '{file}' AS tenant"))
    else:
        session.execute(sa.text("CREATE SCHEMA tenant"))
    session.commit()
    if name != "mysql":
        Base.metadata.create_all(session.get_bind().execution_options(**options))  # type: ignore[union-attr]
        for model in (Team, *(each for each in Base.__subclasses__() if each is not Team)):
            rows = [dict(row._mapping) for row in session.execute(sa.select(model.__table__))]
            if rows:
                session.connection().execute(sa.insert(model.__table__), rows, execution_options=options)
        session.connection().execute(sa.update(cards).values(board_id=2), execution_options=options)
        session.commit()
    recorder.clear()
    session.execute(sa.update(Card).values(title="x").where(Card.id == 1), execution_options=options)
    session.execute(sa.delete(Card).where(Card.id == 2).execution_options(**options))
    session.commit()
    stream = CARDS_1 if name == "mysql" else CARDS_2
    assert recorder.by_stream() == {stream: [("update", "1"), ("delete", "2")]}


def test_nothing_is_flushed_that_the_statement_would_not_flush(session: Session, recorder: Recorder) -> None:
    session.add(Card(id=1, title="there is one already"))
    session.execute(sa.update(Card).values(title="x").where(Card.id == 2), execution_options={"autoflush": False})
    assert session.new
    session.expunge_all()
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("update", "2")]}


def test_what_waits_in_the_session_is_flushed_before_the_rows_are_read(session: Session, recorder: Recorder) -> None:
    session.get_one(Card, 1).board_id = 2
    session.add(Card(id=50, title="new", board_id=1))
    session.execute(sa.update(cards).values(title="x"))
    session.execute(sa.update(Card), [{"id": 50, "title": "y"}])
    session.commit()
    told = {stream: sorted(events) for stream, events in recorder.by_stream().items()}
    assert told == {
        CARDS_1: [("delete", "1"), ("insert", "50"), ("update", "2")],
        CARDS_2: [("insert", "1"), ("update", "3")],
    }


@only_on_postgresql
def test_only_the_rows_that_change_are_locked(session: Session) -> None:
    """Not those of another table that the WHERE clause looks at."""
    statements: list[str] = []
    event.listen(
        session.get_bind(), "before_cursor_execute", lambda conn, cursor, statement, *rest: statements.append(statement)
    )
    session.execute(sa.update(Card).values(title=Team.name).where(Card.board_id == Team.id))
    assert "FOR UPDATE OF cards" in statements[0]


# Several sets of parameters


def test_an_update_with_sets_of_parameters_is_captured(session: Session, recorder: Recorder) -> None:
    statement = sa.update(cards).where(cards.c.id == sa.bindparam("which")).values(title=sa.bindparam("what"))
    session.execute(statement, [{"which": 1, "what": "x"}, {"which": 3, "what": "y"}])
    session.execute(sa.update(cards).where(cards.c.id == sa.bindparam("which")), [{"which": 3, "board_id": 1}] * 2)
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("update", "1"), ("insert", "3")], CARDS_2: [("delete", "3")]}


def test_a_delete_with_sets_of_parameters_is_captured(session: Session, recorder: Recorder) -> None:
    session.execute(sa.delete(cards).where(cards.c.id == sa.bindparam("which")), [{"which": 1}, {"which": 99}])
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("delete", "1")]}


def test_keys_changed_by_sets_of_parameters_are_warned_of(session: Session, recorder: Recorder) -> None:
    statement = sa.update(cards).where(cards.c.id == sa.bindparam("which")).values(id=sa.bindparam("now"))
    with pytest.warns(UncapturedBulkStatement, match="changes primary keys"):
        session.execute(statement, [{"which": 1, "now": 10}])
    session.commit()
    assert recorder.batches == []


def test_an_update_by_primary_key_with_criteria_spares_rows(session: Session, recorder: Recorder) -> None:
    session.execute(
        sa.update(Card).where(Card.title == "one"),
        [{"id": 1, "label": "x"}, {"id": 2, "label": "x"}],
        execution_options={"synchronize_session": None},
    )
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("update", "1")]}


def test_a_mistake_of_the_caller_gets_the_error_of_sqlalchemy(session: Session) -> None:
    with pytest.raises(sa.exc.InvalidRequestError, match="primary key"):
        session.execute(sa.update(Card), [{"title": "x"}])
    with pytest.raises(sa.exc.StatementError, match="which"):
        session.execute(sa.delete(cards).where(cards.c.id == sa.bindparam("which")), [{"witch": 1}])


# Upserts


@only_with_on_conflict
def test_an_upsert_that_moves_a_row_takes_it_off_the_other_stream(session: Session, recorder: Recorder) -> None:
    insert = upsert(session, Card).values(id=1, title="up", board_id=2)
    session.execute(
        insert.on_conflict_do_update(
            index_elements=["id"], set_={"title": insert.excluded.title, "board_id": insert.excluded.board_id}
        )
    )
    session.commit()
    assert recorder.by_stream() == {CARDS_1: [("delete", "1")], CARDS_2: [("insert", "1")]}


@only_with_on_conflict
@pytest.mark.parametrize("by", ["slug", Document.slug, Document.__table__.c.slug], ids=["name", "attribute", "column"])
@pytest.mark.parametrize("sets", [True, False])
def test_an_upsert_sends_the_row_as_it_was(documents: Session, recorder: Recorder, by: Any, sets: bool) -> None:
    """By any unique key, with values in the statement and in sets of parameters."""
    rows = [{"slug": "a", "title": "up"}, {"slug": "new", "title": "new"}]
    insert = upsert(documents, Document)
    statement = (insert if sets else insert.values(rows)).on_conflict_do_update(
        index_elements=[by], set_={"title": insert.excluded.title}
    )
    documents.execute(statement, *([rows] if sets else []))
    documents.commit()
    told = {
        (each["headers"]["operation"], each["value"]["title"]): each.get("old_value", {}).get("title")
        for each in recorder.events("history")
    }
    assert told == {("update", "up"): "one", ("insert", "new"): None}
    assert [each["value"]["title"] for each in recorder.events("arrivals")] == ["new"]


@only_with_on_conflict
def test_an_upsert_that_spares_its_row_tells_nothing(documents: Session, recorder: Recorder) -> None:
    insert = upsert(documents, Document).values(id=1, title="up")
    documents.execute(
        insert.on_conflict_do_update(index_elements=["id"], set_={"title": "up"}, where=Document.size > 100)
    )
    documents.execute(upsert(documents, Document).values([{"id": 1, "title": "x"}]).on_conflict_do_nothing())
    documents.execute(upsert(documents, Document).values(id=2, title="x").on_conflict_do_nothing())
    documents.commit()
    assert recorder.batches == []


@only_with_on_conflict
def test_rows_that_are_not_skipped_are_inserts(documents: Session, recorder: Recorder) -> None:
    rows = [{"id": 1, "title": "x"}, {"id": 9, "title": "x"}]
    documents.execute(upsert(documents, Document).values(rows).on_conflict_do_nothing())
    documents.commit()
    assert recorder.by_stream()["history"] == [("insert", "9")]


@only_with_on_conflict
def test_an_upsert_of_rows_that_only_the_database_knows_is_told_in_part(documents: Session, recorder: Recorder) -> None:
    """No old value is better than a wrong one, and the caller is warned."""
    source = sa.select(Document.slug, sa.literal("up")).where(Document.id == 1)
    insert = upsert(documents, Document).from_select(["slug", "title"], source.where(sa.true()))
    statement = insert.on_conflict_do_update(index_elements=["slug"], set_={"title": insert.excluded.title})
    with pytest.warns(UncapturedBulkStatement, match="do not tell which rows"):
        documents.execute(statement)
    documents.commit()
    (told,) = recorder.events("history")
    assert (told["headers"]["operation"], "old_value" in told) == ("update", False)


def test_rows_that_are_replaced_leave(sqlite_engine: sa.Engine, recorder: Recorder) -> None:
    """INSERT OR REPLACE deletes whatever is in its way, by any unique key."""
    DocumentBase.metadata.create_all(sqlite_engine)
    with Session(sqlite_engine, info={"durable_streams": recorder}) as session:
        populate(session)
        session.add_all([Document(id=1, title="one", slug="a"), Document(id=2, title="two", slug="b")])
        session.commit()
        recorder.clear()
        session.execute(sa.insert(Card).prefix_with("OR REPLACE").values(id=1, title="new", board_id=2))
        session.execute(sa.insert(Document).prefix_with("OR REPLACE"), [{"id": 1, "title": "new", "slug": "b"}])
        session.execute(sa.insert(Document).prefix_with("OR IGNORE").values(id=1, title="not", slug="c"))
        session.commit()
    told = recorder.by_stream()
    assert (told[CARDS_1], told[CARDS_2]) == ([("delete", "1")], [("insert", "1")])
    assert told["history"] == [("update", "1"), ("delete", "2")]


# What cannot be captured


def test_an_inline_insert_is_captured(session: Session, recorder: Recorder) -> None:
    session.execute(sa.insert(Card).values(title="inline", board_id=1).inline())
    session.commit()
    assert [event["value"]["title"] for event in recorder.events(CARDS_1)] == ["inline"]


def test_a_key_that_the_database_computes_and_does_not_tell_is_warned_of(
    sqlite_engine: sa.Engine, recorder: Recorder
) -> None:
    DocumentBase.metadata.create_all(sqlite_engine)
    with Session(sqlite_engine, info={"durable_streams": recorder}) as session:
        with pytest.warns(UncapturedBulkStatement, match="SQL expression"):
            session.execute(sa.insert(Tag).values(name=sa.func.lower("RED")))
        session.execute(sa.insert(Tag).values(name="blue"))
        session.commit()
    assert recorder.by_stream() == {"tags": [("insert", "blue")]}


@only_on_postgresql
def test_a_change_inside_a_cte_is_warned_of_or_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = sa.update(Card).values(title="x").returning(Card.id).cte("renamed")
    for statement in (sa.select(sa.literal(1)).add_cte(renamed), sa.select(renamed.c.id), sa.select(renamed)):
        for run in (session.execute, session.scalars, session.scalar):
            with pytest.warns(UncapturedBulkStatement, match="inside a CTE"):
                run(statement)  # type: ignore[operator]
    monkeypatch.setattr(Card, "__stream_bulk__", "raise")
    with pytest.raises(BulkStatementError, match="inside a CTE"):
        session.execute(sa.select(renamed.c.id))
    monkeypatch.setattr(Card, "__stream_bulk__", "ignore")
    assert len(session.execute(sa.select(renamed.c.id)).all()) == 3


@only_on_postgresql
def test_a_where_clause_that_changes_rows_is_executed_once(session: Session, recorder: Recorder) -> None:
    """To ask beforehand which rows it means would be to execute it."""
    gone = sa.delete(Team).where(Team.id == 2).returning(Team.id).cte("gone")
    session.execute(sa.text("ALTER TABLE boards DROP CONSTRAINT boards_team_id_fkey"))
    statement = sa.update(Card).values(title="x").where(Card.board_id.in_(sa.select(gone.c.id)))
    with pytest.warns(UncapturedBulkStatement, match="changes rows itself"):
        assert session.execute(statement).rowcount == 1  # type: ignore[attr-defined]
