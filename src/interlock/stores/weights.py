"""The safetensors layout, read: a length, a JSON table of tensors, their bytes. Holds a file to it to the last byte; makes no tensor.

    8 bytes   length of the table, little-endian
    table     {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"any": "text"}}
    data      the tensors' bytes one after another, nothing between, before or behind them

A file of this layout is data from the first byte to the last: nothing in it names code. What is checked here is all that a reader relies on,
so that a damaged or hostile file ends in a refusal that names the tensor, and never in a wrong read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interlock.errors import FailedPrecondition

TABLE_BYTES_MAX = 100_000_000  # as the format's own reader
RANK_MAX = 64
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""The layout's dtypes that can be served, and the bytes of an element."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor's place: the layout's dtype, its shape, and where in the file its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_table(path: Path) -> dict[str, Weight]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        FailedPrecondition: `INVALID_ARTIFACT`, saying what is wrong and of which tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(TABLE_BYTES_MAX, size - 8):
            raise _damaged(path, f"it says that its table has {length} bytes; the file has {size}")
        raw = file.read(length)
    try:
        table = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its table is not JSON that can be used: {str(error)[:200]}") from None
    if not isinstance(table, dict):
        raise _damaged(path, "its table is not a JSON object")
    _check_metadata(path, table.pop("__metadata__", {}))
    data = 8 + length
    weights = {name: _weight(path, name, entry, data) for name, entry in table.items()}
    _check_order(path, weights, data, size)
    return weights


def _no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return made


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "__metadata__ is not a table of text")


def _weight(path: Path, name: str, entry: Any, data: int) -> Weight:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, "exactly dtype, shape and data_offsets are needed", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _damaged(path, f"dtype {str(dtype)[:40]!r} is not one of {', '.join(ITEM_BYTES)}", name)
    if not _are_sizes(shape) or len(shape) > RANK_MAX:
        raise _damaged(
            path, f"shape {str(shape)[:80]} is not a list of at most {RANK_MAX} whole numbers from 0 up", name
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"data_offsets {str(offsets)[:80]} is not a pair of whole numbers from 0 up", name)
    begin, end = offsets
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != needed:
        raise _damaged(path, f"{dtype} {shape} needs {needed} bytes, data_offsets {offsets} hold {end - begin}", name)
    return Weight(dtype, tuple(shape), data + begin, data + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_order(path: Path, weights: dict[str, Weight], data: int, size: int) -> None:
    """Byte ranges must follow one another without a hole or an overlap, and end where the file ends."""
    at = data
    for name, weight in sorted(weights.items(), key=lambda item: (item[1].begin, item[1].end)):
        if weight.begin != at:
            kind = "overlaps with another tensor" if weight.begin < at else "leaves a hole before it"
            raise _damaged(path, f"its place {kind}: it begins at byte {weight.begin}, expected {at}", name)
        at = weight.end
    if at != size:
        raise _damaged(path, f"its tensors end at byte {at}, the file has {size}")


def _damaged(path: Path, problem: str, tensor: str = "") -> FailedPrecondition:
    where = f"{path}: tensor {tensor[:200]!r}" if tensor else f"{path}"
    return FailedPrecondition(
        f"{where}: {problem}",
        reason="INVALID_ARTIFACT",
        field="artifact_uri",
        metadata={"path": str(path), "tensor": tensor[:200]},
    )
