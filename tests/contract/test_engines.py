"""What every engine promises (`interlock_inference.engines.Engine`), held by one suite: the data plane knows no difference between them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_models
import torch_models
from interlock.errors import Internal, InvalidArgument
from interlock.runtime.arrays import NUMPY_TYPES
from interlock_inference import repository
from interlock_inference.batching import is_by_rows
from interlock_inference.engines import Engine, EngineOptions, made_up_inputs

OPTIONS = EngineOptions(torch_modules=torch_models.MODULES)
ELEMENTS = {"FP32": "FLOAT", "FP64": "DOUBLE", "FP16": "FLOAT16", "BF16": "BFLOAT16", "BYTES": "STRING"}
Make = Callable[..., Engine]


def onnx_gather() -> bytes:
    table = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(3, 2), "table")
    return onnx_models.make(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        (table,),
    )


def onnx_folds() -> bytes:
    return onnx_models.make(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 3])],
        (numpy_helper.from_array(np.array([-1, 3]), "s"),),
    )


def onnx_identity(datatype: str) -> bytes:
    return onnx_models.identity(TensorProto.DataType.Value(ELEMENTS.get(datatype, datatype)), ["n", 2])


ONNX: dict[str, Callable[..., bytes]] = {
    "identity": onnx_identity,
    "pair": onnx_models.two_inputs,
    "rows": onnx_gather,
    "folds": onnx_folds,
}
TORCH: dict[str, Callable[..., Any]] = {
    "identity": lambda datatype: torch_models.spec("Identity", f"x {datatype} -1,2", f"y {datatype} -1,2"),
    "pair": lambda: torch_models.spec("Pair", "a FP32 -1,2; b FP32 -1,2", "sum FP32 -1,2; shape INT64 2"),
    "rows": lambda: torch_models.spec("Rows", "x INT64 -1", "y FP32 -1,2"),
    "folds": lambda: torch_models.spec("Folds", "x FP32 -1", "y FP32 -1,3"),
}


@pytest.fixture(params=["onnx", "torch"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    def onnx_engine(kind: str, *args: str) -> Engine:
        path = tmp_path / f"{kind}.onnx"
        path.write_bytes(ONNX[kind](*args))
        return opened(path)

    def torch_engine(kind: str, *args: str) -> Engine:
        module = torch_models.Rows() if kind == "rows" else None
        torch_models.write_version(tmp_path / kind, TORCH[kind](*args), module)
        return opened(tmp_path / kind)

    return {"onnx": onnx_engine, "torch": torch_engine}[request.param]


def opened(path: Path) -> Engine:
    return repository.open_artifact(path, "", OPTIONS, lambda percent, message: None).engine


@pytest.mark.parametrize("datatype", sorted(NUMPY_TYPES))
def test_every_datatype_passes_through(make: Make, datatype: str, request: pytest.FixtureRequest) -> None:
    if datatype == "BYTES" and "torch" in request.node.name:
        pytest.skip("torch has no tensor of text; tests/unit/test_torch_engine.py holds the refusal")
    engine = make("identity", datatype)
    assert [spec.datatype for spec in (*engine.signature.inputs, *engine.signature.outputs)] == [datatype] * 2
    if datatype == "BYTES":
        array: Any = np.array([[b"a", "ü".encode()], [b"", b"x"]], dtype=object)
    else:
        array = np.array([[0, 1], [1, 0]]).astype(NUMPY_TYPES[datatype])
    array.flags.writeable = False  # as a view on a request's bytes is
    (out,) = engine.run({"x": array}, ["y"])
    assert out.dtype == NUMPY_TYPES[datatype]
    assert out.tolist() == array.tolist()
    (empty,) = engine.run({"x": array[:0]}, ["y"])
    assert empty.shape == (0, 2)
    (strided,) = (
        engine.run({"x": np.array([[0, 1], [1, 0], [1, 1]]).astype(array.dtype)[::2]}, ["y"])
        if datatype != "BYTES"
        else (None,)
    )
    assert strided is None or strided.tolist() == np.array([[0, 1], [1, 1]]).astype(array.dtype).tolist()


def test_half_precision_keeps_its_bits(make: Make) -> None:
    bits = np.array([[0x3F80, 0xC049], [0x7F80, 0x0001]], np.uint16)  # 1, -3.140625, infinity, the smallest subnormal
    for datatype in ("BF16", "FP16"):
        (out,) = make("identity", datatype).run({"x": bits.view(NUMPY_TYPES[datatype])}, ["y"])
        assert out.view(np.uint16).tolist() == bits.tolist()


def test_outputs_come_in_the_order_asked_for(make: Make) -> None:
    engine = make("pair")
    assert [spec.name for spec in engine.signature.inputs] == ["a", "b"]
    shape, total = engine.run(made_up_inputs(engine.signature, rows=3), ["shape", "sum"])
    assert shape.tolist() == [3, 2]
    assert total.shape == (3, 2)
    (total,) = engine.run({"b": np.ones((1, 2), np.float32), "a": np.zeros((1, 2), np.float32)}, ["sum"])
    assert total.tolist() == [[1.0, 1.0]]


def test_the_caller_owns_what_comes_out(make: Make) -> None:
    engine = make("identity", "FP32")
    first = np.arange(128, dtype=np.float32).reshape(64, 2)
    (kept,) = engine.run({"x": first.copy()}, ["y"])
    for _ in range(20):
        engine.run({"x": np.zeros((64, 2), np.float32)}, ["y"])
    engine.close()
    engine.close()
    del engine
    assert kept.tolist() == first.tolist()


def test_threads_do_not_mix_answers(make: Make) -> None:
    engine = make("identity", "INT32")

    def ask(value: int) -> bool:
        return all((engine.run({"x": np.full((8, 2), value, np.int32)}, ["y"])[0] == value).all() for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(16)))


def test_what_the_model_refuses_is_told_apart_from_what_breaks_it(make: Make) -> None:
    engine = make("rows")
    (rows,) = engine.run({"x": np.array([2, 0])}, ["y"])
    assert rows.shape == (2, 2)
    for index in (3, 1 << 40):
        with pytest.raises(InvalidArgument) as refused:
            engine.run({"x": np.array([index])}, ["y"])
        assert (refused.value.reason, refused.value.field) == ("INPUT_REFUSED", "inputs")
    with pytest.raises(Internal) as fault:
        make("folds").run({"x": np.ones(4, np.float32)}, ["y"])
    assert fault.value.reason == "ENGINE_FAULT"
    assert "shape" not in fault.value.message.lower(), "what broke is in the log, under the error's id"


def test_it_says_what_it_is(make: Make) -> None:
    engine = make("identity", "FP32")
    assert engine.platform
    assert engine.providers
    assert is_by_rows(engine.signature)
