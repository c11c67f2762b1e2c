"""A replica over real sockets for tests: the room in this process, stubs for it, and a controller's verbs in one line each."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from grpc import aio

import onnx_models
from interlock.api.inference.v1 import runtime_service_pb2 as pb
from interlock.api.inference.v1 import runtime_service_pb2_grpc as pb_grpc
from interlock.api.oip import messages, rpc
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
    own = {"port": 0, "metrics_port": 0, "try_loads": False, **inference}  # a trial is 0.3 s and a test's own matter
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


@asynccontextmanager
async def a_process(
    home: Path, failpoint: str = "", port: int = 0, **more: str
) -> AsyncIterator[tuple[Remote, asyncio.subprocess.Process]]:
    """A real replica process; killed at the end if it still lives."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("INTERLOCK_")}
    env |= {
        "INTERLOCK_HOME": str(home),
        "INTERLOCK_INFERENCE_PORT": str(port),
        "INTERLOCK_INFERENCE_METRICS_PORT": "0",
        "INTERLOCK_PROBE_INTERVAL_SECONDS": "0",
    }
    env |= more
    if failpoint:
        env["INTERLOCK_FAILPOINT"] = f"inference.{failpoint}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "interlock_inference", stdout=asyncio.subprocess.PIPE, env=env
    )
    assert process.stdout is not None
    try:
        event: dict[str, Any] = {}
        async with asyncio.timeout(60):
            while event.get("event") != "listening":
                event = json.loads(await process.stdout.readline())
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(process.stdout.read())
            address = event["address"]
            async with open_channel(address) as channel:
                yield Remote(home, channel, int(address.rsplit(":", 1)[1]), event["metrics_port"]), process
            if process.returncode is None:
                process.kill()
            await process.wait()
            await reading
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def infer_request() -> messages.ModelInferRequest:
    request = messages.ModelInferRequest(
        model_name="policy", raw_input_contents=[np.zeros((1, 4), np.float32).tobytes()]
    )
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    return request
