"""`dramatiq broadcastable.worker`: a worker that delivers streams, ready from the environment.

For an application without Dramatiq workers of its own. It takes wake-ups from the Redis at `BROADCASTABLE_REDIS_URL`,
where the application puts them by itself when it has the same settings; see `Settings` for the others. Importing this
module sets Dramatiq's process-wide broker, which is what the `dramatiq` command asks for.

Raises:
    ConfigurationError: On import, when the environment does not describe a worker that could deliver anything.
"""

from __future__ import annotations

import gc

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from .actors import declare
from .errors import ConfigurationError
from .settings import Settings, current_settings

__all__ = ["broker", "broker_for"]


def broker_for(settings: Settings) -> RedisBroker:
    """The broker of a ready worker. Does not connect.

    Raises:
        ConfigurationError: No Redis for the wake-ups, or an outbox that only the application's own process can read.
    """
    if settings.redis_url is None:
        raise ConfigurationError(
            "A worker takes its wake-ups from Redis: set redis_url (BROADCASTABLE_REDIS_URL), such as redis://localhost"
        )
    if settings.outbox == "memory":
        raise ConfigurationError(
            'The outbox "memory" is delivered by the application\'s own process, so a worker has nothing to do. '
            'Set outbox (BROADCASTABLE_OUTBOX) to "redis" or "database", for the application too'
        )
    if settings.outbox == "database" and settings.database_url is None:
        raise ConfigurationError(
            "A worker reads the database outbox by a synchronous SQLAlchemy URL: set database_url "
            "(BROADCASTABLE_DATABASE_URL), such as postgresql+psycopg://user@host/app"
        )
    return RedisBroker(url=settings.redis_url)  # type: ignore[no-untyped-call]


class _Frozen(dramatiq.Middleware):
    """Leaves what was imported to no garbage collection: a full one would take 90 ms, and events wait for it."""

    def after_worker_boot(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        gc.collect()
        gc.freeze()


broker = broker_for(current_settings())
dramatiq.set_broker(broker)
declare(broker)
broker.add_middleware(_Frozen())
