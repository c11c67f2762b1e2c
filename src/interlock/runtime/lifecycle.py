"""Life and death of a room's process.

The order of shutdown is: NOT_SERVING -> wait a probe interval -> stop accepting, finish what is in flight -> stop loops -> flush
telemetry -> close stores. Watches are ended by us: an open stream would otherwise hold the server for its whole grace.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import structlog
import uvloop
from google.protobuf import descriptor_pool
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from interlock.errors import DataLoss, FailedPrecondition
from interlock.runtime.access import Access, Keys, refusing
from interlock.runtime.status import guarded, wrap_handler
from interlock.runtime.streams import until
from interlock.runtime.tracing import traced

_log = structlog.get_logger(__name__)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ENDLESS = ("Watch", "Attach", "StreamStepMetrics", "ServerReflectionInfo")
"""Methods that may stay open for ever; they are ended when the process stops."""


@contextmanager
def stopping_on_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets; a second signal ends the process at once."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopping.is_set():
            os._exit(1)
        _log.info("stopping")
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        yield stopping
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


class _Interceptor(aio.ServerInterceptor):
    """What every call of a room goes through, outermost first: its trace, errors as rich statuses, access, the end of endless streams.

    One interceptor, because each costs every call; what does not depend on the call is made once per method.
    """

    def __init__(self, keys: Keys, stopping: asyncio.Event) -> None:
        self._access = Access(keys)
        self._stopping = stopping
        self._guarded: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[..., Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """The handler as this call needs it; an unknown method passes through to UNIMPLEMENTED."""
        method = details.method
        handler = await continuation(details)
        if handler is None:
            return None
        refusal = self._access.refusal(details)
        if refusal is not None:
            return traced(guarded(refusing(handler, refusal, method), method), details)
        known = self._guarded.get(method)
        if known is None:
            known = self._guarded[method] = guarded(self._ended(handler, method), method)
        return traced(known, details)

    def _ended(self, handler: Any, method: str) -> Any:
        """Methods named in ENDLESS end cleanly when the process stops; the others stay as they are."""
        if not handler.response_streaming or not method.rsplit("/", 1)[-1].startswith(ENDLESS):
            return handler
        return wrap_handler(handler, lambda behaviour, _method: behaviour, self._ending, method)

    def _ending(self, behaviour: Callable[..., Any], _method: str) -> Callable[..., Any]:
        async def ending(request: Any, context: Any) -> AsyncIterator[Any]:
            async for message in until(behaviour(request, context), self._stopping):
                yield message

        return ending


class GrpcRoom:
    """One gRPC server with what every room has: errors, keys, traces, health, reflection, and an orderly end.

    Args:
        stopping: set when the process is to end; see `stopping_on_signals`.
        keys: who may call.
        max_message_mb: largest message either way, in MiB.
    """

    def __init__(self, stopping: asyncio.Event, keys: Keys, *, max_message_mb: int = 64) -> None:
        limit = max_message_mb << 20
        self.stopping = stopping
        self.health = health.aio.HealthServicer()
        self.port = 0
        self.server = aio.server(
            interceptors=(_Interceptor(keys, stopping),),
            options=(
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, not a sharing
            ),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self._services: list[str] = []

    def describe(self, services: Iterable[str], pool: Any = None) -> None:
        """Names the services for health and reflection; call it once, after they were added to `server`.

        Args:
            pool: descriptor pool for reflection when some messages are outside protobuf's default one.
        """
        self._services = list(services)
        names = (*self._services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server, pool=pool or descriptor_pool.Default())

    async def start(self, host: str, port: int) -> int:
        """Binds, starts and reports SERVING for every service; returns the port.

        Raises:
            OSError: the address is taken, saying which.
        """
        try:
            self.port = self.server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            await self.server.stop(None)
            raise OSError(f"cannot listen on {host}:{port}: is another process on this port?") from error
        await self.server.start()
        await self.set_health(SERVING)
        return self.port

    async def set_health(self, state: Any) -> None:
        """Sets the health of the server as a whole and of every described service."""
        for service in ("", *self._services):
            await self.health.set(service, state)

    async def run(self, *, probe_interval_seconds: float, drain_seconds: float) -> None:
        """Waits until `stopping`, then goes down in order; calls in flight get `drain_seconds`."""
        try:
            await self.stopping.wait()
            await self.set_health(NOT_SERVING)
            await asyncio.sleep(probe_interval_seconds)
        finally:  # also when a sibling task failed: calls in flight still get their time
            self.stopping.set()
            await self.server.stop(drain_seconds)


def _mistakes(error: BaseException) -> list[str] | None:
    """The messages of mistakes in configuration and of state that cannot be used; None when anything else is among them."""
    if isinstance(error, BaseExceptionGroup):
        found = [_mistakes(inner) for inner in error.exceptions]
        return None if None in found else [line for lines in found for line in lines or ()]
    return [str(error)] if isinstance(error, ValueError | OSError | DataLoss | FailedPrecondition) else None


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Runs a room's `main` under uvloop; returns the process's exit code: 2, and one line, for what a restart would not mend.

    What was imported lives as long as the process: no collection looks at it again (a full one took 25 ms, in the middle of requests).
    """
    gc.freeze()
    gc.enable()
    try:
        uvloop.run(main())
    except BaseException as error:
        mistakes = _mistakes(error)
        if mistakes is None:
            raise
        sys.stderr.write("".join(f"error: {line}\n" for line in mistakes))
        return 2
    return 0
