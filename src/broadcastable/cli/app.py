"""The commands, put together; and what becomes of the errors that they raise."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from broadcastable import __version__
from broadcastable.errors import BroadcastableError

from .check import check
from .console import fail, out, print_whatever_the_encoding
from .demo.command import demo
from .doctor import doctor
from .faults import OF_SERVICES, service_fault
from .install import install
from .keys import keys
from .server import caddyfile, server
from .status import outbox, status
from .tail import tail


class _Commands(TyperGroup):
    """Says expected errors in one sentence. An unexpected one keeps its traceback: it is a defect."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BroadcastableError as error:
            fail(str(error))
        except OF_SERVICES as error:
            fail(service_fault(error))
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


for command in (demo, server, tail, status, check, doctor, install, caddyfile):
    app.command()(command)
app.add_typer(outbox, name="outbox")
app.add_typer(keys, name="keys")


def run() -> None:
    """Do what the command line says, and exit."""
    print_whatever_the_encoding()
    # What matters to a person at a terminal is printed; an application's workers are the place for logs.
    logging.getLogger("broadcastable").addHandler(logging.NullHandler())
    app()
