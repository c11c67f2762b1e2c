"""Traces: OpenTelemetry spans across rooms, exported over OTLP when an endpoint is set.

Without an endpoint the control plane still makes spans (a swap's story needs one trace id in logs and receipts) and nothing leaves
the process; the data plane makes none unless the caller sent a traceparent or an endpoint is set.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()
_provider: TracerProvider | None = None
_exporting = False
_getrandbits = random.Random().getrandbits  # noqa: S311  ids, not secrets


def exporting() -> bool:
    """True when spans leave the process; the data plane asks before it makes any."""
    return _exporting


@asynccontextmanager
async def telemetry(service: str, otlp_endpoint: str = "") -> AsyncIterator[None]:
    """Makes spans for `service` until the block ends, then flushes what is left (at most 2 s)."""
    global _provider, _exporting
    before = _provider, _exporting
    provider = _provider = TracerProvider(
        resource=Resource.create({"service.name": f"interlock-{service}"}), shutdown_on_exit=False
    )
    if otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=otlp_endpoint, insecure=not otlp_endpoint.startswith("https"), timeout=2)
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
        _exporting = True
    try:
        yield
    finally:
        _provider, _exporting = before
        provider.force_flush(2000)
        provider.shutdown()


@contextmanager
def span(
    name: str, *, parent: str = "", kind: SpanKind = SpanKind.INTERNAL, **attributes: str | float | bool
) -> Iterator[Span]:
    """A span named `name`, a child of the current one or of `parent` (a W3C traceparent) when that is given.

    An exception marks the span as an error and goes on.
    """
    context = _PROPAGATOR.extract({"traceparent": parent}) if parent else None
    tracer = _provider.get_tracer("interlock") if _provider else trace.get_tracer("interlock")
    with tracer.start_as_current_span(name, context=context, kind=kind, attributes=attributes) as current:
        yield current


def current_traceparent() -> str:
    """The current span as a W3C traceparent; empty when there is none. What is stored with a swap, so that it goes on after a crash."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent", "")


def new_traceparent() -> str:
    """A traceparent for a request that nobody samples: its ids are still worth having in answers and logs."""
    ids = f"{_getrandbits(192):048x}"
    return f"00-{ids[:32]}-{ids[32:]}-00"


def is_sampled(traceparent: str) -> bool:
    """True when the caller wants spans."""
    return traceparent[-2:] not in ("", "00")


def trace_id_of(traceparent: str) -> str:
    """The 32 hex digits of the trace in a traceparent; empty for an empty or malformed one."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) == 4 and len(parts[1]) == 32 else ""


@contextmanager
def continued(headers: Mapping[str, str]) -> Iterator[None]:
    """Makes the trace in `headers` (a caller's traceparent) the current one, without a span of its own."""
    token = otel_context.attach(_PROPAGATOR.extract(headers))
    try:
        yield
    finally:
        otel_context.detach(token)
