"""The Open Inference Protocol's datatypes as numpy types, and arrays as raw wire bytes. No messages, no signatures.

BF16 is uint16 bit patterns, because numpy has no such type. BYTES is an object array of bytes; on the wire each element is led by its length
as 4 little-endian bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

NUMPY_TYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
    "BYTES": np.dtype(object),
}
_DATATYPES = {dtype: name for name, dtype in NUMPY_TYPES.items() if name != "BF16"}
LENGTH = struct.Struct("<I")


def datatype_of(array: Array) -> str:
    """The datatype that carries an array; text is BYTES. Raises ValueError for a type that the protocol lacks."""
    if array.dtype.kind in "SU":
        return "BYTES"
    try:
        return _DATATYPES[array.dtype.newbyteorder("<")]
    except KeyError:
        raise ValueError(f"numpy type {array.dtype} has no datatype in the Open Inference Protocol") from None


def from_plain(value: Any, datatype: str) -> Array:
    """Lists and numbers as an array of a datatype; BF16 rounds to nearest even. Raises ValueError or OverflowError for what does not fit."""
    if datatype != "BF16":
        return np.asarray(value, dtype=NUMPY_TYPES[datatype])
    bits = np.asarray(value, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def encode_raw(array: Array, datatype: str) -> bytes:
    """Row-major little-endian bytes."""
    if datatype == "BYTES":
        items = (item.encode() if isinstance(item, str) else bytes(item) for item in array.flat)
        return b"".join(part for item in items for part in (LENGTH.pack(len(item)), item))
    return array.astype(NUMPY_TYPES[datatype], copy=False).tobytes()


def decode_raw(raw: bytes | memoryview, datatype: str, shape: Sequence[int]) -> Array:
    """The array in bytes from a server that is trusted to be well-formed; a view where the type allows. Raises ValueError if it is not."""
    if datatype != "BYTES":
        return np.frombuffer(raw, NUMPY_TYPES[datatype]).reshape(shape)
    items, offset = [], 0
    while offset < len(raw):
        (length,) = LENGTH.unpack_from(raw, offset)
        offset += LENGTH.size
        items.append(bytes(raw[offset : offset + length]))
        offset += length
    elements = np.empty(len(items), dtype=object)
    elements[:] = items
    return elements.reshape(shape)
