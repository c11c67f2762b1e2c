"""The gateway's process: HTTP on one port, gRPC channels to the rooms behind it; in the inline form a replica in the same process."""

from __future__ import annotations

if __name__ == "__main__":
    import interlock.runtime.lean  # noqa: F401  first of all

import asyncio
import contextlib
import pkgutil
import socket
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import structlog
import uvicorn

from interlock.runtime import logging, settings
from interlock.runtime.access import Keys
from interlock.runtime.clock import SystemClock
from interlock.runtime.lifecycle import run, stopping_on_signals
from interlock.runtime.settings import Settings
from interlock.runtime.telemetry import telemetry
from interlock_gateway import web
from interlock_gateway.app import Gateway
from interlock_gateway.http import Protocol
from interlock_gateway.predict import Limits, Predictor
from interlock_gateway.upstreams import upstreams

_log = structlog.get_logger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: the process has one way to stop."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Leaves signals to `stopping_on_signals`."""
        return contextlib.nullcontext()


async def serve(config: Settings, stopping: asyncio.Event, started: Callable[[int], None] = lambda port: None) -> None:
    """Serves until `stopping`, then finishes what is in flight; `started` is told the port."""
    keys, clock = Keys(config.home), SystemClock()
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(_listen(config.host, config.gateway.port))
        await stack.enter_async_context(telemetry("gateway", config.otlp_endpoint))
        own = config.gateway
        near = await stack.enter_async_context(_inline("replica")(config, keys, stopping)) if own.inline else None
        up = await stack.enter_async_context(upstreams(config, keys.internal_key(), clock, stopping, near))
        limits = Limits(own.max_upload_mb << 20, own.max_batch_files)
        predictor = Predictor(up, near.answerer if near else up, own.predict_timeout_seconds, own.default_model, limits)
        application = Gateway(
            predictor,
            web.build(config, up, predictor, keys, *([near.metrics] if near else [])),
            keys,
            max_body_bytes=own.max_body_mb << 20,
            max_batch_bytes=own.max_batch_mb << 20,
            receive_seconds=own.receive_timeout_seconds,
            host=config.host,
        )
        server = _Server(_uvicorn_config(application))
        port = listener.getsockname()[1]
        _log.info("listening", address=f"{config.host}:{port}", keys_required=keys.required)
        started(port)
        async with asyncio.TaskGroup() as group:
            group.create_task(server.serve(sockets=[listener]))
            await stopping.wait()
            await asyncio.sleep(config.probe_interval_seconds)
            server.should_exit = True
    _log.info("stopped")


async def main() -> None:
    """Reads the settings, then serves until a signal."""
    config = settings.load()
    logging.configure("gateway", config.log_level, config.log_format)
    settings.refuse_exposed(config)
    if config.gateway.inline:
        _inline("lock")()
    with stopping_on_signals() as stopping:
        await serve(config, stopping)


def _inline(name: str) -> Any:
    """Part of the replica's inline form, by name: the rooms never import each other."""
    return pkgutil.resolve_name(f"interlock_inference.inline:{name}")


def _uvicorn_config(application: Gateway) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        loop="none",
        interface="asgi3",
        http=Protocol,
        proxy_headers=False,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=30,
    )


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is one clear line.

    Raises:
        OSError: saying which address.
    """
    try:
        return socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(run(main))
