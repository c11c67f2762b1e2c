"""What an ONNX file refers to outside itself, read off the protobuf wire before any runtime sees the file. Builds no graph, judges no operator.

The runtime resolves tensor data that lies in other files by itself, by a path that the file names, and knows a location that means an address in
memory. So the locations are read here first, and held to what stands verified in the version's manifest.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from interlock.errors import FailedPrecondition
from interlock.stores.artifacts import check_relative

# message -> field number -> message, as far as a tensor can hide below (onnx.proto)
_BELOW: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}
DEPTH_MAX = 100  # protobuf's own limit
FIELDS_MAX = 20_000_000


class _NotProtobuf(ValueError):
    """The bytes end in the middle, or are no fields."""


def check_references(path: Path, known: frozenset[str]) -> None:
    """Holds every tensor that lies in another file to `known`: paths relative to the model file's folder.

    Raises:
        InvalidArgument: `PATH_OUTSIDE_FOLDER`.
        FailedPrecondition: `INVALID_ARTIFACT`: not protobuf, or a file that is not in the manifest.
    """
    for location in locations(path):
        check_relative(location, path)
        if location.removeprefix("./") not in known:
            raise FailedPrecondition(
                f"{path}: it refers to tensor data in {location[:200]!r}, which is not in the version's manifest",
                reason="INVALID_ARTIFACT",
                field="artifact_uri",
                metadata={"path": str(path), "location": location[:200]},
            )


def locations(path: Path) -> list[str]:
    """The files in which the model's tensors lie, beside the model file itself; in the order of their first mention."""
    if path.stat().st_size == 0:
        return []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as body:
        try:
            return list(dict.fromkeys(_Walk(body).entries()))
        except (_NotProtobuf, UnicodeDecodeError) as error:
            raise FailedPrecondition(
                f"{path}: not an ONNX model: {error}",
                reason="INVALID_ARTIFACT",
                field="artifact_uri",
                metadata={"path": str(path), "engine": "onnxruntime"},
            ) from None


class _Walk:
    """Over the fields of one file. A length-delimited field that can't hold a tensor is stepped over, whatever its size."""

    def __init__(self, body: mmap.mmap) -> None:
        self._body = body
        self._num_fields = 0

    def entries(self) -> Iterator[str]:
        """The value of each `location` entry."""
        todo = [("Model", 0, len(self._body), 0)]
        while todo:
            message, begin, end, depth = todo.pop()
            if depth > DEPTH_MAX:
                raise _NotProtobuf(f"messages lie more than {DEPTH_MAX} deep")
            if message == "Entry":
                pair = {number: bytes(self._body[a:b]) for number, a, b in self._fields(begin, end)}
                if pair.get(1) == b"location":
                    yield pair.get(2, b"").decode()
                continue
            below = _BELOW[message]
            todo += [(below[number], a, b, depth + 1) for number, a, b in self._fields(begin, end) if number in below]

    def _fields(self, at: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(number, begin, end) of the length-delimited fields."""
        while at < end:
            self._num_fields += 1
            if self._num_fields > FIELDS_MAX:
                raise _NotProtobuf(f"more than {FIELDS_MAX} fields")
            key, at = self._varint(at, end)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                _, at = self._varint(at, end)
                continue
            if kind == _BYTES:
                length, at = self._varint(at, end)
            elif kind in _WIDTHS:
                length = _WIDTHS[kind]
            else:
                raise _NotProtobuf(f"wire type {kind} at byte {at}")
            if length > end - at or not number:
                raise _NotProtobuf(f"a field of {length} bytes at byte {at}, and {end - at} are left")
            if kind == _BYTES:
                yield number, at, at + length
            at += length

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self._body[at]
            value |= (byte & 0x7F) << shift
            at += 1
            if byte < 0x80:
                return value, at
            shift += 7
        raise _NotProtobuf(f"a number at byte {at} has no end")
