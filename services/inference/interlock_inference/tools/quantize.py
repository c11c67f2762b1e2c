"""`interlock quantize`: an INT8 version of a version, compared with it on real samples; one that falls short can't serve.

Weights become INT8, activations are quantised while the model runs (ONNX Runtime's dynamic quantisation). That goes by the range of a
whole batch, so rows no longer answer for themselves: `[batching]` is not taken over.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from interlock.errors import FailedPrecondition, InvalidArgument
from interlock.runtime import terminal
from interlock.stores import golden, modelspec
from interlock.stores.artifacts import Manifest, write_manifest
from interlock.stores.modelspec import GateSpec
from interlock_inference.engines import EngineOptions
from interlock_inference.repository import Opened
from interlock_inference.tools import report, timing
from interlock_inference.tools import samples as sampling
from interlock_inference.tools.subject import inputs_for, model_of, opened, run_of, spec_of

REPORT_FILE = "quantize.json"
DROP_MAX = 0.005  # 004 part H-5: at most 0.5 % of top-1
NUM_SAMPLES = 128  # the same
EXTERNAL_DATA_BYTES = 1 << 30  # a protobuf ends at 2 GiB
STEPS = ("reading", "quantising", "measuring", "judging", "writing")


@click.command()
@click.argument("version", type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new version's folder; must not exist.")
@click.option(
    "--samples",
    "source",
    required=True,
    help="digits, an .npz (rows by input name, and label), or a folder <label>/<image>.",
)
@click.option("--num-samples", type=click.IntRange(1), default=NUM_SAMPLES, show_default=True)
@click.option("--max-drop", type=click.FloatRange(0, 1), default=DROP_MAX, show_default=True, help="Of top-1 accuracy, as a fraction.")  # fmt: skip
@click.option("--output", default="", help="The output with the class scores; default: the first.")
@click.option("--per-channel", is_flag=True, help="A scale per output channel: closer, sometimes slower.")
@click.option("--reduce-range", is_flag=True, help="7 bits: for processors with AVX2 or AVX-512 but no VNNI, where 8 overflow.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.01), default=0.5, show_default=True, help="Per measurement of the speed.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Picks the samples.")
@click.option("--json", "json_", is_flag=True, help="Print the report as JSON.")
def quantize(
    version: Path, out: Path, source: str, num_samples: int, max_drop: float, output: str, per_channel: bool,
    reduce_range: bool, threads: int, seconds: float, seed: int, json_: bool,
) -> None:  # fmt: skip
    """Write an INT8 version of VERSION to --out, held to an accuracy limit on real samples.

    Exit code 1 when it falls short: the folder is kept with its report, and no replica and no swap accepts it.
    """
    if out.exists():
        raise click.UsageError(f"--out: {out} exists already")
    options = EngineOptions(num_threads=threads)
    with report.progress() as bar, tempfile.TemporaryDirectory(dir=_parent(out)) as scratch:
        task = bar.add_task(STEPS[0], total=len(STEPS))

        def step(number: int) -> None:
            bar.update(task, completed=number, description=STEPS[min(number, len(STEPS) - 1)])

        before = opened(version, options)
        name = _scores(before, output)
        samples = sampling.read(source, before, num_samples, seed)
        folder = Path(scratch) / "version"
        folder.mkdir()
        step(1)
        to_int8(model_of(before), folder / "model.onnx", per_channel=per_channel, reduce_range=reduce_range)
        write_manifest(folder)
        step(2)
        after = opened(folder, options)
        speeds = _speeds(before, after, seconds)
        step(3)
        gate = judge(before, after, samples, name, max_drop)
        step(4)
        document = report.document("quantize", version=str(version), digest=before.digest, gate=_shown(gate), speeds=speeds, bytes=_bytes(before, after))  # fmt: skip
        _finish(folder, before, gate, document)
        folder.rename(out)
    terminal.show_json(document) if json_ else show(document, out)
    if gate.failure:
        raise FailedPrecondition(f"{out} must not serve: {gate.failure}", reason="GATE_FAILED", metadata={"gate": gate.failure})  # fmt: skip


def _parent(out: Path) -> Path:
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    return out.absolute().parent


def _scores(subject: Opened, output: str) -> str:
    names = [spec.name for spec in subject.engine.signature.outputs]
    if output and output not in names:
        raise InvalidArgument(
            f"--output: {output!r} is not one of {', '.join(names)}", reason="INVALID_PARAMETER", field="output"
        )
    return output or names[0]


def to_int8(source: Path, target: Path, *, per_channel: bool, reduce_range: bool) -> None:
    """Writes the quantised graph.

    Raises:
        FailedPrecondition: `COMPONENT_MISSING` without the onnx package, `NOT_QUANTISABLE`.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        raise FailedPrecondition(
            "quantising needs the onnx package: pip install 'interlock[train]'",
            reason="COMPONENT_MISSING",
            metadata={"extra": "train"},
        ) from None
    external = sum(file.stat().st_size for file in source.parent.iterdir() if file.is_file()) > EXTERNAL_DATA_BYTES
    try:
        with _silent():
            quantize_dynamic(
                source,
                target,
                weight_type=QuantType.QInt8,
                per_channel=per_channel,
                reduce_range=reduce_range,
                use_external_data_format=external,
            )
    except Exception as error:  # noqa: BLE001 - the library raises what it likes; all mean that this graph can't be quantised
        raise FailedPrecondition(
            f"{source}: can't be quantised: {' '.join(str(error).split())[:300]}", reason="NOT_QUANTISABLE"
        ) from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The library advises on the root logger; its advice is in our documentation."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _speeds(before: Opened, after: Opened, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for batch in (1, 8, 32):
        inputs = inputs_for(before.path, before.engine, None).rows(before.engine.signature, batch)
        if inputs is None:
            continue
        cases = {
            key: timing.timed(run_of(subject.engine, inputs)) for key, subject in (("before", before), ("int8", after))
        }
        found = timing.interleaved(cases, rounds=5, seconds=seconds / 5)
        rows.append(
            {
                "batch": batch,
                "before_rows_per_second": timing.median(found["before"]).calls_per_second * batch,
                "int8_rows_per_second": timing.median(found["int8"]).calls_per_second * batch,
                "ratio": timing.ratio(found["int8"], found["before"]),
            }
        )
    return rows


