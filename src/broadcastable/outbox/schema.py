"""The two tables of the database outbox, for SQLite, PostgreSQL, MariaDB and MySQL.

They stand beside the application's own tables, in its own metadata, so that its own migrations create them and its own
transactions write them. `outbox.database` is the only reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import CompileError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from broadcastable.names import MAX_NAME_LENGTH

MYSQL = ("mysql", "mariadb")


class ExactText(sa.types.TypeDecorator[str]):
    """Text that is equal only when it is the same, byte for byte.

    MySQL's text ignores case, accents or trailing spaces, depending on the server, so there it is kept as UTF-8 bytes.
    """

    impl = sa.String
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self._length = length

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name in MYSQL:
            return dialect.type_descriptor(sa.VARBINARY(4 * self._length))
        return dialect.type_descriptor(sa.String(self._length))

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> Any:
        return value.encode() if value is not None and dialect.name in MYSQL else value

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> str | None:
        return bytes(value).decode() if value is not None and dialect.name in MYSQL else value


class now_ms(FunctionElement[int]):
    """The database's clock: Unix time in milliseconds, also in the middle of a transaction."""

    type = sa.BigInteger()
    inherit_cache = True


@compiles(now_ms)
def _unknown(element: now_ms, compiler: Any, **kw: Any) -> str:
    raise CompileError(
        f"The database outbox knows SQLite, PostgreSQL, MariaDB and MySQL, not {compiler.dialect.name}. "
        'Choose outbox="redis"'
    )


@compiles(now_ms, "postgresql")
def _postgresql(element: now_ms, compiler: Any, **kw: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"


@compiles(now_ms, "sqlite")
def _sqlite(element: now_ms, compiler: Any, **kw: Any) -> str:
    # unixepoch('subsec') would need SQLite 3.42. 2440587.5 is the Julian day of the Unix epoch.
    return "CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER)"


@compiles(now_ms, "mysql")
@compiles(now_ms, "mariadb")
def _mysql(element: now_ms, compiler: Any, **kw: Any) -> str:
    return "CAST(UNIX_TIMESTAMP(SYSDATE(3)) * 1000 AS SIGNED)"


@dataclass(frozen=True, slots=True)
class OutboxTables:
    """What `tables` made.

    Attributes:
        batches: One row for each batch that waits; with no stream, for some minutes, one for each id of `put`, and one
            for each second in which a process acked something.
        streams: One row for each stream that was ever delivered.
    """

    batches: sa.Table
    streams: sa.Table


def tables(metadata: sa.MetaData, *, schema: str | None = None) -> OutboxTables:
    """Add `broadcastable_outbox` and `broadcastable_streams` to *metadata*, or find them there.

    Call it beside your models, so that `metadata.create_all` and Alembic's autogenerate see them; see
    `migrations_example/`.
    """
    schema = schema or metadata.schema
    prefix = f"{schema}." if schema else ""
    if f"{prefix}broadcastable_outbox" in metadata.tables:
        return OutboxTables(
            metadata.tables[f"{prefix}broadcastable_outbox"], metadata.tables[f"{prefix}broadcastable_streams"]
        )
    options: dict[str, Any] = {"schema": schema}
    for name in MYSQL:
        options |= {f"{name}_engine": "InnoDB", f"{name}_charset": "utf8mb4"}
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # only INTEGER counts by itself in SQLite
    long_bytes = sa.LargeBinary().with_variant(mysql.LONGBLOB(), *MYSQL)  # BLOB ends at 64 KiB
    batches = sa.Table(
        "broadcastable_outbox",
        metadata,
        sa.Column("id", number, primary_key=True, autoincrement=True),
        sa.Column("stream", ExactText(MAX_NAME_LENGTH), nullable=False),
        # The frame that took the row; 0 when none did.
        sa.Column("frame", sa.BigInteger, nullable=False, default=0),
        sa.Column("put_at", sa.BigInteger, nullable=False, default=now_ms()),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("events", sa.Integer, nullable=False),
        # Bytes of the events, and one more for each: what they add to a frame.
        sa.Column("size", sa.BigInteger, nullable=False),
        # The batch's id, txid, trace and the lengths of its events; then the events, one behind the other.
        sa.Column("about", long_bytes, nullable=False),
        sa.Column("payload", long_bytes, nullable=False),
        sa.Column("put_id", ExactText(64), nullable=True),
        sa.Index("ix_broadcastable_outbox_order", "stream", "frame", "id"),
        sa.Index("ix_broadcastable_outbox_put_id", "put_id", unique=True),
        # Without this a row's id could be given again once the newest rows are gone, and ids are the order.
        sqlite_autoincrement=True,
        **options,
    )
    streams = sa.Table(
        "broadcastable_streams",
        metadata,
        sa.Column("stream", ExactText(MAX_NAME_LENGTH), primary_key=True),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False, default=0),
        # The number that marks the frozen frame's rows, and its number of events: 0 when none is frozen.
        sa.Column("frame", sa.BigInteger, nullable=False, default=0),
        sa.Column("count", sa.Integer, nullable=False, default=0),
        # The row that goes first, because its first `skip` events are acked.
        sa.Column("head_id", sa.BigInteger, nullable=True),
        sa.Column("skip", sa.Integer, nullable=False, default=0),
        # The row that is not done when the frozen frame is acked, and how many of its events then are.
        sa.Column("rest_id", sa.BigInteger, nullable=True),
        sa.Column("rest", sa.Integer, nullable=False, default=0),
        sa.Column("anchor", sa.Text, nullable=True),
        sa.Column("lease", sa.String(64), nullable=True),
        sa.Column("leased_until", sa.BigInteger, nullable=False, default=0),
        sa.Column("not_before", sa.BigInteger, nullable=False, default=0),
        sa.Column("parked", sa.Text, nullable=True),
        sa.Column("woken_at", sa.BigInteger, nullable=True),
        **options,
    )
    return OutboxTables(batches, streams)
