"""Metrics and traces: what an operator sees of a delivery."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest

from broadcastable import metrics
from broadcastable.client import StreamClient
from broadcastable.counters import counters
from broadcastable.events import Batch
from broadcastable.outbox.memory import MemoryOutbox
from broadcastable.provisioner import StreamProvisioner
from broadcastable.relay import Relay
from broadcastable.settings import Settings
from broadcastable.tokens import Gatekeeper
from tests.core.origin import Origin, answer


@pytest.fixture
def outbox() -> MemoryOutbox:
    return MemoryOutbox(max_bytes=1 << 24, max_frame_bytes=1 << 16, max_frame_events=100)


@pytest.fixture
def relay(outbox: MemoryOutbox, origin: Origin, settings: Settings) -> Iterator[Relay]:
    client = StreamClient(settings, Gatekeeper(settings), transport=origin.transport())
    yield Relay(outbox, client, StreamProvisioner(settings), settings)
    client.close()


@pytest.fixture
def registry() -> Iterator[CollectorRegistry]:
    registry = CollectorRegistry()
    listeners = len(counters.on_count), len(counters.on_duration)
    metrics.install(registry)
    metrics.install(registry)
    yield registry
    del counters.on_count[listeners[0] :], counters.on_duration[listeners[1] :]


def test_deliveries_are_counted_and_timed(
    relay: Relay, outbox: MemoryOutbox, origin: Origin, registry: CollectorRegistry
) -> None:
    before = registry.get_sample_value("broadcastable_events_delivered_total")
    outbox.put([Batch(stream="rooms/1", events=(b"{}", b"{}"), txid="a")])
    relay.deliver("rooms/1")
    assert before is not None
    assert registry.get_sample_value("broadcastable_events_delivered_total") == before + 2
    assert registry.get_sample_value("broadcastable_commit_to_append_seconds_count") == 1


def test_what_waits_is_read_at_every_scrape(
    relay: Relay, outbox: MemoryOutbox, origin: Origin, registry: CollectorRegistry
) -> None:
    metrics.watch(outbox, registry)
    origin.faults.append(answer(400))
    outbox.put([Batch(stream="rooms/1", events=(b"{}",), txid="a")])
    outbox.put([Batch(stream="rooms/2", events=(b"{}", b"{}"), txid="a")])
    relay.deliver("rooms/1")
    assert registry.get_sample_value("broadcastable_parked_streams") == 1
    assert registry.get_sample_value("broadcastable_pending_events") == 3
    relay.deliver("rooms/2")
    assert registry.get_sample_value("broadcastable_pending_events") == 1
    assert b"broadcastable_oldest_pending_seconds" in generate_latest(registry)


def test_a_trace_goes_from_the_transaction_through_the_worker_to_the_append(
    relay: Relay, outbox: MemoryOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    tracer = provider.get_tracer("app")
    for name in ("first", "second"):
        with tracer.start_as_current_span(name):
            outbox.put([Batch(stream="rooms/1", events=(b"{}",), txid=name)])
    relay.deliver("rooms/1")
    first, second, append, deliver = exporter.get_finished_spans()
    assert (deliver.name, append.name) == ("broadcastable deliver", "broadcastable append")
    assert deliver.parent is not None
    assert deliver.parent.span_id == first.context.span_id
    assert [link.context.span_id for link in deliver.links] == [second.context.span_id]
    assert append.parent is not None
    assert append.parent.span_id == deliver.context.span_id
    for span in (deliver, append):
        assert span.attributes is not None
        assert span.attributes["messaging.destination.name"] == "rooms/1"
    provider.shutdown()


def test_whatever_is_counted_is_exported_and_the_other_way_round() -> None:
    """A count that nobody exports is seen by nobody; an exported one that nothing counts stays at zero."""
    package = Path(metrics.__file__).parent
    counted = {
        name
        for module in package.rglob("*.py")
        for name in re.findall(r'increment\(\s*"([a-z_]+)"', module.read_text())
    }
    assert counted == set(metrics.COUNTS)
