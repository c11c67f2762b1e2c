"""Errors over HTTP: RFC 9457 problem+json with the same `reason` as over gRPC; the Open Inference Protocol's own body on its paths."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import orjson
import structlog

from interlock.errors import InterlockError, Internal

_log = structlog.get_logger(__name__)

HTTP_STATUS: Mapping[str, int] = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "FAILED_PRECONDITION": 412,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "DATA_LOSS": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
TOO_LARGE, TOO_SLOW = "BODY_TOO_LARGE", "SLOW_REQUEST"
_OWN_STATUS: Mapping[str, int] = {
    TOO_LARGE: 413,
    TOO_SLOW: 408,
    "IMAGE_TOO_LARGE": 413,
    "TOO_MANY_FILES": 413,
    "UNSUPPORTED_IMAGE": 415,
    "NO_IMAGES": 415,
    "INVALID_IMAGE": 422,
}
"""Reasons that HTTP has a status of its own for."""


def status_of(error: InterlockError) -> int:
    """The HTTP status of an error; a body over the limit is 413 rather than 429."""
    return _OWN_STATUS.get(error.reason) or HTTP_STATUS[error.kind]


def as_interlock(error: Exception, where: str) -> InterlockError:
    """Our own errors as they are; anything else is logged under an id, and the id is all that leaves."""
    if isinstance(error, InterlockError):
        return error
    error_id = uuid.uuid4().hex[:16]
    _log.error("unexpected_error", where=where, error_id=error_id, exc_info=error)
    return Internal(f"internal error {error_id}", metadata={"error_id": error_id})


def problem(error: InterlockError, request_id: str = "", trace_id: str = "") -> dict[str, Any]:
    """The body of an error response."""
    body: dict[str, Any] = {
        "type": f"https://interlock.dev/errors/{error.reason}",
        "title": error.kind.replace("_", " ").capitalize(),
        "status": status_of(error),
        "detail": error.message,
        "reason": error.reason,
    }
    optional = {
        "field": error.field,
        "metadata": error.metadata,
        "request_id": request_id,
        "trace_id": trace_id,
        "retry_after_seconds": error.retry_after_seconds,
    }
    return body | {name: value for name, value in optional.items() if value}


def response(
    error: InterlockError, *, open_inference: bool, request_id: str = "", trace_id: str = ""
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """(status, headers, body) of an error; `open_inference` adds the protocol's `error` field."""
    body = problem(error, request_id, trace_id)
    if open_inference:
        body = {"error": error.message, **body}
    headers = [(b"content-type", b"application/problem+json")]
    if error.retry_after_seconds is not None:
        headers.append((b"retry-after", str(max(1, round(error.retry_after_seconds))).encode()))
    if status_of(error) == 401:
        headers.append((b"www-authenticate", b'ApiKey realm="interlock"'))
    return status_of(error), headers, orjson.dumps(body)