def judge(before: Opened, after: Opened, samples: sampling.Samples, output: str, max_drop: float) -> GateSpec:
    """Top-1 accuracy of both where labels are known, else how often they agree."""
    theirs, ours = (sampling.classes(subject.engine, samples, output) for subject in (before, after))
    if samples.labels is None:
        return GateSpec("top-1 agreement", 1.0, float(np.mean(theirs == ours)), max_drop, len(samples), samples.source)
    baseline, measured = (float(np.mean(found == samples.labels)) for found in (theirs, ours))
    return GateSpec("top-1 accuracy", baseline, measured, max_drop, len(samples), samples.source)


def _bytes(before: Opened, after: Opened) -> dict[str, int]:
    return {key: model_of(subject).stat().st_size for key, subject in (("before", before), ("int8", after))}


def _shown(gate: GateSpec) -> dict[str, Any]:
    return {f: getattr(gate, f) for f in ("metric", "baseline", "measured", "drop", "drop_max", "num_samples", "samples")} | {"passed": not gate.failure}  # fmt: skip


def _finish(folder: Path, before: Opened, gate: GateSpec, document: dict[str, Any]) -> Manifest:
    """The version's own files: model.toml with its gate, the golden set, the report, and the manifest over all of it."""
    spec = spec_of(before)
    source = {**spec.source, "quantised_from": before.digest}
    spec = replace(spec, engine="onnx", file="model.onnx", source=source, batching=None, gate=gate)
    labels = spec.postprocess.labels_file if spec.postprocess is not None else ""
    for name in filter(None, (golden.GOLDEN_FILE, labels)):
        if (before.path / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(before.path / name, folder / name)
    modelspec.write_spec(folder, spec)
    (folder / REPORT_FILE).write_bytes(report.dumps(document))
    return write_manifest(folder)


def show(document: dict[str, Any], out: Path) -> None:
    """The comparison for a person."""
    gate, sizes = document["gate"], document["bytes"]
    rows = [(r["batch"], f"{r['before_rows_per_second']:,.0f}", f"{r['int8_rows_per_second']:,.0f}", f"{r['ratio']:.2f}") for r in document["speeds"]]  # fmt: skip
    terminal.table(rows, ("BATCH", "BEFORE ROWS/S", "INT8 ROWS/S", "RATIO"), numbers_from=0)
    click.echo(
        f"\nsize             {sizes['before']:,} -> {sizes['int8']:,} bytes ({sizes['int8'] / sizes['before']:.2f})"
    )
    click.echo(f"{gate['metric']:<16} {gate['baseline']:.4f} -> {gate['measured']:.4f} on {gate['num_samples']} samples ({gate['samples']}); may fall by {gate['drop_max']:g}")  # fmt: skip
    verdict = click.style("passed", fg="green") if gate["passed"] else click.style("failed: this version can't serve", fg="red")  # fmt: skip
    click.echo(f"gate             {verdict}")
    click.echo(f"written          {out}  (report: {REPORT_FILE} in it)")
