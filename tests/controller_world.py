"""A controller over real sockets for tests: the room in this process, its verbs in one line each, and a trainer that only tells tales."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpc import aio

import onnx_models
from interlock.api.controller.v1 import (
    model_service_pb2,
    model_service_pb2_grpc,
    policy_service_pb2_grpc,
    rollback_service_pb2_grpc,
    route_service_pb2,
    route_service_pb2_grpc,
    swap_service_pb2,
    swap_service_pb2_grpc,
)
from interlock.api.trainer.v1 import (
    checkpoint_service_pb2,
    checkpoint_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
)
from interlock.api.types.v1 import types_pb2
from interlock.errors import FailedPrecondition, Unavailable
from interlock.runtime.access import Keys
from interlock.runtime.channels import Caller, open_channel
from interlock.runtime.lifecycle import GrpcRoom
from interlock.runtime.settings import Settings
from interlock_controller.__main__ import serve

CALLER = Caller()
ENDED = {"COMPLETED", "REVERTED", "FAILED", "CANCELLED", "REJECTED", "SUPERSEDED"}


def state_of(swap: swap_service_pb2.Swap) -> str:
    """A swap's state as the core writes it."""
    return swap_service_pb2.Swap.State.Name(swap.state).removeprefix("STATE_")


@dataclass
class Controller:
    """A running controller."""

    home: Path
    channel: aio.Channel

    def stub(self, service: str) -> Any:
        stubs = {
            "swap": swap_service_pb2_grpc.SwapServiceStub,
            "model": model_service_pb2_grpc.ModelServiceStub,
            "route": route_service_pb2_grpc.RouteServiceStub,
            "rollback": rollback_service_pb2_grpc.RollbackServiceStub,
            "policy": policy_service_pb2_grpc.PolicyServiceStub,
        }
        return stubs[service](self.channel)

    async def call(self, service: str, method: str, request: Any) -> Any:
        return await CALLER.unary(getattr(self.stub(service), method), request, timeout=30)

    async def register(self, value: float, body: bytes | None = None, *, model: str = "policy", **more: Any) -> str:
        """A version whose model answers `value`; its resource name."""
        folder = self.home / "artifacts" / f"{model}-{value}"
        onnx_models.write_version(folder, body or onnx_models.constant(value), name=model)
        request = model_service_pb2.RegisterVersionRequest(model=f"models/{model}", artifact_uri=str(folder), **more)
        return str((await self.call("model", "RegisterVersion", request)).version.name)

    async def create(self, version: str, *, request_id: str = "", **spec: Any) -> swap_service_pb2.Swap:
        request = swap_service_pb2.CreateSwapRequest(
            change=types_pb2.Change(request_id=request_id, reason="test", actor="ana"),
            spec=swap_service_pb2.SwapSpec(candidate_version=version, **spec),
        )
        return (await self.call("swap", "CreateSwap", request)).swap

    async def get(self, name: str) -> swap_service_pb2.Swap:
        return (await self.call("swap", "GetSwap", swap_service_pb2.GetSwapRequest(name=name))).swap

    async def watch(self, name: str, until: str = "") -> list[swap_service_pb2.Swap]:
        """Every message of the watch, to its end or to a state."""
        seen = []
        request = swap_service_pb2.WatchSwapRequest(name=name)
        async with asyncio.timeout(60):
            async for message in CALLER.stream(self.stub("swap").WatchSwap, request):
                seen.append(message.swap)
                if until and state_of(message.swap) == until:
                    break
        return seen

    async def swap_to(self, version: str, **spec: Any) -> swap_service_pb2.Swap:
        """A swap, to its end."""
        swap = await self.create(version, **spec)
        return (await self.watch(swap.name))[-1]

    async def receipt(self, name: str) -> swap_service_pb2.SwapReceipt:
        return (await self.call("swap", "GetReceipt", swap_service_pb2.GetReceiptRequest(name=name))).receipt

    async def route(self, model: str = "policy") -> types_pb2.Route:
        request = route_service_pb2.GetRouteRequest(model=f"models/{model}")
        return (await self.call("route", "GetRoute", request)).route

    async def tell(self, verb: str, name: str) -> swap_service_pb2.Swap:
        request = getattr(swap_service_pb2, f"{verb}Request")(name=name, change=types_pb2.Change(actor="ana"))
        return (await self.call("swap", verb, request)).swap


def settings(home: Path, replicas: list[str], trainer_port: int = 1, **more: Any) -> Settings:
    """Settings of a controller on free ports; port 1 is where no trainer is."""
    return Settings(
        home=home,
        probe_interval_seconds=0,
        controller={"port": 0, "metrics_port": 0, "replicas": replicas, "tick_seconds": 0.05, **more},  # type: ignore[arg-type]
        trainer={"port": trainer_port},  # type: ignore[arg-type]
    )


@asynccontextmanager
async def a_controller(
    home: Path, replicas: list[str], trainer_port: int = 1, **more: Any
) -> AsyncIterator[Controller]:
    """The room in this process; taken down in order at the end."""
    config = settings(home, replicas, trainer_port, **more)
    stopping, started = asyncio.Event(), asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(config, stopping, lambda port, _metrics: started.set_result(port)))
        port = await started
        try:
            async with open_channel(f"127.0.0.1:{port}") as channel:
                yield Controller(home, channel)
        finally:
            stopping.set()


