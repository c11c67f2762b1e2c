"""`interlock bench`, `ort-tune` and `quantize` as a user runs them: processes, their output, their reports, what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import onnx_models
from interlock.errors import FailedPrecondition
from interlock.stores import artifacts, modelspec
from interlock.stores.imagespec import PostprocessSpec, PreprocessSpec
from interlock.stores.modelspec import ModelSpec, TensorSpec
from interlock_inference.engines import EngineOptions
from interlock_inference.repository import open_artifact
from interlock_inference.tools.timing import Timing
from interlock_inference.tools.tune import DEFAULTS, Candidate, candidate, summary, write_tuned
from rooms import PATHS

TENSORS = ((TensorSpec("image", "FP32", (-1, 64)),), (TensorSpec("score", "FP32", (-1, 10)),))


def interlock(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "interlock.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)


def digits_version(folder: Path, *, spoilt: bool = False) -> Path:
    """A linear classifier of the digits. The spoilt one has a weight of 10,000 at a pixel that is always black: the same answers in
    floating point, but a scale for INT8 at which all other weights are zero."""
    digits = load_digits()
    found = LogisticRegression(max_iter=200).fit(digits.data / 16.0, digits.target)
    weights = found.coef_.T.astype(np.float32)
    if spoilt:
        weights[0, 0] = 1e4
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["image", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["score"])],
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(found.intercept_.astype(np.float32), "b")],
    )
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=onnx_models.OPSET, ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    modelspec.write_spec(folder, ModelSpec("digits", *TENSORS, source={"step": 7}))
    artifacts.write_manifest(folder)
    return folder


# --- bench ------------------------------------------------------------------------------------------------------------------------


def bench(*arguments: str | Path) -> dict[str, Any]:
    done = interlock("bench", *arguments, "--rounds", "2", "--seconds", "0.02", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_bench_measures_each_batch_and_thread_count_and_keeps_a_report_beside_the_version(tmp_path: Path) -> None:
    version = digits_version(tmp_path / "models" / "digits" / "3")
    before = artifacts.verify(version).digest
    document = bench(version, "--batch", "1,8", "--threads", "1,2", "--plot", tmp_path / "curve.svg")
    assert [(r["face"], r["batch"], r["threads"], r["providers"]) for r in document["rows"]] == [
        ("raw", 1, 1, "CPU"), ("raw", 8, 1, "CPU"), ("raw", 1, 2, "CPU"), ("raw", 8, 2, "CPU")
    ]  # fmt: skip
    for row in document["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["rows_per_second"] > 0
        assert len(row["rounds_calls_per_second"]) == 2
    assert document["rows"][0]["of_raw"] == 1.0
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    (kept,) = (tmp_path / "models" / "digits" / "3.reports").iterdir()
    assert json.loads(kept.read_text()) == document
    assert artifacts.verify(version).digest == before


def test_bench_serves_a_version_for_the_purpose(tmp_path: Path) -> None:
    document = bench(digits_version(tmp_path / "1"), "--batch", "1,4", "--serve", "--in-flight", "2", "--no-report")
    assert [(r["subject"], r["face"], r["batch"], r["in_flight"]) for r in document["rows"]] == [
        ("1", "raw", 1, 1), ("1", "raw", 4, 1),
        ("bench", "gRPC", 1, 2), ("bench", "gRPC", 4, 2), ("bench", "HTTP", 1, 2), ("bench", "HTTP", 4, 2),
    ]  # fmt: skip
    assert all(row["rows_per_second"] > 0 for row in document["rows"])


def test_bench_shows_a_table_to_a_person(tmp_path: Path) -> None:
    version = digits_version(tmp_path / "1")
    done = interlock("bench", version, "--batch", "4", "--rounds", "1", "--seconds", "0.02", "--no-report")
    assert done.stdout.splitlines()[0].split() == ["SUBJECT", "FACE", "PROVIDERS", "THREADS", "IN", "FLIGHT", "BATCH", "P50", "MS", "P95", "MS", "P99", "MS", "ROWS/S", "OF", "RAW"]  # fmt: skip
    assert done.stdout.splitlines()[1].split()[:2] == ["1", "raw"]
    assert not (tmp_path / "1.reports").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch", "0"], "'0' is not a whole number from 1 up"),
        (["--providers", "NPU"], "providers: 'NPUExecutionProvider' is not one of"),
        (["--grpc", "127.0.0.1:1"], "--grpc and --http need --model"),
        (["--plot", "curve.txt"], "--plot: curve.txt: the suffix must be one of"),
        (["--grpc", "127.0.0.1:1", "--model", "digits"], "the server refused a request"),
    ],
)
def test_bench_says_what_is_wrong(tmp_path: Path, arguments: list[str], says: str) -> None:
    done = interlock("bench", digits_version(tmp_path / "1"), "--rounds", "1", "--seconds", "0.01", *arguments)
    assert done.returncode in (1, 2)
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_bench_uses_the_callers_rows(tmp_path: Path) -> None:
    version = digits_version(tmp_path / "1")
    np.savez(tmp_path / "rows.npz", image=np.zeros((3, 64), np.float32))
    assert bench(version, "--batch", "8", "--inputs", tmp_path / "rows.npz")["rows"][0]["batch"] == 8
    np.savez(tmp_path / "other.npz", picture=np.zeros((3, 64), np.float32))
    done = interlock("bench", version, "--inputs", tmp_path / "other.npz")
    assert "has no array 'image'; the model takes image" in done.stderr


# --- quantize ---------------------------------------------------------------------------------------------------------------------


def test_a_quantised_version_carries_its_gate_and_its_report(tmp_path: Path) -> None:
    """004 part H-5: 128 samples, top-1 may fall by at most 0.5 %."""
    version, out = digits_version(tmp_path / "1"), tmp_path / "2"
    done = interlock("quantize", version, "--out", out, "--samples", "digits", "--seconds", "0.05")
    assert done.returncode == 0, done.stderr
    assert "gate             passed" in done.stdout
    manifest, spec = artifacts.verify(out), modelspec.read_spec(out)
    assert {entry.path for entry in manifest.files} == {"model.onnx", "model.toml", "quantize.json"}
    assert spec.gate is not None
    assert (spec.gate.metric, spec.gate.num_samples, spec.gate.drop_max) == ("top-1 accuracy", 128, 0.005)
    assert spec.gate.baseline > 0.95
    assert spec.gate.drop <= 0.005
    assert spec.source == {"step": 7, "quantised_from": artifacts.verify(version).digest}
    report = json.loads((out / "quantize.json").read_text())
    assert report["bytes"]["int8"] < report["bytes"]["before"]
    assert [row["batch"] for row in report["speeds"]] == [1, 8, 32]
    opened = open_artifact(out, manifest.digest, EngineOptions(), lambda percent, message: None)
    assert opened.engine.run({"image": np.zeros((1, 64), np.float32)}, ["score"])[0].shape == (1, 10)


def test_a_version_that_falls_short_is_kept_and_no_engine_loads_it(tmp_path: Path) -> None:
    version, out = digits_version(tmp_path / "1", spoilt=True), tmp_path / "2"
    done = interlock("quantize", version, "--out", out, "--samples", "digits", "--seconds", "0.05")
    assert done.returncode == 1
    assert "gate             failed: this version can't serve" in done.stdout
    assert "must not serve: top-1 accuracy fell from 0." in done.stderr
    with pytest.raises(FailedPrecondition, match="must not serve: top-1 accuracy fell") as refused:
        open_artifact(out, "", EngineOptions(), lambda percent, message: None)
    assert refused.value.reason == "GATE_FAILED"


def test_without_labels_the_two_must_agree(tmp_path: Path) -> None:
    version = digits_version(tmp_path / "1")
    rows = (load_digits().data[:40] / 16.0).astype(np.float32)
    np.savez(tmp_path / "rows.npz", image=rows)
    done = interlock("quantize", version, "--out", tmp_path / "2", "--samples", tmp_path / "rows.npz", "--max-drop", "1", "--seconds", "0.05", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    gate = json.loads(done.stdout)["gate"]
    assert (gate["metric"], gate["baseline"], gate["num_samples"], gate["passed"]) == ("top-1 agreement", 1.0, 40, True)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"image": np.zeros((4, 64), np.float32), "label": np.zeros(3, np.int64)}, "as many rows in each array are needed"),
        ({"image": np.zeros((4, 64), np.float32), "label": np.zeros(4, np.float32)}, "label must be one whole number a row"),
        ({"picture": np.zeros((4, 64), np.float32)}, "no array 'image'; it has picture"),
        ({"image": np.array([object()])}, "not an .npz of plain arrays"),
    ],
)  # fmt: skip
def test_samples_that_do_not_fit_are_refused_and_nothing_is_written(
    tmp_path: Path, arrays: dict[str, Any], says: str
) -> None:
    version = digits_version(tmp_path / "1")
    np.savez(tmp_path / "rows.npz", **arrays)
    done = interlock("quantize", version, "--out", tmp_path / "2", "--samples", tmp_path / "rows.npz")
    assert done.returncode == 1
    assert says in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "rows.npz"]


# --- ort-tune ---------------------------------------------------------------------------------------------------------------------


def tune(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return interlock("ort-tune", *arguments, "--rounds", "2", "--seconds", "0.01")


def test_every_combination_is_measured_and_the_report_is_kept(tmp_path: Path) -> None:
    version = digits_version(tmp_path / "3")
    done = tune(version, "--batch", "1,8", "--threads", "1,2", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    tried = [(r["options"]["graph_optimization"], r["options"]["intra_op_threads"], r["options"]["execution_mode"]) for r in document["combinations"]]  # fmt: skip
    levels = ("disabled", "basic", "extended", "all")
    wanted = [(level, *rest) for level in levels for rest in ((1, "sequential"), (2, "sequential"), (2, "parallel"))]
    assert sorted(tried) == sorted(wanted)
    (default,) = (row for row in document["combinations"] if row["default"])
    assert default["gain"] == 1.0
    assert default["final"]
    assert [row["final"] for row in document["combinations"]] == [True] * 4 + [False] * 8
    finalists = [row["gain"] for row in document["combinations"][:4]]
    assert finalists == sorted(finalists, reverse=True)
    assert all(set(row["rows_per_second"]) == {"1", "8"} and not row["problem"] for row in document["combinations"])
    (kept,) = (tmp_path / "3.reports").iterdir()
    assert json.loads(kept.read_text()) == document


def test_a_combination_that_answers_otherwise_is_out(tmp_path: Path) -> None:
    opened = open_artifact(digits_version(tmp_path / "1"), "", EngineOptions(), lambda percent, message: None)
    inputs = {"image": np.ones((1, 64), np.float32)}
    truth = opened.engine.run(inputs, ["score"])
    options = {**DEFAULTS, "providers": ["CPUExecutionProvider"]}
    assert candidate(opened, options, truth, inputs).engine is not None
    refused = candidate(opened, options, [truth[0] * 1.01], inputs)
    assert refused.engine is None
    assert refused.problem.startswith("answers differ by more than 0.001")


def test_only_what_is_clearly_faster_is_recommended() -> None:
    def rounds(rate: int) -> list[Timing]:
        return [Timing(rate, 1.0, 1, 1, 1)] * 3

    engine: Any = object()
    candidates = [Candidate({**DEFAULTS, "providers": ["CPUExecutionProvider"], "graph_optimization": level}, engine) for level in ("all", "basic", "extended")]  # fmt: skip
    first = {0: {1: rounds(100)}, 1: {1: rounds(180)}, 2: {1: rounds(50)}}
    lucky = summary(candidates, first, {0: {1: rounds(100)}, 1: {1: rounds(102)}}, 0)
    assert lucky["recommended"] is None
    unsteady = {0: {1: rounds(100)}, 1: {1: [*rounds(90)[:1], *rounds(150)[:2]]}}
    assert summary(candidates, first, unsteady, 0)["recommended"] is None
    clear = summary(candidates, first, {0: {1: rounds(100)}, 1: {1: rounds(150)}}, 0)
    assert (clear["recommended"]["graph_optimization"], clear["gain"]) == ("basic", pytest.approx(1.5))
    assert [row["gain"] for row in clear["combinations"]] == [pytest.approx(1.5), 1.0, pytest.approx(0.5)]


def test_the_tuned_version_has_the_options_and_the_same_model(tmp_path: Path) -> None:
    opened = open_artifact(digits_version(tmp_path / "1"), "", EngineOptions(), lambda percent, message: None)
    write_tuned(opened, tmp_path / "2", {"intra_op_threads": 2, "graph_optimization": "extended"})
    assert modelspec.read_spec(tmp_path / "2").engine_options == {
        "intra_op_threads": 2,
        "graph_optimization": "extended",
    }
    assert (tmp_path / "2" / "model.onnx").read_bytes() == (tmp_path / "1" / "model.onnx").read_bytes()
    again = open_artifact(tmp_path / "2", artifacts.verify(tmp_path / "2").digest, EngineOptions(), lambda percent, message: None)  # fmt: skip
    assert again.engine.run({"image": np.ones((1, 64), np.float32)}, ["score"])[0].shape == (1, 10)


def test_tuning_shows_a_table_and_says_what_to_write(tmp_path: Path) -> None:
    done = tune(digits_version(tmp_path / "1"), "--batch", "4", "--threads", "1", "--no-report")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["PROVIDERS", "GRAPH", "MODE", "THREADS", "ROWS/S", "AT", "4", "GAIN"]
    assert "[engine_options]" in done.stdout or "the defaults are best" in done.stdout
    assert not (tmp_path / "1.reports").exists()


# --- a folder of images -----------------------------------------------------------------------------------------------------------


def images_version(folder: Path) -> Path:
    """The digits' classifier, with the processing that makes its input of 8 x 8 images."""
    digits_version(folder)
    before = PreprocessSpec(color="L", scale=1 / 255, layout="NF", size=(8, 8))
    behind = PostprocessSpec(labels_file="labels.txt", top_k=1)
    (folder / "labels.txt").write_text("\n".join(f"digit-{n}" for n in range(10)))
    modelspec.write_spec(folder, replace(modelspec.read_spec(folder), preprocess=before, postprocess=behind))
    artifacts.write_manifest(folder)
    return folder


