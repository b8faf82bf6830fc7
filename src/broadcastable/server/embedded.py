"""A stream server to embed: rakaia behind the gatekeeper under uvicorn, in a thread for tests and demos, or blocking.

Extra `server`. For production see the deployment page: this server is one process, in memory or on plain files.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import gc
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from broadcastable.errors import ConfigurationError, MissingExtraError
from broadcastable.settings import Settings, current_settings
from broadcastable.tokens import Gatekeeper, generate_key_pair

from .gatekeeper import GatekeeperMiddleware
from .redaction import RedactTokens

try:
    import uvicorn
    from uvicorn.config import LOGGING_CONFIG

    from .rakaia_streams import rakaia_app
except ImportError as error:
    raise MissingExtraError("The embedded stream server", "server") from error

new_event_loop: Callable[[], asyncio.AbstractEventLoop]
try:
    from uvloop import new_event_loop
except ImportError:  # not on Windows, nor on PyPy
    from asyncio import new_event_loop

MOUNT = "/v1/streams"
_STOP_SECONDS = 5.0


def create_app(
    settings: Settings | None = None, data_dir: str | Path | None = None, *, allowed_origins: Iterable[str] = ()
) -> GatekeeperMiddleware:
    """The stream server as an ASGI app, for `uvicorn --factory broadcastable.server:create_app` or to be mounted.

    Mount it at `/v1/streams` and at nothing else, for the paths of streams begin there. One process only: the memory
    store is not shared.

    Args:
        settings: Whose keys verify tokens; `current_settings()` when None.
        data_dir: Where streams are kept; in memory when None.
        allowed_origins: Origins of pages that may call (CORS), or `*`.

    Raises:
        ConfigurationError: No key, or a directory that cannot be used.
    """
    gatekeeper = Gatekeeper(current_settings() if settings is None else settings)
    inner = rakaia_app(None if data_dir is None else Path(data_dir))
    return GatekeeperMiddleware(inner, gatekeeper, mount=MOUNT, allowed_origins=allowed_origins)


class EmbeddedServer:
    """A stream server in a thread of this process, listening when the constructor returns. Made by `embedded_server`.

    Attributes:
        url: Where the streams are: `http://host:port/v1/streams`.
        settings: The settings given, with this server's URL, and keys.
        gatekeeper: Signs and verifies with those keys.
        middleware: The gate, for `use` and `live_reads`.
    """

    def __init__(
        self, *, port: int, host: str, data_dir: str | Path | None, settings: Settings, allowed_origins: Iterable[str]
    ) -> None:
        settings = with_keys(settings)
        self.middleware = create_app(settings, data_dir, allowed_origins=allowed_origins)
        self._socket = listen(host, port)
        self.url = _url_of(self._socket, host)
        self.settings = settings.replace(server_url=self.url, client_url=None)
        self.gatekeeper = Gatekeeper(self.settings)
        self._address = (host, self._socket.getsockname()[1])
        self._run_in_thread()

    def _run_in_thread(self) -> None:
        self._server = _Server(self.middleware, access_log=False)
        self._thread = threading.Thread(target=self._run, name="broadcastable stream server", daemon=True)
        self._thread.start()
        self._server.settled.wait()
        if not self._server.started:
            self._socket.close()
            raise ConfigurationError(f"The embedded stream server did not start on {self.url}; its log says why")

    def _run(self) -> None:
        try:
            self._server.run([self._socket])
        finally:
            self._server.settled.set()

    def stop(self) -> None:
        """End all reads, answer what is being answered, and stop listening. May be called twice."""
        self._server.should_exit = True
        self._thread.join(_STOP_SECONDS)
        self._server.force_exit = True
        self._thread.join()
        self._socket.close()

    def start(self) -> None:
        """After `stop`: listen again, on the same port and with the same streams, those in memory too.

        Raises:
            ConfigurationError: Somebody else has the port by now.
        """
        self._socket = listen(*self._address)
        self._run_in_thread()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


@contextmanager
def embedded_server(
    *,
    port: int = 0,
    host: str = "127.0.0.1",
    data_dir: str | Path | None = None,
    settings: Settings | None = None,
    allowed_origins: Iterable[str] = ("*",),
) -> Iterator[EmbeddedServer]:
    """A running stream server, for tests, demos and development.

    >>> with embedded_server() as server, DurableStreams(server.settings) as durable_streams:
    ...     durable_streams.broadcast_to("news", headline="Rain")
    True

    Args:
        port: 0 for a free one.
        host: The address to listen on.
        data_dir: Where streams are kept; in memory when None.
        settings: `current_settings()` when None. Without a signing key a key pair is made and thrown away at the end.
        allowed_origins: Origins of pages that may call (CORS); every page by default, for they all need a token.

    Raises:
        ConfigurationError: The port is in use, or the directory or a key cannot be used.
    """
    with EmbeddedServer(
        port=port,
        host=host,
        data_dir=data_dir,
        settings=current_settings() if settings is None else settings,
        allowed_origins=allowed_origins,
    ) as server:
        yield server


def serve(
    settings: Settings | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 4437,
    data_dir: str | Path | None = None,
    allowed_origins: Iterable[str] = (),
    access_log: bool = True,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Run a stream server in this thread until SIGINT or SIGTERM; readers are let go and come back after a restart.

    For a process of its own: it freezes what the garbage collector knows so far.

    Args:
        settings: Whose keys verify tokens; `current_settings()` when None. See `with_keys` for a throw-away pair.
        on_listening: Called once with the URL of the streams when connections are accepted.

    Raises:
        ConfigurationError: The port is in use, no key, or a directory that cannot be used.
    """
    middleware = create_app(settings, data_dir, allowed_origins=allowed_origins)
    listening = listen(host, port)
    url = _url_of(listening, host)
    server = _Server(
        middleware, access_log=access_log, on_started=None if on_listening is None else lambda: on_listening(url)
    )
    # What was imported stays; each full collection would look at it for up to 100 ms, and events wait for that.
    gc.collect()
    gc.freeze()
    try:
        server.run([listening])
    finally:
        listening.close()


