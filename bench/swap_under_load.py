"""Swaps under load: 0 failed requests, the time of the switch, and latencies before, during and after. Prints a table; `--json` writes all of it.

Without `--grpc` it starts a replica (and, unless `--no-http`, a gateway) of its own on free ports with models made here, and plays the
controller's part itself: prepare, warm, apply the route, drain, release. With `--grpc` and `--http` it measures what runs there, without swaps.

    python bench/swap_under_load.py --rate 1000 --seconds 20 --swaps 3
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import uvloop
from onnx import TensorProto, helper, numpy_helper

from interlock.api.inference.v1 import runtime_service_pb2 as pb
from interlock.api.inference.v1 import runtime_service_pb2_grpc as pb_grpc
from interlock.api.types.v1 import types_pb2
from interlock.client.load import GrpcTarget, HttpTarget, Load
from interlock.runtime.channels import Caller, open_channel
from interlock.stores import artifacts, modelspec
from interlock.stores.modelspec import BatchingSpec, ModelSpec, TensorSpec
from interlock_inference.tools.own_server import free_ports

MODEL = "bench"
SIZES = {
    "tiny": (16, 64, 64, 8),
    "mid": (784, 1024, 1024, 10),
    "wide": (784, 4096, 4096, 10),
    "large": (4096,) * 9,  # 512 MiB
}
CALLER = Caller()


def mlp(sizes: tuple[int, ...], seed: int) -> bytes:
    """x [batch, sizes[0]] -> y [batch, sizes[-1]], relu between."""
    random = np.random.default_rng(seed)
    nodes, weights, name = [], [], "x"
    for layer, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        last = layer == len(sizes) - 2
        weights.append(
            numpy_helper.from_array(
                (random.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32), f"w{layer}"
            )
        )
        weights.append(numpy_helper.from_array(np.zeros(columns, np.float32), f"b{layer}"))
        out = "y" if last else f"h{layer}"
        nodes.append(helper.make_node("Gemm", [name, f"w{layer}", f"b{layer}"], [out]))
        if not last:
            nodes.append(helper.make_node("Relu", [out], [f"r{layer}"]))
        name = f"r{layer}"
    info = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", c])
        for n, c in (("x", sizes[0]), ("y", sizes[-1]))
    ]
    graph = helper.make_graph(nodes, "mlp", [info[0]], [info[1]], weights)
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


def write_version(
    folder: Path, body: bytes, sizes: tuple[int, ...], model: str = MODEL, batching: BatchingSpec | None = None
) -> None:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(body)
    onnx.checker.check_model(str(folder / "model.onnx"))
    tensors = ((TensorSpec("x", "FP32", (-1, sizes[0])),), (TensorSpec("y", "FP32", (-1, sizes[-1])),))
    modelspec.write_spec(folder, ModelSpec(model, *tensors, batching=batching))
    artifacts.write_manifest(folder)


@asynccontextmanager
async def room(module: str, env: dict[str, str]) -> AsyncIterator[None]:
    """A room's process, until the block ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, stdout=asyncio.subprocess.DEVNULL, env=env
    )
    try:
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def wait_for_port(port: int) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return


