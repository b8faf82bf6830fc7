"""The command `install`: what an application needs beside its code, written where it is missing."""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.syntax import Syntax
from rich.text import Text

from broadcastable.errors import ConfigurationError

from .configuration import FILE
from .console import err, fail, out
from .files import read_file, write_file
from .keys import INSTALLED as KEYS
from .keys import PUBLIC_KEY, SIGNING_KEY, kid_of, public_pem, write_pair

SETTINGS_FILE = Path("broadcastable.env")
IGNORE_FILE = Path(".gitignore")
PROCFILE = Path("Procfile")
WORKER = "broadcastable-worker"
REVISION_NAME = "broadcastable_outbox"

SETTINGS = f"""\
# Settings of broadcastable, for this machine. Any of them is also an argument of broadcastable.configure().
BROADCASTABLE_SIGNING_KEY={{signing_key}}
BROADCASTABLE_SERVER_URL=http://localhost:4437/v1/streams
# Where browsers reach the stream server, when that is another address:
# BROADCASTABLE_CLIENT_URL=https://streams.example.com/v1/streams
# "database" loses nothing and needs its two tables; "redis" needs Redis alone; "memory" is for development. With the
# first two a worker process delivers: {WORKER} in the Procfile.
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

IGNORED = f"""\
{SETTINGS_FILE}
{KEYS.as_posix()}/*{SIGNING_KEY}
var/streams/
"""

_PROCESS = re.compile(r"(?P<comment>#\s*)?(?P<name>[A-Za-z0-9_-]+):\s+(?P<command>\S.*)")
_NEEDS_NO_QUOTES = re.compile(r"[\w@%+=:,./-]*")
_OUTBOX_FOR_WORKERS = re.compile(r"^BROADCASTABLE_OUTBOX=(redis|database)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Plan:
    """One file and what it shall hold.

    Attributes:
        mode: Of a new file; one that exists keeps its own.
        added_to: It may be somebody else's; only lines are added.
        kept: It exists and says something else; only --force changes it.
    """

    path: Path
    after: str
    mode: int = 0o644
    added_to: bool = False

    @property
    def before(self) -> str | None:
        return read_file(self.path)

    @property
    def changes(self) -> bool:
        """Whether it would say something else; other line ends say the same."""
        return self.after.splitlines() != (self.before or "").splitlines()

    @property
    def kept(self) -> bool:
        return not self.added_to and self.before is not None and self.changes


def install(
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that say something else.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be written.")] = False,
    procfile: Annotated[bool, typer.Option("--procfile/--no-procfile", help="Add our processes.")] = True,
) -> None:
    """Write what is missing here: settings, a key pair, broadcastable.toml, a migration, Procfile and .gitignore lines.

    Shows each change as a diff. Existing files are left as they are, so it may be run again at any time; --force
    overwrites broadcastable.env and broadcastable.toml, but never a key. Exits 1 when something could not be made.
    """
    signing_key = _quoted(str((KEYS / SIGNING_KEY).resolve()))
    settings = Plan(SETTINGS_FILE, SETTINGS.format(signing_key=signing_key), mode=0o600)
    plans = [lambda: settings, lambda: Plan(FILE, CONFIGURATION), _ignoring]
    if procfile:
        plans.append(lambda: _running(settings.before if settings.kept and not force else settings.after))
    steps: list[Callable[[], int]] = [
        *(partial(_carry_out, plan, force=force, dry_run=dry_run) for plan in plans),
        partial(_make_keys, dry_run=dry_run),
        partial(_make_revision, dry_run=dry_run),
    ]
    written = 0
    undone: list[str] = []
    for step in steps:
        try:
            written += step()
        except ConfigurationError as reason:
            undone.append(str(reason))
    if written:
        out.print(f"\n{written} files {'would be ' if dry_run else ''}written.")
    elif not undone:
        out.print("Everything is here already; nothing was changed.")
    if written and not dry_run:
        out.print(f"Load {SETTINGS_FILE} into the environment of the application, then: broadcastable doctor")
    if undone:
        fail("\n".join(dict.fromkeys(undone)))


def _quoted(value: str) -> str:
    """*value* as shells, systemd, honcho and readers of .env files take it: bare where that will do, as for Docker."""
    if _NEEDS_NO_QUOTES.fullmatch(value):
        return value
    if "'" not in value:
        return f"'{value}'"
    return '"' + re.sub(r'["$`\\]', r"\\\g<0>", value) + '"'


def _ignoring() -> Plan:
    before = read_file(IGNORE_FILE) or ""
    there = {line.strip() for line in before.splitlines()}
    lines = [line for line in IGNORED.splitlines() if line not in there]
    return Plan(IGNORE_FILE, _with_lines(before, lines), added_to=True)


def _running(settings: str | None) -> Plan:
    """The Procfile with our processes. The worker's is a comment until there is something for it to deliver."""
    before = read_file(PROCFILE) or ""
    there = [found for line in before.splitlines() if (found := _PROCESS.fullmatch(line.strip()))]
    with_worker = _OUTBOX_FOR_WORKERS.search(settings or "") is not None
    lines = []
    for name, command, mark in (
        ("streams", "broadcastable server", "broadcastable server"),
        (WORKER, "dramatiq broadcastable.worker", "broadcastable.worker"),
    ):
        wanted = name != WORKER or with_worker
        ours = [each for each in there if mark in each["command"]]
        if not ours and any(each["name"] == name and not each["comment"] for each in there):
            err.print(f"[yellow]{PROCFILE} has a process {name} of another kind[/], so this is not added: {command}")
        elif not ours:
            lines.append(f"{'' if wanted else '# '}{name}: {command}")
        elif wanted and all(each["comment"] for each in ours):
            err.print(f"[yellow]{PROCFILE} has {name} as a comment[/]; the outbox needs it now: {command}")
    return Plan(PROCFILE, _with_lines(before, lines), added_to=True)


def _with_lines(before: str, lines: list[str]) -> str:
    """*before* with *lines* at its end, in its own line ends."""
    end = "\r\n" if "\r\n" in before else "\n"
    gap = end if lines and before and not before.endswith("\n") else ""
    return before + gap + "".join(line + end for line in lines)


def _carry_out(planned: Callable[[], Plan], *, force: bool, dry_run: bool) -> int:
    plan = planned()
    before = plan.before
    if not plan.changes:
        return 0
    if plan.kept and not force:
        err.print(f"[yellow]{plan.path} is left as it is[/]; --force would change it like this:")
    _show(plan.path, _without_values(before, plan.after) if plan.mode == 0o600 else before, plan.after)
    if plan.kept and not force:
        return 0
    if not dry_run:
        mode = plan.mode if before is None else stat.S_IMODE(plan.path.stat().st_mode)
        write_file(plan.path, plan.after, mode=mode)
    return 1


def _make_keys(*, dry_run: bool) -> int:
    """The pair, or the public half of a private one. Nothing that is there is ever overwritten."""
    signing, public = KEYS / SIGNING_KEY, KEYS / PUBLIC_KEY
    if signing.exists() and public.exists():
        if kid_of(signing) != kid_of(public):
            raise ConfigurationError(
                f"{public} is not the public half of {signing}: gates that know it refuse what the application signs. "
                "Delete the one that is wrong and run this again."
            )
        return 0
    if public.exists():
        raise ConfigurationError(
            f"{public} is here and its private half, {signing}, is not: it is in no repository. Copy it from where the "
            f"application runs; or, for keys of this machine alone: broadcastable keys generate --force -d {KEYS}"
        )
    if signing.exists():
        out.print(f"[green]+ {public}[/]  the public half of {signing}")
        if not dry_run:
            write_file(public, public_pem(signing), mode=0o644)
        return 1
    out.print(f"[green]+ {signing}[/]  a new private key, for its owner alone to read")
    out.print(f"[green]+ {public}[/]  its public half")
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
    except ImportError as error:
        raise ConfigurationError(
            "Alembic is not installed here, so no migration was written. Run this where the application runs."
        ) from error
    try:
        scripts = ScriptDirectory.from_config(Config("alembic.ini"))
        revisions = list(scripts.walk_revisions())
        heads = scripts.get_heads()
    except Exception as error:  # Alembic's own, or whatever a revision's code raises when it is imported
        reason = str(error) or type(error).__name__
        raise ConfigurationError(
            f"Alembic cannot read its migrations, so none was written: {reason.rstrip('.')}."
        ) from error
    if any(_makes_the_tables(Path(revision.path)) for revision in revisions):
        return 0
    if len(heads) > 1:
        raise ConfigurationError(
            f"Alembic has several heads ({', '.join(heads)}), so no migration was written. "
            "Merge them (alembic merge heads) and run this again."
        )
    identifier = "b0a57ab1e001"
    path = Path(scripts.versions) / f"{identifier}_{REVISION_NAME}.py"
    text = _revision(identifier, heads[0] if heads else None)
    _show(path, None, text)
    if not dry_run:
        write_file(path, text, mode=0o644)
    return 1


def _makes_the_tables(path: Path) -> bool:
    text = path.read_text("utf-8", errors="replace")
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


def _without_values(before: str | None, after: str) -> str | None:
    """*before*, but for what *after* says too: a diff goes to terminals and logs, and settings hold passwords."""
    if before is None:
        return None
    there = set(after.splitlines())
    return "\n".join(line if line in there else re.sub("=.*", "=…", line) for line in before.splitlines())
