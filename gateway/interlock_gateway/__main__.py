"""The gateway's process: HTTP on one port, gRPC channels to the rooms behind it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack

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
from interlock_gateway.predict import Predictor
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
        up = await stack.enter_async_context(upstreams(config, keys.internal_key(), clock, stopping))
        predictor = Predictor(up, config.gateway.predict_timeout_seconds, config.gateway.default_model)
        site = web.build(config, up, predictor, keys)
        max_body_bytes = config.gateway.max_body_mb << 20
        server = _Server(
            _uvicorn_config(Gateway(predictor, site, keys, max_body_bytes=max_body_bytes, host=config.host))
        )
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
    with stopping_on_signals() as stopping:
        await serve(config, stopping)


def _uvicorn_config(application: Gateway) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        loop="none",
        http="httptools",
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
