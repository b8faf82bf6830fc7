"""Two stream servers, the embedded one and the npm reference server, and a page that reads them.

Nothing here is skipped: without Node these tests fail, and say what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from broadcastable.names import stream_path
from broadcastable.server.embedded import embedded_server
from broadcastable.settings import Settings
from broadcastable.tokens import Gatekeeper
from tests.interop.application import Application
from tests.interop.node import NodeProcess


class Server(Protocol):
    """A stream server that can go away and come back at the same URL with the same streams."""

    url: str
    settings: Settings

    def stop(self) -> None: ...
    def start(self) -> None: ...


class EmbeddedOnDisk:
    """The embedded server on files, so that it can come back."""

    def __init__(self, data_dir: Path | None) -> None:
        self._data_dir = data_dir
        self.settings = Settings()
        self._port = 0
        self.start()

    def start(self) -> None:
        self._open = ExitStack()
        server = self._open.enter_context(
            embedded_server(port=self._port, data_dir=self._data_dir, settings=self.settings)
        )
        self.url, self.settings = server.url, server.settings
        self._port = httpx.URL(self.url).port or 0

    def stop(self) -> None:
        self._open.close()


class Reference:
    """The npm reference server; it asks for no token, and is given the same ones."""

    def __init__(self, data_dir: Path | None, signing_key: str) -> None:
        self._data_dir = data_dir
        self._port = 0
        self._process: NodeProcess | None = None
        self.start()
        self.settings = Settings(server_url=self.url, signing_key=signing_key)

    def start(self) -> None:
        self._process = NodeProcess("reference_server.mjs")
        base = self._process.do("start", port=self._port, dataDir=self._data_dir and str(self._data_dir))
        self._port = httpx.URL(base).port or 0
        self.url = f"{base}/v1/streams"

    def stop(self) -> None:
        # The end of its process, not its own stop(): that waits for readers, who do not leave.
        if self._process is not None:
            self._process.close()
            self._process = None


SERVERS = ["embedded", "npm"]


def _open(kind: str, data_dir: Path | None, signing_key: str) -> Iterator[Server]:
    server: Server = Reference(data_dir, signing_key) if kind == "npm" else EmbeddedOnDisk(data_dir)
    yield server
    server.stop()


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, signing_key: str) -> Iterator[Server]:
    """A stream server in memory, one of each kind for the tests of a file."""
    yield from _open(request.param, None, signing_key)


@pytest.fixture(params=SERVERS)
def restartable(request: pytest.FixtureRequest, signing_key: str, tmp_path: Path) -> Iterator[Server]:
    """A stream server on files, to be stopped and started again."""
    yield from _open(request.param, tmp_path / "streams", signing_key)


@pytest.fixture
def stream(request: pytest.FixtureRequest) -> str:
    """A stream name that no other test uses."""
    return f"{request.node.originalname}/{id(request):x}"


class Page:
    """A page that shows the collections of streams: `createStreamDB` on TanStack DB in a Node process of its own."""

    def __init__(self, node: NodeProcess, server: Server) -> None:
        self.node = node
        self._server = server
        self._gatekeeper = Gatekeeper(server.settings)

    def address(self, stream: str, *permissions: str) -> dict[str, Any]:
        """The URL of *stream* and the headers of a client that may read it."""
        token = self._gatekeeper.encode({"stream": stream, "permissions": permissions or ["read"]}, expires_in=600)
        url = f"{self._server.url}/{stream_path(stream)}"
        return {"url": url, "headers": {"Authorization": f"Bearer {token}"}}

    def open(self, stream: str, collections: dict[str, tuple[str, str]], *, name: str = "db", live: Any = True) -> None:
        """Make a StreamDB of *stream* and preload it; *collections* gives each one's event type and primary key."""
        self.node.do("open", name=name, collections=collections, live=live, **self.address(stream))

    def rows(self, collection: str, name: str = "db") -> list[dict[str, Any]]:
        """The rows of a collection as the page sees them now."""
        return list(self.node.do("rows", collection=f"{name}.{collection}"))

    def await_txid(self, txid: str, *names: str, timeout: float = 10.0) -> None:
        """Wait until *txid* has been seen in every StreamDB of *names*."""
        for name in names or ("db",):
            self.node.do("awaitTxId", name=name, txid=txid, wait=int(timeout * 1000), timeout=timeout + 5)

    def events(self, name: str = "db") -> list[dict[str, Any]]:
        """Every change event that this page has read, in order."""
        return list(self.node.do("events", name=name))

    def read(self, stream: str, offset: str = "-1") -> dict[str, Any]:
        """What the plain client reads from *stream* now: `items` and the next `offset`."""
        return dict(self.node.do("read", offset=offset, **self.address(stream)))


@pytest.fixture
def open_page() -> Iterator[Callable[[Server], Page]]:
    """Opens pages; each is closed at the end, and must not have lost a session on the way."""
    pages: list[Page] = []

    def open_(server: Server) -> Page:
        page = Page(NodeProcess("reader.mjs"), server)
        pages.append(page)
        return page

    yield open_
    try:
        assert [failure for page in pages for failure in page.node.do("failures")] == []
    finally:
        for page in pages:
            page.node.close()


@pytest.fixture
def page(server: Server, open_page: Callable[[Server], Page]) -> Page:
    """A page on `server`."""
    return open_page(server)


class Writer:
    """Appends events to streams with nothing of ours in between but the server token."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {Gatekeeper(server.settings).server_token()}"}, timeout=30
        )

    def create(self, stream: str) -> None:
        self._client.put(self._url(stream), headers={"Content-Type": "application/json"}).raise_for_status()

    def append(self, stream: str, *events: dict[str, Any]) -> None:
        self._client.post(self._url(stream), json=list(events)).raise_for_status()

    def _url(self, stream: str) -> str:
        return f"{self._server.url}/{stream_path(stream)}"

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def writer(server: Server) -> Iterator[Writer]:
    """A bare writer on `server`."""
    writer = Writer(server)
    yield writer
    writer.close()


@pytest.fixture
def open_application(sqlite_url: str) -> Iterator[Callable[..., Application]]:
    """Opens the application on a server; keywords are settings, and `database_url` another database."""
    applications: list[Application] = []

    def open_(server: Server, *, database_url: str = sqlite_url, **settings: Any) -> Application:
        application = Application(database_url, server.settings.replace(**settings))
        applications.append(application)
        return application

    yield open_
    for application in applications:
        application.close()
