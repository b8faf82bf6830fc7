"""What capture costs a transaction, as a ratio to SQLAlchemy alone, and beside its nearest peer, SQLAlchemy-Continuum.

    python benchmarks/capture.py [rounds]

Plain and captured rounds take turns on the same database: SQLite in a file, and a PostgreSQL of its own in its default
configuration (durable commits). Ratios are of medians. Events go into a memory outbox that no worker empties. The
peer, which writes a history row for each change and listens to every session, runs in a process of its own if it is
installed (`pip install sqlalchemy-continuum`). What sessions without any such model pay is measured in processes with
and without our hooks. Takes about three minutes on a quiet machine.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, configure_mappers, mapped_column, relationship

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import services

from broadcastable import Broadcastable, mixin, streams_to
from broadcastable.events import Batch
from broadcastable.handoff import Handoff, Turn
from broadcastable.outbox.memory import MemoryOutbox
from broadcastable.settings import Settings

ROWS = 1000
STREAMS = 100


class Base(DeclarativeBase):
    pass


class Room(Base):
    __tablename__ = "rooms"
    id: Mapped[int] = mapped_column(primary_key=True)


class Columns:
    id: Mapped[int] = mapped_column(primary_key=True)
    room_id: Mapped[int] = mapped_column(sa.ForeignKey("rooms.id"))
    author: Mapped[str]
    body: Mapped[str]
    likes: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC).replace(tzinfo=None))


class Plain(Columns, Base):
    __tablename__ = "plain"
    room: Mapped[Room] = relationship()


class Captured(Columns, Base, Broadcastable):
    __tablename__ = "captured"
    __streams__ = streams_to("room", "messages")
    room: Mapped[Room] = relationship()


class IntoMemory:
    """A delivery that ends in the memory outbox."""

    settings = Settings()
    transactional = False

    def __init__(self) -> None:
        self.empty()

    def empty(self) -> None:
        self.outbox = MemoryOutbox.from_settings(self.settings)
        self.handoff = Handoff(self.outbox, lambda streams: None, max_bytes=1 << 26, blocking=False)

    def stage(self, connection: sa.Connection, batches: Sequence[Batch]) -> None:
        raise AssertionError("not transactional")

    def announce(self, streams: Collection[str]) -> Turn:
        return self.handoff.announce(streams)

    def withdraw(self, turn: Turn) -> None:
        self.handoff.withdraw(turn)

    def committed(self, batches: Sequence[Batch], *, turn: Turn | None = None, joined: bool = False) -> None:
        self.handoff.submit(batches, turn)


delivery = IntoMemory()


def session(engine: sa.Engine) -> Session:
    return Session(engine, info={"durable_streams": delivery})


# Each returns the seconds of what it measures.


def insert(engine: sa.Engine, model: Any) -> float:
    began = time.perf_counter()
    with session(engine) as current:
        for number in range(ROWS):
            current.add(model(room_id=1 + number % STREAMS, author="somebody", body=f"message number {number}"))
        current.commit()
    return time.perf_counter() - began


def update(engine: sa.Engine, model: Any) -> float:
    with session(engine) as current:
        rows = current.scalars(sa.select(model).order_by(model.id).limit(ROWS)).all()
        began = time.perf_counter()
        for row in rows:
            row.likes += 1
            row.body = f"{row.body[:40]}, again"
        current.commit()
        return time.perf_counter() - began


def one_row(engine: sa.Engine, model: Any) -> float:
    began = time.perf_counter()
    with session(engine) as current:
        current.add(model(room_id=1, author="somebody", body="hello"))
        current.commit()
    return time.perf_counter() - began


def read(engine: sa.Engine, model: Any) -> float:
    began = time.perf_counter()
    with session(engine) as current:
        for number in range(1, 21):
            current.scalars(sa.select(model).where(model.id == number)).all()
    return time.perf_counter() - began


Step = Callable[[sa.Engine, Any], float]

STEPS: dict[str, tuple[Step, float, int]] = {
    f"insert of {ROWS} rows on {STREAMS} streams": (insert, 1.25, 1),
    f"update of {ROWS} rows": (update, 1.6, 1),
    "commit of one row": (one_row, 1.10, 60),
}
"""What is measured, the most that it may cost, and how often a round repeats it."""


def by_turns(first: Callable[[], float], second: Callable[[], float], times: int) -> tuple[float, float]:
    """The medians of two measurements that take turns, the order changing each time."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(times + 2):
        for which in (0, 1) if number % 2 else (1, 0):
            gc.collect()
            gc.disable()
            seconds = (first, second)[which]()
            gc.enable()
            if number >= 2:  # the first ones warm caches
                taken[which].append(seconds)
        delivery.empty()
    return statistics.median(taken[0]), statistics.median(taken[1])


