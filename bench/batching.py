"""What dynamic batching brings: requests per second with and without `[batching]`, one row each, on the 784-1024-1024-10 MLP. Prints a table.

Rounds are interleaved (raw session, data plane without and with, gRPC without and with), so that a machine that is busy for a while
disturbs all of them; figures are medians over the rounds, ratios are medians of the rounds' ratios.

    python bench/batching.py --rounds 5 --seconds 2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from swap_under_load import CALLER, SIZES, mlp, room, wait_for_port, write_version

from interlock.api.inference.v1 import runtime_service_pb2 as pb
from interlock.api.inference.v1 import runtime_service_pb2_grpc as pb_grpc
from interlock.api.types.v1 import types_pb2
from interlock.client.load import GrpcTarget, Load
from interlock.core.route import Route, Weight
from interlock.runtime.access import Keys
from interlock.runtime.channels import open_channel
from interlock.runtime.settings import Settings
from interlock.stores.modelspec import BatchingSpec
from interlock_inference.dataplane import DataPlane
from interlock_inference.engines import Array, EngineOptions
from interlock_inference.engines.onnx import load
from interlock_inference.parts import assembled
from interlock_inference.replica import Wanted
from interlock_inference.slots import Registry, Slot
from interlock_inference.tools.own_server import free_ports

WITHOUT, WITH = "without", "with"
Measure = Callable[[float], Awaitable[float]]
"""Requests per second over so many seconds."""


class Call:
    """One row for a model."""

    version = request_id = ""
    outputs: Sequence[str] = ()
    deadline: float | None = None
    priority = 0
    has_images = False

    def __init__(self, model: str, inputs: dict[str, Array]) -> None:
        self.model = model
        self._inputs = inputs

    def decode(self, slot: Slot) -> dict[str, Array]:
        """The row."""
        return self._inputs


def write_models(home: Path, size: str, spec: BatchingSpec) -> dict[str, Path]:
    """The same network twice."""
    sizes, folders = SIZES[size], {}
    for model, batching in ((WITHOUT, None), (WITH, spec)):
        folder = folders[model] = home / "models" / model / "1"
        write_version(folder, mlp(sizes, 1), sizes, model, batching)
    return folders


def raw(path: Path, inputs: dict[str, Array]) -> Measure:
    """One row at a time through the bare engine, on this thread."""
    engine = load(path / "model.onnx", None, EngineOptions())

    async def measure(seconds: float) -> float:
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            engine.run(inputs, ["y"])
            count += 1
        return count / (time.perf_counter() - start)

    return measure


async def plane(stack: AsyncExitStack, folders: dict[str, Path], home: Path) -> tuple[DataPlane, Registry]:
    """A replica without a listener in this process, both models warmed and routed."""
    own = {"port": 0, "metrics_port": 0, "warmup_iterations": 20, "try_loads": False}
    config = Settings(home=home, inference=own)
    parts = await stack.enter_async_context(assembled(config, Keys(home), asyncio.Event()))
    for model, folder in folders.items():
        async for _ in parts.replica.prepare(Wanted(model, "1", str(folder))):
            pass
        await parts.replica.warm(model, "1", 0)
        await parts.replica.apply_route(1, Route(model, 1, (Weight("1", 1),)), "1", 0.0)
    return parts.plane, parts.registry


def through_plane(made: DataPlane, model: str, inputs: dict[str, Array], in_flight: int) -> Measure:
    """So many callers, each asking again when it has its answer."""

    async def measure(seconds: float) -> float:
        count, end = 0, time.perf_counter() + seconds

        async def caller() -> None:
            nonlocal count
            while time.perf_counter() < end:
                await made.infer(Call(model, inputs))
                count += 1
                await asyncio.sleep(0)

        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(caller())
        return count / (time.perf_counter() - start)

    return measure


async def replica_process(stack: AsyncExitStack, folders: dict[str, Path], home: Path) -> str:
    """A replica of its own, both models warmed and routed; its address."""
    env = {n: v for n, v in os.environ.items() if not n.startswith("INTERLOCK_")} | {"INTERLOCK_HOME": str(home)}
    names = ("INFERENCE", "INFERENCE_METRICS", "CONTROLLER")
    env |= {f"INTERLOCK_{n}_PORT": str(port) for n, port in zip(names, free_ports(len(names)), strict=True)}
    port = int(env["INTERLOCK_INFERENCE_PORT"])
    await stack.enter_async_context(room("interlock_inference", env))
    await wait_for_port(port)
    stub: Any = pb_grpc.RuntimeServiceStub(await stack.enter_async_context(open_channel(f"127.0.0.1:{port}")))
    fence = pb.Fence(token=1)
    for model, folder in folders.items():
        name = f"models/{model}/versions/1"
        async for _ in CALLER.stream(
            stub.Prepare, pb.PrepareRequest(fence=fence, version=name, artifact_uri=str(folder)), timeout=60
        ):
            pass
        await CALLER.unary(stub.Warm, pb.WarmRequest(fence=fence, version=name, iterations=20), timeout=60)
        weights = [types_pb2.RouteWeight(version=name, weight=1)]
        route = types_pb2.Route(model=f"models/{model}", epoch=1, weights=weights)
        await CALLER.unary(stub.ApplyRoute, pb.ApplyRouteRequest(fence=fence, route=route), timeout=5)
    return f"127.0.0.1:{port}"


def through_grpc(address: str, model: str, inputs: dict[str, Array], in_flight: int) -> Measure:
    """The same over the wire, the client in this process."""

    async def measure(seconds: float) -> float:
        traffic = Load([GrpcTarget(address, model, inputs)], rate=None, concurrency=in_flight)
        stopping, start = asyncio.Event(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.run(stopping))
            await asyncio.sleep(seconds)
            stopping.set()
        report = traffic.report()
        assert not report.failed, report.errors
        return report.count / (time.perf_counter() - start)

    return measure


async def compare(args: argparse.Namespace) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = write_models(home, args.size, BatchingSpec(max_rows=args.max_rows))
        inputs = {"x": np.random.default_rng(0).standard_normal((1, SIZES[args.size][0])).astype(np.float32)}
        made, registry = await plane(stack, folders, home)
        address = await replica_process(stack, folders, home)
        measures: dict[str, Measure] = {"raw, one row": raw(folders[WITHOUT], inputs)}
        for model in (WITHOUT, WITH):
            measures[f"plane, {model}"] = through_plane(made, model, inputs, args.in_flight)
            measures[f"gRPC, {model}"] = through_grpc(address, model, inputs, args.in_flight)
        rounds: dict[str, list[float]] = {name: [] for name in measures}
        for measure in measures.values():
            await measure(0.3)
        for _ in range(args.rounds):
            for name, measure in measures.items():
                rounds[name].append(await measure(args.seconds))
        stats = registry.find(WITH, "1").stats
        return {"rounds": rounds, "mean_rows": stats.num_rows / max(1, stats.num_runs)}


def table(result: dict[str, Any]) -> str:
    """Medians, and ratios taken round by round."""
    rounds: dict[str, list[float]] = result["rounds"]
    lines = ["| | requests/s | of raw | with / without |", "|---|---|---|---|"]
    for name, rates in rounds.items():
        of_raw = statistics.median(a / b for a, b in zip(rates, rounds["raw, one row"], strict=True))
        face, _, kind = name.partition(", ")
        gain = ""
        if kind == WITH:
            gain = f"{statistics.median(a / b for a, b in zip(rates, rounds[f'{face}, {WITHOUT}'], strict=True)):.2f}"
        lines.append(f"| {name} | {statistics.median(rates):,.0f} | {of_raw:.2f} | {gain} |")
    return "\n".join([*lines, "", f"rows per run on the data plane, with: {result['mean_rows']:.1f}"])


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--max-rows", type=int, default=64)
    parser.add_argument("--size", choices=sorted(SIZES), default="mid")
    parser.add_argument("--json", type=Path, help="where to write every round")
    args = parser.parse_args()
    result = uvloop.run(compare(args))
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
