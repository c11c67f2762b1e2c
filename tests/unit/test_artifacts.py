"""Artifact folders: what is written is read back, and every byte that changed is named."""

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.errors import DataLoss, FailedPrecondition, InterlockError, InvalidArgument, NotFound
from interlock.stores import artifacts, golden, modelspec
from interlock.stores.modelspec import BatchingSpec, ModelSpec, TensorSpec

SPEC = ModelSpec(
    name="policy",
    inputs=(TensorSpec("obs", "FP32", (-1, 4)),),
    outputs=(TensorSpec("logits", "FP32", (-1, 2)), TensorSpec("value", "FP32", (-1,))),
    source={"run": "cartpole", "step": 1500, "note": 'a "quoted" \\ line\n', "forced": True},
    export={"max_abs_error": 1.5e-7},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"graph" * 100)
    (tmp_path / "weights" / "a.bin").write_bytes(b"1234")
    (tmp_path / "empty").write_bytes(b"")
    modelspec.write_spec(tmp_path, SPEC)
    artifacts.write_manifest(tmp_path, {"run": "cartpole"})
    return tmp_path


def test_round_trip(folder: Path) -> None:
    manifest = artifacts.verify(folder)
    assert [f.path for f in manifest.files] == ["empty", "model.onnx", "model.toml", "weights/a.bin"]
    assert manifest.metadata == {"run": "cartpole"}
    assert modelspec.read_spec(folder) == SPEC
    assert artifacts.verify(folder, manifest.digest) == manifest
    assert SPEC.step == 1500


def test_the_digest_is_of_the_bytes_not_of_the_place_or_the_metadata(folder: Path) -> None:
    digest = artifacts.read_manifest(folder).digest
    assert artifacts.write_manifest(folder, {"other": 1}).digest == digest
    (folder / "weights" / "a.bin").rename(folder / "weights" / "b.bin")
    assert artifacts.write_manifest(folder).digest != digest


@given(where=st.integers(min_value=0, max_value=499), bit=st.integers(min_value=0, max_value=7))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, where: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("flip")
    body = bytearray(b"graph" * 100)
    (folder / "model.onnx").write_bytes(body)
    artifacts.write_manifest(folder)
    body[where] ^= 1 << bit
    (folder / "model.onnx").write_bytes(body)
    with pytest.raises(DataLoss, match=r"model\.onnx"):
        artifacts.verify(folder)


def test_damage_is_named(folder: Path) -> None:
    with pytest.raises(DataLoss, match="expected blake3:00"):
        artifacts.verify(folder, "blake3:00")
    (folder / "model.onnx").unlink()
    with pytest.raises(NotFound, match=r"model\.onnx") as missing:
        artifacts.verify(folder)
    assert missing.value.reason == "FILE_MISSING"
    (folder / "manifest.json").write_text('{"files": [}')
    with pytest.raises(DataLoss) as corrupt:
        artifacts.verify(folder)
    assert corrupt.value.reason == "MANIFEST_CORRUPT"
    (folder / "manifest.json").unlink()
    with pytest.raises(NotFound) as unfinished:
        artifacts.verify(folder)
    assert unfinished.value.reason == "MANIFEST_MISSING"


