"""Any request at all is answered or refused by an error of ours that names its cause; and what is answered is what numpy says."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import onnx_models
from interlock.api.oip import messages as pb
from interlock.core.route import Route, Weight
from interlock.errors import InterlockError, Internal
from interlock.runtime.arrays import NUMPY_TYPES, encode_raw
from interlock_inference import repository
from interlock_inference.dataplane import DataPlane
from interlock_inference.engines import EngineOptions
from interlock_inference.recorder import Recorder
from interlock_inference.servicers.codec import InferCall, ResponseMaker
from interlock_inference.slots import Origin, Registry, Slot, SlotState, Warmup

QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)


class Nobody:
    """Observes nothing."""

    def finished(self, slot: Slot, seconds: float, error: InterlockError | None) -> None:
        """Ignored."""

    def ran(self, slot: Slot, rows: int) -> None:
        """Ignored."""


class Served:
    """A data plane with one model, and a loop to ask it in."""

    def __init__(self, folder: Path, body: bytes) -> None:
        (folder / "model.onnx").write_bytes(body)
        slot = Slot("policy", "1", str(folder), Origin())
        slot.loaded(repository.open_artifact(folder / "model.onnx", "", EngineOptions(), lambda percent, message: None))
        slot.warmup = Warmup(1, 0, 0.0, 0.0, 1e-9, 1)
        slot.move(SlotState.READY)
        registry = Registry()
        registry.put(slot)
        registry.switch(Route("policy", 1, (Weight("1", 1),)))
        self.slot = slot
        self.plane = DataPlane(registry, Recorder(), Nobody())
        self.loop = asyncio.new_event_loop()
        self.maker = ResponseMaker()

    def ask(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        call = InferCall(request, None)
        return self.maker.response(request, self.loop.run_until_complete(self.plane.infer(call)), "")


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("adder"), onnx_models.two_inputs())
    yield served
    served.plane.close()
    served.loop.close()


def refusal(served: Served, request: pb.ModelInferRequest) -> InterlockError | None:
    try:
        served.ask(request)
    except InterlockError as error:
        return error
    finally:
        assert not served.slot.handles, "every handle is given back"
    return None


names = st.sampled_from(["a", "b", "c", ""])
datatypes = st.sampled_from([*sorted(NUMPY_TYPES), "", "fp32", "STRING"])
shapes = st.lists(st.one_of(st.integers(0, 3), st.sampled_from([-1, 2**40, 2**63 - 1, -(2**63)])), max_size=4)
contents = st.dictionaries(
    st.sampled_from(["fp32_contents", "int64_contents", "bool_contents"]),
    st.lists(st.sampled_from([0, 1]), max_size=6),
    max_size=2,
)
tensor = st.tuples(names, datatypes, shapes, st.none() | contents)


@QUIET
@given(
    tensors=st.lists(tensor, max_size=4),
    raw=st.lists(st.binary(max_size=40), max_size=4),
    outputs=st.lists(st.sampled_from(["sum", "shape", "", "z"]), max_size=3),
)
def test_any_request_is_answered_or_refused_with_a_cause(
    adder: Served, tensors: list[Any], raw: list[bytes], outputs: list[str]
) -> None:
    request = pb.ModelInferRequest(model_name="policy", raw_input_contents=raw)
    for name, datatype, shape, typed in tensors:
        made = request.inputs.add(name=name, datatype=datatype, shape=shape)
        for field, values in (typed or {}).items():
            getattr(made.contents, field).extend([bool(v) for v in values] if field == "bool_contents" else values)
    for name in outputs:
        request.outputs.add(name=name)
    error = refusal(adder, request)
    assert not isinstance(error, Internal), error
    if error is not None:
        assert error.field
        assert error.message.startswith(error.field)


@QUIET
@given(wire=st.binary(max_size=200))
def test_any_bytes_are_a_request_or_not(adder: Served, wire: bytes) -> None:
    try:
        request = pb.ModelInferRequest.FromString(wire)
    except DecodeError:
        return
    request.model_name = "policy"
    assert not isinstance(refusal(adder, request), Internal)


@QUIET
@given(
    rows=st.integers(0, 5),
    seed=st.integers(0, 1000),
    swapped=st.booleans(),
    typed=st.booleans(),
    only_sum=st.booleans(),
)
def test_answers_are_what_numpy_says(
    adder: Served, rows: int, seed: int, swapped: bool, typed: bool, only_sum: bool
) -> None:
    random = np.random.default_rng(seed)
    arrays = {name: random.standard_normal((rows, 2)).astype(np.float32) for name in ("a", "b")}
    request = pb.ModelInferRequest(model_name="policy", id=str(seed))
    for name in ("b", "a") if swapped else ("a", "b"):
        made = request.inputs.add(name=name, datatype="FP32", shape=[rows, 2])
        if typed:
            made.contents.fp32_contents.extend(arrays[name].ravel().tolist())
        else:
            request.raw_input_contents.append(encode_raw(arrays[name], "FP32"))
    if only_sum:
        request.outputs.add(name="sum")
    response = adder.ask(request)
    assert response.id == str(seed)
    assert [o.name for o in response.outputs] == (["sum"] if only_sum else ["sum", "shape"])
    total = arrays["a"] + arrays["b"]
    if typed:
        assert list(response.outputs[0].contents.fp32_contents) == total.ravel().tolist()
    else:
        assert response.raw_output_contents[0] == total.tobytes()
    assert list(response.outputs[0].shape) == [rows, 2]
