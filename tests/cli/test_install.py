"""`install` writes what is missing, shows it, and changes nothing the second time."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from broadcastable.outbox.schema import tables
from broadcastable.settings import Settings, override
from broadcastable.tokens import Gatekeeper

Run = Callable[..., Any]


def files(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): path.read_text()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".db"
    }


def environment(directory: Path) -> dict[str, str]:
    """What broadcastable.env sets."""
    lines = (directory / "broadcastable.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line.startswith("BROADCASTABLE_"))


@pytest.fixture
def alembic(here: Path) -> Config:
    """An Alembic environment of an application on SQLite."""
    config = Config(str(here / "alembic.ini"))
    command.init(config, "migrations")
    ini = here / "alembic.ini"
    ini.write_text(re.sub("(?m)^sqlalchemy.url = .*", "sqlalchemy.url = sqlite:///app.db", ini.read_text()))
    # The template's fileConfig would silence the loggers of every test that comes after.
    env = here / "migrations" / "env.py"
    env.write_text(env.read_text().replace("config_file_name)", "config_file_name, disable_existing_loggers=False)"))
    return Config(str(ini))


def test_everything_is_written_and_shown(here: Path, run: Run) -> None:
    result = run("install")
    assert result.exit_code == 0
    assert set(files(here)) == {
        ".gitignore",
        "Procfile",
        "broadcastable.env",
        "broadcastable.toml",
        "config/broadcastable/signing_key.pem",
        "config/broadcastable/signing_key.pub.pem",
    }
    assert "+worker: dramatiq broadcastable.worker" in result.stdout
    assert "PRIVATE" not in result.stdout
    assert stat.S_IMODE((here / "config/broadcastable/signing_key.pem").stat().st_mode) == 0o600


def test_the_second_time_changes_nothing(here: Path, run: Run, alembic: Config) -> None:
    run("install")
    before = files(here)
    again = run("install")
    assert files(here) == before
    assert "nothing was changed" in again.stdout


def test_dry_run_writes_nothing(here: Path, run: Run, alembic: Config) -> None:
    before = files(here)
    result = run("install", "--dry-run")
    assert files(here) == before
    assert "would be written" in result.stdout


def test_what_is_there_is_kept_unless_forced(here: Path, run: Run) -> None:
    (here / "broadcastable.toml").write_text("[development]\nport = 5000\n")
    (here / ".gitignore").write_text("*.pyc")
    (here / "Procfile").write_text("web: uvicorn app\nworker: dramatiq app.tasks broadcastable.worker\n")
    result = run("install")
    assert "left as it is" in result.stderr
    assert (here / "broadcastable.toml").read_text() == "[development]\nport = 5000\n"
    assert (here / ".gitignore").read_text().startswith("*.pyc\nconfig/")
    procfile = (here / "Procfile").read_text()
    assert procfile.count("worker:") == 1
    assert procfile.endswith("streams: broadcastable server\n")
    key = (here / "config/broadcastable/signing_key.pem").read_text()

    run("install", "--force")
    assert "[production]" in (here / "broadcastable.toml").read_text()
    assert (here / "config/broadcastable/signing_key.pem").read_text() == key


def test_the_settings_that_it_writes_are_settings(here: Path, run: Run) -> None:
    run("install")
    lines = (here / "broadcastable.env").read_text().splitlines()
    environment = dict(line.removeprefix("# ").split("=", 1) for line in lines if "BROADCASTABLE_" in line)
    settings = Settings.from_env(environment)
    assert settings.signing_key == "config/broadcastable/signing_key.pem"
    assert settings.database_url is not None


def kids(caddyfile: str) -> set[str]:
    return set(re.findall(r'"kid":"([^"]+)"', caddyfile))


def test_a_rotation_locks_nobody_out_of_the_server_that_it_describes(here: Path, run: Run) -> None:
    """install, rotate, rotate --activate: the Caddyfile has the key that signs in each phase, and the old one."""
    run("install")
    key = Settings.from_env(environment(here)).signing_key
    old = kids(run("caddyfile").stdout)
    with override(signing_key=key):
        assert "keys lacks it" not in run("keys", "rotate").stdout
        between = kids(run("caddyfile").stdout)
        assert run("keys", "rotate", "--activate").exit_code == 0
    after = kids(run("caddyfile").stdout)
    new = {key["kid"] for key in Gatekeeper(Settings(signing_key=key)).jwks()["keys"]}
    assert len(old) == len(new) == 1
    assert between == after == old | new


def test_rotate_without_settings_finds_the_keys_that_install_made(here: Path, run: Run) -> None:
    run("install")
    assert run("keys", "rotate").exit_code == 0
    assert (here / "config/broadcastable/next_signing_key.pem").exists()


def test_the_migration_makes_and_drops_the_outbox_tables(here: Path, run: Run, alembic: Config) -> None:
    """Upgraded by Alembic itself, it leaves what `outbox.database.tables` describes; it follows the present head."""
    command.revision(alembic, "the application's own", rev_id="aaaa")
    run("install")
    command.upgrade(alembic, "head")
    metadata = sa.MetaData()
    tables(metadata)
    engine = sa.create_engine("sqlite:///app.db")
    try:
        inspector = sa.inspect(engine)
        for table in metadata.tables.values():
            assert {column["name"] for column in inspector.get_columns(table.name)} == set(table.columns.keys())
            assert {index["name"] for index in inspector.get_indexes(table.name)} == {
                index.name for index in table.indexes
            }
        command.downgrade(alembic, "aaaa")
        assert sa.inspect(engine).get_table_names() == ["alembic_version"]
    finally:
        engine.dispose()


def test_a_migration_that_makes_the_tables_is_not_made_again(here: Path, run: Run, alembic: Config) -> None:
    run("install")
    made = list((here / "migrations/versions").glob("*.py"))
    assert len(made) == 1
    made[0].rename(made[0].with_name("of_another_name.py"))
    run("install")
    assert len(list((here / "migrations/versions").glob("*.py"))) == 1


def test_several_heads_are_left_to_be_merged(here: Path, run: Run, alembic: Config) -> None:
    command.revision(alembic, "one", rev_id="aaaa", head="base")
    command.revision(alembic, "other", rev_id="bbbb", head="base", splice=True)
    result = run("install")
    assert "several heads" in result.stderr
    assert len(list((here / "migrations/versions").glob("*.py"))) == 2
