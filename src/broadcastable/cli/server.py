"""The commands `server` and `caddyfile`: a stream server for development, and the file for the one in production."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from broadcastable.errors import ConfigurationError, MissingExtraError
from broadcastable.settings import Settings, current_settings
from broadcastable.tokens import Gatekeeper

from . import configuration
from .application import App, load
from .console import err, print_text

CONFIG_HELP = "The file that says how stream servers run."
ENVIRONMENT_HELP = "Which table of it."


def server(
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65_535, help="0 for any that is free.", show_default="4437")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", file_okay=False, help="Keep the streams here.", show_default="in memory"),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option("--origin", metavar="ORIGIN", help="A page's origin that may call, or '*'; may be repeated."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", dir_okay=False, help=CONFIG_HELP, show_default="broadcastable.toml, if there"),
    ] = None,
    environment: Annotated[
        str | None,
        typer.Option("--environment", "-e", metavar="NAME", help=ENVIRONMENT_HELP, show_default="development"),
    ] = None,
    app: App = None,
) -> None:
    """Run a stream server behind the gatekeeper, for development and tests, until Ctrl+C.

    It verifies tokens with the application's keys. What broadcastable.toml says in its table [development] counts
    where an option does not say otherwise.
    """
    try:
        from broadcastable.server.embedded import serve
    except ImportError as error:
        raise MissingExtraError("The stream server", "server") from error
    settings = _settings(app)
    if config is not None or environment is not None or configuration.FILE.exists():
        table = configuration.read(config or configuration.FILE, environment or "development")
        settings = table.settings(settings)
        port = table.port if port is None else port
        data_dir = Path(table.data_dir) if data_dir is None and table.data_dir else data_dir
        origin = origin or table.origins
    kept = f"kept in {data_dir}" if data_dir else "in memory, gone when this ends"
    serve(
        settings,
        host=host,
        port=4437 if port is None else port,
        data_dir=data_dir,
        allowed_origins=origin or (),
        on_listening=lambda url: err.print(f"Streams at [bold]{url}[/], {kept}. Ctrl+C ends it."),
    )


def caddyfile(
    config: Annotated[Path, typer.Option("--config", dir_okay=False, help=CONFIG_HELP)] = configuration.FILE,
    environment: Annotated[
        str, typer.Option("--environment", "-e", metavar="NAME", help=ENVIRONMENT_HELP)
    ] = "production",
    app: App = None,
) -> None:
    """Print the Caddyfile of the production stream server: who may read and write what, as the gatekeeper decides it.

    Made from broadcastable.toml and the public keys. Redirect it: broadcastable caddyfile > Caddyfile
    """
    from broadcastable.server.caddyfile import CaddySite
    from broadcastable.server.caddyfile import caddyfile as render

    table = configuration.read(config, environment)
    settings = table.settings(_settings(app))
    site = CaddySite(
        domain=table.domain,
        port=table.port,
        tls=table.tls if isinstance(table.tls, str) else (table.tls[0], table.tls[1]),
        data_dir=table.data_dir,
        issuer=settings.token_issuer,
        audience=settings.token_audience,
        origins=tuple(table.origins or ()),
    )
    if site.data_dir is None:
        err.print("[yellow]No data_dir:[/] the streams will be kept in memory and gone after a restart.")
    print_text(render(site, _jwks(settings)))


def _settings(app: str | None) -> Settings:
    if app is not None:
        load(app)
    return current_settings()


def _jwks(settings: Settings) -> dict[str, object]:
    if not settings.signing_key and not settings.verify_keys:
        raise ConfigurationError(
            "There is no key to verify tokens with: set signing_key (BROADCASTABLE_SIGNING_KEY), or keys in "
            "broadcastable.toml. Make a key pair: broadcastable keys generate"
        )
    return Gatekeeper(settings).jwks()
