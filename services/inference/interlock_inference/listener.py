"""The gRPC listener in front of a replica: its services, health and reflection. What they do is decided behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from interlock.api.inference.v1 import (
    runtime_service_pb2,
    runtime_service_pb2_grpc,
    text_service_pb2,
    text_service_pb2_grpc,
)
from interlock.api.oip import rpc
from interlock.runtime import lifecycle
from interlock.runtime.access import Keys
from interlock.runtime.settings import Settings
from interlock_inference import health
from interlock_inference.parts import Parts
from interlock_inference.servicers.text import TextServicer

SERVICES = (
    rpc.SERVICE_NAME,
    runtime_service_pb2.DESCRIPTOR.services_by_name["RuntimeService"].full_name,
    text_service_pb2.DESCRIPTOR.services_by_name["TextService"].full_name,
)


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
