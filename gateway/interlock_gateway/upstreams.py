"""The gateway's lines to the other rooms: one channel each (one per replica, `spread`), the stubs on them, and what is cached of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from prometheus_client import CollectorRegistry

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
from interlock.runtime import telemetry
from interlock.runtime.access import KEY_HEADER
from interlock.runtime.channels import Caller, open_channel
from interlock.runtime.infer import TRACE, Answerer, InferAnswer, InferRequest
from interlock.runtime.settings import Settings
from interlock.runtime.status import translated
from interlock.runtime.streams import until
from interlock_gateway import codec
from interlock_gateway.spread import spread

CALL_SECONDS = 5.0
SIGNATURE_SECONDS = 5.0
"""How long a model's metadata is believed. Versions that follow each other have the same signature, so this is about a first version."""


class Near(Protocol):
    """A replica of this process: who answers predictions, its stubs and its metrics. `alone`: no controller decides what it serves."""

    answerer: Answerer
    inference: Any
    runtime: Any
    metrics: CollectorRegistry
    alone: bool


@dataclass(slots=True)
class Upstreams:
    """Stubs of every service the gateway fronts. `alone`: there is neither a controller nor a trainer."""

    caller: Caller
    clock: Clock
    inference: Any
    infer: Any
    predictions: Any
    runtime: Any
    swaps: Any
    models: Any
    routes: Any
    rollbacks: Any
    runs: Any
    metrics: Any
    checkpoints: Any
    alone: bool = False
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

    def begin(
        self, request: InferRequest, timeout: float, traceparent: str
    ) -> InferAnswer | Coroutine[Any, Any, InferAnswer]:
        """A prediction by the replica; see `interlock.runtime.infer.Answerer`."""
        return self._infer(request, timeout, traceparent)

    async def _infer(self, request: InferRequest, timeout: float, traceparent: str) -> InferAnswer:
        if telemetry.exporting() or telemetry.is_sampled(traceparent):  # a span belongs to a call
            metadata = ((KEY_HEADER, self.caller.key), (TRACE, telemetry.current_traceparent() or traceparent))
            return cast(InferAnswer, await translated(self.infer(request, timeout=timeout, metadata=metadata)))
        pairs = {KEY_HEADER: self.caller.key, TRACE: traceparent}
        return cast(InferAnswer, await self.predictions(request, timeout=timeout, metadata=pairs))

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
    settings: Settings, key: str, clock: Clock, stopping: asyncio.Event | None = None, near: Near | None = None
) -> AsyncIterator[Upstreams]:
    """Opens the channels; they connect when first used and close with the block. Watches end when `stopping` is set.

    Args:
        near: a replica of this process, asked instead of those at `replica_addresses`.
    """
    async with (
        spread(settings.replica_addresses, clock) as replicas,
        open_channel(settings.trainer_address) as trainer,
        open_channel(settings.controller_address) as controller,
    ):
        inference: Any = replicas  # what the stubs need of a channel
        yield Upstreams(
            caller=Caller(key),
            clock=clock,
            inference=near.inference if near else rpc.Stub(inference),
            infer=inference.unary_unary(
                f"/{rpc.SERVICE_NAME}/ModelInfer",
                request_serializer=codec.to_wire,
                response_deserializer=codec.from_wire,
            ),
            predictions=replicas.predictions(f"/{rpc.SERVICE_NAME}/ModelStreamInfer"),
            runtime=near.runtime if near else RuntimeServiceStub(inference),
            alone=near is not None and near.alone,
            swaps=SwapServiceStub(controller),
            models=ModelServiceStub(controller),
            routes=RouteServiceStub(controller),
            rollbacks=RollbackServiceStub(controller),
            runs=RunServiceStub(trainer),
            metrics=MetricsServiceStub(trainer),
            checkpoints=CheckpointServiceStub(trainer),
            stopping=stopping or asyncio.Event(),
        )
