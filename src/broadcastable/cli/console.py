"""What every command shares: where it prints, how it says that something went wrong, how it shows progress."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, NoReturn

import typer
from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
"""For what was asked for."""

err = Console(stderr=True, highlight=False, soft_wrap=True)
"""For progress, hints and errors, so that the other can be piped."""


def print_whatever_the_encoding() -> None:
    """Have characters that a terminal or a file does not know, such as the check mark, spelt out and not refused."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """*value* as JSON on one line, for scripts: no colour, no wrapping; ASCII where that is all that can be printed."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, default=str)
    typer.echo(text)


def print_text(text: str) -> None:
    """*text* as it is, in UTF-8, for a file or a pipe."""
    typer.echo(text.encode(), nl=False)


def fail(sentence: str, *, code: int = 1) -> NoReturn:
    """Say why it was not done, in one sentence, and exit."""
    err.print(f"[bold red]Not done.[/] {_escaped(sentence)}")
    raise typer.Exit(code)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


@contextmanager
def step(doing: str) -> Iterator[None]:
    """Show that *doing* is under way, and when it is done."""
    if not err.is_terminal:
        err.print(f"{doing} …")
        yield
        return
    with err.status(doing):
        yield
    err.print(f"[green]✓[/] {doing}")


def has_desktop() -> bool:
    """Whether there is a screen on which a browser could open."""
    return os.name == "nt" or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or os.uname().sysname == "Darwin"
    )
