"""The command `demo`: start everything, serve the page, or play the scenario once."""

from __future__ import annotations

import threading
import webbrowser
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from broadcastable.cli.console import err, has_desktop, out, step
from broadcastable.errors import ConfigurationError, MissingExtraError

Port = Annotated[int, typer.Option("--port", min=0, max=65_535, help="The page's port; 0 for any that is free.")]
StreamPort = Annotated[
    int | None,
    typer.Option(
        "--stream-port",
        min=0,
        max=65_535,
        help="The stream server's port.",
        show_default="the one after --port, if free",
    ),
]
Host = Annotated[str, typer.Option("--host", help="The address to listen on; 0.0.0.0 for the whole network.")]
Open = Annotated[bool | None, typer.Option("--open/--no-open", help="Open the page.", show_default="on a desktop")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", file_okay=False, help="Keep messages and streams here.", show_default="nothing is kept"),
]
Once = Annotated[bool, typer.Option("--once", help="No page: play a scenario, print what a reader gets, and exit.")]


def demo(
    port: Port = 8000,
    stream_port: StreamPort = None,
    host: Host = "127.0.0.1",
    open_page: Open = None,
    data_dir: DataDir = None,
    once: Once = False,
) -> None:
    """A chat in several windows, with the change events beside it. Everything runs in this process.

    With --once a scripted scenario runs instead: each commit is printed with the event that a reader received and how
    long that took. Exits 0 only if everything arrived, once and in order.
    """
    try:
        from .chat import Chat
    except ImportError as error:
        raise MissingExtraError("The demo", "demo") from error
    if once:
        try:
            from .scenario import play
        except ModuleNotFoundError as error:
            raise MissingExtraError("The demo's reader", "demo") from error
        with Chat(data_dir, host=host, stream_port=stream_port or 0) as chat:
            arrived = play(chat)
        raise typer.Exit(0 if arrived else 1)
    _serve(port, stream_port, host, open_page, data_dir)


def _serve(port: int, stream_port: int | None, host: str, open_page: bool | None, data_dir: Path | None) -> None:
    try:
        import uvicorn

        from broadcastable.server.embedded import listen

        from .chat import Chat
        from .web import web_app
    except ModuleNotFoundError as error:
        raise MissingExtraError("The demo's page", "demo") from error
    with ExitStack() as running:
        # First, so that a port in use is said before anything is started.
        listening = running.enter_context(listen(host, port))
        if stream_port is None:
            stream_port = _free_or_any(host, listening.getsockname()[1] + 1)
        chat = running.enter_context(Chat(data_dir, host=host, stream_port=stream_port))
        with step("Serving the page"):
            server = uvicorn.Server(
                uvicorn.Config(web_app(chat), log_config=None, access_log=False, timeout_graceful_shutdown=2)
            )
        shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)  # noqa: S104  # shown, not bound
        url = f"http://{f'[{shown}]' if ':' in shown else shown}:{listening.getsockname()[1]}/"
        out.print(f"\n  The demo is at [bold link={url}]{url}[/]")
        out.print(f"  Its streams are at {chat.stream_server.url}")
        out.print("  Open it in two windows. Ctrl+C ends it.\n")
        if has_desktop() if open_page is None else open_page:
            threading.Timer(0.3, webbrowser.open, [url]).start()
        server.run(sockets=[listening])
        err.print("Goodbye.")


def _free_or_any(host: str, port: int) -> int:
    """*port* if nobody has it, else 0: any other will do."""
    from broadcastable.server.embedded import listen

    try:
        listen(host, port if port <= 65_535 else 0).close()
    except ConfigurationError:
        return 0
    return port
