"""Connections for relaying the database outbox: synchronous, and with the isolation that its steps rely on."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.ext.asyncio import AsyncEngine

from broadcastable.errors import ConfigurationError

SQLITE_PATIENCE = 30.0
"""Seconds for which a step waits while the application writes: SQLite has one writer at a time."""

ASKED_AFTER = 1.0
"""Seconds of rest after which a connection is asked whether it is still there, before it is used again."""

_RESTS_SINCE = "broadcastable.rests_since"

Database = sa.Engine | AsyncEngine | sa.URL | str


def lends_its_pool(database: Database | None) -> bool:
    """Whether the relay shares the connections of *database*. Those of SQLite would not begin as the relay must."""
    return isinstance(database, sa.Engine) and database.dialect.name != "sqlite"


def check(database: Database | None) -> None:
    """Raise what `open_engine` would, without opening anything."""
    if database is not None and not lends_its_pool(database):
        sync_url(_url(database))


def open_engine(database: Database | None) -> sa.Engine:
    """An engine for the relay's steps on *database*.

    READ COMMITTED, whatever the application's own level is: a step that waited for a lock must see what its holder
    wrote. On SQLite every transaction begins as a writer.

    Raises:
        ConfigurationError: There is no database, its driver is not installed, or it is SQLite in memory.
    """
    if database is None:
        raise ConfigurationError(
            "To relay the database outbox, or to put into it outside a transaction, "
            "set database_url (BROADCASTABLE_DATABASE_URL)"
        )
    if isinstance(database, sa.Engine) and lends_its_pool(database):
        return database.execution_options(isolation_level="READ COMMITTED")
    url = sync_url(_url(database))
    if url.get_backend_name() != "sqlite":
        engine = sa.create_engine(url, isolation_level="READ COMMITTED")
        _ask_after_a_rest(engine)
        return engine
    engine = sa.create_engine(url, connect_args={"timeout": SQLITE_PATIENCE})
    _begin_immediately(engine)
    return engine


_SYNC_DRIVERS = {
    "sqlite+aiosqlite": "sqlite",
    "postgresql+asyncpg": "postgresql+psycopg",
    "postgresql+psycopg_async": "postgresql+psycopg",
    "mysql+aiomysql": "mysql+pymysql",
    "mysql+asyncmy": "mysql+pymysql",
    "mariadb+aiomysql": "mariadb+pymysql",
    "mariadb+asyncmy": "mariadb+pymysql",
}


def sync_url(url: sa.URL | str) -> sa.URL:
    """*url* with the synchronous driver of its backend: the relay works in threads.

    Raises:
        ConfigurationError: That driver is not installed, or the URL names an in-memory SQLite database.
    """
    parsed = sa.make_url(url)
    parsed = parsed.set(drivername=_SYNC_DRIVERS.get(parsed.drivername, parsed.drivername))
    try:
        dialect = parsed.get_dialect()
        dialect.import_dbapi()
    except (ImportError, exc.NoSuchModuleError) as error:
        raise ConfigurationError(
            f"The database outbox is relayed with the driver {parsed.drivername!r}, which is not installed ({error}). "
            "Install it, or set database_url to a synchronous driver that is"
        ) from error
    if parsed.get_backend_name() == "sqlite" and _is_in_memory(parsed):
        raise ConfigurationError(
            "The database outbox needs an SQLite file: an in-memory database is seen by one connection only. "
            'Give database_url a path, or choose outbox="memory"'
        )
    return parsed


def _is_in_memory(url: sa.URL) -> bool:
    if url.query.get("cache") == "shared":
        return False
    return not url.database or url.database == ":memory:" or url.query.get("mode") == "memory"


def _begin_immediately(engine: sa.Engine) -> None:
    # A transaction that reads first and writes then fails at once when another wrote in between (SQLITE_BUSY_SNAPSHOT),
    # whatever the timeout. SQLAlchemy documentation, SQLite, "Enabling non-legacy SQLite transactional modes".
    @event.listens_for(engine, "connect")
    def stop_the_driver_from_beginning(dbapi_connection: Any, record: Any) -> None:
        dbapi_connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _ask_after_a_rest(engine: sa.Engine) -> None:
    """Have connections that rested in the pool asked whether they are still there. (`pool_pre_ping` asks always.)"""

    @event.listens_for(engine, "checkin")
    def note_the_time(dbapi_connection: Any, record: Any) -> None:
        record.info[_RESTS_SINCE] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def ask(dbapi_connection: Any, record: Any, fairy: Any) -> None:
        since = record.info.pop(_RESTS_SINCE, None)
        if since is None or time.monotonic() - since < ASKED_AFTER:
            return
        try:
            engine.dialect.do_ping(dbapi_connection)
        except engine.dialect.loaded_dbapi.Error as error:
            # The pool opens another connection, and does not use those any more that are older than this.
            raise exc.DisconnectionError from error


def _url(database: Database) -> sa.URL | str:
    return database.url if isinstance(database, sa.Engine | AsyncEngine) else database
