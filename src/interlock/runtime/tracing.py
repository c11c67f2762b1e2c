"""The server's side of a trace: a span per call on the control plane, and the caller's ids in every log line."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import structlog
from opentelemetry.trace import SpanKind

from interlock.runtime import telemetry
from interlock.runtime.status import wrap_handler

REQUEST_ID_HEADER = "x-request-id"
HOT = ("ModelInfer", "ModelStreamInfer")
"""Methods of the data plane: no span and no log context unless the caller's trace is sampled or spans are exported."""
QUIET = ("/grpc.",)
"""Services that are polled: no span at all."""


def traced(handler: Any, details: grpc.HandlerCallDetails) -> Any:
    """A handler that continues the caller's trace and binds request id and method for logs; the same one for a call that leaves no trace."""
    method: str = details.method
    if method.startswith(QUIET):
        return handler
    if method.endswith(HOT) and not telemetry.exporting() and not telemetry.is_sampled(caller_traceparent(details)):
        return handler
    headers = {name: value for name, value in details.invocation_metadata or () if isinstance(value, str)}
    return wrap_handler(handler, _traced_unary(headers), _traced_stream(headers), method)


def caller_traceparent(call: Any) -> str:
    """The traceparent that came with a call (its context, or the details that an interceptor sees); empty when none did."""
    metadata = call.invocation_metadata
    for name, value in (metadata() if callable(metadata) else metadata) or ():
        if name == "traceparent":
            return str(value)
    return ""


def _bind(headers: dict[str, str], method: str) -> dict[str, str]:
    return {"request_id": headers.get(REQUEST_ID_HEADER) or uuid.uuid4().hex[:16], "method": method}


def _traced_unary(headers: dict[str, str]) -> Callable[..., Any]:
    def wrap(behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
        async def traced(request: Any, context: Any) -> Any:
            with (
                structlog.contextvars.bound_contextvars(**_bind(headers, method)),
                telemetry.span(
                    method.lstrip("/"),
                    parent=headers.get("traceparent", ""),
                    kind=SpanKind.SERVER,
                    **{"rpc.system": "grpc"},
                ),
            ):
                try:
                    return await behaviour(request, context)
                except grpc.aio.AbortError as aborted:
                    del request  # gRPC keeps the exception, see `status`
                    raise aborted.with_traceback(None) from None

        return traced

    return wrap


def _traced_stream(headers: dict[str, str]) -> Callable[..., Any]:
    # A span around a generator would be attached in one context and detached in another: streams keep the caller's ids for logs only.
    def wrap(behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
        async def traced(request: Any, context: Any) -> AsyncIterator[Any]:
            structlog.contextvars.bind_contextvars(**_bind(headers, method))
            async for message in behaviour(request, context):
                yield message

        return traced

    return wrap