# --- a trainer that only tells tales ----------------------------------------------------------------------------------------------


@dataclass
class FakeTrainer(run_service_pb2_grpc.RunServiceServicer, checkpoint_service_pb2_grpc.CheckpointServiceServicer):
    """One run with a promotion policy; tests add checkpoints to it. Exports are constant models that answer the checkpoint's step."""

    home: Path
    run: run_service_pb2.Run = field(default_factory=lambda: run_service_pb2.Run(name="runs/r"))
    checkpoints: dict[str, run_service_pb2.Checkpoint] = field(default_factory=dict)
    exports: list[str] = field(default_factory=list)
    pins: dict[str, bool] = field(default_factory=dict)
    rollbacks: list[run_service_pb2.RollbackRunRequest] = field(default_factory=list)
    refuse_exports: int = 0
    broken: set[str] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    held: tuple[asyncio.Event, asyncio.Event] | None = None

    def hold_exports(self) -> tuple[asyncio.Event, asyncio.Event]:
        """Holds the next export: (it has begun, let it go on)."""
        self.held = asyncio.Event(), asyncio.Event()
        return self.held

    def promote(self, model: str = "policy", metric: str = "reward", **policy: Any) -> None:
        self.run.promotion.CopyFrom(run_service_pb2.PromotionPolicy(model=f"models/{model}", metric=metric, **policy))

    def save(self, step: int, reward: float, *, good: bool = True, attempt: int = 1) -> str:
        """A checkpoint; its resource name."""
        name = f"runs/r/checkpoints/step-{step:09d}-a{attempt}"
        state = run_service_pb2.Checkpoint.STATE_GOOD if good else run_service_pb2.Checkpoint.STATE_CANDIDATE
        self.checkpoints[name] = run_service_pb2.Checkpoint(
            name=name, step=step, attempt=attempt, state=state, metrics={"reward": reward}, digest=f"blake3:{step}"
        )
        self.changed.set()
        self.changed = asyncio.Event()
        return name

    async def ListRuns(self, _request: Any, _context: Any) -> Any:
        return run_service_pb2.ListRunsResponse(runs=[self.run])

    async def WatchRun(self, _request: Any, _context: Any) -> AsyncIterator[Any]:
        sent: set[str] = set()
        yield run_service_pb2.WatchRunResponse(run=self.run)
        while True:
            changed = self.changed
            for name in [n for n in self.checkpoints if n not in sent]:
                sent.add(name)
                yield run_service_pb2.WatchRunResponse(run=self.run, checkpoint=self.checkpoints[name])
            await changed.wait()

    async def RollbackRun(self, request: Any, _context: Any) -> Any:
        self.rollbacks.append(request)
        target = self.checkpoints[request.checkpoint]
        left = [c.name for c in self.checkpoints.values() if c.step > target.step]
        rollback = run_service_pb2.Rollback(
            rollback_id=request.rollback_id,
            run=request.name,
            rule="manual",
            from_step=max(c.step for c in self.checkpoints.values()),
            to_step=target.step,
            target_checkpoint=target.name,
            quarantined_checkpoints=left,
            attempt=2,
        )
        return run_service_pb2.RollbackRunResponse(run=self.run, rollback=rollback)

    async def List(self, _request: Any, _context: Any) -> Any:
        return checkpoint_service_pb2.ListResponse(checkpoints=self.checkpoints.values())

    async def Pin(self, request: Any, _context: Any) -> Any:
        self.pins[request.name] = request.pinned
        return checkpoint_service_pb2.PinResponse()

    async def Export(self, request: Any, _context: Any) -> Any:
        self.exports.append(request.name)
        if self.held is not None:
            (reached, free), self.held = self.held, None
            reached.set()
            await free.wait()
        if request.name in self.broken:
            raise FailedPrecondition("torch and ONNX Runtime disagree", reason="EXPORT_MISMATCH")
        if self.refuse_exports:
            self.refuse_exports -= 1
            raise Unavailable("the loop is not attached", reason="LOOP_DETACHED")
        checkpoint = self.checkpoints[request.name]
        folder = self.home / "exports" / str(checkpoint.step)
        digest = onnx_models.write_version(folder, onnx_models.constant(float(checkpoint.step)))
        origin = types_pb2.Origin(run="runs/r", checkpoint=checkpoint.name, step=checkpoint.step, attempt=1)
        return checkpoint_service_pb2.ExportResponse(artifact_uri=str(folder), digest=digest, origin=origin)


@asynccontextmanager
async def a_trainer(home: Path) -> AsyncIterator[tuple[FakeTrainer, int]]:
    """The fake trainer with its port."""
    stopping, fake = asyncio.Event(), FakeTrainer(home)
    room = GrpcRoom(stopping, Keys(home))
    run_service_pb2_grpc.add_RunServiceServicer_to_server(fake, room.server)
    checkpoint_service_pb2_grpc.add_CheckpointServiceServicer_to_server(fake, room.server)
    room.describe(["interlock.api.trainer.v1.RunService"])
    port = await room.start("127.0.0.1", 0)
    async with asyncio.TaskGroup() as group:
        group.create_task(room.run(probe_interval_seconds=0.0, drain_seconds=1.0))
        try:
            yield fake, port
        finally:
            stopping.set()
