"""A SQLAlchemy application with its `DurableStreams`, and an HTTP front for the requests of a page."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sqlalchemy.orm import Session

from broadcastable.durable_streams import DurableStreams
from broadcastable.settings import Settings
from broadcastable.transactions import txid
from tests import services
from tests.interop.models import Base


class Application:
    """Rooms and messages in a database, broadcast through *settings*."""

    def __init__(self, database_url: str, settings: Settings) -> None:
        self.engine = services.open_engine(database_url)
        Base.metadata.create_all(self.engine)
        self.durable_streams = DurableStreams(settings)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session that broadcasts; commits are the caller's."""
        with Session(self.engine, info={"durable_streams": self.durable_streams}) as session:
            yield session

    def commit(self, *records: object) -> str:
        """Add and commit *records* in one transaction; its txid."""
        with self.session() as session:
            session.add_all(records)
            transaction_id = txid(session)
            session.commit()
            return transaction_id

    def change(self, change: Callable[[Session], object]) -> str:
        """Commit what *change* does in one transaction; its txid."""
        with self.session() as session:
            transaction_id = txid(session)
            change(session)
            session.commit()
            return transaction_id

    def provision(self, *streams: str) -> None:
        """Make the streams, as signing their URLs would."""
        for stream in streams:
            self.durable_streams.ensure_stream_exists(stream)

    def close(self) -> None:
        self.durable_streams.close()
        self.engine.dispose()


@contextmanager
def http_front(view: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    """The URL of a server that answers a POST with `{"txid": view(document)}`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps({"txid": view(document)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
