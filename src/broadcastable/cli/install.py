"""The command `install`: what an application needs beside its code, written where it is missing."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.syntax import Syntax
from rich.text import Text

from .configuration import FILE
from .console import err, out
from .keys import INSTALLED as KEYS
from .keys import PUBLIC_KEY, SIGNING_KEY, write_file, write_pair

REVISION_NAME = "broadcastable_outbox"

SETTINGS = f"""\
# Settings of broadcastable. Any of them is also an argument of broadcastable.configure().
BROADCASTABLE_SIGNING_KEY={KEYS / SIGNING_KEY}
BROADCASTABLE_SERVER_URL=http://localhost:4437/v1/streams
# Where browsers reach the stream server, when that is another address:
# BROADCASTABLE_CLIENT_URL=https://streams.example.com/v1/streams
# "database" loses nothing and needs its two tables; "redis" needs Redis alone; "memory" is for development.
BROADCASTABLE_OUTBOX=memory
# BROADCASTABLE_DATABASE_URL=postgresql+psycopg://localhost/app
# BROADCASTABLE_REDIS_URL=redis://localhost:6379/0
"""

CONFIGURATION = f"""\
# How the stream server runs. Development: broadcastable server. Production: broadcastable caddyfile > Caddyfile

[development]
port = 4437
data_dir = "var/streams"
origins = ["http://localhost:8000", "http://127.0.0.1:8000"]

