"""Prometheus metrics, where `prometheus_client` is installed: counts, the time from commit to append, what waits.

`install()` is called by itself once `prometheus_client` has been imported and something is relayed; Dramatiq's own
Prometheus middleware then exports these beside its own. `watch()` adds what waits in an outbox, read at every scrape.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .counters import counters
from .errors import MissingExtraError
from .outbox import Outbox

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import GaugeMetricFamily

COUNTS = {
    "events_committed": "Events of committed transactions, on their way to the outbox",
    "events_delivered": "Events that the stream server has",
    "frames_delivered": "Appends that succeeded",
    "frames_parked": "Frames that the stream server will never take; each blocks its stream until an operator decides",
    "deliveries_delayed": "Deliveries left for later because the stream server was away",
    "looks": "Reads of a stream to find out whether a frame is there; each follows some trouble",
    "epochs_renewed": "Producer epochs raised because server and outbox disagreed",
    "streams_healed": "Streams that were gone from the server and were provisioned anew",
    "batches_dropped": "Batches lost because a bounded buffer was full",
    "batches_refused": "Batches not sent because their session was joined into an outer transaction",
    "events_failed": "Changes that could not be made into events",
    "events_dropped_with_transaction": "Deferred events gone with their transaction: rolled back, or never committed",
    "transactions_lost": "Committed transactions whose events could not be handed over",
    "bulk_statements_uncaptured": "Statements past the unit of work on models that only warn of them",
}
DURATIONS = {"commit_to_append": "From the end of a transaction to its events being on the stream server"}
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_installed: set[int] = set()
_lock = threading.Lock()


def install(registry: CollectorRegistry | None = None) -> None:
    """Count into `broadcastable_<name>_total` and `broadcastable_<name>_seconds` of *registry*. Once for each registry.

    Args:
        registry: `prometheus_client.REGISTRY` when None.

    Raises:
        MissingExtraError: `prometheus_client` is not installed.
    """
    prometheus = _prometheus()
    registry = registry if registry is not None else prometheus.REGISTRY
    with _lock:
        if id(registry) in _installed:
            return
        _installed.add(id(registry))
    counts = {
        name: prometheus.Counter(f"broadcastable_{name}", text, registry=registry) for name, text in COUNTS.items()
    }
    durations = {
        name: prometheus.Histogram(f"broadcastable_{name}_seconds", text, buckets=_BUCKETS, registry=registry)
        for name, text in DURATIONS.items()
    }
    for name, so_far in counters.snapshot().items():
        if name in counts:
            counts[name].inc(so_far)

    def count(name: str, by: int) -> None:
        if name in counts:
            counts[name].inc(by)

    def observe(name: str, seconds: float) -> None:
        if name in durations:
            durations[name].observe(seconds)

    counters.on_count.append(count)
    counters.on_duration.append(observe)


class PendingCollector:
    """What waits in an outbox, as gauges, read at every scrape: a few queries, so scrape it in one process only."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing: `collect` alone says, and registering does no I/O."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges now."""
        from prometheus_client.core import GaugeMetricFamily

        pending = self._outbox.pending()
        now = time.time_ns() // 1_000_000
        oldest = min((each.oldest_at for each in pending if each.oldest_at is not None), default=now)
        for name, text, value in (
            ("pending_streams", "Streams with undelivered batches", len(pending)),
            ("pending_batches", "Undelivered batches", sum(each.batches for each in pending)),
            ("pending_events", "Undelivered events", sum(each.events for each in pending)),
            ("parked_streams", "Streams set aside with an error", sum(each.parked is not None for each in pending)),
            (
                "oldest_pending_seconds",
                "Age of the oldest batch",
                max(0, now - oldest) / 1000,
            ),
        ):
            yield GaugeMetricFamily(f"broadcastable_{name}", text, value=value)


def watch(outbox: Outbox, registry: CollectorRegistry | None = None) -> PendingCollector:
    """Add what waits in *outbox* to *registry*; unregister the returned collector to stop."""
    collector = PendingCollector(outbox)
    (registry if registry is not None else _prometheus().REGISTRY).register(collector)
    return collector


def _prometheus() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise MissingExtraError("Metrics", "metrics") from error
    return prometheus_client
