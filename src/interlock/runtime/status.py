"""Errors on the wire: `InterlockError` to google.rpc.Status and back. The only place where either is known to the other.

The server's interceptor also catches everything else: grpc.aio would send the text of any exception to the client; here it is logged
under an error id, and the client gets the id only.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from interlock.errors import BY_KIND, DeadlineExceeded, InterlockError, Internal, Unavailable
from interlock.runtime import telemetry
from interlock.runtime.streams import yielding

DOMAIN = "interlock"
DETAILS_KEY = "grpc-status-details-bin"
_log = structlog.get_logger(__name__)
_CODES = {code.name: code for code in grpc.StatusCode}


def to_status(error: InterlockError) -> status_pb2.Status:
    """The error as google.rpc.Status with ErrorInfo, and BadRequest or RetryInfo where they apply."""
    status = status_pb2.Status(code=_CODES[error.kind].value[0], message=error.message)
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_seconds is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        details.append(info)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def from_status(status: status_pb2.Status) -> InterlockError:
    """The error that `to_status` was given, as far as the wire carries it."""
    kind = next((name for name, code in _CODES.items() if code.value[0] == status.code), "INTERNAL")
    cls = BY_KIND.get(kind, Internal)
    reason, field, retry, metadata = cls.default_reason, "", None, {}
    for detail in status.details:
        info, bad, again = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(again):
            retry = again.retry_delay.ToNanoseconds() / 1e9
    return cls(status.message, reason=reason, field=field, retry_after_seconds=retry, metadata=metadata)


def from_rpc_error(error: aio.AioRpcError | grpc.RpcError) -> InterlockError:
    """A client's gRPC error as our own class, by the details the server sent or else by the code."""
    trailing: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    for key, value in trailing or ():
        if key == DETAILS_KEY:
            return from_status(status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode()))
    code = error.code().name if hasattr(error, "code") else "INTERNAL"
    message = (error.details() if hasattr(error, "details") else "") or code
    return BY_KIND.get(code, Internal)(message)


def _as_interlock(error: Exception, method: str) -> InterlockError:
    if isinstance(error, InterlockError):
        return error
    if isinstance(error, aio.AioRpcError):  # a call to another room failed and nobody translated it
        return from_rpc_error(error)
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"{method} did not finish in time")
    error_id = uuid.uuid4().hex[:16]
    _log.error("unexpected_error", method=method, error_id=error_id, exc_info=error)
    return Internal(f"internal error {error_id}", metadata={"error_id": error_id})


def _trace_of(context: Any) -> str:
    """The trace that a refusal belongs to: the span's, the caller's, or a new one that nobody samples."""
    given = next((str(value) for name, value in context.invocation_metadata() or () if name == "traceparent"), "")
    known = telemetry.current_traceparent() or given
    return known if telemetry.trace_id_of(known) else telemetry.new_traceparent()


async def _abort(context: Any, error: InterlockError) -> NoReturn:
    status = to_status(error)
    trailing = ((DETAILS_KEY, status.SerializeToString()), ("traceparent", _trace_of(context)))
    await context.abort(_CODES[error.kind], error.message, trailing_metadata=trailing)
    raise AssertionError("abort returned")


Handler = Any


def _guarded_unary(behaviour: Callable[..., Any], method: str) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await behaviour(request, context)
        except (aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001  the supervised edge: nothing unknown may reach the client
            failure = _as_interlock(error, method)
        del request
        return await _abort(context, _bare(failure))

    return guarded


def _guarded_stream(behaviour: Callable[..., Any], method: str) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for message in behaviour(request, context):
                yield message
            return
        except (aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001  the supervised edge: nothing unknown may reach the client
            failure = _as_interlock(error, method)
        del request
        await _abort(context, _bare(failure))

    return guarded


def _bare(error: InterlockError) -> InterlockError:
    """Without the frames that it came through. gRPC keeps the exception of an aborted call, and with it what hangs on it, sometimes for ever
    (grpcio 1.85.1, seen in tests/component/test_cleanup_matrix.py): that must not be the request."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def wrap_handler(handler: Handler, unary: Callable[..., Any], stream: Callable[..., Any], method: str) -> Handler:
    """A handler of the same arity and codecs whose behaviour went through `unary` or `stream` (by its response's arity).

    `stream` gets and gives generators; a handler that writes by itself is made one.
    """
    codecs = {"request_deserializer": handler.request_deserializer, "response_serializer": handler.response_serializer}
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(unary(handler.unary_unary, method), **codecs)
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(stream(yielding(handler.unary_stream), method), **codecs)
    if handler.stream_unary:
        return grpc.stream_unary_rpc_method_handler(unary(handler.stream_unary, method), **codecs)
    return grpc.stream_stream_rpc_method_handler(stream(yielding(handler.stream_stream), method), **codecs)


def guarded(handler: Handler, method: str) -> Handler:
    """A handler whose every exception becomes a rich status; unknown ones INTERNAL with an error id."""
    return wrap_handler(handler, _guarded_unary, _guarded_stream, method)


async def translated(call: Awaitable[Any]) -> Any:
    """Awaits a client call and raises our own error classes instead of gRPC's."""
    try:
        return await call
    except aio.AioRpcError as error:
        raise from_rpc_error(error) from error


async def translated_stream(call: Any) -> AsyncIterator[Any]:
    """Iterates a client's response stream and raises our own error classes instead of gRPC's."""
    try:
        async for message in call:
            yield message
    except aio.AioRpcError as error:
        raise from_rpc_error(error) from error


RETRYABLE = (Unavailable,)
"""What an idempotent call may be tried again on; everything else would fail again or may have happened."""
