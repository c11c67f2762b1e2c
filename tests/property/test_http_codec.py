"""The gateway's codec: what goes over the wire is what protobuf would make of it, and any body is a request or a refusal with a cause."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.api.oip import messages
from interlock.errors import InvalidArgument
from interlock.runtime.arrays import NUMPY_TYPES, encode_raw
from interlock.runtime.infer import InferRequest, Tensor
from interlock_gateway import codec

parameters = st.dictionaries(
    st.text(max_size=8), st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=8), max_size=3
)  # fmt: skip


@given(
    raws=st.lists(st.binary(max_size=400), max_size=3),
    given_parameters=parameters,
    outputs=st.lists(st.text(max_size=5), max_size=2),
)
def test_a_request_on_the_wire_is_the_message(
    raws: list[bytes], given_parameters: dict[str, Any], outputs: list[str]
) -> None:
    tensors = [Tensor(f"t{i}", "UINT8", [len(raw)], memoryview(raw)) for i, raw in enumerate(raws)]
    request = InferRequest("m", "1", "id", tensors, outputs, given_parameters)
    message = messages.ModelInferRequest.FromString(codec.to_wire(request))
    assert (message.model_name, message.model_version, message.id) == ("m", "1", "id")
    assert list(message.raw_input_contents) == raws
    assert [(t.name, list(t.shape)) for t in message.inputs] == [(f"t{i}", [len(raw)]) for i, raw in enumerate(raws)]
    assert [o.name for o in message.outputs] == outputs
    assert codec.parameters(message) == given_parameters


@pytest.mark.parametrize("size", [0, 1, 200, codec.SCAN_BYTES, 5 * codec.SCAN_BYTES])
def test_an_answer_from_the_wire_is_the_message(size: int) -> None:
    message = messages.ModelInferResponse(model_name="m", model_version="2", id="q")
    for name, count in (("a", size), ("b", 3), ("c", size)):
        message.outputs.add(name=name, datatype="UINT8", shape=[count])
        message.raw_output_contents.append(bytes(i % 251 for i in range(count)))
    message.parameters["interlock-step"].int64_param = 7
    answer = codec.from_wire(message.SerializeToString())
    assert (answer.model, answer.version, answer.request_id, answer.parameters) == (
        "m",
        "2",
        "q",
        {"interlock-step": 7},
    )
    assert [bytes(t.raw()) for t in answer.outputs] == list(message.raw_output_contents)
    large = size >= codec.SCAN_BYTES
    assert isinstance(answer.outputs[0].data, memoryview) is large, "the elements of a large answer are not copied out"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
GOOD = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1.5]}
tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(max_size=3) | json_values,
        "datatype": st.sampled_from([*NUMPY_TYPES, "FLOAT"]) | json_values,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | json_values,
        "data": json_values,
        "parameters": json_values
        | st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 40) | json_values}),
    },
)


@given(
    document=st.fixed_dictionaries(
        {}, optional={"id": json_values, "inputs": st.just([GOOD]) | st.lists(tensors, max_size=2) | json_values, "outputs": json_values, "parameters": json_values}
    ),
    binary=st.binary(max_size=20),
)  # fmt: skip
def test_any_body_is_a_request_or_a_refusal_with_its_field(document: dict[str, Any], binary: bytes) -> None:
    try:
        text = orjson.dumps(document)
    except TypeError:  # an integer beyond 64 bits
        return
    try:
        request, wanted = codec.infer_request("m", "", text + binary, len(text))
    except InvalidArgument as refusal:
        field = refusal.field
    else:
        field = ""
        assert "" in wanted
        check(request)
        return
    assert field


def check(request: InferRequest) -> None:
    codec.to_wire(request)
    for tensor in request.inputs:
        assert isinstance(tensor.raw(), bytes | memoryview)


@pytest.mark.parametrize("datatype", sorted(codec.JSON_TYPES))
def test_elements_survive_json_and_back(datatype: str) -> None:
    plain: Any = ["a", "ü", ""] if datatype == "BYTES" else [True, False, True] if datatype == "BOOL" else [0, 1, 100]
    body = orjson.dumps({"inputs": [{"name": "x", "datatype": datatype, "shape": [3], "data": plain}]})
    request, _ = codec.infer_request("m", "", body, None)
    array = np.array(plain, dtype=object if datatype == "BYTES" else NUMPY_TYPES[datatype])
    assert bytes(request.inputs[0].raw()) == encode_raw(array, datatype)
    from interlock.runtime.infer import InferAnswer

    tensor = Tensor("y", datatype, [3], bytes(request.inputs[0].raw()))
    text, _ = codec.infer_response(InferAnswer("m", "1", "", [tensor], {}), codec.ALL)
    assert orjson.loads(text)["outputs"][0]["data"] == plain
