"""`interlock ort-tune`: which of ONNX Runtime's options make a version fastest here, as an `[engine_options]` table for its model.toml.

Every combination is measured in turn, round after round, and its answers are held against those of the unoptimised graph: one that
answers differently is out, however fast. The best few meet the defaults again in three times as many rounds: of many, one is always
lucky. What is not faster in three of four of these rounds is not recommended.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, fsum, log
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort

from interlock.errors import FailedPrecondition, InterlockError
from interlock.runtime import terminal
from interlock.stores import modelspec
from interlock.stores.artifacts import read_manifest, write_manifest
from interlock_inference.engines import Array, Engine, EngineOptions, onnx
from interlock_inference.repository import Opened
from interlock_inference.tools import report, timing
from interlock_inference.tools.options import numbers
from interlock_inference.tools.subject import Inputs, inputs_for, model_of, opened, providers_of, run_of, short, spec_of

GAIN_MIN = 1.03  # below it a round's luck decides
NUM_FINALISTS = 3
TOLERANCE = 1e-3  # of the output's largest element; the optimiser reorders sums, it doesn't round more coarsely
OPTIMIZATION = ("disabled", "basic", "extended", "all")  # 004 part H-5
DEFAULTS: Mapping[str, Any] = {"graph_optimization": "all", "execution_mode": "sequential", "intra_op_threads": 1}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One combination, and why it is out, or nothing."""

    options: Mapping[str, Any]
    engine: Engine | None
    problem: str = ""

    @property
    def title(self) -> str:
        """As the table shows it."""
        own = self.options
        extra = "".join(f" {k}={v}" for table in own.get("provider_options", {}).values() for k, v in table.items())
        return ",".join(map(short, own["providers"])) + extra


def combinations(providers: Sequence[tuple[str, ...]], threads: Sequence[int]) -> Iterator[dict[str, Any]]:
    """`[engine_options]` tables. The parallel mode only where there is a second thread; the workspace option only where there is CUDA."""
    for names, level, count in itertools.product(providers, OPTIMIZATION, threads):
        for mode in ("sequential", "parallel") if count > 1 else ("sequential",):
            table = {
                "providers": list(names),
                "graph_optimization": level,
                "execution_mode": mode,
                "intra_op_threads": count,
            }
            if mode == "parallel":
                table["inter_op_threads"] = count
            if "CUDAExecutionProvider" not in names:
                yield table
                continue
            for workspace in ("0", "1"):
                yield table | {
                    "provider_options": {"CUDAExecutionProvider": {"cudnn_conv_use_max_workspace": workspace}}
                }


def candidate(
    subject: Opened, options: Mapping[str, Any], truth: Sequence[Array], inputs: Mapping[str, Array]
) -> Candidate:
    """Builds the combination and holds its answers against the unoptimised graph's."""
    spec = replace(spec_of(subject), engine_options=options)
    try:
        engine = onnx.load(model_of(subject), spec, EngineOptions())
        found = engine.run(inputs, [output.name for output in engine.signature.outputs])
    except InterlockError as error:
        return Candidate(options, None, f"{error.reason}: {error.message}")
    if missing := [short(name) for name in options["providers"] if name not in engine.providers]:
        return Candidate(options, None, f"{', '.join(missing)} did not come up")
    if not all(_same(ours, theirs) for ours, theirs in zip(found, truth, strict=True)):
        return Candidate(options, None, f"answers differ by more than {TOLERANCE:g} from the unoptimised graph's")
    return Candidate(options, engine)


def _same(ours: Array, theirs: Array) -> bool:
    if ours.dtype.kind != "f":
        return np.array_equal(ours, theirs)
    largest = float(np.max(np.abs(theirs), initial=1e-6))
    return bool(np.allclose(ours, theirs, rtol=0, atol=TOLERANCE * largest, equal_nan=True))


def measured(
    candidates: Sequence[Candidate], rows: Inputs, batches: Sequence[int], rounds: int, seconds: float
) -> dict[int, dict[int, list[timing.Timing]]]:
    """Candidate's place -> batch -> a timing per round."""
    cases = {
        (place, batch): timing.timed(run_of(one.engine, arrays))
        for place, one in enumerate(candidates)
        for batch in batches
        if one.engine is not None and (arrays := rows.rows(one.engine.signature, batch)) is not None
    }
    found = report.measured(cases, rounds=rounds, seconds=seconds)
    tables: dict[int, dict[int, list[timing.Timing]]] = {}
    for (place, batch), timings in found.items():
        tables.setdefault(place, {})[batch] = timings
    return tables


