"""What every request over HTTP goes through: limits, request ids, traces and metrics. Predictions go one way, the rest to `web`.

Two callers: `http.Protocol` hands over a prediction whole (`begin`), uvicorn everything else as ASGI (`__call__`), which answers predictions too.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from opentelemetry.trace import SpanKind

from interlock.errors import DeadlineExceeded, InterlockError, PermissionDenied, ResourceExhausted
from interlock.runtime import telemetry
from interlock.runtime.access import Keys, Scope, require
from interlock.runtime.infer import Buffer
from interlock.runtime.settings import is_loopback
from interlock_gateway import metrics, problems
from interlock_gateway.predict import BATCH, INFER_TEMPLATE, Answer, Predictor, infer_route, is_prediction

Scope_ = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope_, Receive, Send], Awaitable[None]]
Headers = Mapping[bytes, bytes]

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Reply:
    """One whole answer: `body`, then `tensors` as they lie."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    tensors: Sequence[Buffer] = ()

    @property
    def num_bytes(self) -> int:
        """Of the whole body."""
        return len(self.body) + sum(map(len, self.tensors)) if self.tensors else len(self.body)


class _Sent:
    """What one ASGI request sent, for metrics and the log."""

    __slots__ = ("bytes_sent", "request_bytes", "started", "status")

    def __init__(self) -> None:
        self.started = False
        self.status = 500
        self.bytes_sent = 0
        self.request_bytes = 0


@dataclass(slots=True)
class _Ids:
    """What names a request in answers and logs."""

    request_id: str
    traceparent: str

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self.request_id.encode("latin-1")), (b"traceparent", self.traceparent.encode())]


def _ids(headers: Headers) -> _Ids:
    caller, traceparent = headers.get(b"traceparent"), ""
    if caller is not None and telemetry.trace_id_of(text := caller.decode("latin-1")):
        traceparent = text
    traceparent = traceparent or telemetry.new_traceparent()
    given = headers.get(b"x-request-id")
    return _Ids(given.decode("latin-1")[:128] if given else traceparent[36:52], traceparent)


