"""An hour at 70 % of what the rooms can take, with a swap every minute: memory, files, threads and latency must stay flat.

    python bench/soak.py --json soak.json --plot soak.png        an hour on the 7.5 MB MLP, over HTTP and gRPC
    python bench/soak.py --minutes 5 --size tiny --no-http       a short one

First the capacity is measured (closed loop, ten seconds), then requests come at --share of it, open loop. Every --every seconds the
processes are looked at (resident memory, open files, threads, children); every minute there is a swap, and the minute's p50 and p99 are kept.
Prints slopes by least squares after the first --settle minutes, and exits with 1 when a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from swap_under_load import MODEL, SIZES, Commands, own_rooms

from interlock.client.load import GrpcTarget, HttpTarget, Load, figures

CAPACITY_SECONDS = 10.0
MINUTE = 60.0


def look(second: float) -> dict[str, float]:
    """The rooms' processes now; those that load are counted with them."""
    row: dict[str, float] = {"minute": second / MINUTE, "children": 0}
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
            room = next((name for name in ("inference", "gateway") if f"-m interlock_{name}" in line), "")
            if "loads.child" in line or not room:
                row["children"] += 1
                continue
            with process.oneshot():
                row[f"{room}_rss_mib"] = process.memory_info().rss / 2**20
                row[f"{room}_files"] = process.num_fds()
                row[f"{room}_threads"] = process.num_threads()
        except psutil.Error:
            continue
    return row


def targets(grpc: str, http: str, size: str) -> list[Any]:
    inputs = {"x": np.zeros((1, SIZES[size][0]), np.float32)}
    made: list[Any] = [GrpcTarget(grpc, MODEL, inputs)]
    return made + ([HttpTarget(http, MODEL, inputs)] if http else [])


async def capacity(grpc: str, http: str, size: str) -> float:
    """Requests per second with 32 in flight."""
    load, stopping = Load(targets(grpc, http, size), rate=None, concurrency=32), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run(stopping))
        await asyncio.sleep(CAPACITY_SECONDS)
        stopping.set()
    return load.report().rate


async def watch(rows: list[dict[str, float]], load: Load, every: float, stopping: asyncio.Event) -> None:
    """Looks at the processes until the end; in a thread, so that looking delays no request."""
    while not stopping.is_set():
        rows.append(await asyncio.to_thread(look, load.elapsed))
        await asyncio.sleep(every)


async def minutes(load: Load, commands: Commands, count: int) -> list[dict[str, float]]:
    """A swap in the middle of each minute; its latency at its end. Samples are dropped: an hour of them would be the largest thing here."""
    kept = []
    for minute in range(1, count + 1):
        await asyncio.sleep(max(0.0, (minute - 0.5) * MINUTE - load.elapsed))
        await commands.swap()
        await asyncio.sleep(max(0.0, minute * MINUTE - load.elapsed))
        samples, load.samples = load.samples, []
        seen = figures(samples)
        kept.append(
            {"minute": minute, "count": seen.count, "failed": seen.failed, "p50_ms": seen.p50_ms, "p99_ms": seen.p99_ms}
        )
        print(
            f"minute {minute}: {seen.count} requests, {seen.failed} failed, p50 {seen.p50_ms} ms, p99 {seen.p99_ms} ms"
        )
    return kept


def slope(rows: list[dict[str, float]], name: str, settle: float) -> tuple[float, float]:
    """(per hour, mean) by least squares over what came after `settle` minutes."""
    points = [(row["minute"] / 60, row[name]) for row in rows if name in row and row["minute"] >= settle]
    if len(points) < 2:
        return 0.0, points[0][1] if points else 0.0
    hours, values = (np.array(column) for column in zip(*points, strict=True))
    return float(np.polyfit(hours, values, 1)[0]), float(values.mean())


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        grpc, http, commands = await own_rooms(stack, args, home)
        most = await capacity(grpc, http, args.size)
        rate = args.rate or args.share * most
        print(f"capacity {most:.0f}/s, going on at {rate:.0f}/s")
        load, stopping = Load(targets(grpc, http, args.size), rate=rate), asyncio.Event()
        rows: list[dict[str, float]] = []
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(stopping))
            watching = group.create_task(watch(rows, load, args.every, stopping))
            kept = await minutes(load, commands, args.minutes)
            stopping.set()
            watching.cancel()
        names = sorted({name for row in rows for name in row} - {"minute", "children"})
        slopes = {name: slope(rows, name, args.settle) for name in names}
        slopes |= {name: slope(kept, name, args.settle) for name in ("p50_ms", "p99_ms")}
        return {
            "capacity": most,
            "rate": rate,
            "requests": sum(int(row["count"]) for row in kept),
            "failed": sum(int(row["failed"]) for row in kept),
            "swaps": args.minutes,
            "slopes_per_hour": {name: round(each[0], 3) for name, each in slopes.items()},
            "means": {name: round(each[1], 3) for name, each in slopes.items()},
            "processes": rows,
            "minutes": kept,
        }


def plot(result: dict[str, Any], path: Path) -> None:
    """Latency and memory over the minutes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name in ("p50_ms", "p99_ms"):
        upper.plot([row["minute"] for row in result["minutes"]], [row[name] for row in result["minutes"]], label=name)
    for name in sorted({name for row in result["processes"] for name in row if name.endswith("_rss_mib")}):
        points = [(row["minute"], row[name]) for row in result["processes"] if name in row]
        lower.plot(*zip(*points, strict=True), label=name)
    upper.set(ylabel="ms", ylim=(0, None), title=f"{result['rate']:.0f} requests/s, a swap every minute")
    lower.set(ylabel="MiB", xlabel="minutes", ylim=(0, None))
    for axes in (upper, lower):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Exit code 1 when a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--share", type=float, default=0.7, help="of the measured capacity")
    parser.add_argument("--rate", type=float, default=0.0, help="requests per second instead")
    parser.add_argument("--size", choices=sorted(SIZES), default="mid")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks at the processes")
    parser.add_argument("--settle", type=float, default=5.0, help="minutes that the slopes leave out")
    parser.add_argument("--no-http", action="store_true", help="no gateway: gRPC only")
    parser.add_argument("--json", type=Path, help="where to write everything")
    parser.add_argument("--plot", type=Path, help="where to write a PNG; needs matplotlib")
    args = parser.parse_args()
    result = uvloop.run(measure(args))
    print(f"{result['requests']} requests, {result['failed']} failed, {result['swaps']} swaps")
    for name, per_hour in result["slopes_per_hour"].items():
        print(f"{name:24}{result['means'][name]:>12.2f} on average{per_hour:>+12.3f} per hour")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
