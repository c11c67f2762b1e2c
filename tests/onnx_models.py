"""Tiny ONNX models for tests, made in memory: each answers in a way that reveals which one it is."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from interlock.stores import artifacts, golden, modelspec
from interlock.stores.modelspec import BatchingSpec, ModelSpec, TensorSpec

OPSET = [helper.make_opsetid("", 17)]


def make(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: tuple[onnx.TensorProto, ...] = (),
) -> bytes:
    """A serialized model with the given graph."""
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    return helper.make_model(graph, opset_imports=OPSET, ir_version=8).SerializeToString()


def constant(value: float, columns: int = 4, *, input_name: str = "x", output_name: str = "y") -> bytes:
    """y [-1, columns] = 0 * x + value, for x [-1, columns]."""
    return make(
        [helper.make_node("Mul", [input_name, "zero"], ["z"]), helper.make_node("Add", ["z", "value"], [output_name])],
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["batch", columns])],
        [helper.make_tensor_value_info(output_name, TensorProto.FLOAT, ["batch", columns])],
        (numpy_helper.from_array(np.float32(0), "zero"), numpy_helper.from_array(np.float32(value), "value")),
    )


def bomb(elements: int) -> bytes:
    """Like a constant for x [-1, 4], but a run wants so many floats at once."""
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["many"]),
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Add", ["many", "s"], ["more"]),
        helper.make_node("ReduceSum", ["more"], ["t"], keepdims=0),
        helper.make_node("Add", ["x", "t"], ["y"]),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    return make(nodes, [info[0]], [info[1]], (numpy_helper.from_array(np.array([elements]), "size"),))


def slow(value: float, size: int = 700, repeats: int = 6) -> bytes:
    """Like `constant`, for x [-1, 4], behind some milliseconds of matrix products that come out as zero."""
    nodes = [helper.make_node("MatMul", ["w", "w"], ["m0"])]
    nodes += [helper.make_node("MatMul", [f"m{i}", "w"], [f"m{i + 1}"]) for i in range(repeats)]
    # the products depend on the input, so that they can't be folded away when the model is loaded
    nodes.insert(0, helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0))
    nodes.insert(1, helper.make_node("Mul", ["w0", "s"], ["w"]))
    nodes += [
        helper.make_node("ReduceSum", [f"m{repeats}"], ["t"], keepdims=0),
        helper.make_node("Mul", ["t", "zero"], ["t0"]),
        helper.make_node("Mul", ["x", "zero"], ["x0"]),
        helper.make_node("Add", ["x0", "t0"], ["a"]),
        helper.make_node("Add", ["a", "value"], ["y"]),
    ]
    weights = (
        numpy_helper.from_array(np.full((size, size), 1e-9, np.float32), "w0"),
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(np.float32(value), "value"),
    )
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    return make(nodes, [info[0]], [info[1]], weights)


def mlp(sizes: tuple[int, ...], seed: int = 0) -> bytes:
    """y [-1, sizes[-1]] from x [-1, sizes[0]], random weights, relu between."""
    random, nodes, weights, name = np.random.default_rng(seed), [], [], "x"
    for layer, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        out = "y" if layer == len(sizes) - 2 else f"h{layer}"
        values = (random.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{layer}"], [out]))
        if out != "y":
            nodes.append(helper.make_node("Relu", [out], [f"r{layer}"]))
        name = f"r{layer}"
    info = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", c])
        for n, c in (("x", sizes[0]), ("y", sizes[-1]))
    ]
    return make(nodes, [info[0]], [info[1]], tuple(weights))


def softmax_over_rows() -> bytes:
    """Softmax over the rows: an answer that depends on who else is there."""
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in ("x", "y")]
    return make([helper.make_node("Softmax", ["x"], ["y"], axis=0)], [info[0]], [info[1]])


def identity(element_type: int, shape: list[str | int] | None = None) -> bytes:
    """y = x, of one element type."""
    dims = shape if shape is not None else ["n"]
    return make(
        [helper.make_node("Identity", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", element_type, dims)],
        [helper.make_tensor_value_info("y", element_type, dims)],
    )


def two_inputs() -> bytes:
    """sum [-1, 2] = a + b and flag [-1] INT64 = shape of a; a, b [-1, 2]."""
    return make(
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Shape", ["a"], ["shape"])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 2]) for n in ("a", "b")],
        [
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["batch", 2]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [2]),
        ],
    )


def write_version(
    folder: Path,
    body: bytes,
    *,
    name: str = "policy",
    step: int = 0,
    columns: int = 4,
    golden_inputs: dict[str, dict[str, np.ndarray]] | None = None,
    batching: BatchingSpec | None = None,
) -> str:
    """A version folder as the trainer's export writes it, for models with x and y; its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(body)
    shape = (-1, columns)
    tensors = ((TensorSpec("x", "FP32", shape),), (TensorSpec("y", "FP32", shape),))
    spec = ModelSpec(name, *tensors, source={"run": "r", "step": step}, batching=batching)
    modelspec.write_spec(folder, spec)
    if golden_inputs:
        golden.write(folder, golden_inputs)
    return artifacts.write_manifest(folder).digest
