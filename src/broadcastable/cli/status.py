"""The commands `status` and `outbox ...`: what waits to be delivered, and what to do about a stream that is stuck."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .application import App, Json, durable_streams_of, stream_named
from .console import err, fail, out, print_json

if TYPE_CHECKING:
    from broadcastable.durable_streams import DurableStreams
    from broadcastable.outbox import Outbox, PendingStream, Rate

MOST_SHOWN = 30

outbox = typer.Typer(help="List, retry or drop what waits to be delivered.", no_args_is_help=True)


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Stay, and show it anew all the time, until Ctrl+C.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, metavar="SECONDS", help="How often, with --watch.")] = 1.0,
    app: App = None,
    json: Json = False,
) -> None:
    """Show what waits in the outbox, how old the oldest is, which streams are parked, and how fast it empties.

    Exits 1 when a stream is parked: it waits for `broadcastable outbox retry` or `drop`.
    """
    durable_streams = _shared(app)
    if not watch:
        pending = _print_once(durable_streams, json=json)
        raise typer.Exit(1 if any(each.parked for each in pending) else 0)
    try:
        if json or not out.is_terminal:
            while True:
                _print_once(durable_streams, json=json)
                time.sleep(every)
        with Live(console=out, auto_refresh=False, screen=True) as live:
            while True:
                live.update(_table(durable_streams, *_look(durable_streams.outbox)), refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@outbox.command("list")
def list_(
    stream: Annotated[str | None, typer.Argument(metavar="[STREAM|MODEL/ID]", help="Only this one.")] = None,
    app: App = None,
    json: Json = False,
) -> None:
    """List the streams with undelivered events, the one that waits longest first."""
    durable_streams = _shared(app)
    name = None if stream is None else stream_named(stream, durable_streams)
    pending = durable_streams.outbox.pending(name)
    if json:
        for each in pending:
            print_json(_as_json(each))
    elif pending:
        out.print(_streams(pending, len(pending)))
    else:
        out.print("Nothing waits.")


@outbox.command()
def retry(
    stream: Annotated[str, typer.Argument(metavar="STREAM|MODEL/ID")],
    app: App = None,
) -> None:
    """Let a parked stream be delivered again, once what stopped it is mended. Nothing is lost."""
    durable_streams = _shared(app)
    name = stream_named(stream, durable_streams)
    if not durable_streams.outbox.retry(name):
        fail(f"Nothing waits for {name}.")
    durable_streams.wakeups.wake([name])
    out.print(f"[green]✓[/] {name} goes on as soon as a worker sees to it.")


@outbox.command()
def drop(
    stream: Annotated[str, typer.Argument(metavar="STREAM|MODEL/ID")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    app: App = None,
) -> None:
    """Throw away what waits for a stream. Its readers never get it: mend that with `broadcastable check --repair`."""
    durable_streams = _shared(app)
    name = stream_named(stream, durable_streams)
    pending = durable_streams.outbox.pending(name)
    if not pending:
        fail(f"Nothing waits for {name}.")
    if not yes:
        typer.confirm(f"Throw away {pending[0].events} undelivered events of {name}?", abort=True, err=True)
    out.print(f"{durable_streams.outbox.drop(name)} events of {name} are thrown away.")


def _shared(app: str | None) -> DurableStreams:
    durable_streams = durable_streams_of(app)
    if durable_streams.settings.outbox == "memory" and (app is None or ":" not in app):
        err.print(
            "[yellow]The outbox is in the memory of the application's own process[/], which no other can look into; "
            'this one is empty. With outbox "redis" or "database" there is something to see here.'
        )
    return durable_streams


def _print_once(durable_streams: DurableStreams, *, json: bool) -> list[PendingStream]:
    pending, rate = _look(durable_streams.outbox)
    if json:
        print_json(_summary(durable_streams, pending, rate))
    else:
        out.print(_table(durable_streams, pending, rate))
    return pending


def _look(outbox: Outbox) -> tuple[list[PendingStream], Rate]:
    return outbox.pending(), outbox.rate()


def _summary(durable_streams: DurableStreams, pending: Sequence[PendingStream], rate: Rate) -> dict[str, Any]:
    return {
        "outbox": durable_streams.settings.outbox,
        "streams": len(pending),
        "batches": sum(each.batches for each in pending),
        "events": sum(each.events for each in pending),
        "oldest_age_seconds": _oldest(pending),
        "frames_per_second": rate.frames_per_second,
        "events_per_second": rate.events_per_second,
        "parked": [_as_json(each) for each in pending if each.parked is not None],
    }


def _as_json(each: PendingStream) -> dict[str, Any]:
    return {
        "stream": each.stream,
        "batches": each.batches,
        "events": each.events,
        "oldest_age_seconds": _age(each.oldest_at),
        "parked": each.parked,
    }


def _table(durable_streams: DurableStreams, pending: Sequence[PendingStream], rate: Rate) -> Group:
    parked = sum(1 for each in pending if each.parked is not None)
    oldest = _oldest(pending)
    head = Text()
    head.append(f"{durable_streams.settings.outbox} outbox", style="bold")
    head.append(
        f"  {sum(each.events for each in pending):,} events in {sum(each.batches for each in pending):,} batches"
    )
    head.append(f" for {len(pending):,} streams wait")
    if oldest is not None:
        head.append(f", the oldest {_said(oldest)}")
    if parked:
        head.append(f"; {parked} parked", style="bold red")
    head.append(f"  {time.strftime('%H:%M:%S')}", style="dim")
    speed = Text(f"{rate.events_per_second:,.1f} events/s delivered in {rate.frames_per_second:,.1f} frames/s")
    speed.append("  in the last ten seconds", style="dim")
    return Group(head, speed, *([_streams(pending, MOST_SHOWN)] if pending else []))


def _streams(pending: Sequence[PendingStream], most: int) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("Stream", overflow="fold")
    for title in ("Batches", "Events", "Oldest"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for each in pending[:most]:
        age = _age(each.oldest_at)
        table.add_row(
            Text(each.stream),
            f"{each.batches:,}",
            f"{each.events:,}",
            "" if age is None else _said(age),
            Text(f"parked: {each.parked}", style="red") if each.parked is not None else "",
        )
    if len(pending) > most:
        table.add_row(f"… and {len(pending) - most:,} more", "", "", "", "")
    return table


def _oldest(pending: Sequence[PendingStream]) -> float | None:
    return max((age for each in pending if (age := _age(each.oldest_at)) is not None), default=None)


def _age(created_at: int | None) -> float | None:
    return None if created_at is None else round(max(0.0, time.time() - created_at / 1_000), 3)


def _said(age: float) -> str:
    if age < 120:
        return f"{age:.1f} s"
    return f"{age / 60:.0f} min" if age < 7_200 else f"{age / 3_600:.0f} h"
