"""A whole deployment on this machine, each part a process of its own that can be killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from dramatiq.brokers.redis import RedisBroker
from sqlalchemy.orm import Session

from broadcastable.client import StreamClient
from broadcastable.durable_streams import DurableStreams
from broadcastable.settings import Settings
from broadcastable.tokens import Gatekeeper, generate_key_pair
from broadcastable.wakeups import enqueue
from tests import services
from tests.chaos.models import Commit, Message, create

SERVER = """
import sys
from broadcastable.server.embedded import serve
serve(port=int(sys.argv[1]), data_dir=sys.argv[2] or None, access_log=False)
"""


@dataclass
class Part:
    """One process of the deployment."""

    command: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    killed: list[int] = field(default_factory=list, init=False)
    """The processes that were ended by SIGKILL."""

    def start(self, **environment: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env={**self.environment, **environment}, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def end(self, how: signal.Signals) -> None:
        """Send *how* to the process and its children, and wait."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)
            self.process.wait(30)

    def kill(self) -> None:
        if self.process is not None:
            self.killed.append(self.process.pid)
        self.end(signal.SIGKILL)


class Stack:
    """PostgreSQL (given), Valkey, a stream server on files, worker processes and applications.

    Args:
        outbox: "database" or "redis".
        server: The command of another stream server, from its port and its directory.
    """

    def __init__(
        self,
        directory: Path,
        database_url: str,
        *,
        outbox: str,
        rooms: int = 20,
        workers: int = 2,
        applications: int = 1,
        writers: int = 4,
        pause: float = 0.02,
        on_files: bool = True,
        server: Callable[[int, str], list[str]] | None = None,
    ) -> None:
        self._exits = ExitStack()
        self.rooms = rooms
        # Everything is on disk before Redis answers: what it has acknowledged survives its SIGKILL.
        self.valkey = services.Valkey(appendonly="yes", appendfsync="always")
        key = directory / "key.pem"
        key.write_text(generate_key_pair().private_pem)
        port = services.free_port()
        self.settings = Settings(
            server_url=f"http://127.0.0.1:{port}/v1/streams",
            signing_key=str(key),
            redis_url=self.valkey.url,
            database_url=database_url,
            outbox=outbox,  # type: ignore[arg-type]
            request_timeout=1.0,
        )
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "CHAOS_PAUSE": str(pause),
            "BROADCASTABLE_SERVER_URL": str(self.settings.server_url),
            "BROADCASTABLE_SIGNING_KEY": str(key),
            "BROADCASTABLE_REDIS_URL": self.valkey.url,
            "BROADCASTABLE_DATABASE_URL": database_url,
            "BROADCASTABLE_OUTBOX": outbox,
            "BROADCASTABLE_REQUEST_TIMEOUT": "1.0",
        }
        data = str(directory / "streams") if on_files else ""
        python = [sys.executable, "-W", "ignore"]
        command = server(port, data) if server is not None else [*python, "-c", SERVER, str(port), data]
        self.server = Part(command, environment, directory / "server.log")
        dramatiq = [*python, "-m", "dramatiq", "tests.chaos.worker", "--processes", "1", "--threads", "4"]
        self.workers = [Part(dramatiq, environment, directory / f"worker{n}.log") for n in range(workers)]
        app = [*python, "-m", "tests.chaos.app", str(writers), str(rooms)]
        self.applications = [Part(app, environment, directory / f"app{n}.log") for n in range(applications)]
        self._client = StreamClient(self.settings, Gatekeeper(self.settings))
        self._broker = RedisBroker(url=self.valkey.url, middleware=[])
        self._port = port
        create(database_url, rooms)

    def __enter__(self) -> Self:
        self.valkey.start()
        self.server.start()
        for part in (*self.workers, *self.applications):
            part.start()
        services.wait_until(self.server_answers, within=30, what="an answer of the stream server")
        return self

    def __exit__(self, *exc_info: object) -> None:
        for part in (*self.applications, *self.workers, self.server):
            part.kill()
        self._client.close()
        self._broker.client.connection_pool.disconnect()
        self.valkey.stop()

    def server_answers(self) -> bool:
        try:
            self._client.create("probe")
        except OSError:
            return False
        return True

    def restart(self, part: Part, **environment: str) -> None:
        part.kill()
        part.start(**environment)

    def restart_valkey(self) -> None:
        self.valkey.kill()
        self.valkey.start()

    def wake_for_nothing(self) -> None:
        """Queue a wake-up of every room, as a broker that repeats its messages would."""
        names = [f"gid://app/Room/{room}/messages" for room in range(1, self.rooms + 1)]
        enqueue(self._broker, self.settings.namespace, names)

    def start_what_died(self) -> None:
        for part in (self.server, *self.workers, *self.applications):
            if not part.is_running:
                part.start()

    def settle(self, *, within: float, commits: int = 0) -> None:
        """Let the writers reach so many *commits*, stop them in order, and wait until nothing is pending."""
        services.wait_until(lambda: self._commits() >= commits, within=within, what=f"{commits} commits")
        for part in self.applications:
            part.end(signal.SIGTERM)
        with DurableStreams(self.settings) as streams:
            services.wait_until(lambda: not streams.outbox.pending(), within=within, what="an empty outbox")

    # What is there at the end

    def events(self, room: int) -> list[dict[str, Any]]:
        """All events of a room's stream, in order."""
        stream = f"gid://app/Room/{room}/messages"
        events: list[dict[str, Any]] = []
        try:
            page = self._client.read(stream)
            while page.events:
                events.extend(json.loads(event) for event in page.events)
                page = self._client.read(stream, page.next_offset)
        except LookupError:
            pass
        return events

    def rows(self) -> dict[int, dict[str, dict[str, Any]]]:
        """The table: room -> key -> value, as the events would have it."""
        rows: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
        with self._session() as session:
            for message in session.scalars(sa.select(Message)):
                rows[message.room_id][str(message.id)] = {
                    "id": str(message.id),
                    "room_id": str(message.room_id),
                    "number": message.number,
                    "writer": message.writer,
                    "body": message.body,
                }
        return rows

    def owed(self) -> dict[int, dict[str, Owed]]:
        """The log of the commits: room -> txid -> what a reader of the room is owed."""
        owed: dict[int, dict[str, Owed]] = defaultdict(dict)
        with self._session() as session:
            for commit in session.scalars(sa.select(Commit)):
                owed[commit.room_id][commit.txid] = Owed(commit.process)
        return owed

    def _commits(self) -> int:
        with self._session() as session:
            return session.scalar(sa.select(sa.func.count()).select_from(Commit)) or 0

    @contextmanager
    def _session(self) -> Iterator[Session]:
        engine = sa.create_engine(str(self.settings.database_url), poolclass=sa.NullPool)
        with Session(engine) as session:
            yield session
        engine.dispose()


