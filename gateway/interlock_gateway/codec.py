"""Open Inference Protocol between JSON over HTTP, its gRPC messages, and the neutral form of `interlock.runtime.infer`. No sockets, no state.

Elements in JSON become arrays of their datatype as soon as they are parsed; the binary tensor extension passes raw bytes through without
looking at them or copying them. What belongs to a signature (names, shapes) is checked by the replica, which holds it; here only what
cannot be written down is refused.
"""

from __future__ import annotations

import math
import sys
from array import array as array_of
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from interlock.api.oip import messages
from interlock.errors import InvalidArgument
from interlock.runtime.arrays import NUMPY_TYPES, Array
from interlock.runtime.infer import Buffer, InferAnswer, InferRequest, Tensor

JSON_TYPES = frozenset(NUMPY_TYPES) - {"BF16"}
"""Datatypes that have a form in JSON. BF16 travels by the binary extension only."""
ALL: Mapping[str, bool] = {"": False}
"""No output is wanted as binary data."""
_ALLOWED = {"b": "b", "i": "biu", "u": "biu", "f": "iuf"}
"""Kind of a datatype to the kinds that JSON elements for it may have."""
_FLOATS = {"FP32": "f", "FP64": "d"} if sys.byteorder == "little" else {}
_NUMBERS = frozenset({float, int})
_OWN_PARAMETERS = frozenset({"binary_data_output"})
_RAW_INPUT, _RAW_OUTPUT = b"\x3a", 0x32
_STREAM_ERROR = 0x0A
"""Tags of `raw_input_contents` (7) and `raw_output_contents` (6), length-delimited; of a stream's `error_message` (1)."""
SCAN_BYTES = 1 << 16
"""From this size on a response's raw outputs are taken as views instead of being copied out of a parsed message."""


def invalid(field: str, message: str) -> InvalidArgument:
    """A refusal that names the field."""
    return InvalidArgument(f"{field}: {message}", reason="INVALID_REQUEST", field=field)


def parse_json(body: Buffer) -> Any:
    """The JSON document in `body`; refused with the place of the mistake."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"body: not JSON: {error}", reason="INVALID_JSON", field="body") from error


def parse_object(body: Buffer) -> dict[str, Any]:
    """The JSON object in `body`."""
    document = parse_json(body)
    if not isinstance(document, dict):
        raise invalid("body", f"a JSON object is expected, this is {type(document).__name__}")
    return document


# --- JSON and binary tensors over HTTP -> a request ---


def infer_request(
    model: str, version: str, body: Buffer, json_length: int | None
) -> tuple[InferRequest, Mapping[str, bool]]:
    """A request from a body whose first `json_length` bytes (None: all) are JSON and the rest binary tensors.

    Returns:
        The request, and which outputs are wanted as binary data (empty name: all others).
    """
    text: Buffer = body
    binary: Buffer = b""
    if json_length is not None:
        if json_length > len(body):
            raise invalid("Inference-Header-Content-Length", f"{json_length} is more than the body's {len(body)} bytes")
        view = memoryview(body)
        text, binary = view[:json_length], view[json_length:]
    document = parse_object(text)
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise invalid("inputs", "a list of at least one tensor is expected")
    tensors, offset = [], 0
    for index, item in enumerate(inputs):
        tensor, offset = _input(index, item, binary, offset)
        tensors.append(tensor)
    if offset != len(binary):
        raise invalid("inputs", f"{len(binary) - offset} bytes of binary data belong to no input")
    request = InferRequest(model, version, _text(document, "id"), tensors)
    return request, _wanted(document, request) if "parameters" in document or "outputs" in document else ALL


def _wanted(document: Mapping[str, Any], request: InferRequest) -> Mapping[str, bool]:
    """Sets the request's parameters and outputs; says which outputs are wanted as binary data."""
    parameters = document.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise invalid("parameters", f"an object is expected, this is {type(parameters).__name__}")
    wanted = {"": bool(parameters.get("binary_data_output", False))}
    request.parameters = {n: _parameter(n, v) for n, v in parameters.items() if n not in _OWN_PARAMETERS}
    names = []
    outputs = document.get("outputs") or []
    if not isinstance(outputs, list):
        raise invalid("outputs", f"a list is expected, this is {type(outputs).__name__}")
    for index, output in enumerate(outputs):
        if not isinstance(output, dict) or not isinstance(output.get("name"), str):
            raise invalid(f"outputs[{index}].name", "a string is expected")
        names.append(output["name"])
        own = _own_parameters(output, f"outputs[{index}]")
        if "classification" in own:
            raise unsupported_classification(f"outputs[{index}]")
        wanted[output["name"]] = bool(own.get("binary_data", wanted[""]))
    request.outputs = names
    return wanted


