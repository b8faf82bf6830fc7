from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker

from tests.actors.commands import Command
from tests.actors.served import Served


@pytest.fixture
def make_served() -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def make(**options: object) -> Served:
        made.append(Served(**options))
        return made[-1]

    yield make
    for served in made:
        served.wakeups.close()


@pytest.fixture
def stub_broker() -> Iterator[StubBroker]:
    broker = StubBroker()
    yield broker
    broker.close()


@pytest.fixture
def start_worker() -> Iterator[Callable[..., dramatiq.Worker]]:
    """Starts Dramatiq workers in this process, and stops them at the end."""
    workers: list[dramatiq.Worker] = []

    def start(broker: dramatiq.Broker, **options: object) -> dramatiq.Worker:
        worker = dramatiq.Worker(broker, **{"worker_timeout": 50, "worker_threads": 4, **options})
        workers.append(worker)
        worker.start()
        return worker

    yield start
    for worker in workers:
        worker.stop(timeout=5_000)


@pytest.fixture(autouse=True)
def _no_declared_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broadcastable.actors._declared", None)


@pytest.fixture
def run_dramatiq(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def run(environment: dict[str, str], *arguments: str) -> Command:
        commands.append(Command(tmp_path / f"worker-{len(commands)}.log", environment, *arguments))
        return commands[-1]

    yield run
    for command in commands:
        command.kill()