def images_folder(folder: Path, count: int = 200) -> Path:
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:count], digits.target[:count], strict=True)):
        place = folder / f"digit-{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(place / f"{number}.png")
    return folder


def test_a_folder_of_images_is_read_by_the_versions_own_processing(tmp_path: Path) -> None:
    version, images = images_version(tmp_path / "1"), images_folder(tmp_path / "images")
    done = interlock("quantize", version, "--out", tmp_path / "2", "--samples", images, "--seconds", "0.05")
    assert done.returncode == 0, done.stderr
    spec = modelspec.read_spec(tmp_path / "2")
    assert spec.gate is not None
    assert (spec.gate.num_samples, spec.gate.samples) == (128, str(images))
    assert spec.gate.baseline > 0.95, "the folders' names are matched to the version's labels"
    opened = open_artifact(tmp_path / "2", "", EngineOptions(), lambda percent, message: None)
    assert opened.processing is not None, "the labels came along"


@pytest.mark.parametrize("broken", ["no processing", "empty", "unknown label", "damaged"])
def test_a_folder_of_images_that_does_not_fit_is_refused_by_name(tmp_path: Path, broken: str) -> None:
    version = (digits_version if broken == "no processing" else images_version)(tmp_path / "1")
    images = tmp_path / "images"
    images.mkdir()
    if broken != "empty":
        images_folder(images, 5)
    if broken == "unknown label":
        (images / "digit-1").rename(images / "letter-a")
    if broken == "damaged":
        (images / "digit-1" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    done = interlock("quantize", version, "--out", tmp_path / "2", "--samples", images)
    assert done.returncode == 1
    says = {
        "no processing": "needs [preprocess]",
        "empty": "no images in it",
        "unknown label": "'letter-a' is not a label of the version",
        "damaged": "digit-1/1.png: image[0]",
    }
    assert says[broken] in done.stderr
    assert not (tmp_path / "2").exists()
