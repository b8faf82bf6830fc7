"""OpenTelemetry, where the application uses it: one trace from the commit through the worker to the append.

A batch carries the W3C `traceparent` of the transaction that made it. Nothing is imported unless the application has
imported OpenTelemetry itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .outbox import Frame

_NAME = "broadcastable"


def current_trace() -> str | None:
    """The `traceparent` (W3C Trace Context, 3.2) of the span that is current here, or None."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    context = _trace().get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


@contextmanager
def deliver_span(frame: Frame) -> Iterator[None]:
    """A span for all that one delivery does about *frame*.

    A child of the first traced transaction in it, linked to the others.
    """
    if "opentelemetry.trace" not in sys.modules:
        yield
        return
    trace = _trace()
    origins = [_remote_context(batch.trace) for batch in frame.batches if batch.trace is not None]
    parent = trace.set_span_in_context(trace.NonRecordingSpan(origins[0])) if origins else None
    with trace.get_tracer(_NAME).start_as_current_span(
        "broadcastable deliver",
        context=parent,
        kind=trace.SpanKind.CONSUMER,
        links=[trace.Link(origin) for origin in origins[1:]],
        attributes=_about(frame),
    ):
        yield


@contextmanager
def append_span(frame: Frame) -> Iterator[None]:
    """A span for one append of *frame*, within that of its delivery."""
    if "opentelemetry.trace" not in sys.modules:
        yield
        return
    trace = _trace()
    with trace.get_tracer(_NAME).start_as_current_span(
        "broadcastable append", kind=trace.SpanKind.PRODUCER, attributes=_about(frame)
    ):
        yield


def _about(frame: Frame) -> dict[str, str | int]:
    """By OpenTelemetry's semantic conventions for messaging."""
    return {
        "messaging.system": "durable-streams",
        "messaging.destination.name": frame.stream,
        "messaging.batch.message_count": len(frame.events),
    }


def _trace() -> Any:
    from opentelemetry import trace

    return trace


def _remote_context(traceparent: str) -> Any:
    trace = _trace()
    _, trace_id, span_id, flags = traceparent.split("-")
    return trace.SpanContext(
        trace_id=int(trace_id, 16),
        span_id=int(span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(int(flags, 16)),
    )
