from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from tests.actors.conftest import make_served, run_dramatiq, start_worker
from tests.rabbitmq.server import RabbitMQ

__all__ = ["make_served", "run_dramatiq", "start_worker"]


@pytest.fixture(scope="session")
def _rabbitmq_server() -> Iterator[RabbitMQ]:
    server = RabbitMQ().start()
    yield server
    server.close()


@pytest.fixture
def rabbitmq(_rabbitmq_server: RabbitMQ) -> Iterator[RabbitMQ]:
    """A RabbitMQ, running; it may be killed. The queues of other tests are in it too, under other namespaces."""
    yield _rabbitmq_server
    _rabbitmq_server.resume()
    if not _rabbitmq_server.is_running:
        _rabbitmq_server.start()


@pytest.fixture
def make_broker(rabbitmq: RabbitMQ) -> Iterator[Callable[[], RabbitmqBroker]]:
    brokers: list[RabbitmqBroker] = []

    def make() -> RabbitmqBroker:
        brokers.append(RabbitmqBroker(url=rabbitmq.url))
        return brokers[-1]

    yield make
    for broker in brokers:
        broker.close()