def prepare(engine: sa.Engine, models: Sequence[Any]) -> None:
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Room.__table__), [{"id": number} for number in range(1, STREAMS + 1)])
    for model in models:
        insert(engine, model)


def measure(name: str, engine: sa.Engine, rounds: int, peer: dict[str, float]) -> None:
    prepare(engine, [Plain, Captured])
    for label, (step, limit, repeats) in STEPS.items():
        plain, captured = by_turns(partial(step, engine, Plain), partial(step, engine, Captured), rounds * repeats)
        beside = f"{peer[label] / plain:10.1f}" if label in peer else "         -"
        print(f"{name:12}{label:38}{plain * 1e3:9.2f}{captured * 1e3:9.2f}{captured / plain:8.3f}{limit:8.2f}{beside}")


BYSTANDER: dict[str, tuple[Step, int]] = {
    "plain session, insert of 1000 rows": (insert, 1),
    "plain session, commit of one row": (one_row, 60),
    "plain session, 20 queries": (read, 20),
}


def run_bystander(directory: str, rounds: int, *, installed: bool) -> None:
    """In a process of its own, since hooks that come and go cost more than hooks that stay."""
    if not installed:
        mixin.remove()
    engine = services.open_engine(f"sqlite:///{directory}/bystander.db")
    found = {}
    for label, (step, repeats) in BYSTANDER.items():
        step(engine, Plain)
        found[label] = statistics.median(step(engine, Plain) for _ in range(rounds * repeats))
    engine.dispose()
    print(json.dumps(found))


def measure_bystander(directory: str, rounds: int) -> None:
    """A session without models with streams, with our hooks and without; processes take turns."""
    engine = services.open_engine(f"sqlite:///{directory}/bystander.db")
    prepare(engine, [Plain])
    engine.dispose()
    taken: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for number in range(6):
        for which in sorted(taken, reverse=bool(number % 2)):
            taken[which].append(in_a_process_of_its_own(rounds, "--bystander", which, directory))
    for label in BYSTANDER:
        alone, watched = (statistics.median(each[label] for each in taken[which]) for which in ("without", "with"))
        print(f"{'SQLite':12}{label:38}{alone * 1e3:9.2f}{watched * 1e3:9.2f}{watched / alone:8.3f}{1.01:8.2f}")


def run_peer(url: str, rounds: int) -> None:
    """In a process of its own: the same steps with SQLAlchemy-Continuum."""
    import sqlalchemy_continuum

    mixin.remove()
    sqlalchemy_continuum.make_versioned(user_cls=None)

    class Versioned(Columns, Base):
        __tablename__ = "versioned"
        __versioned__: dict[str, Any] = {}  # noqa: RUF012
        room: Mapped[Room] = relationship()

    configure_mappers()
    engine = services.open_engine(url)
    prepare(engine, [Versioned])
    found = {}
    for label, (step, _, repeats) in STEPS.items():
        times = max(5, rounds * repeats // 2)
        found[label] = statistics.median(step(engine, Versioned) for _ in range(times + 2))
    engine.dispose()
    print(json.dumps(found))


def in_a_process_of_its_own(rounds: int, *arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, str(rounds), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"({arguments[0]} did not run: {done.stderr.strip().splitlines()[-1]})")
        return {}
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main(rounds: int) -> None:
    print(f"{'':12}{'':38}{'plain ms':>9}{'ours ms':>9}{'ratio':>8}{'limit':>8}{'Continuum':>10}")
    with tempfile.TemporaryDirectory() as directory:
        engine = services.open_engine(f"sqlite:///{directory}/ours.db")
        peer = in_a_process_of_its_own(rounds, "--peer", f"sqlite:///{directory}/peer.db")
        measure("SQLite", engine, rounds, peer)
        engine.dispose()
        measure_bystander(directory, rounds)
    with services.postgresql() as server:
        with services.maintenance(server) as connection:
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                connection.exec_driver_sql(f"ALTER SYSTEM RESET {setting}")
            connection.exec_driver_sql("SELECT pg_reload_conf()")
        with services.fresh_database(server) as url:
            peer = in_a_process_of_its_own(rounds, "--peer", url)
        with services.fresh_database(server) as url:
            engine = services.open_engine(url)
            measure("PostgreSQL", engine, rounds, peer)
            engine.dispose()


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    if "--peer" in sys.argv:
        run_peer(sys.argv[-1], rounds)
    elif "--bystander" in sys.argv:
        run_bystander(sys.argv[-1], rounds, installed=sys.argv[-2] == "with")
    else:
        main(rounds)
