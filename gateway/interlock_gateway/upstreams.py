"""The gateway's lines to the other rooms: one channel each, the stubs on them, and what is cached of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from interlock.api.controller.v1.model_service_pb2_grpc import ModelServiceStub
from interlock.api.controller.v1.rollback_service_pb2_grpc import RollbackServiceStub
from interlock.api.controller.v1.route_service_pb2_grpc import RouteServiceStub
from interlock.api.controller.v1.swap_service_pb2_grpc import SwapServiceStub
from interlock.api.inference.v1.runtime_service_pb2_grpc import RuntimeServiceStub
from interlock.api.oip import rpc
from interlock.api.trainer.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from interlock.api.trainer.v1.metrics_service_pb2_grpc import MetricsServiceStub
from interlock.api.trainer.v1.run_service_pb2_grpc import RunServiceStub
from interlock.core.ports import Clock
from interlock.runtime.channels import Caller, open_channel
from interlock.runtime.lifecycle import until
from interlock.runtime.settings import Settings

CALL_SECONDS = 5.0
SIGNATURE_SECONDS = 5.0
"""How long a model's metadata is believed. Versions that follow each other have the same signature, so this is about a first version."""


@dataclass(slots=True)
class Upstreams:
    """Stubs of every service the gateway fronts."""

    caller: Caller
    clock: Clock
    inference: rpc.Stub
    runtime: Any
    swaps: Any
    models: Any
    routes: Any
    rollbacks: Any
    runs: Any
    metrics: Any
    checkpoints: Any
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _signatures: dict[str, tuple[float, Any]] = field(default_factory=dict)

    async def call(
        self, method: Any, request: Any, *, timeout: float = CALL_SECONDS, idempotent: bool = False, actor: str = ""
    ) -> Any:
        """One call with the gateway's key; see `Caller.unary`."""
        return await self.caller.unary(method, request, timeout=timeout, idempotent=idempotent, actor=actor)

    def watch(self, method: Any, request: Any) -> AsyncIterator[Any]:
        """A stream without a deadline; it ends when the gateway stops, which an open watch would otherwise hold up."""
        return until(self.caller.stream(method, request), self.stopping)

    async def signature(self, model: str) -> Any:
        """ModelMetadata of the version that serves `model`, believed for a few seconds."""
        from interlock.api.oip import messages

        known = self._signatures.get(model)
        if known and self.clock.monotonic() - known[0] < SIGNATURE_SECONDS:
            return known[1]
        metadata = await self.call(
            self.inference.ModelMetadata, messages.ModelMetadataRequest(name=model), idempotent=True
        )
        if len(self._signatures) >= 1024:  # more models than a replica holds: names nobody serves never get here
            self._signatures.clear()
        self._signatures[model] = (self.clock.monotonic(), metadata)
        return metadata


@asynccontextmanager
async def upstreams(
    settings: Settings, key: str, clock: Clock, stopping: asyncio.Event | None = None
) -> AsyncIterator[Upstreams]:
    """Opens the channels; they connect when first used and close with the block. Watches end when `stopping` is set."""
    async with (
        open_channel(settings.inference_address) as inference,
        open_channel(settings.trainer_address) as trainer,
        open_channel(settings.controller_address) as controller,
    ):
        yield Upstreams(
            caller=Caller(key),
            clock=clock,
            inference=rpc.Stub(inference),
            runtime=RuntimeServiceStub(inference),
            swaps=SwapServiceStub(controller),
            models=ModelServiceStub(controller),
            routes=RouteServiceStub(controller),
            rollbacks=RollbackServiceStub(controller),
            runs=RunServiceStub(trainer),
            metrics=MetricsServiceStub(trainer),
            checkpoints=CheckpointServiceStub(trainer),
            stopping=stopping or asyncio.Event(),
        )
