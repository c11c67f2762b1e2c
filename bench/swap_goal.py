"""The goal for swaps: 0 failed in 200,000 requests over 50 swaps, failing loads and a model of half a gigabyte among them, and what the swaps do to the p99.

    python bench/swap_goal.py                                        200,000 requests at 800/s over HTTP and gRPC; about five minutes
    python bench/swap_goal.py --requests 20000 --swaps 8 --rate 400  a short one

The load runs on the 784-1024-1024-10 MLP (7.5 MB), open loop, latency counted from when a request was due. Beside its own swaps, in turn: a corrupt
candidate, one whose loading process is killed, one that needs more memory than there is, one of another signature (all must be refused,
and nothing served may notice), and swaps of a second model of --large-mb. Steady is what was due outside all of these. Prints one row
per kind and the ratios of their p99 to the steady one; exit code 1 when a request failed or a bad candidate was not refused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from onnx import TensorProto, helper, numpy_helper
from swap_under_load import CALLER, MODEL, SIZES, Commands, mlp, own_rooms, write_version

from interlock.api.inference.v1 import runtime_service_pb2 as pb
from interlock.api.types.v1 import types_pb2
from interlock.client.load import SETTLE_SECONDS, GrpcTarget, HttpTarget, Load, Sample, figures
from interlock.errors import InterlockError
from interlock.stores import artifacts

LARGE = "large"
EXPECTED = {
    "corrupt": "DIGEST_MISMATCH",
    "crash": "LOAD_CRASHED",
    "huge": "DOES_NOT_FIT",
    "incompatible": "SIGNATURE_MISMATCH",
}


def bomb(elements: int) -> bytes:
    """x [batch, 784] -> y [batch, 10]; a run wants so many floats at once."""
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["many"]),
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Add", ["many", "s"], ["more"]),
        helper.make_node("ReduceSum", ["more"], ["t"], keepdims=0),
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node("Add", ["z", "t"], ["y"]),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", c]) for n, c in (("x", 784), ("y", 10))]
    weights = [
        numpy_helper.from_array(np.array([elements]), "size"),
        numpy_helper.from_array(np.zeros((784, 10), np.float32), "w"),
    ]
    graph = helper.make_graph(nodes, "bomb", [info[0]], [info[1]], weights)
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


class Candidates:
    """The failing ones and the large one, made before the load begins."""

    def __init__(self, commands: Commands, large_mb: int) -> None:
        self._commands = commands
        self._home = commands.home / "models" / MODEL
        sizes = SIZES["mid"]
        for name, body, shape in (
            ("corrupt", mlp(sizes, 7), sizes),
            ("crash", mlp(sizes, 8), sizes),
            ("huge", bomb(1 << 42), sizes),
            ("incompatible", mlp((784, 16, 11), 9), (784, 16, 11)),
        ):
            write_version(self._home / name, body, shape)
        self._digest = artifacts.read_manifest(self._home / "corrupt").digest
        damaged = bytearray((self._home / "corrupt" / "model.onnx").read_bytes())
        damaged[len(damaged) // 2] ^= 1
        (self._home / "corrupt" / "model.onnx").write_bytes(damaged)
        self._large = (4096,) * (max(1, large_mb // 64) + 1)
        self._large_number = 0
        if large_mb:
            for number in range(2):
                write_version(commands.home / "models" / LARGE / str(number), mlp(self._large, number), self._large)

    async def refused(self, kind: str) -> str:
        """Loads a bad candidate and gives the reason of its refusal; empty when it was not refused."""
        commands = self._commands
        name = f"models/{MODEL}/versions/{kind}"
        request = pb.PrepareRequest(
            fence=commands.fence,
            version=name,
            artifact_uri=str(self._home / kind),
            compatible_with=f"models/{MODEL}/versions/{commands.serving}",
        )
        try:
            async for _ in CALLER.stream(commands.stub.Prepare, request, timeout=120):
                pass
        except InterlockError as error:
            return error.reason
        finally:
            await CALLER.unary(commands.stub.Release, pb.ReleaseRequest(fence=commands.fence, version=name), timeout=30)
        return ""

    async def swap_large(self) -> None:
        """To the other large version: load, warm, route, drain, release."""
        commands, before = self._commands, self._large_number
        self._large_number += 1
        name = f"models/{LARGE}/versions/{self._large_number}"
        folder = commands.home / "models" / LARGE / str(self._large_number % 2)
        prepare = pb.PrepareRequest(fence=commands.fence, version=name, artifact_uri=str(folder))
        async for _ in CALLER.stream(commands.stub.Prepare, prepare, timeout=300):
            pass
        await CALLER.unary(commands.stub.Warm, pb.WarmRequest(fence=commands.fence, version=name), timeout=120)
        weights = [types_pb2.RouteWeight(version=name, weight=1)]
        route = types_pb2.Route(model=f"models/{LARGE}", epoch=self._large_number, weights=weights)
        await CALLER.unary(commands.stub.ApplyRoute, pb.ApplyRouteRequest(fence=commands.fence, route=route), timeout=5)
        if before:
            old = f"models/{LARGE}/versions/{before}"
            await CALLER.unary(commands.stub.Drain, pb.DrainRequest(fence=commands.fence, version=old), timeout=60)
            await CALLER.unary(commands.stub.Release, pb.ReleaseRequest(fence=commands.fence, version=old), timeout=30)


async def story(load: Load, commands: Commands, candidates: Candidates, args: argparse.Namespace) -> list[str]:
    """All swaps, spread over the load; what was not refused as it should be."""
    wrong, kinds = [], list(EXPECTED)
    period = args.requests / args.rate / (args.swaps + 1)
    for number in range(1, args.swaps + 1):
        await asyncio.sleep(max(0.0, number * period - load.elapsed))
        with load.marked("swap"):
            await commands.swap()
        if number % 2 == 0:
            kind = kinds[number // 2 % len(kinds)]
            await asyncio.sleep(period / 3)
            with load.marked(f"refused {kind}"):
                reason = await candidates.refused(kind)
            if reason != EXPECTED[kind]:
                wrong.append(f"{kind}: {reason or 'not refused'}")
        if args.large_mb and number % args.large_every == 0:
            with load.marked(f"swap of {args.large_mb} MB beside"):
                await candidates.swap_large()
    await asyncio.sleep(max(0.0, args.requests / args.rate - load.elapsed))
    return wrong


def grouped(load: Load) -> dict[str, list[Sample]]:
    """Samples by the kind of the mark that they were in flight in; `steady` is in none."""
    spans = [(m.name, m.start, (m.end or load.elapsed) + SETTLE_SECONDS) for m in load.marks]
    groups: dict[str, list[Sample]] = {"steady": []}
    for sample in load.samples:
        inside = {name for name, start, end in spans if sample.due <= end and sample.due + sample.seconds >= start}
        for name in inside or {"steady"}:
            groups.setdefault(name, []).append(sample)
    return groups


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args.size = "mid"
        grpc, http, commands = await own_rooms(stack, args, home, INTERLOCK_FAILPOINT="child.load:crash")
        candidates = Candidates(commands, args.large_mb)
        if args.large_mb:
            await candidates.swap_large()
        inputs = {"x": np.zeros((1, SIZES["mid"][0]), np.float32)}
        targets: list[Any] = [GrpcTarget(grpc, MODEL, inputs)]
        targets += [HttpTarget(http, MODEL, inputs)] if http else []
        load, stopping = Load(targets, rate=args.rate), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(stopping))
            wrong = await story(load, commands, candidates, args)
            stopping.set()
        return result(load, wrong)


def result(load: Load, wrong: list[str]) -> dict[str, Any]:
    """Prints the table; the same as plain data."""
    rows = {name: figures(samples) for name, samples in grouped(load).items()}
    steady = rows["steady"].p99_ms or float("nan")
    report = load.report()
    row: Callable[..., str] = "{:<28}{:>10}{:>8}{:>10}{:>10}{:>10}{:>12}".format
    print(f"{report.count} requests, {report.failed} failed, {sum(m.name == 'swap' for m in load.marks)} swaps")
    print(row("", "requests", "failed", "p50 ms", "p99 ms", "max ms", "p99/steady"))
    for name, f in rows.items():
        print(row(name, f.count, f.failed, f.p50_ms, f.p99_ms, f.max_ms, f"{f.p99_ms / steady:.2f}"))
    for line in [*(f"error {reason}: {count}" for reason, count in report.errors.items()), *wrong]:
        print(line)
    figures_by_name = {
        name: {"count": f.count, "failed": f.failed, "p50_ms": f.p50_ms, "p99_ms": f.p99_ms, "ratio": f.p99_ms / steady}
        for name, f in rows.items()
    }
    return {"requests": report.count, "failed": report.failed, "wrong": wrong, "figures": figures_by_name}


def main() -> int:
    """Exit code 1 when the goal's zero is not zero."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--rate", type=float, default=800.0, help="requests per second over both protocols")
    parser.add_argument("--large-mb", type=int, default=512, help="size of the model swapped beside; 0: none")
    parser.add_argument("--large-every", type=int, default=10, help="one swap of it per so many")
    parser.add_argument("--no-http", action="store_true", help="no gateway: gRPC only")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    outcome = uvloop.run(measure(args))
    if args.json:
        args.json.write_text(json.dumps(outcome, indent=1) + "\n")
    return 1 if outcome["failed"] or outcome["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
