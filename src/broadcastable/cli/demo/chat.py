"""The demo's chat: a database, an embedded stream server, a worker in this process, and what one can do with them.

What an application would write is in the methods: each changes rows and commits, and none mentions a stream but those
that hand one to a page.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session, sessionmaker

from broadcastable import transactions
from broadcastable.cli.console import step
from broadcastable.cli.files import write_file
from broadcastable.durable_streams import DurableStreams
from broadcastable.errors import ConfigurationError
from broadcastable.server.embedded import embedded_server
from broadcastable.settings import ENV_PREFIX, Settings
from broadcastable.tokens import generate_key_pair

from .models import Base, Message, Room

LONGEST_BURST = 1_000

T = TypeVar("T")


class NotInTheChat(LookupError):
    """There is no such room or message."""


class Chat:
    """Everything that the demo runs on but the page. A context manager: nothing runs before and after it.

    Args:
        data_dir: Where the messages, the streams and the key are kept; a directory that is thrown away when None.
        host: The address on which the stream server listens.
        stream_port: Its port; 0 for a free one.
    """

    def __init__(self, data_dir: Path | None = None, *, host: str = "127.0.0.1", stream_port: int = 0) -> None:
        self._data_dir = data_dir
        self._host = host
        self._stream_port = stream_port
        self._running = ExitStack()
        self._switch = threading.Lock()
        self.stream_server_runs = False

    def __enter__(self) -> Self:
        with ExitStack() as starting:
            with step("Opening the database"):
                directory = self._data_dir or Path(
                    starting.enter_context(tempfile.TemporaryDirectory(prefix="broadcastable-demo-"))
                )
                try:
                    directory.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise ConfigurationError(
                        f"{directory} cannot be a directory for --data-dir: {error.strerror}"
                    ) from error
                database = directory / "chat.db"
                self.engine = _open_database(database)
                starting.callback(self.engine.dispose)
                Base.metadata.create_all(self.engine)
            with step("Starting the stream server"):
                self.stream_server = starting.enter_context(
                    embedded_server(
                        port=self._stream_port,
                        host=self._host,
                        data_dir=None if self._data_dir is None else directory / "streams",
                        settings=_settings(directory, database if self._data_dir else None),
                    )
                )
                self.stream_server_runs = True
            with step("Starting the worker"):
                self.durable_streams = starting.enter_context(DurableStreams(self.stream_server.settings))
                self.sessions = sessionmaker(self.engine, info={"durable_streams": self.durable_streams})
                self._furnish()
                # What was committed and not delivered when this data was last used.
                self.durable_streams.wakeups.wake([each.stream for each in self.durable_streams.outbox.pending()])
                self.durable_streams.drain()
            self._running = starting.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._running.close()

    def _furnish(self) -> None:
        with self.sessions() as session:
            if session.scalar(sa.select(sa.func.count()).select_from(Room)):
                return
            lobby, kitchen = Room(name="Lobby"), Room(name="Kitchen")
            session.add_all([lobby, kitchen, Room(name="Garden")])
            session.add_all(
                [
                    Message(room=lobby, author="Grace", body="Every commit in this room reaches every window of it."),
                    Message(room=lobby, author="Ada", body="Open a second window and put it beside this one."),
                    Message(room=kitchen, author="Radia", body="Move a message here from the Lobby and watch both."),
                ]
            )
            session.commit()

    # --- what an application writes ---

    def rooms(self) -> list[Room]:
        """All rooms, the oldest first."""
        with self.sessions() as session:
            return list(session.scalars(sa.select(Room).order_by(Room.id)))

    def make_room(self, name: str) -> Room:
        """A new room."""
        with self.sessions(expire_on_commit=False) as session:
            room = Room(name=name)
            session.add(room)
            session.commit()
            return room

    def rename_room(self, room_id: int, name: str) -> str:
        """Change the room's own row; the txid."""
        with self._changing(Room, room_id) as (session, room):
            room.name = name
            return self._commit(session)

    def post(self, room_id: int, author: str, body: str) -> tuple[int, str]:
        """A new message; its id and txid."""
        with self._changing(Room, room_id) as (session, room):
            message = Message(room_id=room.id, author=author, body=body)
            session.add(message)
            session.flush()
            return message.id, self._commit(session)

    def post_many(self, room_id: int, author: str, count: int) -> None:
        """*count* messages, each in a transaction of its own."""
        for number in range(1, count + 1):
            self.post(room_id, author, f"Message {number} of {count}")

    def edit(self, message_id: int, body: str) -> str:
        """Change a message's text; the txid."""
        with self._changing(Message, message_id) as (session, message):
            message.body = body
            message.edited = True
            return self._commit(session)

    def move(self, message_id: int, room_id: int) -> str:
        """Put a message into another room: a delete on one stream, an insert on the other, under one txid."""
        with self._changing(Message, message_id) as (session, message):
            message.room_id = _get(session, Room, room_id).id
            return self._commit(session)

    def remove(self, message_id: int) -> str:
        """Delete a message; the txid."""
        with self._changing(Message, message_id) as (session, message):
            session.delete(message)
            return self._commit(session)

    @contextmanager
    def _changing(self, model: type[Any], key: int) -> Iterator[tuple[Session, Any]]:
        with self.sessions(expire_on_commit=False) as session:
            yield session, _get(session, model, key)

    @staticmethod
    def _commit(session: Session) -> str:
        txid = transactions.txid(session)
        session.commit()
        return txid

    # --- what it hands to a page ---

    def snapshot(self, room_id: int) -> dict[str, Any]:
        """The room's messages as they are, and the stream to follow from there."""
        room = self._room(room_id)
        with self.sessions() as session:
            messages = sa.select(Message).where(Message.room_id == room.id).order_by(Message.id)
            return self.durable_streams.snapshot(session, messages, room, "messages").as_dict()

    def token(self, room_id: int) -> dict[str, str]:
        """A new token to go on following the room's messages."""
        url, token = self.durable_streams.signed_stream_primitives(self._room(room_id), "messages")
        return {"url": url, "token": token}

    def stream_name(self, room: Room) -> str:
        """The name of the stream of the room's messages."""
        return self.durable_streams.stream_name_from(room, "messages")

    def _room(self, room_id: int) -> Room:
        with self.sessions() as session:
            return _get(session, Room, room_id)

    # --- the switch on the page ---

    def let_stream_server_run(self, wanted: bool) -> None:
        """Stop the stream server, or start it again where it was. What is committed meanwhile waits in the outbox."""
        with self._switch:
            if wanted == self.stream_server_runs:
                return
            if wanted:
                self.stream_server.start()
            else:
                self.stream_server.stop()
            self.stream_server_runs = wanted


