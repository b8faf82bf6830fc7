"""The Alembic example is run as its README says, on every database."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import sqlalchemy as sa

from broadcastable.outbox.database import DatabaseOutbox, tables
from tests.outbox.workers import batch, deliver

EXAMPLE = Path(__file__).parents[2] / "migrations_example"


def alembic(url: str, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-x", f"url={url}", *command],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def shape_of_the_tables(engine: sa.Engine) -> list[object]:
    inspector = sa.inspect(engine)
    shape: list[object] = []
    for name in ("broadcastable_outbox", "broadcastable_streams"):
        shape += [(c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(name)]
        shape += sorted((str(i["name"]), i["column_names"], i["unique"]) for i in inspector.get_indexes(name))
        shape.append(inspector.get_pk_constraint(name)["constrained_columns"])
    return shape


def test_the_example_goes_up_agrees_with_the_models_and_goes_down(database_url: str, engine: sa.Engine) -> None:
    alembic(database_url, "upgrade", "head")
    migrated = shape_of_the_tables(engine)
    assert "No new upgrade operations detected" in alembic(database_url, "check")
    outbox = DatabaseOutbox(engine, namespace="test", max_frame_bytes=1 << 20, max_frame_events=1_000)
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO rooms (id, name) VALUES (1, 'Lobby')"))
        outbox.stage(connection, [batch("gid://app/Room/1")])
    outbox.put([batch("gid://app/Room/1")])
    assert len(deliver(outbox, "gid://app/Room/1")) == 2
    outbox.close()
    alembic(database_url, "downgrade", "0001")
    assert set(sa.inspect(engine).get_table_names()) == {"alembic_version", "rooms", "messages"}
    alembic(database_url, "downgrade", "base")
    assert set(sa.inspect(engine).get_table_names()) == {"alembic_version"}
    metadata = sa.MetaData()
    tables(metadata)
    metadata.create_all(engine)
    assert shape_of_the_tables(engine) == migrated


def test_the_offline_mode_writes_sql(postgres_url: str) -> None:
    assert "CREATE TABLE broadcastable_outbox" in alembic(postgres_url, "upgrade", "head", "--sql")