def unsupported_classification(where: str) -> InvalidArgument:
    """Labels are a version's own affair: its `[postprocess]` says them, for every caller alike."""
    return invalid(
        f"{where}.parameters.classification",
        "the classification extension is not supported; take the scores, or POST /predict, which answers labels",
    )


def _own_parameters(tensor: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    parameters = tensor.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise invalid(f"{where}.parameters", f"an object is expected, this is {type(parameters).__name__}")
    return parameters


def _parameter(name: str, value: Any) -> bool | float | str:
    if not isinstance(value, bool | int | float | str) or (type(value) is int and not -(2**63) <= value < 2**63):
        raise invalid(f"parameters.{name[:80]}", "a string, a number or a boolean is expected")
    return value


def _text(document: Mapping[str, Any], field: str) -> str:
    value = document.get(field, "")
    if not isinstance(value, str):
        raise invalid(field, f"a string is expected, this is {type(value).__name__}")
    return value


def _input(index: int, tensor: Any, binary: Buffer, offset: int) -> tuple[Tensor, int]:
    """One tensor, and the offset after its binary data."""
    if not isinstance(tensor, dict):
        raise invalid(f"inputs[{index}]", "an object with name, datatype, shape and data is expected")
    name, datatype, shape = tensor.get("name"), tensor.get("datatype"), tensor.get("shape")
    if not isinstance(name, str) or not isinstance(datatype, str) or not isinstance(shape, list):
        field = "name" if not isinstance(name, str) else "datatype" if not isinstance(datatype, str) else "shape"
        kind = "list of integers" if field == "shape" else "string"
        raise invalid(f"inputs[{index}].{field}", f"a {kind} is expected")
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**31:
            raise invalid(f"inputs[{index}].shape", f"{shape[:8]} is not a list of sizes")
    if "parameters" in tensor:
        size = _own_parameters(tensor, f"inputs[{index}]").get("binary_data_size")
        if size is not None:
            if type(size) is not int or size < 0 or offset + size > len(binary):
                left = len(binary) - offset
                where = f"inputs[{index}].parameters.binary_data_size"
                raise invalid(where, f"{size}: {left} bytes of binary data are left")
            return Tensor(name, datatype, shape, binary[offset : offset + size]), offset + size
    if "data" not in tensor:
        raise invalid(f"inputs[{index}].data", "missing")
    return Tensor(name, datatype, shape, _elements(tensor["data"], datatype, shape, f"inputs[{index}]")), offset


def _elements(data: Any, datatype: str, shape: Sequence[int], where: str) -> Array:
    """JSON elements, flat or nested, in their shape; their count is held to it."""
    if datatype not in JSON_TYPES:
        raise invalid(
            f"{where}.datatype", f"{datatype[:20]!r} has no JSON form; the others are {', '.join(sorted(JSON_TYPES))}"
        )
    array = to_array(data, datatype, where)
    if array.size != math.prod(shape):
        raise invalid(f"{where}.data", f"{array.size} elements, shape {list(shape)} has {math.prod(shape)}")
    return array.reshape(shape)


def to_array(data: Any, datatype: str, where: str) -> Array:
    """JSON elements as an array of the datatype; ragged lists, other types and values out of range are refused."""
    if datatype == "BYTES":
        return _text_array(data, where)
    if datatype in _FLOATS and type(data) is list and _NUMBERS.issuperset(map(type, data)):
        return np.frombuffer(array_of(_FLOATS[datatype], data), NUMPY_TYPES[datatype])
    try:
        array = np.array(data)
    except ValueError as error:
        raise invalid(f"{where}.data", "the rows have different lengths") from error
    wanted = NUMPY_TYPES[datatype]
    if not array.size:
        return array.astype(wanted)
    if array.dtype.kind not in _ALLOWED[wanted.kind]:
        raise invalid(f"{where}.data", f"elements are not all {datatype}")
    if wanted.kind in "iu":
        limits = np.iinfo(wanted)
        if array.min() < limits.min or array.max() > limits.max:
            raise invalid(f"{where}.data", f"an element does not fit {datatype} ({limits.min} to {limits.max})")
    if wanted.itemsize >= array.itemsize:
        return array.astype(wanted, copy=False)
    with np.errstate(over="ignore"):  # a number beyond FP32 becomes infinite, as in every client's own conversion
        return array.astype(wanted)


def _text_array(data: Any, where: str) -> Array:
    try:
        array = np.array(data, dtype=object)
    except ValueError as error:
        raise invalid(f"{where}.data", "the rows have different lengths") from error
    if not all(isinstance(item, str) for item in array.flat):
        raise invalid(f"{where}.data", "BYTES elements are strings, in rows of one length")
    encoded = np.empty(array.shape, dtype=object)
    encoded.flat[:] = [item.encode() for item in array.flat]
    return encoded


# --- an answer -> JSON and binary tensors over HTTP ---


def plain(array: Array, datatype: str) -> Any:
    """An output as what orjson writes: text for BYTES. NaN and infinities have no JSON form and become null."""
    if datatype != "BYTES":
        return np.ascontiguousarray(array)
    text = np.array([item if isinstance(item, str) else item.decode(errors="replace") for item in array.flat], object)
    return text.reshape(array.shape).tolist()


def listed(array: Array, datatype: str) -> Any:
    """An output as lists of plain values, rows first."""
    return plain(array, datatype) if datatype == "BYTES" else array.tolist()


def infer_response(
    answer: InferAnswer, wanted: Mapping[str, bool], traceparent: str = ""
) -> tuple[bytes, list[Buffer]]:
    """(JSON, the tensors that follow it as binary data) of an answer."""
    binary: list[Buffer] = []
    outputs = []
    for tensor in answer.outputs:
        item: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if wanted.get(tensor.name, wanted[""]) or tensor.datatype == "BF16":
            raw = tensor.raw()
            item["parameters"] = {"binary_data_size": len(raw)}
            binary.append(raw)
        else:
            item["data"] = plain(tensor.array().ravel(), tensor.datatype)
        outputs.append(item)
    document: dict[str, Any] = {"model_name": answer.model, "model_version": answer.version}
    if answer.request_id:
        document["id"] = answer.request_id
    document["parameters"] = {**answer.parameters, "traceparent": traceparent} if traceparent else answer.parameters
    document["outputs"] = outputs
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), binary


