"""The inference process: `python -m interlock_inference`. A replica (`parts`) behind its gRPC listener, with metrics and health, taken down in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import structlog

from interlock.api.inference.v1 import (
    runtime_service_pb2,
    runtime_service_pb2_grpc,
    text_service_pb2,
    text_service_pb2_grpc,
)
from interlock.api.oip import rpc
from interlock.runtime import lifecycle, logging, settings
from interlock.runtime.access import Keys
from interlock.runtime.metrics import metrics_server
from interlock.runtime.settings import Settings
from interlock.runtime.telemetry import telemetry
from interlock_inference import audit, health
from interlock_inference.parts import Parts, assembled
from interlock_inference.servicers.text import TextServicer

SERVICES = (
    rpc.SERVICE_NAME,
    runtime_service_pb2.DESCRIPTOR.services_by_name["RuntimeService"].full_name,
    text_service_pb2.DESCRIPTOR.services_by_name["TextService"].full_name,
)
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


@asynccontextmanager
async def listening(
    config: Settings, parts: Parts, keys: Keys, stopping: asyncio.Event
) -> AsyncIterator[lifecycle.GrpcRoom]:
    """The replica's gRPC listener, started; whoever opens it also runs it (`GrpcRoom.run`)."""
    room = lifecycle.GrpcRoom(stopping, keys, max_message_mb=config.inference.max_message_mb)
    rpc.add_servicer(parts.oip, room.server)
    runtime_service_pb2_grpc.add_RuntimeServiceServicer_to_server(parts.commands, room.server)
    text_service_pb2_grpc.add_TextServiceServicer_to_server(TextServicer(), room.server)
    room.describe(SERVICES, rpc.chained_pool())
    await room.start(config.host, config.inference.port)
    publishing = parts.tasks.create_task(health.publish(room, parts.registry, parts.replica))
    try:
        yield room
    finally:
        publishing.cancel()


async def main() -> None:
    """Reads the settings, then serves until a signal."""
    config = settings.load()
    logging.configure("inference", config.log_level, config.log_format)
    settings.refuse_exposed(config)
    audit.install()
    with lifecycle.stopping_on_signals() as stopping:
        await serve(config, stopping)


if __name__ == "__main__":
    raise SystemExit(lifecycle.run(main))