def _get(session: Session, model: type[T], key: int) -> T:
    record = session.get(model, key) if key.bit_length() < 64 else None  # SQLite has no larger integers
    if record is None:
        raise NotInTheChat(f"There is no {model.__name__.lower()} {key}; perhaps it was deleted meanwhile.")
    return record


def _settings(directory: Path, database: Path | None) -> Settings:
    """The environment's settings, but the demo's own everything: no other service takes part.

    What is kept is kept whole: with a *database* the outbox is in it, so that a kill at any moment loses nothing.
    """
    own = {
        "outbox": "memory" if database is None else "database",
        "database_url": None if database is None else f"sqlite:///{database}",
        "redis_url": None,
        "client_url": None,
        "stream_ttl": None,
        "gid_app": "demo",
    }
    # Unread, so that what the demo replaces cannot be wrong either; the URL is the embedded server's.
    unread = {f"{ENV_PREFIX}{name.upper()}" for name in (*own, "server_url")}
    environment = {name: value for name, value in os.environ.items() if name not in unread}
    settings = Settings.from_env(environment).replace(**own)
    if settings.signing_key:
        return settings
    key = directory / "signing_key.pem"
    if not key.exists():
        write_file(key, generate_key_pair().private_pem, mode=0o600)
    return settings.replace(signing_key=str(key))


def _open_database(path: Path) -> sa.Engine:
    """An SQLite file that several threads write: real transactions, write-ahead log, and patience.

    SQLAlchemy documentation, SQLite dialect, "Enabling non-legacy SQLite transactional modes".
    """
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 10})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # At once for writing: a transaction that has read before another wrote may not write any more (SQLITE_BUSY).
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
