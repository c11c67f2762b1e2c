"""A replica over real sockets for tests: the room in this process, stubs for it, and a controller's verbs in one line each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc import aio

import onnx_models
from interlock.api.inference.v1 import runtime_service_pb2 as pb
from interlock.api.inference.v1 import runtime_service_pb2_grpc as pb_grpc
from interlock.api.oip import rpc
from interlock.api.types.v1 import types_pb2
from interlock.runtime.channels import Caller, open_channel
from interlock.runtime.settings import Settings
from interlock_inference.__main__ import serve

CALLER = Caller()


@dataclass
class Remote:
    """A running replica."""

    home: Path
    channel: aio.Channel
    port: int
    metrics_port: int = 0
    token: int = 1

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def runtime(self) -> Any:
        return pb_grpc.RuntimeServiceStub(self.channel)

    @property
    def oip(self) -> rpc.Stub:
        return rpc.Stub(self.channel)

    @property
    def fence(self) -> pb.Fence:
        return pb.Fence(token=self.token)

    def artifact(self, version: str, body: bytes | None = None, *, model: str = "policy", **more: Any) -> str:
        folder = self.home / "models" / model / version
        onnx_models.write_version(folder, body or onnx_models.constant(float(version)), name=model, **more)
        return str(folder)

    async def command(self, method: str, request: Any) -> Any:
        return await CALLER.unary(getattr(self.runtime, method), request, timeout=30)

    async def prepare(self, version: str, uri: str, *, model: str = "policy", **more: Any) -> list[pb.PrepareResponse]:
        request = pb.PrepareRequest(
            fence=self.fence, version=f"models/{model}/versions/{version}", artifact_uri=uri, **more
        )
        return [message async for message in CALLER.stream(self.runtime.Prepare, request, timeout=60)]

    async def load(
        self, version: str, body: bytes | None = None, *, model: str = "policy", **more: Any
    ) -> pb.WarmResponse:
        await self.prepare(version, self.artifact(version, body, model=model, **more), model=model)
        return await self.command(
            "Warm", pb.WarmRequest(fence=self.fence, version=f"models/{model}/versions/{version}")
        )

    def route_request(self, epoch: int, *versions: str, model: str = "policy") -> pb.ApplyRouteRequest:
        names = [f"models/{model}/versions/{version}" for version in versions]
        weights = [types_pb2.RouteWeight(version=name, weight=1) for name in names]
        return pb.ApplyRouteRequest(
            fence=self.fence, route=types_pb2.Route(model=f"models/{model}", epoch=epoch, weights=weights)
        )

    async def route(self, epoch: int, *versions: str, model: str = "policy") -> pb.ApplyRouteResponse:
        return await self.command("ApplyRoute", self.route_request(epoch, *versions, model=model))

    async def drain(self, version: str, *, model: str = "policy") -> pb.DrainResponse:
        return await self.command(
            "Drain", pb.DrainRequest(fence=self.fence, version=f"models/{model}/versions/{version}")
        )

    async def release(self, version: str, *, model: str = "policy") -> bool:
        request = pb.ReleaseRequest(fence=self.fence, version=f"models/{model}/versions/{version}")
        return bool((await self.command("Release", request)).released)

    async def swap(self, epoch: int, previous: str, version: str, body: bytes | None = None) -> pb.ApplyRouteResponse:
        """Load, warm, switch, drain, release; what a controller does, without the judgement."""
        await self.load(version, body)
        applied = await self.route(epoch, version)
        await self.drain(previous)
        await self.release(previous)
        return applied

    async def state(self) -> pb.ReplicaState:
        return (await self.command("GetState", pb.GetStateRequest())).state


@asynccontextmanager
async def a_replica(home: Path, controller_port: int = 1, **inference: Any) -> AsyncIterator[Remote]:
    """The room in this process, on free ports; taken down in order at the end."""
    own = {"port": 0, "metrics_port": 0, **inference}
    config = Settings(home=home, probe_interval_seconds=0, inference=own, controller={"port": controller_port})  # type: ignore[arg-type]
    stopping, started = asyncio.Event(), asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(config, stopping, lambda port, metrics_port: started.set_result((port, metrics_port))))
        port, metrics_port = await started
        try:
            async with open_channel(f"127.0.0.1:{port}") as channel:
                yield Remote(home, channel, port, metrics_port)
        finally:
            stopping.set()