class Gateway:
    """Counts, limits and dispatches.

    Args:
        web: everything that is not a prediction.
        max_body_bytes: largest request body; `max_batch_bytes` that of `/batch`.
        receive_seconds: the longest that a request may take to come in.
        host: the address listened on; on loopback only local names are answered, so that a page in a browser cannot reach it by rebinding.
    """

    def __init__(
        self,
        predictor: Predictor,
        web: Asgi,
        keys: Keys,
        *,
        max_body_bytes: int,
        max_batch_bytes: int = 64 << 20,
        receive_seconds: float = 30.0,
        host: str = "127.0.0.1",
    ) -> None:
        self.max_body_bytes = max_body_bytes
        self.receive_seconds = receive_seconds
        self._max_batch_bytes = max_batch_bytes
        self._predictor = predictor
        self._web = web
        self._keys = keys
        self._local_only = is_loopback(host)
        self._local_host = b"localhost"

    # --- a prediction, whole ---

    def is_short(self, path: str, headers: Headers) -> bool:
        """True for a prediction that nobody traces: it needs no span, and may go without a task."""
        if infer_route(path) is None or telemetry.exporting():
            return False
        return b"traceparent" not in headers or not telemetry.is_sampled(headers[b"traceparent"].decode("latin-1"))

    def begin(self, path: str, headers: Headers, body: Buffer) -> Reply | Coroutine[Any, Any, Reply]:
        """Answers a prediction at once if that can be, else returns what to await, which must be started. Errors are replies too."""
        start, ids = time.perf_counter(), _ids(headers)
        try:
            self._check_host(headers)
            self._check_key(headers, path)
            begun = self._predictor.begin(path, headers, body, ids.traceparent)
        except Exception as error:  # noqa: BLE001  the supervised edge: the client gets a problem, never internals
            return self._counted(path, start, len(body), self._problem(error, path, ids))
        if isinstance(begun, Answer):
            return self._counted(path, start, len(body), _reply(begun, ids))
        return self._later(path, start, len(body), ids, begun)

    async def _later(
        self, path: str, start: float, num_bytes: int, ids: _Ids, begun: Coroutine[Any, Any, Answer]
    ) -> Reply:
        try:
            reply = _reply(await begun, ids)
        except Exception as error:  # noqa: BLE001  as in `begin`
            reply = self._problem(error, path, ids)
        return self._counted(path, start, num_bytes, reply)

    def refused_unread(self, path: str, headers: Headers) -> Reply | None:
        """The refusal of a prediction whose headers already say that it is too large; None for one to be read."""
        length = headers.get(b"content-length", b"0")
        return self.too_large(path) if len(length) > 12 or int(length) > self.max_body_bytes else None

    def too_large(self, path: str) -> Reply:
        """The refusal of a body over the limit."""
        reply = self._problem(_too_large(self.max_body_bytes), path, _ids({}))
        return self._counted(path, time.perf_counter(), 0, reply)

    def too_slow(self, path: str) -> Reply:
        """The refusal of a request that does not come in."""
        error = DeadlineExceeded(
            f"the request was not there in whole after {self.receive_seconds:g} s (gateway.receive_timeout_seconds)",
            reason=problems.TOO_SLOW,
        )
        return self._counted(path, time.perf_counter() - self.receive_seconds, 0, self._problem(error, path, _ids({})))

    def _counted(self, path: str, start: float, num_bytes: int, reply: Reply) -> Reply:
        endpoint = INFER_TEMPLATE if infer_route(path) else "unknown"
        metrics.observe(endpoint, "POST", reply.status, time.perf_counter() - start, num_bytes, reply.num_bytes)
        return reply

    def _problem(self, error: Exception, path: str, ids: _Ids) -> Reply:
        known = problems.as_interlock(error, path)
        status, headers, body = problems.response(
            known,
            open_inference=path.startswith("/v2/"),
            request_id=ids.request_id,
            trace_id=telemetry.trace_id_of(ids.traceparent),
        )
        if status >= 500:
            _log.warning(
                "request_failed", request_id=ids.request_id, path=path[:200], status=status, reason=known.reason,
                trace_id=telemetry.trace_id_of(ids.traceparent),
            )  # fmt: skip
        return Reply(status, headers + ids.headers(), body)

    # --- anything, as ASGI ---

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        """One request; websockets and lifespan are not spoken."""
        if scope["type"] != "http":
            return
        start, sent = time.perf_counter(), _Sent()
        headers = dict(scope["headers"])
        ids = _ids(headers)
        try:
            await self._answer(
                scope, headers, ids, self._limited(receive, sent, scope["path"]), _noted(send, sent, ids)
            )
        finally:
            endpoint = str(scope.get("endpoint_template") or getattr(scope.get("route"), "path", "unknown"))
            verb = scope["method"] if scope["method"] in METHODS else "OTHER"
            seconds = time.perf_counter() - start
            metrics.observe(endpoint, verb, sent.status, seconds, sent.request_bytes, sent.bytes_sent)

    async def _answer(self, scope: Scope_, headers: Headers, ids: _Ids, receive: Receive, send: Send) -> None:
        path = scope["path"]
        try:
            self._check_host(headers)
            self._check_size(int(headers.get(b"content-length", b"0")), path)
            if is_prediction(scope["method"], path):
                scope["endpoint_template"] = INFER_TEMPLATE if infer_route(path) else path
                await self._predict(scope, headers, ids, receive, send)
            else:
                with structlog.contextvars.bound_contextvars(request_id=ids.request_id), _span(scope, headers, ids):
                    await self._web(scope, receive, send)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  the supervised edge: the client gets a problem, never internals
            reply = self._problem(error, path, ids)
            await _send_whole(send, reply.status, reply.headers[: -len(ids.headers())], reply.body)

    async def _predict(self, scope: Scope_, headers: Headers, ids: _Ids, receive: Receive, send: Send) -> None:
        path = scope["path"]
        self._check_key(headers, path)
        body = await _read(receive)
        traced = telemetry.exporting() or telemetry.is_sampled(ids.traceparent)
        with _span(scope, headers, ids) if traced else _NO_SPAN:
            begun = self._predictor.begin(path, headers, body, ids.traceparent)
            answer = begun if isinstance(begun, Answer) else await begun
        await _send_whole(send, 200, answer.headers, b"".join((answer.body, *answer.tensors)))

    # --- limits ---

    def _check_key(self, headers: Headers, path: str) -> None:
        if self._keys.required:
            key = headers.get(b"x-api-key", b"").decode("latin-1")
            require(self._keys.principal(key), Scope.INFER, f"POST {path}")

    def _check_host(self, headers: Headers) -> None:
        if not self._local_only:
            return
        given = headers.get(b"host", b"localhost")
        if given == self._local_host:
            return
        host = given.decode("latin-1")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if not is_loopback(name):
            raise PermissionDenied(
                f"host: {host[:80]!r} is not a local name, and this gateway serves this machine only",
                reason="HOST_REFUSED",
                field="host",
            )
        self._local_host = given  # the next request most likely says the same

    def _limited(self, receive: Receive, sent: _Sent, path: str) -> Receive:
        async def limited() -> MutableMapping[str, Any]:
            message = await receive()
            sent.request_bytes += len(message.get("body", b""))
            self._check_size(sent.request_bytes, path)
            return message

        return limited

    def _check_size(self, num_bytes: int, path: str) -> None:
        if path == BATCH and num_bytes > self._max_batch_bytes:
            raise _too_large(self._max_batch_bytes, "gateway.max_batch_mb")
        if path != BATCH and num_bytes > self.max_body_bytes:
            raise _too_large(self.max_body_bytes)


def _too_large(max_bytes: int, setting: str = "gateway.max_body_mb") -> InterlockError:
    limit = str(max_bytes >> 20)
    message = f"body: more than {limit} MiB ({setting})"
    return ResourceExhausted(message, reason=problems.TOO_LARGE, field="body", metadata={"limit_mib": limit})


def _reply(answer: Answer, ids: _Ids) -> Reply:
    return Reply(200, answer.headers + ids.headers(), answer.body, answer.tensors)


def _noted(send: Send, sent: _Sent, ids: _Ids) -> Send:
    async def noted(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            if sent.started:
                return  # an error after the first byte: the status is out already, the connection just ends
            sent.started, sent.status = True, message["status"]
            message["headers"] = [*message["headers"], *ids.headers()]
        else:
            sent.bytes_sent += len(message.get("body", b""))
        await send(message)

    return noted


_NO_SPAN = contextlib.nullcontext()


@contextlib.contextmanager
def _span(scope: Scope_, headers: Headers, ids: _Ids) -> Any:
    """A span around a request; its ids become the request's."""
    parent = headers.get(b"traceparent", b"").decode("latin-1")
    name = f"{scope['method']} {scope.get('endpoint_template') or 'http'}"
    with telemetry.span(name, parent=parent, kind=SpanKind.SERVER) as span:
        ids.traceparent = telemetry.current_traceparent() or ids.traceparent
        yield span


async def _read(receive: Receive) -> bytes:
    """The whole body; its size is bounded by `_limited`."""
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        return bytes(message.get("body", b""))
    parts = [message.get("body", b"")]
    while message.get("more_body"):
        message = await receive()
        parts.append(message.get("body", b""))
    if message["type"] == "http.disconnect":
        raise asyncio.CancelledError
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
