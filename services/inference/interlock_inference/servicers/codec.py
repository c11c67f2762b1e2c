"""Open Inference Protocol messages <-> the data plane's calls and replies. Only shapes and bytes; no decisions, no gRPC context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from interlock.api.oip import messages as pb
from interlock.errors import InvalidArgument, Unimplemented
from interlock.runtime.arrays import NUMPY_TYPES, encode_raw
from interlock.runtime.images import IMAGE
from interlock.runtime.infer import DIGEST, EPOCH, MEMBERS, STEP, TRACE, VERSION
from interlock_inference import tensors
from interlock_inference.dataplane import Reply
from interlock_inference.engines import Array
from interlock_inference.processing import encoded_images
from interlock_inference.slots import Slot, no_images
from interlock_inference.tensors import Described, invalid

RAW_ONLY = frozenset(NUMPY_TYPES) - frozenset(tensors.TYPED_FIELDS)


class InferCall:
    """A ModelInferRequest as the data plane takes it."""

    __slots__ = ("_request", "deadline", "has_images", "model", "outputs", "priority", "request_id", "version")

    def __init__(self, request: pb.ModelInferRequest, deadline: float | None) -> None:
        if not request.model_name:
            raise InvalidArgument("model_name: which model?", reason="INVALID_NAME", field="model_name")
        self._request = request
        self.model = request.model_name
        self.version = request.model_version
        self.request_id = request.id
        self.outputs: Sequence[str] = _outputs(request) if request.outputs else ()
        self.has_images = any(tensor.name == IMAGE and tensor.datatype == "BYTES" for tensor in request.inputs)
        self.deadline = deadline
        self.priority = _priority(request) if "priority" in request.parameters else 0

    def decode(self, slot: Slot) -> dict[str, Array]:
        """The inputs by name, checked against the slot's signature; views on the request's bytes where they came raw."""
        request = self._request
        described = tuple([Described(t.name, t.datatype, tuple(t.shape)) for t in request.inputs])
        if self.has_images:
            return with_images(slot, described, self._arrays(described))
        slot.check(described)
        return self._arrays(described)

    def _arrays(self, described: Sequence[Described]) -> dict[str, Array]:
        request = self._request
        for index, tensor in enumerate(request.inputs):
            if tensor.parameters:
                _refuse_shared_memory(tensor.parameters, f"inputs[{index}]")
        raw = request.raw_input_contents
        if not raw:
            return {t.name: _typed(t, request.inputs[i], i) for i, t in enumerate(described)}
        if len(raw) != len(described):
            raise invalid(
                "raw_input_contents",
                f"{len(raw)} entries for {len(described)} inputs; give one per input, or none and use contents",
            )
        for index, tensor in enumerate(request.inputs):
            if tensor.HasField("contents"):
                raise invalid(f"inputs[{index}].contents", "elements are given both here and in raw_input_contents")
        return {t.name: tensors.decode_raw(t, raw[i], i) for i, t in enumerate(described)}


def with_images(slot: Slot, described: Sequence[Described], given: dict[str, Array]) -> dict[str, Array]:
    """The inputs of a request whose `image` is encoded images, made by the version's own [preprocess]. Slow: for a worker thread.

    Raises:
        InvalidArgument: `NO_IMAGES`; see `Preprocess.array`; `INVALID_TENSOR`.
    """
    before = slot.processing.before if slot.processing is not None else None
    if before is None:
        raise no_images(slot.name)
    made = before.array(encoded_images(given.pop(IMAGE)))
    datatype = slot.specs[before.input].datatype
    others = [tensor for tensor in described if tensor.name != IMAGE]
    slot.check((*others, Described(before.input, datatype, made.shape)))
    return {**given, before.input: made}


def _priority(request: pb.ModelInferRequest) -> int:
    """Triton's clients send it unsigned, JSON ones as an int64."""
    parameter = request.parameters["priority"]
    kind = parameter.WhichOneof("parameter_choice")
    return whole_priority(getattr(parameter, kind) if kind else None)


