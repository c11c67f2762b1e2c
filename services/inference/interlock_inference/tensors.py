"""Wire elements <-> numpy arrays, and the check of a request's tensors against a signature. No protobuf, no engine.

Raw contents become views on the bytes that came in: no element is touched. BF16 is uint16 bit patterns, BYTES an object array of bytes,
each element led on the wire by its length as 4 little-endian bytes. Every refusal is `InvalidArgument` with reason `INVALID_TENSOR` and
names the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from interlock.errors import InvalidArgument
from interlock.runtime.arrays import LENGTH, NUMPY_TYPES
from interlock.stores.modelspec import TensorSpec
from interlock_inference.engines import Array, Signature

TYPED_FIELDS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Datatype -> the field of InferTensorContents that carries it. FP16 and BF16 travel raw only."""

MAX_RANK = 32
MAX_ELEMENTS = (
    2**40
)  # far above any body that fits in a message: only there so that a product of dimensions stays a sane number


def invalid(field: str, message: str, **metadata: str) -> InvalidArgument:
    """The refusal of a tensor: `INVALID_TENSOR`, the message led by the field."""
    return InvalidArgument(f"{field}: {message}", reason="INVALID_TENSOR", field=field, metadata=metadata)


class Described(NamedTuple):
    """A tensor as a request describes it, before its elements are read."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def check_described(tensors: Sequence[Described], signature: Signature, specs: Mapping[str, TensorSpec]) -> None:
    """Holds a request's tensors to a signature: names, datatypes, ranks, fixed dimensions, dimensions that must agree.

    `specs` is the signature's inputs by name. Order is free. Raises InvalidArgument naming `inputs[i].<part>`.
    """
    sizes: dict[str, tuple[int, str]] = {}
    seen = set()
    for index, tensor in enumerate(tensors):
        spec = specs.get(tensor.name)
        if spec is None:
            raise invalid(
                f"inputs[{index}].name",
                f"unknown input {tensor.name[:80]!r}; the model takes {_names(signature.inputs)}",
                input=tensor.name[:80],
            )
        if tensor.name in seen:
            raise invalid(f"inputs[{index}].name", f"input {tensor.name!r} is given twice", input=tensor.name)
        seen.add(tensor.name)
        _check_one(index, tensor, spec)
        for symbol, size in zip(signature.symbols.get(tensor.name, ()), tensor.shape, strict=False):
            first = sizes.setdefault(symbol, (size, tensor.name)) if symbol else (size, "")
            if first[0] != size:
                message = f"dimension {symbol!r} is {size}, input {first[1]!r} has {first[0]} there"
                raise invalid(f"inputs[{index}].shape", message, input=tensor.name, dimension=symbol)
    if len(seen) < len(specs):
        missing = [name for name in specs if name not in seen]
        raise invalid(
            "inputs", f"missing input {missing[0]!r}; the model takes {_names(signature.inputs)}", input=missing[0]
        )


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} ({s.datatype} {list(s.shape)})" for s in specs)


def _check_one(index: int, tensor: Described, spec: TensorSpec) -> None:
    if tensor.datatype != spec.datatype:
        message = f"input {spec.name!r} is {spec.datatype}, the request says {tensor.datatype[:20]!r}"
        raise invalid(
            f"inputs[{index}].datatype", message, input=spec.name, expected=spec.datatype, actual=tensor.datatype[:20]
        )
    fits = len(tensor.shape) == len(spec.shape) and all(
        want in (-1, have) and have >= 0 for want, have in zip(spec.shape, tensor.shape, strict=True)
    )
    if not fits:
        expected, actual = str(list(spec.shape)), str(list(tensor.shape[:MAX_RANK]))
        message = f"input {spec.name!r} has shape {expected} (-1 is free), the request says {actual}"
        raise invalid(f"inputs[{index}].shape", message, input=spec.name, expected=expected, actual=actual)


def num_elements(shape: Sequence[int], field: str) -> int:
    """The product of the dimensions, refused when negative, absurd or of too many dimensions."""
    if len(shape) > MAX_RANK:
        raise invalid(field, f"{len(shape)} dimensions; at most {MAX_RANK}")
    if any(dim < 0 for dim in shape):
        raise invalid(field, f"{list(shape)} has a negative dimension")
    count = math.prod(shape)
    if count > MAX_ELEMENTS:
        raise invalid(field, f"{list(shape)} has {count} elements; at most {MAX_ELEMENTS}")
    return count


def decode_raw(tensor: Described, raw: bytes | memoryview, index: int) -> Array:
    """A view on `raw`, read-only like it; BYTES are copied out element by element. `index` is the tensor's place in the request."""
    count = num_elements(tensor.shape, f"inputs[{index}].shape")
    if tensor.datatype == "BYTES":
        return _decode_bytes(raw, count, index).reshape(tensor.shape)
    dtype = NUMPY_TYPES[tensor.datatype]
    expected = count * dtype.itemsize
    if len(raw) != expected:
        message = f"{len(raw)} bytes for input {tensor.name!r}, {tensor.datatype} {list(tensor.shape)} has {expected}"
        raise invalid(
            f"raw_input_contents[{index}]", message, input=tensor.name, expected=str(expected), actual=str(len(raw))
        )
    array = np.frombuffer(raw, dtype).reshape(tensor.shape)
    if tensor.datatype == "BOOL" and array.size and array.view(np.uint8).max() > 1:
        raise invalid(f"raw_input_contents[{index}]", f"input {tensor.name!r}: BOOL elements are the bytes 0 and 1")
    return array


