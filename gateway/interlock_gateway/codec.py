"""Open Inference Protocol between JSON over HTTP and its gRPC messages. No sockets, no state.

Elements become raw bytes as soon as they are parsed; the binary tensor extension passes raw bytes through without looking at them.
What belongs to a signature (names, shapes, element counts) is checked by the replica, which holds it; here only what cannot be written
down is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from interlock.api.oip import messages
from interlock.errors import InvalidArgument
from interlock.runtime.arrays import NUMPY_TYPES, Array, decode_raw, encode_raw

JSON_TYPES = frozenset(NUMPY_TYPES) - {"BF16"}
"""Datatypes that have a form in JSON. BF16 travels by the binary extension only."""


def invalid(field: str, message: str) -> InvalidArgument:
    """A refusal that names the field."""
    return InvalidArgument(f"{field}: {message}", reason="INVALID_REQUEST", field=field)


def parse_json(body: bytes) -> Any:
    """The JSON document in `body`; refused with the place of the mistake."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"body: not JSON: {error}", reason="INVALID_JSON", field="body") from error


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`."""
    document = parse_json(body)
    if not isinstance(document, dict):
        raise invalid("body", f"a JSON object is expected, this is {type(document).__name__}")
    return document


def infer_request(model: str, version: str, body: bytes, json_length: int | None) -> tuple[Any, dict[str, bool]]:
    """A ModelInferRequest from a body whose first `json_length` bytes (None: all) are JSON and the rest binary tensors.

    Returns:
        The message, and which outputs are wanted as binary data (empty name: all others).
    """
    text, binary = (body, b"") if json_length is None else (body[:json_length], body[json_length:])
    if json_length is not None and json_length > len(body):
        raise invalid("Inference-Header-Content-Length", f"{json_length} is more than the body's {len(body)} bytes")
    document = parse_object(text)
    request = messages.ModelInferRequest(model_name=model, model_version=version, id=_text(document, "id"))
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise invalid("inputs", "a list of at least one tensor is expected")
    offset = 0
    for index, tensor in enumerate(inputs):
        offset = _add_input(request, index, tensor, binary, offset)
    if offset != len(binary):
        raise invalid("inputs", f"{len(binary) - offset} bytes of binary data belong to no input")
    wanted = {"": _binary_default(document.get("parameters"))}
    for index, output in enumerate(document.get("outputs") or ()):
        if not isinstance(output, dict) or not isinstance(output.get("name"), str):
            raise invalid(f"outputs[{index}].name", "a string is expected")
        request.outputs.add(name=output["name"])
        wanted[output["name"]] = bool((output.get("parameters") or {}).get("binary_data", wanted[""]))
    return request, wanted


def _text(document: Mapping[str, Any], field: str) -> str:
    value = document.get(field, "")
    if not isinstance(value, str):
        raise invalid(field, f"a string is expected, this is {type(value).__name__}")
    return value


def _binary_default(parameters: Any) -> bool:
    return isinstance(parameters, dict) and bool(parameters.get("binary_data_output", False))


def _add_input(request: Any, index: int, tensor: Any, binary: bytes, offset: int) -> int:
    """Appends one tensor; returns the offset after its binary data."""
    where = f"inputs[{index}]"
    if not isinstance(tensor, dict):
        raise invalid(where, "an object with name, datatype, shape and data is expected")
    for field, kind in (("name", str), ("datatype", str), ("shape", list)):
        if not isinstance(tensor.get(field), kind):
            raise invalid(f"{where}.{field}", f"a {'list of integers' if kind is list else 'string'} is expected")
    shape = tensor["shape"]
    if not all(isinstance(size, int) and 0 <= size < 2**31 for size in shape):
        raise invalid(f"{where}.shape", f"{shape[:8]} is not a list of sizes")
    request.inputs.add(name=tensor["name"], datatype=tensor["datatype"], shape=shape)
    size = (tensor.get("parameters") or {}).get("binary_data_size")
    if size is not None:
        if not isinstance(size, int) or size < 0 or offset + size > len(binary):
            raise invalid(
                f"{where}.parameters.binary_data_size", f"{size}: {len(binary) - offset} bytes of binary data are left"
            )
        request.raw_input_contents.append(binary[offset : offset + size])
        return offset + size
    if "data" not in tensor:
        raise invalid(f"{where}.data", "missing")
    request.raw_input_contents.append(encode_elements(tensor["data"], tensor["datatype"], shape, where))
    return offset


def encode_elements(data: Any, datatype: str, shape: Sequence[int], where: str) -> bytes:
    """JSON elements, flat or nested, as row-major little-endian bytes; their count is held to `shape`."""
    if datatype not in JSON_TYPES:
        raise invalid(
            f"{where}.datatype", f"{datatype[:20]!r} has no JSON form; the others are {', '.join(sorted(JSON_TYPES))}"
        )
    array = to_array(data, datatype, where)
    if array.size != math.prod(shape):
        raise invalid(f"{where}.data", f"{array.size} elements, shape {list(shape)} has {math.prod(shape)}")
    return encode_raw(array, datatype)


def to_array(data: Any, datatype: str, where: str) -> Array:
    """JSON elements as an array of the datatype; ragged lists, other types and values out of range are refused."""
    try:
        array = np.array(data, dtype=object if datatype == "BYTES" else None)
    except ValueError as error:
        raise invalid(f"{where}.data", "the rows have different lengths") from error
    if datatype == "BYTES":
        if not all(isinstance(item, str) for item in array.flat):
            raise invalid(f"{where}.data", "BYTES elements are strings, in rows of one length")
        return array
    wanted = NUMPY_TYPES[datatype]
    allowed = {"b": "b", "i": "biu", "u": "biu", "f": "iuf"}[wanted.kind]
    if array.size and array.dtype.kind not in allowed:
        raise invalid(f"{where}.data", f"elements are not all {datatype}")
    if wanted.kind in "iu" and array.size:
        limits = np.iinfo(wanted)
        if array.min() < limits.min or array.max() > limits.max:
            raise invalid(f"{where}.data", f"an element does not fit {datatype} ({limits.min} to {limits.max})")
    with np.errstate(over="ignore"):  # a number beyond FP32 becomes infinite, as in every client's own conversion
        return array.astype(wanted)


def decode_elements(raw: bytes, datatype: str, shape: Sequence[int]) -> Array:
    """An output as an array whose `tolist` is JSON: text for BYTES. NaN and infinities have no JSON form and become null."""
    array = decode_raw(raw, datatype, shape)
    if datatype != "BYTES":
        return array
    text = np.array([item.decode(errors="replace") for item in array.flat], dtype=object)
    return text.reshape(array.shape)


def parameters(answer: Any) -> dict[str, Any]:
    """The response parameters of a ModelInferResponse as plain values."""
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in answer.parameters.items()}


def infer_response(answer: Any, wanted: Mapping[str, bool]) -> tuple[bytes, int | None]:
    """(body, length of its JSON part or None when all of it is JSON) of a ModelInferResponse."""
    binary: list[bytes] = []
    outputs = []
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        item: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if wanted.get(output.name, wanted.get("", False)) or output.datatype == "BF16":
            item["parameters"] = {"binary_data_size": len(raw)}
            binary.append(raw)
        else:
            item["data"] = decode_elements(raw, output.datatype, output.shape).ravel().tolist()
        outputs.append(item)
    document: dict[str, Any] = {"model_name": answer.model_name, "model_version": answer.model_version}
    if answer.id:
        document["id"] = answer.id
    document |= {"parameters": parameters(answer), "outputs": outputs}
    text = orjson.dumps(document)
    return (b"".join([text, *binary]), len(text)) if binary else (text, None)