class Commands:
    """The controller's part, without the judgement."""

    def __init__(self, channel: Any, home: Path, sizes: tuple[int, ...]) -> None:
        self.stub: Any = pb_grpc.RuntimeServiceStub(channel)
        self.home = home
        for number in range(2):  # two take turns, under new names; made before the load
            write_version(home / "models" / MODEL / str(number), mlp(sizes, number), sizes)
        self.fence = pb.Fence(token=1)
        self.serving = 0

    async def swap(self) -> float:
        """To the next version; milliseconds of the switch itself."""
        number = self.serving + 1
        name = f"models/{MODEL}/versions/{number}"
        folder = self.home / "models" / MODEL / str(number % 2)
        prepare = pb.PrepareRequest(fence=self.fence, version=name, artifact_uri=str(folder))
        async for _ in CALLER.stream(self.stub.Prepare, prepare, timeout=120):
            pass
        await CALLER.unary(self.stub.Warm, pb.WarmRequest(fence=self.fence, version=name), timeout=60)
        route = types_pb2.Route(
            model=f"models/{MODEL}", epoch=number, weights=[types_pb2.RouteWeight(version=name, weight=1)]
        )
        applied = await CALLER.unary(
            self.stub.ApplyRoute, pb.ApplyRouteRequest(fence=self.fence, route=route), timeout=5
        )
        if self.serving:
            previous = f"models/{MODEL}/versions/{self.serving}"
            await CALLER.unary(self.stub.Drain, pb.DrainRequest(fence=self.fence, version=previous), timeout=60)
            await CALLER.unary(self.stub.Release, pb.ReleaseRequest(fence=self.fence, version=previous), timeout=30)
        self.serving = number
        return float(applied.switch_duration.ToNanoseconds() / 1e6)

    async def beside(self, megabytes: int) -> None:
        """Loads and releases another model of about that size: what a load does to the tail of what serves."""
        layers = max(1, megabytes // 64)
        sizes = (4096,) * (layers + 1)
        folder = self.home / "models" / "beside" / "1"
        name = "models/beside/versions/1"
        if not folder.exists():
            write_version(folder, mlp(sizes, 0), sizes)
            return
        prepare = pb.PrepareRequest(fence=self.fence, version=name, artifact_uri=str(folder))
        async for _ in CALLER.stream(self.stub.Prepare, prepare, timeout=120):
            pass
        await CALLER.unary(self.stub.Warm, pb.WarmRequest(fence=self.fence, version=name), timeout=60)
        await CALLER.unary(self.stub.Release, pb.ReleaseRequest(fence=self.fence, version=name), timeout=30)


async def own_rooms(
    stack: AsyncExitStack, args: argparse.Namespace, home: Path, **settings: str
) -> tuple[str, str, Commands]:
    """Starts what is to be measured; its addresses."""
    names = ("INFERENCE_PORT", "INFERENCE_METRICS_PORT", "GATEWAY_PORT", "CONTROLLER_PORT", "TRAINER_PORT")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    env = {n: v for n, v in os.environ.items() if not n.startswith("INTERLOCK_")} | {
        f"INTERLOCK_{n}": str(p) for n, p in ports.items()
    }
    env |= {"INTERLOCK_HOME": str(home), **settings}
    await stack.enter_async_context(room("interlock_inference", env))
    await wait_for_port(ports["INFERENCE_PORT"])
    if not args.no_http:
        await stack.enter_async_context(room("interlock_gateway", env))
        await wait_for_port(ports["GATEWAY_PORT"])
    grpc = f"127.0.0.1:{ports['INFERENCE_PORT']}"
    channel = await stack.enter_async_context(open_channel(grpc))
    commands = Commands(channel, home, SIZES[args.size])
    await commands.swap()
    if getattr(args, "beside_mb", 0):
        await commands.beside(args.beside_mb)
    return grpc, "" if args.no_http else f"127.0.0.1:{ports['GATEWAY_PORT']}", commands


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        grpc, http, commands = args.grpc, args.http, None
        if not grpc and not http:
            grpc, http, commands = await own_rooms(stack, args, home)
        inputs = {"x": np.zeros((1, SIZES[args.size][0]), np.float32)}
        targets: list[Any] = [GrpcTarget(grpc, args.model, inputs, args.key)] if grpc else []
        targets += [HttpTarget(http, args.model, inputs, args.key)] if http else []
        load = Load(targets, rate=args.rate or None, concurrency=args.concurrency)
        switches = await drive(load, commands, args)
        report = load.report()
        print(report.table())
        print(f"switch ms: {', '.join(f'{ms:.1f}' for ms in switches) or '-'}")
        return {"switch_ms": switches, "size": args.size, "requested_rate": args.rate, **report.as_dict()}


async def drive(load: Load, commands: Commands | None, args: argparse.Namespace) -> list[float]:
    """Runs the load with its swaps spread over the middle; milliseconds of each switch."""
    stopping, switches = asyncio.Event(), []
    num_swaps = args.swaps if commands else 0
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run(stopping))
        for number in range(num_swaps):
            await asyncio.sleep(args.seconds / (num_swaps + 1))
            assert commands is not None
            with load.marked(f"swap {number + 1}"):
                switches.append(await commands.swap())
        if commands and args.beside_mb:
            with load.marked(f"load {args.beside_mb} MB"):
                await commands.beside(args.beside_mb)
        await asyncio.sleep(max(0.0, args.seconds - load.elapsed))
        stopping.set()
    return switches


def main() -> int:
    """Exit code 1 when a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rate", type=float, default=1000.0, help="requests per second over all targets; 0: as fast as it goes"
    )
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight with --rate 0")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--swaps", type=int, default=1)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--grpc", default="", help="address of a running replica")
    parser.add_argument("--http", default="", help="address of a running gateway")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--key", default="", help="API key for a running service")
    parser.add_argument("--beside-mb", type=int, default=0, help="also load another model of this size after the swaps")
    parser.add_argument("--no-http", action="store_true", help="no gateway: gRPC only")
    parser.add_argument("--json", type=Path, help="where to write everything")
    args = parser.parse_args()
    result = uvloop.run(measure(args))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
