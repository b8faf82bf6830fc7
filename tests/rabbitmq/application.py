"""`dramatiq tests.rabbitmq.application`: an application's own RabbitmqBroker, as its web processes have it too."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

import broadcastable.actors

broker = RabbitmqBroker(url=os.environ["TEST_RABBITMQ_URL"])
dramatiq.set_broker(broker)
broadcastable.actors.declare(broker)