Timings = Mapping[int, Sequence[timing.Timing]]
"""Of one combination: batch -> a timing per round."""


def gain(mine: Timings, base: Timings, share: float = 0.5) -> float:
    """Geometric mean over the batches of the rounds' median ratio to the defaults, or of the ratio at another share of the rounds."""
    ratios = [timing.ratio(mine[batch], base[batch], share) for batch in mine]
    return exp(fsum(log(ratio) for ratio in ratios) / len(ratios))


@click.command()
@click.argument("version", type=click.Path(exists=True, path_type=Path))
@click.option("--batch", "batches", callback=numbers, metavar="N,N,...", default="1,32", show_default=True, help="Rows a request; all count alike.")  # fmt: skip
@click.option("--threads", callback=numbers, metavar="N,N,...", default="", help="Threads inside one run; default: 1 and as many as there are cores.")  # fmt: skip
@click.option("--providers", multiple=True, help="Best first, e.g. CUDA,CPU. May be repeated. Default: what is here.")
@click.option("--inputs", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="An .npz of rows by input name.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0.01), default=0.1, show_default=True, help="Per measurement.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write a version with the recommended options; must not exist.")  # fmt: skip
@click.option("--report/--no-report", "keep", default=True, help="Keep the figures in <VERSION>.reports/.")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
def tune(
    version: Path, batches: list[int], threads: list[int], providers: tuple[str, ...], file: Path | None,
    seconds: float, rounds: int, out: Path | None, keep: bool, json_: bool,
) -> None:  # fmt: skip
    """Search ONNX Runtime's options for those with which VERSION is fastest on this machine."""
    if out is not None and out.exists():
        raise click.UsageError(f"--out: {out} exists already")
    chosen = [providers_of(text) for text in providers] or default_providers()
    subject = opened(version, EngineOptions(chosen[0]))
    if spec_of(subject).engine != "onnx":
        raise FailedPrecondition(
            f"{version}: engine {spec_of(subject).engine} has no such options", reason="NOT_TUNABLE"
        )
    rows = inputs_for(version, subject.engine, file)
    fitting = [batch for batch in batches if rows.rows(subject.engine.signature, batch) is not None]
    if not fitting:
        raise click.UsageError(f"no batch of {', '.join(map(str, batches))} rows fits what the model takes")
    candidates = all_candidates(subject, rows, fitting[0], chosen, threads or default_threads())
    found = measured(candidates, rows, fitting, rounds, seconds)
    base = next(place for place, one in enumerate(candidates) if is_default(one, chosen[0]))
    if base not in found:
        raise FailedPrecondition(f"{version}: the defaults don't work here: {candidates[base].problem}", reason="NOT_TUNABLE")  # fmt: skip
    best = sorted((place for place in found if place != base), key=lambda place: -gain(found[place], found[base]))
    finalists = {base, *best[:NUM_FINALISTS]}
    last = [one if place in finalists else replace(one, engine=None) for place, one in enumerate(candidates)]
    result = summary(candidates, found, measured(last, rows, fitting, 3 * rounds, seconds), base)
    document = report.document("ort-tune", version=str(version), digest=subject.digest, inputs=rows.source, rounds=rounds, **result)  # fmt: skip
    terminal.show_json(document) if json_ else show(document, fitting)
    if out is not None:
        write_tuned(subject, out, result["recommended"])
        click.echo(f"written: {out}", err=True)
    if keep:
        click.echo(f"report: {report.save(document, version)}", err=True)


def default_providers() -> list[tuple[str, ...]]:
    """The CPU, and before it each accelerator of this build."""
    names = [name for name in onnx.BEST_FIRST if name in ort.get_available_providers()]
    accelerated = [(name, "CPUExecutionProvider") for name in names if name != "CPUExecutionProvider"]
    return [("CPUExecutionProvider",), *accelerated]


def default_threads() -> list[int]:
    """1, and all cores."""
    return list(dict.fromkeys((1, EngineOptions().threads(1 << 16))))


def all_candidates(
    subject: Opened, rows: Inputs, batch: int, providers: Sequence[tuple[str, ...]], threads: Sequence[int]
) -> list[Candidate]:
    """Every combination, the defaults among them."""
    inputs = rows.rows(subject.engine.signature, batch)
    assert inputs is not None, "the batch fits"
    plain = replace(spec_of(subject), engine_options={"graph_optimization": "disabled", "providers": ["CPUExecutionProvider"]})  # fmt: skip
    reference = onnx.load(model_of(subject), plain, EngineOptions())
    truth = reference.run(inputs, [output.name for output in reference.signature.outputs])
    tables = list(combinations(providers, list(dict.fromkeys((1, *threads)))))
    with report.progress() as bar:
        return [candidate(subject, table, truth, inputs) for table in bar.track(tables, description="building")]


def is_default(one: Candidate, providers: Sequence[str]) -> bool:
    """What a version gets that says nothing."""
    own = one.options
    plain = all(own[key] == value for key, value in DEFAULTS.items())
    return plain and own["providers"] == list(providers) and "1" not in str(own.get("provider_options", ""))


def summary(
    candidates: Sequence[Candidate], found: Mapping[int, Timings], final: Mapping[int, Timings], base: int
) -> dict[str, Any]:
    """Every combination with its figures, finalists by their final, best first, and the one to take."""
    rows = []
    for place, one in enumerate(candidates):
        source = final if place in final else found
        timings = source.get(place)
        rows.append(
            {
                "options": dict(one.options),
                "title": one.title,
                "problem": one.problem,
                "final": place in final,
                "gain": gain(timings, source[base]) if timings else None,
                "rows_per_second": {str(b): timing.median(t).calls_per_second * b for b, t in (timings or {}).items()},
                "default": place == base,
            }
        )
    rows.sort(key=lambda row: (not row["final"], -(row["gain"] or 0.0)))  # type: ignore[operator]
    sure = {place: gain(timings, final[base], 0.25) for place, timings in final.items() if place != base}
    best = max(sure, key=lambda place: _merit(candidates[place], gain(final[place], final[base])), default=base)
    recommended = candidates[best].options if sure.get(best, 1.0) >= GAIN_MIN else None
    return {
        "combinations": rows,
        "recommended": recommended and dict(recommended),
        "gain": gain(final[best], final[base]) if recommended else 1.0,
    }


def _merit(one: Candidate, found: float) -> tuple[float, int]:
    """Among equals to a hundredth, what changes least."""
    return round(found, 2), sum(one.options[key] == value for key, value in DEFAULTS.items())


def show(document: Mapping[str, Any], batches: Sequence[int]) -> None:
    """The table, best first, and the recommendation."""
    header = ("PROVIDERS", "GRAPH", "MODE", "THREADS", *(f"ROWS/S AT {batch}" for batch in batches), "GAIN", "")
    cells = []
    for row in document["combinations"]:
        own = row["options"]
        rates = [f"{row['rows_per_second'][str(b)]:,.0f}" if row["rows_per_second"] else "" for b in batches]
        mark = "default" if row["default"] else row["problem"] or ("final" if row["final"] else "")
        cells.append((row["title"], own["graph_optimization"], own["execution_mode"], own["intra_op_threads"], *rates, "" if row["gain"] is None else f"{row['gain']:.2f}", mark or " "))  # fmt: skip
    terminal.table(cells, header, numbers_from=None)
    if document["recommended"] is None:
        click.echo(f"\nthe defaults are best: nothing is faster by {GAIN_MIN - 1:.0%} in three of four rounds")
    else:
        click.echo(f"\n{document['gain']:.2f} times the defaults, for model.toml:\n")
        click.echo("\n".join(modelspec.engine_options_toml(document["recommended"])))


def write_tuned(subject: Opened, out: Path, recommended: Mapping[str, Any] | None) -> None:
    """A copy of the version with the options in its model.toml and a manifest of its own."""
    scratch = out.with_name(f".{out.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    files = [entry.path for entry in read_manifest(subject.path).files] if subject.path.is_dir() else []
    for name in files:
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(subject.path / name, scratch / name)
    if not files:
        shutil.copyfile(subject.path, scratch / "model.onnx")
    spec = spec_of(subject)
    modelspec.write_spec(scratch, replace(spec, engine_options=recommended or spec.engine_options))
    write_manifest(scratch)
    scratch.rename(out)
