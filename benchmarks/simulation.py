"""A deployment of any size, simulated from the CPU times that `scale.py` measured on this machine.

    python benchmarks/simulation.py [--figures FILE] [--outbox redis] [--scale 1 10 100] [--seconds 5] [--json FILE]

Needs simpy (`pip install simpy`). First it simulates the two cores on which the figures were measured, beside what was
measured there: how far to trust the rest. Then, for each scale, it sizes every part for a load, lets commits arrive,
frames form and readers be served, and prints how busy each part is and when readers see a commit. Last come the bytes.

What the model has: a queue for the cores of each part, commits at random moments, streams of unequal popularity
(Zipf), one frame at a time for each stream, batches that share a frame when they wait for the same one, and an event
loop on each stream server that writes to one reader after the other. What it leaves out: networks, disks, locks on
rows, garbage collection. So latencies are those of the CPUs alone, and the loads are what the CPUs can bear.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import math
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import simpy

from broadcastable.names import shard_of

Row = dict[str, Any]

FIGURES = Path(__file__).parent / "figures.json"
PARTS = ("application", "database", "redis", "worker", "server")

BUSY = 0.6
"""The share of its cores that a part is sized for: beyond that, queues grow faster than loads."""

ZIPF = 0.9
"""How unequal streams are: the n-th has 1 / n**0.9 of the first one's commits, and of its readers."""


@dataclass(frozen=True)
class Demands:
    """Microseconds of CPU that each part needs."""

    commit: dict[str, float]
    """For one commit of one row, until the outbox has its batch."""
    frame: dict[str, float]
    """For the delivery of a frame of one event, with its share of wake-ups."""
    event: dict[str, float]
    """For each further event in a frame."""
    reader: float
    """On the stream server, for each reader of each event."""
    elsewhere: float = 0.0
    """Of a commit's way to its reader, what is not CPU. It is only known for the machine of the measurement."""

    @classmethod
    def measured(cls, figures: Row, outbox: str) -> Demands:
        found = next(row for row in figures["demands"]["rows"] if row["outbox"] == outbox)
        commit = {part: found["commit"].get(part, 0.0) for part in ("application", "database", "redis")}
        crowd = max(figures["readers"]["rows"], key=lambda row: row["readers"])
        return cls(
            commit={part: commit.get(part, 0.0) for part in PARTS},
            frame={part: max(0.0, found["delivered commit"][part] - commit.get(part, 0.0)) for part in PARTS},
            event={part: found["event"].get(part, 0.0) for part in PARTS},
            reader=crowd["cpu_us_per_reader_event"],
        )


@dataclass(frozen=True)
class Load:
    commits: float
    """A second."""
    streams: int
    readers: int


@dataclass
class Deployment:
    """How many cores a part has, and into how many shards they are divided; a shard has its own streams."""

    cores: dict[str, int]
    shards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 1))

    @classmethod
    def for_load(cls, load: Load, demands: Demands, popularity: Popularity) -> Deployment:
        """Enough of everything if each commit is a frame of its own. Under load they share frames, which is cheaper."""
        fan_out = popularity.mean_readers(load.readers)
        cores = {}
        for part in PARTS:
            each = demands.commit[part] + demands.frame[part] + (fan_out * demands.reader if part == "server" else 0.0)
            cores[part] = max(1, math.ceil(load.commits * each / 1e6 / BUSY))
        # A Redis and an embedded stream server are one thread each, so more cores are more of them.
        return cls(cores, {part: cores[part] if part in ("redis", "server") else 1 for part in PARTS})


class Popularity:
    """How commits and readers spread over streams."""

    def __init__(self, streams: int) -> None:
        weights = [1 / rank**ZIPF for rank in range(1, streams + 1)]
        self.total = sum(weights)
        self.shares = [weight / self.total for weight in weights]
        self._upto = list(itertools.accumulate(self.shares))

    def draw(self, chance: random.Random) -> int:
        return min(bisect.bisect(self._upto, chance.random()), len(self.shares) - 1)

    def mean_readers(self, readers: int) -> float:
        """Of an event, on average: popular streams have more of both."""
        return readers * sum(share * share for share in self.shares)


