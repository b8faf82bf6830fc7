"""The command `check`: do the streams of a model still say what its table says?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from broadcastable.errors import ConfigurationError, UsageError

from .application import App, Json, durable_streams_of, load
from .console import err, fail, out, print_json

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from broadcastable import drift
    from broadcastable.durable_streams import DurableStreams

MOST_KEYS_SHOWN = 10
DELIVERED_WITHIN = 60.0
"""Seconds that a repair may take to be delivered."""


def check(
    model: Annotated[str, typer.Argument(metavar="MODULE:MODEL", help="Such as shop.models:Order.")],
    repair: Annotated[bool, typer.Option("--repair", help="Append the events that mend it, and look again.")] = False,
    database_url: Annotated[
        str | None,
        typer.Option("--database-url", help="Where the table is.", show_default="the settings' database_url"),
    ] = None,
    app: App = None,
    json: Json = False,
) -> None:
    """Compare a model's streams with its table, row by row: what is missing, what is stale, what is there too much.

    Finds what nobody could see: raw SQL, triggers, ON DELETE CASCADE, a restored backup. Exits 1 when they differ, or
    when a row cannot be judged; with --repair only when that is still so afterwards.
    """
    durable_streams = durable_streams_of(app)
    mapped = load(model)
    if not isinstance(mapped, type):
        raise UsageError(f"{model} is no model class; name one as MODULE:MODEL, such as shop.models:Order")
    with _session(database_url or durable_streams.settings.database_url, durable_streams) as session:
        found = _look(session, mapped, durable_streams, mend=repair, json=json)
        if not repair or not any(len(each) for each in found):
            _conclude(found, json=json)
        if not durable_streams.drain(DELIVERED_WITHIN):
            fail(f"The repair was not delivered within {DELIVERED_WITHIN:g} s. Is a worker running?")
        if not json:
            out.print(f"{sum(map(len, found))} events were appended to mend it; looking again.")
        _conclude(_look(session, mapped, durable_streams, mend=False, json=json), json=json)


def _conclude(found: list[drift.Drift], *, json: bool) -> None:
    """Say how it ended, and exit."""
    if not json:
        rows, unknown = sum(map(len, found)), sum(len(each.unknown) for each in found)
        if rows:
            out.print(f"[red]{rows} rows on {sum(len(each) > 0 for each in found)} streams differ.[/]")
        if unknown:
            out.print(f"[red]{unknown} rows cannot be judged, since a function of the application raised.[/]")
        if not found:
            out.print("[green]✓[/] No drift.")
    raise typer.Exit(1 if found else 0)


def _look(
    session: Session, model: type, durable_streams: DurableStreams, *, mend: bool, json: bool
) -> list[drift.Drift]:
    """What differs, shown as it is found; with *mend* also mended at once, before the rows can change much."""
    from broadcastable import drift

    found = []
    with _bar(f"Comparing the streams of {model.__name__}") as progress:
        for each in drift.find_drift(session, model, durable_streams=durable_streams, progress=progress):
            if mend:
                drift.repair(each, durable_streams)
            found.append(each)
            if json:
                print_json(
                    {
                        "stream": each.stream,
                        "type": each.type,
                        "missing": list(each.missing),
                        "stale": list(each.stale),
                        "extra": sorted(each.extra),
                        "unknown": each.unknown,
                    }
                )
            else:
                _print(each)
    return found


def _print(each: drift.Drift) -> None:
    out.print(f"[bold]{escape(each.stream)}[/]  [dim]{escape(each.type)}[/]")
    for what, colour, keys in (
        ("missing", "red", list(each.missing)),
        ("stale", "yellow", list(each.stale)),
        ("extra", "magenta", sorted(each.extra)),
    ):
        if keys:
            more = f" and {len(keys) - MOST_KEYS_SHOWN:,} more" if len(keys) > MOST_KEYS_SHOWN else ""
            out.print(f"  [{colour}]{what}[/] ", end="")
            out.print(f"{', '.join(keys[:MOST_KEYS_SHOWN])}{more}", markup=False)
    for key, error in list(each.unknown.items())[:MOST_KEYS_SHOWN]:
        out.print("  [red]unknown[/] ", end="")
        out.print(f"{key} ({error})", markup=False)
    if len(each.unknown) > MOST_KEYS_SHOWN:
        out.print(f"  and {len(each.unknown) - MOST_KEYS_SHOWN:,} more")


@contextmanager
def _bar(doing: str) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


@contextmanager
def _session(url: str | None, durable_streams: DurableStreams) -> Iterator[Session]:
    import sqlalchemy as sa
    from sqlalchemy.exc import ArgumentError, OperationalError
    from sqlalchemy.orm import Session

    if url is None:
        raise ConfigurationError(
            "Where is the table? Set database_url (BROADCASTABLE_DATABASE_URL), or give --database-url, such as "
            "postgresql+psycopg://user@host/app"
        )
    try:
        engine = sa.create_engine(url)
    except (ArgumentError, ImportError) as error:
        raise ConfigurationError(f"The database_url is of no use here: {error}") from error
    try:
        with Session(engine, info={"durable_streams": durable_streams}) as session:
            yield session
    except OperationalError as error:
        raise ConfigurationError(f"The database cannot be read: {error.orig}") from error
    finally:
        engine.dispose()
