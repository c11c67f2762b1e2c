"""`interlock bench`: how fast a version answers, through the bare engine and through servers that run.

Cases (subject, face, batch, threads, providers, requests in flight) are measured in turn, round after round; a ratio is the median of
the rounds' ratios to the bare engine's single row.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import uvloop

from interlock.client.load import GrpcTarget, HttpTarget, Load, Target
from interlock.errors import Unavailable
from interlock.runtime import terminal
from interlock_inference.engines import Array, EngineOptions
from interlock_inference.tools import own_server, report, timing
from interlock_inference.tools.options import numbers
from interlock_inference.tools.subject import inputs_for, opened, providers_of, run_of, short
from interlock_inference.tools.timing import Measure, Timing


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    subject: str
    face: str
    batch: int
    threads: int
    providers: str
    in_flight: int


def raw_cases(
    path: Path, batches: Sequence[int], threads: Sequence[int], providers: Sequence[tuple[str, ...]], file: Path | None
) -> Iterator[tuple[Case, Measure]]:
    """The bare engine, called on this thread. A batch that the model can't take has no case."""
    for wanted in providers:
        for count in threads:
            found = opened(path, EngineOptions(wanted, count))
            engine = found.engine
            rows = inputs_for(path, engine, file)
            actual = ",".join(short(name) for name in engine.providers)
            for batch in batches:
                arrays = rows.rows(engine.signature, batch)
                if arrays is not None:
                    yield Case(path.name, "raw", batch, count, actual, 1), timing.timed(run_of(engine, arrays))


def served_cases(
    targets: Mapping[str, Any],
    model: str,
    inputs: Mapping[int, Mapping[str, Array]],
    in_flight: Sequence[int],
    key: str,
) -> Iterator[tuple[Case, Measure]]:
    """A server that runs, asked by this process: `targets` are addresses by face."""
    kinds: dict[str, Any] = {"gRPC": GrpcTarget, "HTTP": HttpTarget}
    for face, address in targets.items():
        for batch, arrays in inputs.items():
            target = kinds[face](address, model, arrays, key)
            for count in in_flight:
                yield Case(model, face, batch, 0, "", count), _load(target, count)


def _load(target: Target, in_flight: int) -> Measure:
    async def asked(seconds: float) -> Timing:
        traffic, stopping = Load([target], rate=None, concurrency=in_flight), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.run(stopping))
            await asyncio.sleep(max(seconds, 0.1))
            stopping.set()
        failed = next((sample.error for sample in traffic.samples if sample.error), "")
        if failed:
            raise Unavailable(f"the server refused a request: {failed}", reason="BENCH_REFUSED")
        return timing.timing([sample.seconds for sample in traffic.samples], traffic.elapsed)

    return lambda seconds: uvloop.run(asked(seconds))