def test_links_are_refused(folder: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(InvalidArgument) as refused:
        artifacts.write_manifest(folder)
    assert refused.value.reason == "NOT_A_PLAIN_FILE"


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ({}, "name"),
        ({"name": 3}, "name"),
        ({"name": "m", "colour": 1}, "colour"),
        ({"name": "m", "engine": "pickle"}, "engine"),
        ({"name": "m", "file": "../model.onnx"}, "file"),
        ({"name": "m", "module": "os:system"}, "module"),
        ({"name": "m", "engine": "torch"}, "module"),
        ({"name": "m", "engine": "torch", "module": 3}, "module"),
        ({"name": "m", "file": "/etc/model.onnx"}, "file"),
        ({"name": "m"}, "inputs"),
        ({"name": "m", "inputs": [{"name": "x"}]}, "inputs[0]"),
        ({"name": "m", "inputs": [{"name": "x", "datatype": "float", "shape": [1]}]}, "inputs[0].datatype"),
        ({"name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [-2]}]}, "inputs[0].shape"),
        ({"name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [True]}]}, "inputs[0].shape"),
        ({"name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}]}, "outputs"),
    ],
)
def test_a_wrong_spec_names_its_field(table: dict[str, object], field: str) -> None:
    with pytest.raises(InterlockError) as refused:
        modelspec.parse_spec(table)
    assert refused.value.field == field


def test_golden_sets(tmp_path: Path) -> None:
    assert golden.read(tmp_path) == {}
    golden.write(tmp_path, {"a": {"x": np.arange(3.0), "t": np.array(["ü", ""])}, "b": {"x": np.zeros((0, 2))}})
    back = golden.read(tmp_path)
    assert back["a"]["x"].tolist() == [0.0, 1.0, 2.0]
    assert back["a"]["t"].tolist() == ["ü".encode(), b""]
    assert back["b"]["x"].shape == (0, 2)


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/x.npy", b"\0" * (golden.BYTES_MAX + 1))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda path: path.write_bytes(b"not a zip"), "not a golden set"),
        (lambda path: np.savez(path, x=np.zeros(1)), "<sample>/<input>"),
        (lambda path: np.savez(path, **{"a/x": np.array([{}], dtype=object)}), "not a golden set"),
        (bomb, "at most"),
    ],
)
def test_what_is_not_a_golden_set(tmp_path: Path, spoil: Callable[[Path], None], text: str) -> None:
    spoil(tmp_path / "golden.npz")
    with pytest.raises(FailedPrecondition, match=text) as refused:
        golden.read(tmp_path)
    assert refused.value.reason == "INVALID_ARTIFACT"


def test_batching_is_read_back_as_written_and_refused_with_its_key(tmp_path: Path) -> None:
    full = BatchingSpec(True, 32, (8, 16), 1.5, 20.0, 3, 2, 100, 250.0, "continue")
    for batching in (None, BatchingSpec(), BatchingSpec(enabled=False), full):
        spec = replace(SPEC, batching=batching)
        modelspec.write_spec(tmp_path, spec)
        assert modelspec.read_spec(tmp_path) == spec
    tensors = [{"name": "x", "datatype": "FP32", "shape": [-1]}]
    good = {"name": "m", "inputs": tensors, "outputs": tensors}
    cases: tuple[tuple[object, str], ...] = (
        (3, "batching"),
        ({"max_row": 3}, "batching.max_row"),
        ({"enabled": 1}, "batching.enabled"),
        ({"max_rows": 0}, "batching.max_rows"),
        ({"max_rows": True}, "batching.max_rows"),
        ({"preferred_rows": [8, 4]}, "batching.preferred_rows"),
        ({"preferred_rows": [128]}, "batching.preferred_rows"),
        ({"max_delay_ms": -1}, "batching.max_delay_ms"),
        ({"max_run_ms": float("nan")}, "batching.max_run_ms"),
        ({"default_priority": 2}, "batching.default_priority"),
        ({"timeout_action": "delay"}, "batching.timeout_action"),
    )
    for table, field in cases:
        with pytest.raises(InvalidArgument) as refused:
            modelspec.parse_spec({**good, "batching": table})
        assert (refused.value.reason, refused.value.field) == ("MODEL_SPEC_INVALID", field)


def test_engine_options_are_read_back_as_written_and_refused_with_their_key(tmp_path: Path) -> None:
    full = {
        "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"],
        "intra_op_threads": 2,
        "execution_mode": "parallel",
        "graph_optimization": "layout",
        "memory_arena": False,
        "provider_options": {
            "CUDAExecutionProvider": {"device_id": 1, "use_tf32": False, "arena_extend_strategy": 'k"S'}
        },
    }
    for options in ({}, {"providers": "auto"}, full):
        spec = replace(SPEC, engine_options=options)
        modelspec.write_spec(tmp_path, spec)
        assert modelspec.read_spec(tmp_path) == spec
    tensors = [{"name": "x", "datatype": "FP32", "shape": [-1]}]
    good = {"name": "m", "inputs": tensors, "outputs": tensors}
    cases: tuple[tuple[object, str], ...] = (
        (3, "engine_options"),
        ({"threads": 3}, "engine_options.threads"),
        ({"providers": []}, "engine_options.providers"),
        ({"providers": "CPUExecutionProvider"}, "engine_options.providers"),
        ({"intra_op_threads": 0}, "engine_options.intra_op_threads"),
        ({"execution_mode": "fast"}, "engine_options.execution_mode"),
        ({"graph_optimization": 99}, "engine_options.graph_optimization"),
        ({"memory_pattern": "no"}, "engine_options.memory_pattern"),
        ({"provider_options": {"CPUExecutionProvider": {"x": 1}}}, "engine_options.provider_options"),
        ({"provider_options": {"CUDAExecutionProvider": {"device_id": [1]}}}, "engine_options.provider_options"),
        # would have the runtime load a library, or write where it likes
        (
            {"provider_options": {"TensorrtExecutionProvider": {"trt_extra_plugin_lib_paths": "x.so"}}},
            "engine_options.provider_options",
        ),
        (
            {"provider_options": {"TensorrtExecutionProvider": {"trt_engine_cache_path": "/"}}},
            "engine_options.provider_options",
        ),
        ({"provider_options": {"OpenVINOExecutionProvider": {"load_config": "x"}}}, "engine_options.provider_options"),
    )
    for table, field in cases:
        with pytest.raises(InvalidArgument) as refused:
            modelspec.parse_spec({**good, "engine_options": table})
        assert (refused.value.reason, refused.value.field) == ("MODEL_SPEC_INVALID", field)


def test_a_module_and_its_arguments_are_read_back_as_written(tmp_path: Path) -> None:
    tensors = [{"name": "x", "datatype": "FP32", "shape": [-1]}]
    table = {
        "name": "m",
        "engine": "torch",
        "module": "nets:Net",
        "instances": 2,
        "inputs": tensors,
        "outputs": tensors,
    }
    spec = modelspec.parse_spec({**table, "module_args": {"sizes": [4, 8], "act": "relu", "bias": True, "p": 0.5}})
    assert spec.file == "model.safetensors"
    modelspec.write_spec(tmp_path, spec)
    assert modelspec.read_spec(tmp_path) == spec
    for part, value, field in (
        ("module_args", [1], "module_args"),
        ("module_args", {"a": {"b": 1}}, "module_args.a"),
        ("instances", -1, "instances"),
        ("instances", True, "instances"),
        ("engine_options", {"device": "tpu"}, "engine_options.device"),
        ("engine_options", {"compile": True}, "engine_options.compile"),
        ("engine_options", {"providers": "auto"}, "engine_options.providers"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            modelspec.parse_spec({**table, part: value})
        assert refused.value.field == field