def with_keys(settings: Settings) -> Settings:
    """*settings*, with a fresh signing key when it has none."""
    return settings if settings.signing_key else settings.replace(signing_key=generate_key_pair().private_pem)


class _Server(uvicorn.Server):
    """uvicorn with a word when it listens, and without waiting for readers when it stops."""

    def __init__(
        self, middleware: GatekeeperMiddleware, *, access_log: bool, on_started: Callable[[], None] | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                middleware,
                lifespan="on",
                ws="none",
                access_log=access_log,
                log_config=_log_config() if access_log else None,
                server_header=False,
                timeout_graceful_shutdown=int(_STOP_SECONDS),
            )
        )
        self._middleware = middleware
        self._on_started = on_started
        self.settled = threading.Event()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `should_exit`, on an event loop of our own choice.

        Earlier uvicorns choose one for the whole process, and this may be a thread of somebody else's.
        """
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(self.serve(sockets))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.settled.set()
        if self._on_started is not None:
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._middleware.end_reads()
        await super().shutdown(sockets)


def _log_config() -> dict[str, Any]:
    """uvicorn's own log lines, with tokens taken out whoever puts them in."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["filters"] = {"redact": {"()": RedactTokens}}
    for handler in config["handlers"].values():
        handler["filters"] = ["redact"]
    return config


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound before its server starts: the port is known, and taken, from here on.

    Raises:
        ConfigurationError: The port is in use, or the host names no address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # With the protocol named, asyncio sets TCP_NODELAY on what it accepts. Without, an answer or an event that is
        # written in two pieces waits 40 ms for the client's acknowledgement of the first.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise ConfigurationError(f"The host {host!r} names no address of this machine: {error.strerror}") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"Port {port} on {host} is in use; choose another, or stop the program that has it"
            ) from error
        raise ConfigurationError(f"Cannot listen on {host}, port {port}: {error.strerror}") from error
    except OverflowError as error:
        listening.close()
        raise ConfigurationError(f"A port is between 0 and 65535; got {port}") from error
    return listening


def _url_of(listening: socket.socket, host: str) -> str:
    name: tuple[Any, ...] = listening.getsockname()
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # not bound here, only shown
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{name[1]}{MOUNT}"
