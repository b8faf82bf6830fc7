"""`check` finds what nobody could see, and mends it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import ORMExecuteState, Session

from broadcastable.cli.application import load
from broadcastable.durable_streams import current
from broadcastable.server.embedded import EmbeddedServer
from broadcastable.settings import override

Run = Callable[..., Any]

SHOP = """
from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from broadcastable import Broadcastable, streams_to


class Base(DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "shelves"
    id: Mapped[int] = mapped_column(primary_key=True)


class Book(Base, Broadcastable):
    __tablename__ = "books"
    __streams__ = streams_to("shelf", "{name}")
    __gid_name__ = "{name}"
    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int] = mapped_column(ForeignKey("shelves.id"))
    title: Mapped[str]
    shelf: Mapped[Shelf] = relationship()


class Note:
    pass


count = 1
"""


@pytest.fixture
def shop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sqlite_url: str, stream_server: EmbeddedServer
) -> Iterator[ModuleType]:
    """An application with 3 books on 2 shelves, all of them delivered; its streams are its own."""
    name = f"shop_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SHOP.replace("{name}", name))
    monkeypatch.syspath_prepend(tmp_path)
    with override(
        server_url=stream_server.url,
        signing_key=stream_server.settings.signing_key,
        database_url=sqlite_url,
        gid_app=name,
    ):
        module = load(name)
        engine = sa.create_engine(sqlite_url)
        module.Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add_all([module.Shelf(id=1), module.Shelf(id=2)])
            session.add_all(
                module.Book(id=number, shelf_id=1 + number % 2, title=f"Volume {number}") for number in (1, 2, 3)
            )
            session.commit()
        assert current().drain()
        yield module
        current().close()
        engine.dispose()
        del sys.modules[name]


@contextmanager
def listening(target: Any, name: str, listener: Callable[..., None]) -> Iterator[None]:
    event.listen(target, name, listener)
    try:
        yield
    finally:
        event.remove(target, name, listener)


def by_hand(url: str, *statements: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def test_no_drift(shop: ModuleType, run: Run) -> None:
    result = run("check", f"{shop.__name__}:Book")
    assert result.exit_code == 0, result.stdout
    assert "No drift" in result.stdout


def test_drift_is_found_shown_and_mended(shop: ModuleType, run: Run, sqlite_url: str) -> None:
    """Rows changed by raw SQL: one missing, one stale, one extra; then none."""
    by_hand(
        sqlite_url,
        "INSERT INTO books VALUES (4, 1, 'Volume 4')",
        "UPDATE books SET title = 'Volume II' WHERE id = 2",
        "DELETE FROM books WHERE id = 3",
    )
    found = run("check", f"{shop.__name__}:Book", "--json")
    assert found.exit_code == 1
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [each["missing"] for each in lines if each["missing"]] == [["4"]]
    assert [each["stale"] for each in lines if each["stale"]] == [["2"]]
    assert [each["extra"] for each in lines if each["extra"]] == [["3"]]
    shown = run("check", f"{shop.__name__}:Book").stdout
    assert "3 rows on" in shown
    assert "missing 4" in shown

    mended = run("check", f"{shop.__name__}:Book", "--repair")
    assert mended.exit_code == 0, mended.stdout
    assert "3 events were appended" in mended.stdout
    assert run("check", f"{shop.__name__}:Book").exit_code == 0


def test_a_row_that_changes_while_other_streams_are_compared_is_not_written_over(
    shop: ModuleType, run: Run, sqlite_url: str
) -> None:
    """What was seen of a stream is mended before the next one is looked at; later events follow it."""
    by_hand(sqlite_url, "INSERT INTO books VALUES (4, 1, 'Volume 4')", "INSERT INTO books VALUES (5, 2, 'Volume 5')")
    engine = sa.create_engine(sqlite_url)
    looks = 0

    def change_before_the_second_stream(execution: ORMExecuteState) -> None:
        nonlocal looks
        looks += shop.Book.__table__ in execution.statement.get_final_froms()
        if looks == 3:  # after one at all streams, and another one at the first
            looks += 1
            with Session(engine) as session:
                session.delete(session.get_one(shop.Book, 4))
                session.commit()

    with listening(Session, "do_orm_execute", change_before_the_second_stream):
        mended = run("check", f"{shop.__name__}:Book", "--repair")
    engine.dispose()
    assert looks > 3
    assert mended.exit_code == 0, mended.stdout


def test_a_row_that_cannot_be_judged_is_shown_and_is_a_failure(
    shop: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without --repair, which can do nothing about it."""

    def refuse(book: object) -> bool:
        raise ValueError("[nobody] knows")

    monkeypatch.setattr(shop.Book.__dict__["__stream_plan__"].routes[0], "when", refuse)
    shown = run("check", f"{shop.__name__}:Book", "--repair")
    assert shown.exit_code == 1
    assert "1 (ValueError: [nobody] knows)" in shown.stdout
    assert "cannot be judged" in shown.stdout
    assert "differ" not in shown.stdout
    lines = [json.loads(line) for line in run("check", f"{shop.__name__}:Book", "--json").stdout.splitlines()]
    assert {"1", "2", "3"} == {key for each in lines for key in each["unknown"]}
    assert not any(each["extra"] for each in lines)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("{shop}:Shelf", "declares no streams"),
        ("{shop}:count", "is no model class"),
        ("{shop}:Missing", "has no 'Missing'"),
        ("{shop}", "is no model class"),
        ("{shop}:Note", "is no mapped class"),
        ("{shop}:Base", "is no mapped class"),
        ("collections:OrderedDict", "is no mapped class"),
        ("", "names no module"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(shop: ModuleType, run: Run, model: str, says: str) -> None:
    result = run("check", model.format(shop=shop.__name__))
    assert result.exit_code == 1
    assert says in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("no url", "database_url is of no use"),
        ("sqlite:////nowhere/to/be/found.db", "cannot be read"),
    ],
)
def test_a_database_that_is_not_there_is_one_sentence(shop: ModuleType, run: Run, url: str, says: str) -> None:
    result = run("check", f"{shop.__name__}:Book", "--database-url", url)
    assert result.exit_code == 1
    assert says in result.stderr.replace("\n", " ")


def test_no_database_url_says_where_to_set_it(shop: ModuleType, run: Run) -> None:
    with override(database_url=None):
        result = run("check", f"{shop.__name__}:Book")
    assert result.exit_code == 1
    assert "BROADCASTABLE_DATABASE_URL" in result.stderr
