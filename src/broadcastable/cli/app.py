"""The commands, put together; and what becomes of the errors that they raise."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from broadcastable import __version__
from broadcastable.errors import BroadcastableError

from .console import fail, out
from .demo.command import demo


class _Commands(TyperGroup):
    """Says expected errors in one sentence. An unexpected one keeps its traceback: it is a defect."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BroadcastableError as error:
            fail(str(error))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    name="broadcastable",
    cls=_Commands,
    help="Durable Streams for SQLAlchemy.",
    epilog="Exit codes: 0 done, 1 not done (the reason is printed), 2 used wrongly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def broadcastable(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Durable Streams for SQLAlchemy."""


app.command()(demo)


def run() -> None:
    """Do what the command line says, and exit."""
    app()
