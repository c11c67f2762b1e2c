"""Tensors on the wire: what goes in comes out, and every wrong one names its field."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from interlock.errors import InvalidArgument
from interlock.runtime import arrays
from interlock.stores.modelspec import TensorSpec
from interlock_inference import tensors
from interlock_inference.engines import Signature
from interlock_inference.tensors import Described

NUMERIC = sorted(set(arrays.NUMPY_TYPES) - {"BYTES"})
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@given(data=st.data(), datatype=st.sampled_from(NUMERIC), shape=SHAPES)
def test_raw_round_trip(data: st.DataObject, datatype: str, shape: tuple[int, ...]) -> None:
    array = data.draw(hnp.arrays(arrays.NUMPY_TYPES[datatype], shape))
    raw = arrays.encode_raw(array, datatype)
    back = tensors.decode_raw(Described("x", datatype, shape), raw, 0)
    assert back.shape == shape
    assert back.dtype == arrays.NUMPY_TYPES[datatype]
    assert back.tobytes() == array.tobytes()


@given(items=st.lists(st.binary(max_size=20), max_size=12))
def test_bytes_round_trip(items: list[bytes]) -> None:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    raw = arrays.encode_raw(array, "BYTES")
    assert list(tensors.decode_raw(Described("x", "BYTES", (len(items),)), raw, 0)) == items


@given(datatype=st.sampled_from([*NUMERIC, "BYTES"]), shape=SHAPES, raw=st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused_with_a_field(datatype: str, shape: tuple[int, ...], raw: bytes) -> None:
    refused: InvalidArgument | None = None
    try:
        assert tensors.decode_raw(Described("x", datatype, shape), raw, 3).shape == shape
    except InvalidArgument as error:
        refused = error
    if refused is not None:
        assert (refused.field, refused.reason) == ("raw_input_contents[3]", "INVALID_TENSOR")


def test_raw_is_a_view_on_the_message() -> None:
    raw = np.arange(6, dtype=np.float32).tobytes()
    array = tensors.decode_raw(Described("x", "FP32", (2, 3)), raw, 0)
    assert np.shares_memory(array, np.frombuffer(raw, np.uint8))
    assert not array.flags.writeable


@pytest.mark.parametrize("datatype", sorted(tensors.TYPED_FIELDS))
def test_typed_round_trip(datatype: str) -> None:
    values: list[Any] = [b"a", b""] if datatype == "BYTES" else [1, 0]
    array = tensors.decode_typed(Described("x", datatype, (2, 1)), values, 0)
    assert array.shape == (2, 1)
    assert array.dtype == arrays.NUMPY_TYPES[datatype]
    assert array.ravel().tolist() == values


def raw_refusal(datatype: str, shape: tuple[int, ...], raw: bytes) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as refused:
        tensors.decode_raw(Described("x", datatype, shape), raw, 1)
    return refused.value


def test_raw_refusals() -> None:
    cut = raw_refusal("FP32", (2, 3), b"\0" * 23)
    assert (cut.field, cut.metadata["expected"], cut.metadata["actual"]) == ("raw_input_contents[1]", "24", "23")
    assert raw_refusal("FP32", (-1, 3), b"").field == "inputs[1].shape"
    assert "elements" in raw_refusal("FP32", (2**40, 2**40), b"").message
    assert "dimensions" in raw_refusal("FP32", (1,) * 33, b"").message
    assert "0 and 1" in raw_refusal("BOOL", (1,), b"\x02").message
    assert "element 1 of 2" in raw_refusal("BYTES", (2,), struct.pack("<I", 1) + b"a" + struct.pack("<I", 9)).message
    assert "left over" in raw_refusal("BYTES", (1,), struct.pack("<I", 0) + b"x").message
    assert "can't hold" in raw_refusal("BYTES", (10**9,), b"1234").message


@pytest.mark.parametrize(
    ("datatype", "values", "text"),
    [
        ("INT8", [128], "INT8"),
        ("UINT8", [256], "UINT8"),
        ("INT16", [-32769], "INT16"),
        ("FP32", [1.0, 2.0], "2 elements"),
    ],
)
def test_typed_refusals(datatype: str, values: list[Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text) as refused:
        tensors.decode_typed(Described("x", datatype, (1,)), values, 0)
    assert refused.value.field == "inputs[0].contents"


SIGNATURE = Signature(
    (TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT64", (-1,))),
    (TensorSpec("y", "FP32", (-1,)),),
    {"a": ("batch", ""), "b": ("batch",)},
)
SPECS = {spec.name: spec for spec in SIGNATURE.inputs}
A, B = Described("a", "FP32", (3, 2)), Described("b", "INT64", (3,))


@pytest.mark.parametrize(
    ("given_tensors", "field", "text"),
    [
        ([A], "inputs", "missing input 'b'"),
        ([], "inputs", "missing input 'a'"),
        ([A, B, Described("c", "FP32", (1,))], "inputs[2].name", "unknown input 'c'"),
        ([A, A], "inputs[1].name", "twice"),
        ([A, Described("b", "INT32", (3,))], "inputs[1].datatype", "is INT64, the request says 'INT32'"),
        ([Described("a", "FP32", (3, 3)), B], "inputs[0].shape", r"\[-1, 2\]"),
        ([Described("a", "FP32", (3,)), B], "inputs[0].shape", r"\[3\]"),
        (
            [Described("a", "FP32", (-1, 2)), B],
            "inputs[0].shape",
            r"\[-1, 2\] \(-1 is free\), the request says \[-1, 2\]",
        ),
        ([A, Described("b", "INT64", (4,))], "inputs[1].shape", "dimension 'batch' is 4, input 'a' has 3"),
    ],
)
def test_described_refusals(given_tensors: list[Described], field: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text) as refused:
        tensors.check_described(given_tensors, SIGNATURE, SPECS)
    assert refused.value.field == field


def test_order_of_inputs_is_free() -> None:
    tensors.check_described([B, A], SIGNATURE, SPECS)


@pytest.mark.parametrize(
    ("value", "bits"),
    [(0.0, 0), (1.0, 0x3F80), (-2.5, 0xC020), (1.00390625, 0x3F80), (1.01171875, 0x3F82), (float("inf"), 0x7F80)],
)
def test_plain_numbers_become_bfloat16_bits(value: float, bits: int) -> None:
    """The two in the middle lie half-way between neighbours and go to the even one."""
    assert arrays.from_plain([value], "BF16").tolist() == [bits]


def test_plain_numbers_that_do_not_fit_are_refused() -> None:
    assert arrays.from_plain([1, 2], "INT8").dtype == np.int8
    with pytest.raises((ValueError, OverflowError)):
        arrays.from_plain([300], "INT8")