[production]
domain = "streams.example.com"
data_dir = "/var/lib/broadcastable/streams"
keys = ["{(KEYS / PUBLIC_KEY).as_posix()}", "{(KEYS / "verify-*.pem").as_posix()}"]
origins = ["https://example.com"]
"""

PROCFILE = """\
streams: broadcastable server
worker: dramatiq broadcastable.worker
"""

IGNORED = f"""\
{KEYS.as_posix()}/*{SIGNING_KEY}
var/streams/
"""


@dataclass(frozen=True)
class Plan:
    """One file and what it shall hold.

    Attributes:
        lines: Only the lines that are missing are added, to what may be somebody else's.
        kept: It exists and says something else; only --force changes it.
    """

    path: Path
    text: str
    lines: bool = False

    @property
    def before(self) -> str | None:
        return self.path.read_text("utf-8") if self.path.exists() else None

    @property
    def after(self) -> str:
        before = self.before
        if not self.lines or before is None:
            return self.text
        there = {_subject(line) for line in before.splitlines()}
        missing = [line for line in self.text.splitlines() if _subject(line) not in there]
        if not missing:
            return before
        return before + ("" if before.endswith("\n") or not before else "\n") + "\n".join(missing) + "\n"

    @property
    def kept(self) -> bool:
        return not self.lines and self.before not in {None, self.after}


def install(
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that say something else.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be written.")] = False,
    procfile: Annotated[bool, typer.Option("--procfile/--no-procfile", help="Add the two processes.")] = True,
) -> None:
    """Write what is missing here: settings, a key pair, broadcastable.toml, a migration, Procfile and .gitignore lines.

    Shows each change as a diff. Existing files are left as they are, so it may be run again at any time; --force
    overwrites broadcastable.env and broadcastable.toml, but never a key.
    """
    written = 0
    for plan in _plans(procfile):
        written += _carry_out(plan, force=force, dry_run=dry_run)
    written += _make_keys(dry_run=dry_run)
    written += _make_revision(dry_run=dry_run)
    if written == 0:
        out.print("Everything is here already; nothing was changed.")
        return
    out.print(f"\n{written} files {'would be' if dry_run else ''} written.".replace("  ", " "))
    if not dry_run:
        out.print("Load broadcastable.env into the environment of the application, then: broadcastable doctor")


def _plans(procfile: bool) -> Iterator[Plan]:
    yield Plan(Path("broadcastable.env"), SETTINGS)
    yield Plan(FILE, CONFIGURATION)
    if procfile:
        yield Plan(Path("Procfile"), PROCFILE, lines=True)
    yield Plan(Path(".gitignore"), IGNORED, lines=True)


def _carry_out(plan: Plan, *, force: bool, dry_run: bool) -> int:
    if plan.before == plan.after:
        return 0
    if plan.kept and not force:
        err.print(f"[yellow]{plan.path} is left as it is[/]; --force overwrites it.")
        return 0
    _show(plan.path, plan.before, plan.after)
    if not dry_run:
        write_file(plan.path, plan.after, mode=0o644)
    return 1


def _make_keys(*, dry_run: bool) -> int:
    if (KEYS / SIGNING_KEY).exists():
        return 0
    out.print(f"[green]+ {KEYS / SIGNING_KEY}[/]  a new private key, for its owner alone to read")
    out.print(f"[green]+ {KEYS / PUBLIC_KEY}[/]  its public half")
    if not dry_run:
        write_pair(KEYS)
    return 2


def _make_revision(*, dry_run: bool) -> int:
    """A migration that makes the outbox tables, where Alembic is in use."""
    if not Path("alembic.ini").exists():
        err.print("[dim]No alembic.ini here, so no migration; the tables are outbox.database.tables(metadata).[/]")
        return 0
    try:
        from alembic.config import Config
        from alembic.script import ScriptDirectory
    except ImportError:
        err.print("[yellow]Alembic is not installed here[/], so no migration was written.")
        return 0
    scripts = ScriptDirectory.from_config(Config("alembic.ini"))
    if any(_makes_the_tables(Path(revision.path)) for revision in scripts.walk_revisions()):
        return 0
    heads = scripts.get_heads()
    if len(heads) > 1:
        err.print(
            f"[yellow]Alembic has several heads[/] ({', '.join(heads)}), so no migration was written: merge them."
        )
        return 0
    identifier = "b0a57ab1e001"
    path = Path(scripts.versions) / f"{identifier}_{REVISION_NAME}.py"
    text = _revision(identifier, heads[0] if heads else None)
    _show(path, None, text)
    if not dry_run:
        write_file(path, text, mode=0o644)
    return 1


def _makes_the_tables(path: Path) -> bool:
    text = path.read_text("utf-8")
    return all(f'"{name}"' in text or f"'{name}'" in text for name in _table_names())


def _table_names() -> list[str]:
    import sqlalchemy as sa

    from broadcastable.outbox.schema import tables

    metadata = sa.MetaData()
    tables(metadata)
    return list(metadata.tables)


def _revision(identifier: str, down: str | None) -> str:
    """The migration's text: the tables as they are now, written out, so that it means the same in a later release."""
    import sqlalchemy as sa
    from alembic.autogenerate import render_python_code
    from alembic.operations import ops

    from broadcastable.outbox.schema import tables

    metadata = sa.MetaData()
    tables(metadata)
    made = metadata.sorted_tables
    up: list[ops.MigrateOperation] = []
    for table in made:
        up.append(ops.CreateTableOp.from_table(table))
        up += [ops.CreateIndexOp.from_index(index) for index in sorted(table.indexes, key=lambda each: str(each.name))]
    down_ops: list[ops.MigrateOperation] = [ops.DropTableOp.from_table(table) for table in reversed(made)]
    upgrade = _clean(render_python_code(ops.UpgradeOps(up)))
    downgrade = _clean(render_python_code(ops.DowngradeOps(down_ops)))
    imports = "import sqlalchemy as sa\nfrom alembic import op"
    if "mysql." in upgrade:
        imports += "\nfrom sqlalchemy.dialects import mysql"
    if "broadcastable." in upgrade:
        imports += "\n\nimport broadcastable.outbox.schema"
    return f'''"""The outbox of broadcastable: batches that wait for delivery, and the state of each stream.

Revision ID: {identifier}
Revises: {down or ""}
Create Date: {datetime.now(UTC):%Y-%m-%d %H:%M}
"""

{imports}

revision = "{identifier}"
down_revision = {f'"{down}"' if down else None}
branch_labels = None
depends_on = None


def upgrade() -> None:
    {upgrade}


def downgrade() -> None:
    {downgrade}
'''


def _clean(code: str) -> str:
    lines = [line for line in code.splitlines() if not line.strip().startswith("# ###")]
    return "\n".join(lines).strip()


def _show(path: Path, before: str | None, after: str) -> None:
    diff = difflib.unified_diff(
        (before or "").splitlines(),
        after.splitlines(),
        str(path) if before is not None else "/dev/null",
        str(path),
        lineterm="",
    )
    out.print(Syntax("\n".join(diff), "diff", background_color="default") if out.is_terminal else Text("\n".join(diff)))


def _subject(line: str) -> str:
    """What a line is about: the process of a Procfile line, else all of it."""
    name, colon, rest = line.partition(": ")
    return name + colon if colon and " " not in name and rest else line.strip()
