"""The inference process: `python -m interlock_inference`. A replica (`parts`) behind its gRPC listener, with metrics and health, taken down in order."""

from __future__ import annotations

if __name__ == "__main__":
    import interlock.runtime.lean  # noqa: F401  first of all

import asyncio
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack

import structlog

from interlock.runtime import lifecycle, logging, settings
from interlock.runtime.access import Keys
from interlock.runtime.metrics import metrics_server
from interlock.runtime.settings import Settings
from interlock.runtime.telemetry import telemetry
from interlock_inference import audit
from interlock_inference.listener import listening
from interlock_inference.parts import assembled

SWITCH_SECONDS = 0.001
"""How long a thread that loads may keep the interpreter from the event loop: Python's own 5 ms would be a request's whole p99."""
_log = structlog.get_logger(__name__)


def _ignore(port: int, metrics_port: int) -> None:
    pass


async def serve(config: Settings, stopping: asyncio.Event, started: Callable[[int, int], None] = _ignore) -> None:
    """Runs one replica until `stopping`; `started` is told the gRPC port and the metrics port."""
    own, keys = config.inference, Keys(config.home)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(telemetry("inference", config.otlp_endpoint))
        parts = await stack.enter_async_context(assembled(config, keys, stopping))
        room = await stack.enter_async_context(listening(config, parts, keys, stopping))
        metrics_port = stack.enter_context(
            metrics_server(config.host, own.metrics_port, parts.probe(stopping), parts.metrics)
        )
        address = f"{config.host}:{room.port}"
        _log.info("listening", address=address, metrics_port=metrics_port, keys_required=keys.required)
        started(room.port, metrics_port)
        starting = parts.tasks.create_task(parts.start())
        await room.run(probe_interval_seconds=config.probe_interval_seconds, drain_seconds=own.drain_seconds)
        starting.cancel()
    _log.info("stopped")


async def main() -> None:
    """Reads the settings, then serves until a signal."""
    config = settings.load()
    logging.configure("inference", config.log_level, config.log_format)
    settings.refuse_exposed(config)
    audit.install()
    sys.setswitchinterval(SWITCH_SECONDS)
    with lifecycle.stopping_on_signals() as stopping:
        await serve(config, stopping)


if __name__ == "__main__":
    raise SystemExit(lifecycle.run(main))