def rows_of(cases: Mapping[Case, Sequence[Timing]]) -> list[dict[str, Any]]:
    """One plain row per case; `of_raw` is rows per second against the first raw case's, round by round."""
    raw = next((found for case, found in cases.items() if case.face == "raw" and case.batch == 1), None)
    rows = []
    for case, found in cases.items():
        best = timing.median(found)
        row = {**asdict(case), "rows_per_second": best.calls_per_second * case.batch}
        row |= {"p50_ms": best.p50_ms, "p95_ms": best.p95_ms, "p99_ms": best.p99_ms}
        row["of_raw"] = timing.ratio(found, raw) * case.batch if raw is not None else None
        row["rounds_calls_per_second"] = [t.calls_per_second for t in found]
        rows.append(row)
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table."""
    header = ("SUBJECT", "FACE", "PROVIDERS", "THREADS", "IN FLIGHT", "BATCH", "P50 MS", "P95 MS", "P99 MS", "ROWS/S", "OF RAW")  # fmt: skip
    cells = [
        (r["subject"], r["face"], r["providers"], r["threads"] or "", r["in_flight"], r["batch"],
         *(f"{r[name]:.3f}" for name in ("p50_ms", "p95_ms", "p99_ms")), f"{r['rows_per_second']:,.0f}",
         "" if r["of_raw"] is None else f"{r['of_raw']:.2f}")
        for r in rows
    ]  # fmt: skip
    terminal.table(cells, header, numbers_from=3)


def lines_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The plot: rows per second over the batch, a line for everything else that differs."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        parts = (r["subject"], r["face"], r["providers"], f"{r['threads']} threads" if r["threads"] else "", f"{r['in_flight']} in flight")  # fmt: skip
        lines.setdefault(" ".join(part for part in parts if part), []).append((r["batch"], r["rows_per_second"]))
    return lines


@click.command()
@click.argument("versions", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--batch",
    "batches",
    callback=numbers,
    metavar="N,N,...",
    default="1,2,4,8,16,32",
    show_default=True,
    help="Rows a request.",
)
@click.option(
    "--threads",
    callback=numbers,
    metavar="N,N,...",
    default="1",
    show_default=True,
    help="Engine threads, for the bare engine.",
)
@click.option("--providers", multiple=True, default=("CPU",), help="Best first, e.g. CUDA,CPU. May be repeated.")
@click.option("--inputs", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="An .npz of rows by input name.")  # fmt: skip
@click.option("--serve", "serve", is_flag=True, help="Also measure the first version behind gRPC and HTTP, served for the purpose.")  # fmt: skip
@click.option("--grpc", default="", metavar="HOST:PORT", help="A replica that runs; needs --model.")
@click.option("--http", default="", metavar="HOST:PORT", help="A gateway that runs; needs --model.")
@click.option("--model", default="", help="The served model's name.")
@click.option("--key", envvar="INTERLOCK_API_KEY", default="", help="API key of the running servers.")
@click.option(
    "--in-flight",
    callback=numbers,
    metavar="N,N,...",
    default="1,16",
    show_default=True,
    help="Requests at once, for servers.",
)
@click.option("--seconds", type=click.FloatRange(0.01), default=0.5, show_default=True, help="Per measurement.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw rows per second over the batch.")
@click.option("--report/--no-report", "keep", default=True, help="Keep the figures in <VERSION>.reports/.")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
def bench(
    versions: tuple[Path, ...], batches: list[int], threads: list[int], providers: tuple[str, ...], file: Path | None,
    serve: bool, grpc: str, http: str, model: str, key: str, in_flight: list[int], seconds: float, rounds: int, plot: Path | None,
    keep: bool, json_: bool,
) -> None:  # fmt: skip
    """Measure VERSIONS (folders or .onnx files; several are compared): bare engine, gRPC and HTTP.

    Name an ONNX and a PyTorch folder of the same model to compare the engines.
    """
    report.check_plot(plot)
    targets = {face: address for face, address in (("gRPC", grpc), ("HTTP", http)) if address}
    if not versions:
        raise click.UsageError("name a version folder or an .onnx file; for servers, the version that they serve")
    if bool(targets) != bool(model) or (targets and serve):
        raise click.UsageError("--grpc and --http need --model, and go without --serve")
    cases: dict[Case, Measure] = {}
    for path in versions:
        cases |= dict(raw_cases(path, batches, threads, [providers_of(text) for text in providers], file))
    if not cases:
        raise click.UsageError(f"no batch of {', '.join(map(str, batches))} rows fits what the model takes")
    with contextlib.ExitStack() as stack:
        if serve:
            targets, model, key = stack.enter_context(own_server.serving(versions[0])), own_server.MODEL, ""
        if targets:
            cases |= dict(served_cases(targets, model, _batches(versions[0], batches, file), in_flight, key))
        rows = rows_of(report.measured(cases, rounds=rounds, seconds=seconds))
    document = report.document("bench", versions=[str(path) for path in versions], rounds=rounds, seconds=seconds, rows=rows)  # fmt: skip
    terminal.show_json(document) if json_ else show(rows)
    if plot is not None:
        report.plot(plot, lines_of(rows), x="rows a request", y="rows per second", title="interlock bench")
    if keep:
        click.echo(f"report: {report.save(document, versions[0])}", err=True)


def _batches(path: Path, batches: Sequence[int], file: Path | None) -> dict[int, Mapping[str, Array]]:
    engine = opened(path, EngineOptions()).engine
    rows = inputs_for(path, engine, file)
    found = {batch: rows.rows(engine.signature, batch) for batch in batches}
    return {batch: arrays for batch, arrays in found.items() if arrays is not None}