class Model:
    """One run. Times are seconds; a stream's batches wait in `_waiting` while a frame of it is under way."""

    def __init__(
        self, deployment: Deployment, demands: Demands, popularity: Popularity, readers: int, *, one_machine: int = 0
    ) -> None:
        """*one_machine*: all parts share that many cores, and those of *deployment* do not count."""
        self.environment = simpy.Environment()
        self._demands = demands
        self._popularity = popularity
        self._readers = readers
        self._shards = deployment.shards
        self._chance = random.Random(1)
        self._waiting: dict[int, list[float]] = {}
        machine = simpy.Resource(self.environment, one_machine) if one_machine else None
        self._cores = {
            part: [
                machine or simpy.Resource(self.environment, max(1, deployment.cores[part] // shards))
                for _ in range(shards)
            ]
            for part, shards in deployment.shards.items()
        }
        self.busy = {part: [0.0] * shards for part, shards in deployment.shards.items()}
        self.latencies: list[float] = []
        self.frames = 0
        self.events = 0

    def _work(self, part: str, stream: int, microseconds: float) -> Generator[Any, Any, None]:
        """Queue for a core of *part*, and hold it for a time that varies as work does (exponentially)."""
        if microseconds <= 0.0:
            return
        shard = _shard(stream, self._shards[part])
        with self._cores[part][shard].request() as core:
            yield core
            seconds = self._chance.expovariate(1e6 / microseconds)
            yield self.environment.timeout(seconds)
            self.busy[part][shard] += seconds

    def commit(self, stream: int) -> Generator[Any, Any, None]:
        began = self.environment.now
        for part in ("application", "database", "redis"):
            yield from self._work(part, stream, self._demands.commit[part])
        waiting = self._waiting.get(stream)
        if waiting is None:
            self._waiting[stream] = [began]
            self.environment.process(self._deliver(stream))
        else:
            waiting.append(began)

    def _deliver(self, stream: int) -> Generator[Any, Any, None]:
        readers = self._readers * self._popularity.shares[stream]
        while self._waiting[stream]:
            frame, self._waiting[stream] = self._waiting[stream], []
            self.frames += 1
            self.events += len(frame)
            for part in ("application", "database", "redis", "worker", "server"):
                more = self._demands.event[part] * (len(frame) - 1)
                yield from self._work(part, stream, self._demands.frame[part] + more)
            yield from self._work("server", stream, readers * self._demands.reader * len(frame))
            self.latencies += [self.environment.now - began + self._demands.elsewhere for began in frame]
        del self._waiting[stream]

    def arrivals(self, rate: float) -> Generator[Any, Any, None]:
        """Commits whether the earlier ones are done or not."""
        while True:
            yield self.environment.timeout(self._chance.expovariate(rate))
            self.environment.process(self.commit(self._popularity.draw(self._chance)))

    def client(self) -> Generator[Any, Any, None]:
        """One that commits again as soon as it has."""
        while True:
            yield from self.commit(self._popularity.draw(self._chance))

    def run(self, seconds: float) -> None:
        self.environment.run(until=seconds)


def _shard(stream: int, shards: int) -> int:
    return shard_of(f"gid://app/Room/{stream}/messages", shards) if shards > 1 else 0


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else math.nan


def header(title: str, *columns: str, first: str = "") -> None:
    print(f"\n{title}\n  {first:<22}" + "".join(f"{column:>13}" for column in columns))


def row(name: str, *cells: float | str) -> None:
    texts = (cell if isinstance(cell, str) else f"{cell:,.0f}" if cell >= 1000 else f"{cell:,.3g}" for cell in cells)
    print(f"  {name:<22}" + "".join(f"{text:>13}" for text in texts), flush=True)


# The machine of the measurement


def check(figures: Row, outbox: str, demands: Demands, seconds: float) -> list[Row]:
    """The loads of `scale.py demands`, on as many cores as it had."""
    found = next(each for each in figures["demands"]["rows"] if each["outbox"] == outbox)
    cores = figures["demands"]["machine"]["cores"]
    header(
        f"The machine that was measured, {cores} cores for everything, {outbox} outbox",
        "commits/s",
        "simulated",
        "p50 ms",
        "simulated",
        "p99 ms",
        "simulated",
        first="load",
    )
    popularity = Popularity(1_000)
    everything = Deployment(dict.fromkeys(PARTS, cores))
    rows = []
    for point in found["points"]:
        model = Model(everything, demands, popularity, 1, one_machine=cores)
        rate, _, kind = point["load"].partition("/")
        if kind:
            model.environment.process(model.arrivals(float(rate)))
        else:
            for _ in range(int(rate.split()[0])):
                model.environment.process(model.client())
        model.run(seconds)
        mine = len(model.latencies) / seconds
        p50, p99 = (percentile(model.latencies, share) * 1e3 for share in (0.5, 0.99))
        rows.append({"load": point["load"], "commits_per_second": mine, "p50_ms": p50, "p99_ms": p99})
        row(point["load"], point["commits_per_second"], mine, point["p50_ms"], p50, point["p99_ms"], p99)
    return rows


def calibrated(figures: Row, outbox: str, demands: Demands, seconds: float) -> Demands:
    """With the time that is no CPU time, such that the easiest load has its measured median."""
    found = next(each for each in figures["demands"]["rows"] if each["outbox"] == outbox)
    easiest = found["points"][0]
    cores = figures["demands"]["machine"]["cores"]
    model = Model(Deployment(dict.fromkeys(PARTS, cores)), demands, Popularity(1_000), 1, one_machine=cores)
    model.environment.process(model.arrivals(float(easiest["load"].partition("/")[0])))
    model.run(seconds)
    return replace(demands, elsewhere=max(0.0, easiest["p50_ms"] / 1e3 - percentile(model.latencies, 0.5)))


# Larger ones


def scales(demands: Demands, base: Load, factors: list[int], seconds: float) -> Iterator[Row]:
    for factor in factors:
        load = Load(base.commits * factor, base.streams * factor, base.readers * factor)
        popularity = Popularity(load.streams)
        deployment = Deployment.for_load(load, demands, popularity)
        model = Model(deployment, demands, popularity, load.readers)
        model.environment.process(model.arrivals(load.commits))
        model.run(seconds)
        cores_of_shard = {part: deployment.cores[part] // deployment.shards[part] for part in PARTS}
        busiest = {part: max(model.busy[part]) / seconds / cores_of_shard[part] for part in PARTS}
        yield {
            "factor": factor,
            "commits_per_second": load.commits,
            "streams": load.streams,
            "readers": load.readers,
            "mean_readers_per_event": popularity.mean_readers(load.readers),
            "cores": deployment.cores,
            "busiest": busiest,
            "events_per_frame": model.events / max(1, model.frames),
            "p50_ms": percentile(model.latencies, 0.5) * 1e3,
            "p99_ms": percentile(model.latencies, 0.99) * 1e3,
            "undelivered": sum(map(len, model._waiting.values())),
        }


def print_scales(rows: list[Row]) -> None:
    columns = (*PARTS, "p50 ms", "p99 ms", "events/frame")
    header("Cores of each part, and how busy its busiest shard is", *columns, first="load")
    for each in rows:
        cores = [each["cores"][part] for part in PARTS]
        name = f"{each['factor']}x: {each['commits_per_second']:,.0f}/s"
        row(name, *cores, each["p50_ms"], each["p99_ms"], each["events_per_frame"])
        row("", *(f"{each['busiest'][part]:.0%}" for part in PARTS))


def memory(figures: Row, outbox: str, loads: list[Row]) -> None:
    """What is kept where, by the measured slopes."""
    names = max(figures["streams"]["rows"], key=lambda each: each["streams"])
    held = max(figures["server"]["rows"], key=lambda each: each["streams"])
    waits = next(each for each in figures["outbox"]["rows"] if each["outbox"] == outbox)
    crowd = max(figures["readers"]["rows"], key=lambda each: each["readers"])
    header(
        "GiB",
        "Redis: names",
        "outbox: idle",
        "1 h unsent",
        "server: empty",
        "readers",
        first="load",
    )
    for each in loads:
        streams, readers, rate = each["streams"], each["readers"], each["commits_per_second"]
        row(
            f"{each['factor']}x: {streams:,} streams",
            *(
                size / 2**30
                for size in (
                    streams * names["redis_bytes_per_stream"],
                    streams * waits["bytes_per_idle_stream"],
                    rate * 3600 * waits["bytes_per_batch"],
                    streams * held["bytes_per_stream"],
                    readers * crowd["kib_per_reader"] * 1024,
                )
            ),
        )


def shares(most: int = 100_000) -> None:
    """How evenly the hash of `server_url` divides streams, and what a further server takes over."""
    columns = ("most/mean", "least/mean", "moved by +1")
    header(f"Several stream servers, by the hash of {most:,} names", *columns, first="servers")
    names = [f"gid://app/Room/{number}/messages" for number in range(most)]
    for servers in (2, 4, 16):
        counts = [0] * servers
        moved = 0
        for name in names:
            home = shard_of(name, servers)
            counts[home] += 1
            moved += shard_of(name, servers + 1) != home
        mean = most / servers
        row(str(servers), max(counts) / mean, min(counts) / mean, f"{moved / most:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--figures", type=Path, default=FIGURES, help="what scale.py --json wrote")
    parser.add_argument("--outbox", choices=("redis", "database"), default="redis")
    parser.add_argument("--scale", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--commits", type=float, default=100.0, help="a second, at scale 1")
    parser.add_argument("--streams", type=int, default=10_000, help="at scale 1")
    parser.add_argument("--readers", type=int, default=1_000, help="at scale 1")
    parser.add_argument("--seconds", type=float, default=5.0, help="of simulated time")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    figures = json.loads(options.figures.read_text())
    print(", ".join(f"{name} {value}" for name, value in figures["demands"]["machine"].items()))
    demands = Demands.measured(figures, options.outbox)
    here = calibrated(figures, options.outbox, demands, 10 * options.seconds)
    checked = check(figures, options.outbox, here, 4 * options.seconds)
    base = Load(options.commits, options.streams, options.readers)
    simulated = list(scales(demands, base, options.scale, options.seconds))
    print_scales(simulated)
    memory(figures, options.outbox, simulated)
    shares()
    if options.json:
        options.json.write_text(json.dumps({"check": checked, "scales": simulated}, indent=1) + "\n")


if __name__ == "__main__":
    main()
