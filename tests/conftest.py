"""Fixtures of the whole suite: real services, started when first asked for, clean for every test.

`REDIS_URL`, `POSTGRES_URL` and `MARIADB_URL` point the suite at other servers. It empties the Redis database that it
is given (number 0, or that of the xdist process), and makes and drops databases on the others. MariaDB takes part only
when its variable is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hypothesis
import pytest
import redis
import sqlalchemy as sa

from broadcastable.events import Batch, ChangeEvent
from broadcastable.server.embedded import EmbeddedServer, embedded_server
from broadcastable.settings import Settings
from broadcastable.tokens import generate_key_pair
from tests import services
from tests.clock import Clock
from tests.state_protocol import Tap

pytest_plugins = ["pytester"]

# No deadline: a slow machine is no fault. A check says the same of the same code each time, and which change broke it;
# the nightly run looks for what no run has met, and longer.
hypothesis.settings.register_profile("checks", deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", deadline=None, derandomize=False, max_examples=5_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "checks"))

BACKENDS = ("sqlite", "postgres", *(("mariadb",) if os.environ.get("MARIADB_URL") else ()))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BROADCASTABLE_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def _state_protocol_tap() -> Iterator[Tap]:
    tap = Tap()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChangeEvent, "encode", tap.listening(ChangeEvent.encode))
        patch.setattr(Batch, "__init__", tap.watching(Batch.__init__))
        yield tap


@pytest.fixture(autouse=True)
def every_event_follows_the_state_protocol(_state_protocol_tap: Tap) -> Iterator[Tap]:
    """Fails any test in which a change event is made that the State Protocol does not allow."""
    yield _state_protocol_tap
    _state_protocol_tap.check()


@pytest.fixture
def clock() -> Clock:
    return Clock()


# Redis


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[str]:
    elsewhere = os.environ.get("REDIS_URL")
    if elsewhere:
        # One database for each test process; xdist calls them gw0, gw1, ...
        number = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
        yield urlsplit(elsewhere)._replace(path=f"/{number}").geturl()
        return
    server = services.Valkey().start()
    yield server.url
    server.stop()


@pytest.fixture
def valkey_url(_redis_server: str) -> str:
    """The `redis://` URL of a Valkey database that is empty."""
    client = redis.Redis.from_url(_redis_server)
    client.flushdb()
    client.script_flush()
    client.close()
    return _redis_server


@pytest.fixture
def make_valkey() -> Iterator[Callable[..., services.Valkey]]:
    """Starts Valkey servers of the test's own, to be stopped, killed, paused, restarted; keywords are its settings."""
    servers: list[services.Valkey] = []

    def make(**config: Any) -> services.Valkey:
        server = services.Valkey(**config)
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def valkey_server(make_valkey: Callable[..., services.Valkey]) -> services.Valkey:
    """One Valkey server of the test's own, running."""
    return make_valkey()


# Databases


@pytest.fixture(scope="session")
def _postgres_server() -> Iterator[sa.URL]:
    elsewhere = os.environ.get("POSTGRES_URL")
    if elsewhere:
        yield sa.make_url(elsewhere).set(drivername="postgresql+psycopg")
        return
    with services.postgresql() as url:
        yield url


@pytest.fixture
def postgres_url(_postgres_server: sa.URL) -> Iterator[str]:
    """`postgresql+psycopg://` URL of a new, empty PostgreSQL database."""
    with services.fresh_database(_postgres_server) as url:
        yield url


@pytest.fixture
def mariadb_url() -> Iterator[str]:
    """`mysql+pymysql://` URL of a new, empty MariaDB database on the server at `MARIADB_URL`."""
    with services.fresh_database(sa.make_url(os.environ["MARIADB_URL"])) as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """`sqlite://` URL of a file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a new, empty database, once for each backend."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    """An engine on a new, empty database, once for each backend."""
    engine = services.open_engine(database_url)
    yield engine
    engine.dispose()


# Stream servers


@pytest.fixture(scope="session")
def signing_key() -> str:
    """The PEM of the private key that `stream_server` trusts."""
    return generate_key_pair().private_pem


@pytest.fixture(scope="session")
def stream_server(signing_key: str) -> Iterator[EmbeddedServer]:
    """The embedded stream server, one for all tests: each uses stream names of its own."""
    with embedded_server(settings=Settings(signing_key=signing_key)) as server:
        yield server
