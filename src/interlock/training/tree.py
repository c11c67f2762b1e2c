"""State dicts to flat tensors plus tagged JSON, and back, exactly. No pickle: a type that is not listed here is refused by its path.

Tensors and numpy arrays go to the safetensors file under their path; everything else becomes JSON, where JSON has no word for it as a
one-key table:

    {"$tensor": path}  {"$numpy": path}  {"$tuple": [...]}  {"$set": [...]}  {"$float": "nan"}  {"$bytes": base64}  {"$dict": [[k, v]]}
    {"$dtype": "torch.float32"}  {"$device": "cpu"}
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from interlock.errors import InvalidArgument

CODES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
}
DTYPES: Mapping[str, torch.dtype] = {code: dtype for dtype, code in CODES.items()}

Tensors = dict[str, torch.Tensor]


def pack(value: Any, path: str, tensors: Tensors) -> Any:
    """Plain JSON for `value`; tensors met on the way are put into `tensors` under their path, not copied.

    Raises:
        InvalidArgument: `STATE_NOT_SUPPORTED`, naming the path and the type.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, torch.Tensor):
        return {"$tensor": _put(tensors, path, value.detach())}
    if isinstance(value, (np.ndarray, np.generic)):
        return _pack_numpy(value, path, tensors)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Mapping):
        return _pack_mapping(value, path, tensors)
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    return _pack_rare(value, path, tensors)


def _pack_numpy(value: Any, path: str, tensors: Tensors) -> Any:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise _refuse(path, f"numpy {array.dtype}")
    tag = "$numpy" if isinstance(value, np.ndarray) else "$scalar"
    return {tag: _put(tensors, path, torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape))}


def _pack_mapping(value: Mapping[Any, Any], path: str, tensors: Tensors) -> Any:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: pack(item, f"{path}/{key}", tensors) for key, item in value.items()}
    pairs = [[pack(key, path, tensors), pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]
    return {"$dict": pairs}


def _pack_rare(value: Any, path: str, tensors: Tensors) -> Any:
    if isinstance(value, (set, frozenset)):
        return {"$set": [pack(item, path, tensors) for item in sorted(value)]}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, (torch.dtype, torch.device)):
        return {"$dtype" if isinstance(value, torch.dtype) else "$device": str(value)}
    raise _refuse(path, type(value).__qualname__)


def _refuse(path: str, what: str) -> InvalidArgument:
    return InvalidArgument(
        f"{path}: {what} has no exact form in a checkpoint; give numbers, text, lists, tables, tensors or numpy arrays",
        reason="STATE_NOT_SUPPORTED",
        field=path,
        metadata={"type": what},
    )


def _put(tensors: Tensors, path: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in CODES:
        raise _refuse(path, str(tensor.dtype))
    name, number = path, 1
    while name in tensors:
        number += 1
        name = f"{path}#{number}"
    tensors[name] = tensor
    return name


def unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `pack` was given, with the tensors taken from `tensors`."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, body), *_ = value.items()
        if tag.startswith("$"):
            return _unpack_tag(tag, body, tensors)
    return {key: unpack(item, tensors) for key, item in value.items()}


def _unpack_tag(tag: str, body: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if tag == "$tensor":
        return tensors[body]
    if tag == "$numpy":
        return tensors[body].numpy().copy()
    if tag == "$scalar":
        return tensors[body].numpy()[()]
    if tag == "$float":
        return float(body)
    if tag == "$bytes":
        return base64.b64decode(body)
    if tag == "$dtype":
        return getattr(torch, body.removeprefix("torch."))
    if tag == "$device":
        return torch.device(body)
    items = unpack(body, tensors)
    if tag == "$dict":
        return dict(items)
    return tuple(items) if tag == "$tuple" else set(items)