@dataclass(frozen=True)
class Owed:
    """A transaction's events on one stream: the process that committed them."""

    process: int


@dataclass
class Verdict:
    """What a sceptic finds on the streams. All but `events` should be 0."""

    events: int = 0
    lost: int = 0
    """Batches: what one transaction had for one stream."""
    streams_that_differ_from_the_table: int = 0
    doubled: int = 0
    out_of_order: int = 0
    torn: int = 0


def judge(stack: Stack, *, admitted: Callable[[Owed], bool] = lambda owed: False) -> tuple[Verdict, int]:
    """Fold every stream and compare it with the table; count what is missing, twice, out of order, or torn apart.

    Args:
        admitted: Whether the guarantees admit the loss of a batch. What it admits is counted apart, and the fold of
            its stream is not compared with the table.

    Returns:
        The verdict, and the number of batches that are lost as admitted.
    """
    verdict, forgiven = Verdict(), 0
    rows, owed = stack.rows(), stack.owed()
    for room in range(1, stack.rooms + 1):
        events = stack.events(room)
        verdict.events += len(events)
        fold: dict[str, Any] = {}
        seen: Counter[tuple[str, str, str]] = Counter()
        closed: set[str] = set()
        last_number, last_txid = 0, ""
        for event in events:
            headers, key = event["headers"], event["key"]
            seen[headers["txid"], key, headers["operation"]] += 1
            if headers["txid"] != last_txid:
                closed.add(last_txid)
                verdict.torn += headers["txid"] in closed
                last_txid = headers["txid"]
            if headers["operation"] == "delete":
                fold.pop(key, None)
                continue
            fold[key] = event["value"]
            verdict.out_of_order += event["value"]["number"] < last_number
            last_number = event["value"]["number"]
        verdict.doubled += sum(count - 1 for count in seen.values())
        arrived = {event["headers"]["txid"] for event in events}
        missing = [each for txid, each in owed[room].items() if txid not in arrived]
        excused = sum(map(admitted, missing))
        forgiven += excused
        verdict.lost += len(missing) - excused
        if not excused:
            verdict.streams_that_differ_from_the_table += fold != rows[room]
    return verdict, forgiven
