"""`install` writes what is missing, shows it, and changes nothing the second time."""

from __future__ import annotations

import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from broadcastable.durable_streams import DurableStreams
from broadcastable.outbox.schema import tables
from broadcastable.settings import Settings, override
from broadcastable.tokens import Gatekeeper, generate_key_pair

from .conftest import Command
from .test_server import listening

Run = Callable[..., Any]
Start = Callable[..., Command]


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
    assert "+streams: broadcastable server" in result.stdout
    assert "PRIVATE" not in result.stdout
    assert stat.S_IMODE((here / "config/broadcastable/signing_key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((here / "broadcastable.env").stat().st_mode) == 0o600
    assert "broadcastable.env" in (here / ".gitignore").read_text().splitlines()


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
    """What --force would change is shown, but for values that only the file of settings knows."""
    (here / "broadcastable.toml").write_text("[development]\nport = 5000\n")
    (here / "broadcastable.env").write_text("BROADCASTABLE_DATABASE_URL=postgresql://ada:secret@db/app\n")
    (here / "broadcastable.env").chmod(0o640)
    (here / ".gitignore").write_text("*.pyc")
    result = run("install")
    assert "left as it is" in result.stderr
    assert "-port = 5000" in result.stdout
    assert "-BROADCASTABLE_DATABASE_URL=…" in result.stdout
    assert "+BROADCASTABLE_OUTBOX=memory" in result.stdout
    assert "secret" not in result.stdout + result.stderr
    assert (here / "broadcastable.toml").read_text() == "[development]\nport = 5000\n"
    assert (here / ".gitignore").read_text().startswith("*.pyc\nbroadcastable.env\nconfig/")
    key = (here / "config/broadcastable/signing_key.pem").read_text()

    run("install", "--force")
    assert "[production]" in (here / "broadcastable.toml").read_text()
    assert "OUTBOX=memory" in (here / "broadcastable.env").read_text()
    assert stat.S_IMODE((here / "broadcastable.env").stat().st_mode) == 0o640
    assert (here / "config/broadcastable/signing_key.pem").read_text() == key


def test_lines_are_added_in_the_line_ends_of_the_file_and_through_links(here: Path, run: Run) -> None:
    """What was there stays as it is, byte for byte."""
    (here / "shared").write_bytes(b"*.pyc\r\n.env")
    (here / ".gitignore").symlink_to("shared")
    (here / "Procfile").write_bytes(b"web: gunicorn app\r\n")
    result = run("install")
    assert result.exit_code == 0
    assert "-*.pyc" not in result.stdout
    assert (here / ".gitignore").is_symlink()
    assert (here / "shared").read_bytes().startswith(b"*.pyc\r\n.env\r\nbroadcastable.env\r\n")
    assert (here / "Procfile").read_bytes().startswith(b"web: gunicorn app\r\nstreams: broadcastable server\r\n")
    assert run("install").exit_code == 0


def test_other_line_ends_say_nothing_else(here: Path, run: Run) -> None:
    run("install")
    for name in ("broadcastable.env", "broadcastable.toml"):
        (here / name).write_bytes((here / name).read_bytes().replace(b"\n", b"\r\n"))
    again = run("install")
    assert "nothing was changed" in again.stdout
    assert "left as it is" not in again.stderr


@pytest.mark.parametrize("name", [".gitignore", "Procfile", "broadcastable.env", "broadcastable.toml"])
def test_a_file_that_cannot_be_read_is_a_sentence_and_the_rest_is_written(here: Path, run: Run, name: str) -> None:
    (here / name).mkdir()
    result = run("install")
    assert result.exit_code == 1
    assert result.stderr.count(f"{name} cannot be read: Is a directory") == 1
    assert (here / "config/broadcastable/signing_key.pem").exists()
    (here / name).rmdir()
    (here / name).write_bytes("# caf\u00e9\n".encode("latin-1"))
    result = run("install")
    assert result.exit_code == 1
    assert f"{name} is not UTF-8 text" in result.stderr
    assert (here / name).read_bytes() == b"# caf\xe9\n"


@pytest.mark.parametrize("name", ["plain", "my app", "it's $5 `here`", 'a "b" & c;'])
def test_the_settings_are_good_for_a_shell_in_any_directory(
    here: Path, run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / name).mkdir()
    monkeypatch.chdir(here / name)
    run("install")
    key = str(here / name / "config/broadcastable/signing_key.pem")
    script = 'set -a; . ./broadcastable.env; printf %s "$BROADCASTABLE_SIGNING_KEY"'
    done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (key, "")
    line = (here / name / "broadcastable.env").read_text().splitlines()[1]
    # Docker takes the quotes for a part of the value, so there are none without need.
    assert (line == f"BROADCASTABLE_SIGNING_KEY={key}") == (shlex.quote(key) == key)


WORKER = "broadcastable-worker: dramatiq broadcastable.worker"


@pytest.mark.parametrize(
    ("before", "outbox", "added", "says"),
    [
        ("", "memory", ["streams: broadcastable server", f"# {WORKER}"], ""),
        ("", "redis", ["streams: broadcastable server", WORKER], ""),
        ("worker: celery -A app worker", "database", ["streams: broadcastable server", WORKER], ""),
        ("worker: dramatiq app.tasks broadcastable.worker", "redis", ["streams: broadcastable server"], ""),
        ("streams: node streams.js", "memory", [f"# {WORKER}"], "a process streams of another kind"),
        (f"streams: broadcastable server --port 1\n# {WORKER}", "memory", [], ""),
        (f"streams: broadcastable server\n# {WORKER}", "redis", [], "as a comment"),
        (f"streams: broadcastable server\n{WORKER}", "redis", [], ""),
    ],
)
def test_the_processes_are_added_that_have_something_to_do(
    here: Path, run: Run, before: str, outbox: str, added: list[str], says: str
) -> None:
    """A worker has nothing to deliver from the memory of another process, and does not start; so it is a comment."""
    (here / "broadcastable.env").write_text(f"BROADCASTABLE_OUTBOX={outbox}\n")
    (here / "Procfile").write_text(before)
    result = run("install")
    assert (here / "Procfile").read_text().splitlines() == [*before.splitlines(), *added]
    if says:
        assert says in result.stderr
    else:
        assert "Procfile" not in result.stderr


def test_what_it_writes_starts(here: Path, run: Run, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of the Procfile, with the settings of broadcastable.env; and these are good in any directory."""
    run("install")
    active = [line for line in (here / "Procfile").read_text().splitlines() if not line.startswith("#")]
    assert active == ["streams: broadcastable server"]
    url = listening(start("server", "--port", "0", **environment(here)))
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    with DurableStreams(Settings.from_env({**environment(here), "BROADCASTABLE_SERVER_URL": url})) as durable_streams:
        assert durable_streams.ensure_stream_exists("room") == "room"


def test_a_private_key_that_is_missing_is_not_made_up(here: Path, run: Run) -> None:
    """As in a fresh clone, which has the public half alone: a new pair would lock out everybody who is let in now."""
    run("install")
    public = here / "config/broadcastable/signing_key.pub.pem"
    (here / "config/broadcastable/signing_key.pem").unlink()
    (here / "Procfile").unlink()
    before = public.read_text()
    for options in ((), ("--force",), ("--dry-run",)):
        result = run("install", *options)
        assert result.exit_code == 1
        assert "its private half" in result.stderr
        assert "keys generate --force" in result.stderr
        assert "Everything is here" not in result.stdout
    assert public.read_text() == before
    assert not (here / "config/broadcastable/signing_key.pem").exists()
    assert (here / "Procfile").exists()


def test_a_public_key_that_is_missing_is_made_from_the_private_one(here: Path, run: Run) -> None:
    run("install")
    public = here / "config/broadcastable/signing_key.pub.pem"
    before = files(here)
    public.unlink()
    assert "1 files would be written" in run("install", "--dry-run").stdout
    assert not public.exists()
    assert run("install").exit_code == 0
    assert files(here) == before


def test_halves_of_two_keys_are_told_apart(here: Path, run: Run) -> None:
    run("install")
    (here / "config/broadcastable/signing_key.pub.pem").write_text(generate_key_pair().public_pem)
    result = run("install")
    assert result.exit_code == 1
    assert "is not the public half" in result.stderr


def test_the_settings_that_it_writes_are_settings(here: Path, run: Run) -> None:
    run("install")
    lines = (here / "broadcastable.env").read_text().splitlines()
    every = dict(line.removeprefix("# ").split("=", 1) for line in lines if re.match(r"(# )?BROADCASTABLE_\w+=", line))
    settings = Settings.from_env(every)
    assert settings.signing_key == str(here / "config/broadcastable/signing_key.pem")
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
    for _ in range(2):
        result = run("install")
        assert result.exit_code == 1
        assert "several heads" in result.stderr
        assert "nothing was changed" not in result.stdout
    assert len(list((here / "migrations/versions").glob("*.py"))) == 2


def test_a_missing_alembic_is_a_failure_where_it_is_in_use(
    here: Path, run: Run, alembic: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "alembic.config", None)
    for _ in range(2):
        result = run("install")
        assert result.exit_code == 1
        assert "Alembic is not installed" in result.stderr
        assert "nothing was changed" not in result.stdout
    assert (here / "broadcastable.toml").exists()


@pytest.mark.parametrize(
    ("ini", "says"),
    [("[alembic]\nscript_location = nowhere\n", "nowhere"), ("[alembic]\n", "script_location"), ("[", "[")],
)
def test_migrations_that_alembic_cannot_read_are_one_sentence(here: Path, run: Run, ini: str, says: str) -> None:
    """Everything else is there all the same."""
    (here / "alembic.ini").write_text(ini)
    result = run("install")
    assert result.exit_code == 1
    assert "Alembic cannot read its migrations" in result.stderr
    assert says in result.stderr
    assert (here / "config/broadcastable/signing_key.pem").exists()


def test_a_migration_that_does_not_compile_is_one_sentence(here: Path, run: Run, alembic: Config) -> None:
    (here / "migrations/versions/aaaa_broken.py").write_text("revision = ")
    result = run("install")
    assert result.exit_code == 1
    assert "Alembic cannot read its migrations" in result.stderr