# --- the neutral form <-> gRPC messages ---


def to_wire(request: InferRequest) -> bytes:
    """A serialized ModelInferRequest. The elements go from where they lie into the message's bytes in one step."""
    message = messages.ModelInferRequest(model_name=request.model, model_version=request.version, id=request.request_id)
    for tensor in request.inputs:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    for name in request.outputs:
        message.outputs.add(name=name)
    for name, value in request.parameters.items():
        _set(message.parameters[name], value)
    parts: list[Buffer] = [message.SerializeToString()]
    for tensor in request.inputs:
        raw = tensor.raw()
        parts += (_RAW_INPUT, _varint(len(raw)), raw)
    return b"".join(parts)


def _set(parameter: Any, value: bool | float | str) -> None:
    match value:
        case bool():
            parameter.bool_param = value
        case int():
            parameter.int64_param = value
        case float():
            parameter.double_param = value
        case _:
            parameter.string_param = value


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def stream_parts(wire: bytes) -> tuple[str, Buffer]:
    """(error message, serialized ModelInferResponse) of a serialized ModelStreamInferResponse; the latter is a view on a large one."""
    view, at, message = memoryview(wire), 0, ""
    body: Buffer = b""
    while at < len(wire):
        tag = wire[at]
        length, at = _length(wire, at + 1)
        part = view[at : at + length]
        if tag == _STREAM_ERROR:
            message = str(part, "utf-8", "replace")
        else:
            body = part if length >= SCAN_BYTES else bytes(part)
        at += length
    return message, body


def from_wire(wire: Buffer) -> InferAnswer:
    """An answer from a serialized ModelInferResponse; the outputs of a large one are views on it."""
    head, raws = _split(wire) if len(wire) >= SCAN_BYTES else (wire, [])
    answer = messages.ModelInferResponse.FromString(bytes(head))
    raws = raws or list(answer.raw_output_contents)
    outputs = [
        Tensor(output.name, output.datatype, list(output.shape), raw)
        for output, raw in zip(answer.outputs, raws, strict=True)
    ]
    return InferAnswer(answer.model_name, answer.model_version, answer.id, outputs, parameters(answer))


def _split(wire: Buffer) -> tuple[Buffer, list[Buffer]]:
    """The message without its raw outputs, and those. A message with anything else than length-delimited fields is left whole."""
    view, at = memoryview(wire), 0
    rest: list[Buffer] = []
    raws: list[Buffer] = []
    while at < len(wire):
        start, tag = at, wire[at]
        if tag & 0x87 != 2:  # a field of another kind, or numbered above 15
            return wire, []
        length, at = _length(wire, at + 1)
        if tag == _RAW_OUTPUT:
            raws.append(view[at : at + length])
        else:
            rest.append(view[start : at + length])
        at += length
    return b"".join(rest), raws


def _length(wire: Buffer, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = wire[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def parameters(answer: Any) -> dict[str, Any]:
    """The response parameters of a ModelInferResponse as plain values."""
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in answer.parameters.items()}