def _decode_bytes(raw: bytes | memoryview, count: int, index: int) -> Array:
    field = f"raw_input_contents[{index}]"
    if count * LENGTH.size > len(raw):
        raise invalid(field, f"{len(raw)} bytes can't hold {count} BYTES elements, each led by 4 bytes of length")
    elements = np.empty(count, dtype=object)
    offset = 0
    for position in range(count):
        if offset + LENGTH.size > len(raw):
            raise invalid(field, f"cut off in the length of BYTES element {position} of {count}")
        (length,) = LENGTH.unpack_from(raw, offset)
        offset += LENGTH.size
        if offset + length > len(raw):
            raise invalid(
                field, f"BYTES element {position} of {count} says {length} bytes, {len(raw) - offset} are left"
            )
        elements[position] = bytes(raw[offset : offset + length])
        offset += length
    if offset != len(raw):
        raise invalid(field, f"{len(raw) - offset} bytes left over after {count} BYTES elements")
    return elements


def decode_typed(tensor: Described, values: Sequence[Any], index: int) -> Array:
    """An array from elements that came as numbers, checked for count and range."""
    count = num_elements(tensor.shape, f"inputs[{index}].shape")
    field = f"inputs[{index}].contents"
    if len(values) != count:
        message = f"{len(values)} elements for input {tensor.name!r}, shape {list(tensor.shape)} has {count}"
        raise invalid(field, message, input=tensor.name, expected=str(count), actual=str(len(values)))
    if tensor.datatype == "BYTES":
        elements = np.empty(count, dtype=object)
        elements[:] = [value.encode() if isinstance(value, str) else value for value in values]
        return elements.reshape(tensor.shape)
    return _in_range(tensor, np.array(values, _wide(tensor.datatype)), field).reshape(tensor.shape)


def _wide(datatype: str) -> np.dtype[Any]:
    """The type in which a typed field carries the datatype."""
    if datatype in ("INT8", "INT16", "INT32"):
        return NUMPY_TYPES["INT32"]
    if datatype in ("UINT8", "UINT16", "UINT32"):
        return NUMPY_TYPES["UINT32"]
    return NUMPY_TYPES[datatype]


def _in_range(tensor: Described, array: Array, field: str) -> Array:
    dtype = NUMPY_TYPES[tensor.datatype]
    if dtype.itemsize < array.dtype.itemsize and array.size:
        limits = np.iinfo(dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise invalid(
                field,
                f"input {tensor.name!r}: an element does not fit {tensor.datatype} ({limits.min} to {limits.max})",
                input=tensor.name,
            )
    return array.astype(dtype, copy=False)
