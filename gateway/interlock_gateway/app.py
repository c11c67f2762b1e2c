"""The outermost ASGI application: limits, request ids, traces and metrics for every request; predictions go one way, the rest to `web`."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import structlog
from opentelemetry.trace import SpanKind

from interlock.errors import PermissionDenied, ResourceExhausted
from interlock.runtime import telemetry
from interlock.runtime.access import Keys, Scope, require
from interlock.runtime.settings import is_loopback
from interlock_gateway import metrics, problems
from interlock_gateway.predict import Predictor, is_prediction

Scope_ = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope_, Receive, Send], Awaitable[None]]

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_log = structlog.get_logger(__name__)


class _Reply:
    """What one request sent, for metrics and the log."""

    __slots__ = ("bytes_sent", "request_bytes", "started", "status")

    def __init__(self) -> None:
        self.started = False
        self.status = 500
        self.bytes_sent = 0
        self.request_bytes = 0


class Gateway:
    """Counts, limits and dispatches.

    Args:
        web: everything that is not a prediction.
        max_body_bytes: largest request body.
        host: the address listened on; on loopback only local names are answered, so that a page in a browser cannot reach it by rebinding.
    """

    def __init__(
        self, predictor: Predictor, web: Asgi, keys: Keys, *, max_body_bytes: int, host: str = "127.0.0.1"
    ) -> None:
        self._predictor = predictor
        self._web = web
        self._keys = keys
        self._max_body = max_body_bytes
        self._local_only = is_loopback(host)

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        """One request; websockets and lifespan are not spoken."""
        if scope["type"] != "http":
            return
        start, reply = time.perf_counter(), _Reply()
        method, path = scope["method"], scope["path"]
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:128] or uuid.uuid4().hex[:16]
        try:
            await self._answer(
                scope, headers, request_id, self._limited(receive, reply), self._counted(send, reply, request_id)
            )
        finally:
            endpoint = str(scope.get("endpoint_template") or getattr(scope.get("route"), "path", "unknown"))
            verb = method if method in METHODS else "OTHER"
            metrics.observe(
                endpoint, verb, reply.status, time.perf_counter() - start, reply.request_bytes, reply.bytes_sent
            )
            if reply.status >= 500:
                _log.warning(
                    "request_failed", request_id=request_id, method=method, path=path[:200], status=reply.status
                )

    async def _answer(
        self, scope: Scope_, headers: dict[bytes, bytes], request_id: str, receive: Receive, send: Send
    ) -> None:
        path = scope["path"]
        try:
            self._check_host(headers)
            self._check_size(int(headers.get(b"content-length", b"0")))
            if is_prediction(scope["method"], path):
                scope["endpoint_template"] = "/predict" if path == "/predict" else "/v2/models/{model}/infer"
                await self._predict(scope, headers, receive, send)
            else:
                with structlog.contextvars.bound_contextvars(request_id=request_id), _span(scope, headers):
                    await self._web(scope, receive, send)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  the supervised edge: the client gets a problem, never internals
            known = problems.as_interlock(error, path)
            status, reply_headers, body = problems.response(
                known, open_inference=path.startswith("/v2/"), request_id=request_id
            )
            await _send_whole(send, status, reply_headers, body)

    async def _predict(self, scope: Scope_, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        path = scope["path"]
        if self._keys.required:
            key = headers.get(b"x-api-key", b"").decode("latin-1")
            require(self._keys.principal(key), Scope.INFER, f"POST {path}")
        body = await _read(receive)
        traced = telemetry.exporting() or b"traceparent" in headers
        with _span(scope, headers) if traced else _NO_SPAN:
            if path == "/predict":
                content, reply_headers = await self._predictor.predict(headers, body)
            else:
                content, reply_headers = await self._predictor.infer(path, headers, body)
        await _send_whole(send, 200, reply_headers, content)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        if not self._local_only:
            return
        host = headers.get(b"host", b"localhost").decode("latin-1")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if not is_loopback(name):
            raise PermissionDenied(
                f"host: {host[:80]!r} is not a local name, and this gateway serves this machine only",
                reason="HOST_REFUSED",
                field="host",
            )

    def _limited(self, receive: Receive, reply: _Reply) -> Receive:
        async def limited() -> MutableMapping[str, Any]:
            message = await receive()
            reply.request_bytes += len(message.get("body", b""))
            self._check_size(reply.request_bytes)
            return message

        return limited

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_body:
            limit = str(self._max_body >> 20)
            message = f"body: more than {limit} MiB (gateway.max_body_mb)"
            raise ResourceExhausted(message, reason=problems.TOO_LARGE, field="body", metadata={"limit_mib": limit})

    def _counted(self, send: Send, reply: _Reply, request_id: str) -> Send:
        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                if reply.started:
                    return  # an error after the first byte: the status is out already, the connection just ends
                reply.started, reply.status = True, message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode("latin-1"))]
            else:
                reply.bytes_sent += len(message.get("body", b""))
            await send(message)

        return counted


_NO_SPAN = contextlib.nullcontext()


def _span(scope: Scope_, headers: dict[bytes, bytes]) -> Any:
    parent = headers.get(b"traceparent", b"").decode("latin-1")
    return telemetry.span(
        f"{scope['method']} {scope.get('endpoint_template') or 'http'}", parent=parent, kind=SpanKind.SERVER
    )


async def _read(receive: Receive) -> bytes:
    """The whole body; its size is bounded by `_limited`."""
    message = await receive()
    if not message.get("more_body"):
        return bytes(message.get("body", b""))
    parts = [message.get("body", b"")]
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        parts.append(message.get("body", b""))
    return b"".join(parts)


async def _send_whole(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [*headers, (b"content-length", str(len(body)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": body})
