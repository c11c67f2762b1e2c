"""The ONNX engine: every datatype goes through, and a file that can't be served says why."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_models
from interlock.errors import FailedPrecondition, InterlockError, Internal, InvalidArgument, NotFound
from interlock.runtime.arrays import NUMPY_TYPES
from interlock.stores import artifacts
from interlock.stores.modelspec import ModelSpec, TensorSpec
from interlock_inference import repository
from interlock_inference.engines import Engine, EngineOptions, made_up_inputs
from interlock_inference.engines import onnx as onnx_engine

OPTIONS = EngineOptions()


def load(folder: Path, body: bytes) -> Engine:
    path = folder / "model.onnx"
    path.write_bytes(body)
    return onnx_engine.load(path, None, OPTIONS)


@pytest.mark.parametrize("onnx_type", sorted(onnx_engine.DATATYPES))
def test_every_datatype_passes_through(tmp_path: Path, onnx_type: str) -> None:
    datatype = onnx_engine.DATATYPES[onnx_type]
    element = {"FP32": "FLOAT", "FP64": "DOUBLE", "FP16": "FLOAT16", "BF16": "BFLOAT16", "BYTES": "STRING"}.get(
        datatype, datatype
    )
    engine = load(tmp_path, onnx_models.identity(TensorProto.DataType.Value(element), ["n", 2]))
    assert engine.signature.inputs[0].datatype == datatype
    if datatype == "BYTES":
        array: Any = np.array([[b"a", "ü".encode()], [b"", b"x"]], dtype=object)
    else:
        array = np.array([[0, 1], [1, 0]]).astype(NUMPY_TYPES[datatype])
    (out,) = engine.run({"x": array}, ["y"])
    assert out.dtype == NUMPY_TYPES[datatype]
    assert out.tolist() == array.tolist()
    (empty,) = engine.run({"x": array[:0]}, ["y"])
    assert empty.shape == (0, 2)


def test_made_up_inputs_fit(tmp_path: Path) -> None:
    engine = load(tmp_path, onnx_models.two_inputs())
    total, shape = engine.run(made_up_inputs(engine.signature, rows=3), ["sum", "shape"])
    assert total.shape == (3, 2)
    assert shape.tolist() == [3, 2]


def refusal(folder: Path, body: bytes | None) -> InterlockError:
    path = folder / "model.onnx"
    if body is not None:
        path.write_bytes(body)
    with pytest.raises(InterlockError) as refused:
        onnx_engine.load(path, None, OPTIONS)
    return refused.value


def external(location: str) -> bytes:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "64")):
        weight.external_data.add(key=key, value=value)
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in ("x", "y")]
    return onnx_models.make([helper.make_node("MatMul", ["x", "w"], ["y"])], [info[0]], [info[1]], (weight,))


def test_load_refusals(tmp_path: Path) -> None:
    (tmp_path / "outside.bin").write_bytes(np.ones((4, 4), np.float32).tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    assert refusal(folder, None).reason == "ARTIFACT_MISSING"
    assert refusal(folder, b"not a protobuf" * 9).reason == "INVALID_ARTIFACT"
    assert refusal(folder, b"").reason == "INVALID_ARTIFACT"
    assert refusal(folder, onnx_models.constant(1.0)[:-20]).reason == "INVALID_ARTIFACT"
    for location in ("../outside.bin", str(tmp_path / "outside.bin")):
        assert refusal(folder, external(location)).reason == "PATH_OUTSIDE_FOLDER"
    assert refusal(folder, external("missing.bin")).reason == "INVALID_ARTIFACT"
    info = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    constant = helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(np.ones(1, np.float32)))
    assert refusal(folder, onnx_models.make([constant], [], [info])).reason == "SIGNATURE_MISSING"


def test_external_data_inside_the_folder_loads(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(np.ones((4, 4), np.float32).tobytes())
    (out,) = load(tmp_path, external("weights.bin")).run({"x": np.ones((1, 4), np.float32)}, ["y"])
    assert out.tolist() == [[4.0] * 4]


def test_a_provider_that_is_demanded_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx_models.constant(1.0))
    with pytest.raises(FailedPrecondition, match="CUDAExecutionProvider") as refused:
        onnx_engine.load(tmp_path / "model.onnx", None, EngineOptions(("CUDAExecutionProvider",)))
    assert refused.value.reason == "PROVIDER_UNAVAILABLE"
    fallback = EngineOptions(("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert onnx_engine.load(tmp_path / "model.onnx", None, fallback).providers == ("CPUExecutionProvider",)
    with pytest.raises(ValueError, match="providers"):
        onnx_engine.check_options(EngineOptions(("gpu",)))


def test_a_version_has_options_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_models.mlp((4, 8, 4)))
    tensors = (TensorSpec("x", "FP32", (-1, 4)),)
    expected = onnx_engine.load(path, None, OPTIONS).run({"x": np.ones((2, 4), np.float32)}, ["y"])[0]
    for options in (
        {"graph_optimization": "disabled", "memory_arena": False, "memory_pattern": False},
        {"execution_mode": "parallel", "inter_op_threads": 2, "intra_op_threads": 2, "graph_optimization": "layout"},
        {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]},
    ):
        engine = onnx_engine.load(path, ModelSpec("m", tensors, tensors, engine_options=options), OPTIONS)
        assert np.allclose(engine.run({"x": np.ones((2, 4), np.float32)}, ["y"])[0], expected, atol=1e-6)
        assert engine.providers == ("CPUExecutionProvider",)
    demanding = ModelSpec("m", tensors, tensors, engine_options={"providers": ["CUDAExecutionProvider"]})
    with pytest.raises(FailedPrecondition) as refused:
        onnx_engine.load(path, demanding, OPTIONS)
    assert (refused.value.reason, refused.value.field) == ("PROVIDER_UNAVAILABLE", "engine_options.providers")


def test_the_replica_caps_the_threads_that_a_version_asks_for() -> None:
    assert EngineOptions(num_threads=3).threads(None) == 3
    assert EngineOptions(num_threads=1, max_threads=4).threads(64) == 4
    assert EngineOptions(num_threads=1, max_threads=4).threads(2) == 2
    assert EngineOptions(num_threads=8, max_threads=4).threads(64) == 8, (
        "what the replica gives to everybody is no excess"
    )


def test_outputs_stay_what_they_were_when_the_engine_runs_again_and_when_it_is_closed(tmp_path: Path) -> None:
    for body in (onnx_models.mlp((4, 8, 4)), onnx_models.identity(TensorProto.FLOAT, ["n", 4])):
        engine = load(tmp_path, body)
        first = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
        (kept,) = engine.run({"x": first}, ["y"])
        copy = kept.copy()
        for seed in range(20):
            engine.run({"x": np.random.default_rng(seed).standard_normal((64, 4)).astype(np.float32)}, ["y"])
        engine.close()
        del engine
        assert kept.tobytes() == copy.tobytes()


def test_threads_share_a_session_without_mixing_answers(tmp_path: Path) -> None:
    engine = load(tmp_path, onnx_models.identity(TensorProto.FLOAT, ["n", 4]))

    def ask(value: int) -> bool:
        return all((engine.run({"x": np.full((8, 4), value, np.float32)}, ["y"])[0] == value).all() for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(32)))


def test_runs_that_go_wrong(tmp_path: Path) -> None:
    engine = load(tmp_path, onnx_models.identity(TensorProto.STRING))
    with pytest.raises(InvalidArgument, match="UTF-8"):
        engine.run({"x": np.array([b"\xff"], dtype=object)}, ["y"])
    reshape = onnx_models.make(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 3])],
        (numpy_helper.from_array(np.array([-1, 3]), "s"),),
    )
    with pytest.raises(Internal) as fault:
        load(tmp_path, reshape).run({"x": np.ones(4, np.float32)}, ["y"])
    assert fault.value.reason == "ENGINE_FAULT"
    assert "Reshape" not in fault.value.message


# --- repository: verified before it is loaded ---


def opening(path: Path, digest: str = "") -> repository.Opened:
    return repository.open_artifact(path, digest, OPTIONS, lambda percent, message: None)


def test_a_version_folder_and_a_bare_file_open(tmp_path: Path) -> None:
    digest = onnx_models.write_version(tmp_path / "3", onnx_models.constant(3.0), step=1500)
    opened = opening(tmp_path / "3", digest)
    assert opened.digest == digest
    assert opened.spec is not None
    assert opened.spec.step == 1500
    bare = tmp_path / "bare.onnx"
    bare.write_bytes(onnx_models.constant(3.0))
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "model.onnx").write_bytes(onnx_models.constant(3.0))
    manifest = artifacts.write_manifest(tmp_path / "4")
    assert opening(bare).digest == opening(tmp_path / "4").digest == manifest.digest


def test_open_refusals(tmp_path: Path) -> None:
    folder = tmp_path / "3"
    digest = onnx_models.write_version(folder, onnx_models.constant(3.0))
    with pytest.raises(NotFound, match="no such file or folder"):
        opening(tmp_path / "none")
    with pytest.raises(FailedPrecondition) as other:
        opening(folder, "blake3:" + "0" * 64)
    assert other.value.reason == "DIGEST_MISMATCH"
    body = bytearray((folder / "model.onnx").read_bytes())
    body[-1] ^= 1
    (folder / "model.onnx").write_bytes(body)
    with pytest.raises(FailedPrecondition, match=r"model\.onnx") as flipped:
        opening(folder, digest)
    assert flipped.value.reason == "DIGEST_MISMATCH"
    onnx_models.write_version(folder, onnx_models.constant(3.0), columns=5)
    with pytest.raises(FailedPrecondition, match=r"\[-1, 5\] against FP32 \[-1, 4\]") as claims:
        opening(folder)
    assert claims.value.reason == "SIGNATURE_MISMATCH"
    (folder / "manifest.json").unlink()
    with pytest.raises(FailedPrecondition) as unfinished:
        opening(folder)
    assert unfinished.value.reason == "INVALID_ARTIFACT"
    with pytest.raises(InvalidArgument):
        repository.parse_uri("gs://bucket/model")


def test_the_serving_process_never_unpickles() -> None:
    source = """
import pickle, io, fractions
from interlock_inference import audit
body = pickle.dumps(fractions.Fraction(1, 2))
assert pickle.loads(body) == fractions.Fraction(1, 2)
audit.install(); audit.install()
assert pickle.loads(pickle.dumps([1, "a"])) == [1, "a"]
for load in (pickle.loads, lambda b: pickle._Unpickler(io.BytesIO(b)).load()):
    try:
        load(body)
    except audit.UnpicklingRefused as refused:
        assert "fractions.Fraction" in str(refused)
    else:
        raise SystemExit("unpickled")
import numpy as np
stream = io.BytesIO(); np.save(stream, np.array([fractions.Fraction(1, 2)], dtype=object)); stream.seek(0)
try:
    np.load(stream, allow_pickle=True)
except Exception as error:
    print("refused", type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused")