def whole_priority(value: Any) -> int:
    """A priority as the data plane takes it. Raises InvalidArgument `INVALID_PARAMETER`."""
    if type(value) is not int:
        raise InvalidArgument(
            "parameters.priority: a whole number is needed", reason="INVALID_PARAMETER", field="parameters.priority"
        )
    return value


def identity(slot: Slot, epoch: int) -> dict[str, str | int]:
    """The response parameters that say which weights answered."""
    return {VERSION: slot.name, STEP: slot.step, DIGEST: slot.digest, EPOCH: epoch}


def member_names(reply: Reply) -> str:
    """The versions that an ensemble was answered by, in the order of its steps."""
    return ",".join(dict.fromkeys(slot.name for slot in reply.members))


def _outputs(request: pb.ModelInferRequest) -> list[str]:
    for index, output in enumerate(request.outputs):
        if output.parameters:
            _refuse_shared_memory(output.parameters, f"outputs[{index}]")
            if "classification" in output.parameters:
                raise Unimplemented(
                    f"outputs[{index}]: the classification extension is not supported; take the scores",
                    reason="CLASSIFICATION",
                )
    return [output.name for output in request.outputs]


def _refuse_shared_memory(parameters: Any, where: str) -> None:
    if "shared_memory_region" in parameters:
        raise Unimplemented(
            f"{where}: shared memory is not supported; send the elements in the message", reason="SHARED_MEMORY"
        )


def _typed(tensor: Described, message: Any, index: int) -> Array:
    if tensor.datatype in RAW_ONLY:
        raise invalid(f"inputs[{index}].contents", f"{tensor.datatype} travels in raw_input_contents only")
    field = tensors.TYPED_FIELDS[tensor.datatype]
    for other, values in message.contents.ListFields():
        if other.name != field:
            raise invalid(
                f"inputs[{index}].contents.{other.name}",
                f"{len(values)} elements here, {tensor.datatype} goes into {field}",
            )
    return tensors.decode_typed(tensor, getattr(message.contents, field), index)


class ResponseMaker:
    """Makes responses; what does not change between requests of one version and epoch is made once."""

    def __init__(self) -> None:
        self._templates: dict[tuple[str, str, int], pb.ModelInferResponse] = {}

    def response(self, request: pb.ModelInferRequest, reply: Reply, traceparent: str) -> pb.ModelInferResponse:
        """The answer, raw if the request was raw, else readable."""
        made = pb.ModelInferResponse()
        made.CopyFrom(self._template(reply.slot, reply.epoch))
        if request.id:
            made.id = request.id
        if traceparent:
            made.parameters[TRACE].string_param = traceparent
        if reply.members:
            made.parameters[MEMBERS].string_param = member_names(reply)
        specs = reply.slot.output_specs
        raw = bool(request.raw_input_contents) or any(specs[name].datatype in RAW_ONLY for name in reply.names)
        for name, array in zip(reply.names, reply.outputs, strict=True):
            datatype = specs[name].datatype
            output = made.outputs.add(name=name, datatype=datatype, shape=array.shape)
            if raw:
                made.raw_output_contents.append(encode_raw(array, datatype))
            else:
                getattr(output.contents, tensors.TYPED_FIELDS[datatype]).extend(array.ravel().tolist())
        return made

    def _template(self, slot: Slot, epoch: int) -> pb.ModelInferResponse:
        key = (slot.name, slot.digest, epoch)
        template = self._templates.get(key)
        if template is None:
            if len(self._templates) > 64:
                self._templates.clear()
            template = pb.ModelInferResponse(model_name=slot.model, model_version=slot.version)
            for name, value in identity(slot, epoch).items():
                if isinstance(value, str):
                    template.parameters[name].string_param = value
                else:
                    template.parameters[name].int64_param = value
            self._templates[key] = template
        return template
