"""The prediction routes, without a framework: `/v2/models/{model}[/versions/{version}]/infer` and `/predict`.

A prediction costs one JSON parse, one gRPC hop and one JSON dump; everything else of HTTP (documentation, validation models, middleware)
would cost more than the model, so it stands in `web`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from interlock.api.oip import messages
from interlock.errors import FailedPrecondition, NotFound, Unavailable
from interlock.runtime.arrays import encode_raw
from interlock_gateway import codec
from interlock_gateway.upstreams import Upstreams

INFER_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
IDENTITY = "interlock-"
"""Response parameters with this prefix say which weights answered; each is also a header of the same name."""
BINARY_LENGTH = b"inference-header-content-length"

Answer = tuple[bytes, list[tuple[bytes, bytes]]]


class Predictor:
    """Answers predictions through one replica address.

    Args:
        timeout_seconds: deadline of a prediction when the caller names none.
        default_model: the model of `/predict` when the request names none; empty: the only one that serves.
    """

    def __init__(self, upstreams: Upstreams, timeout_seconds: float, default_model: str = "") -> None:
        self._up = upstreams
        self._timeout = timeout_seconds
        self._default_model = default_model

    async def infer(self, path: str, headers: Mapping[bytes, bytes], body: bytes) -> Answer:
        """The Open Inference Protocol's REST form, JSON or with the binary tensor extension."""
        match = INFER_PATH.fullmatch(path)
        assert match is not None
        length = headers.get(BINARY_LENGTH)
        if length is not None and not length.isdigit():
            raise codec.invalid("Inference-Header-Content-Length", f"{length[:20]!r} is not a number")
        request, wanted = codec.infer_request(match[1], match[2] or "", body, int(length) if length else None)
        answer = await self._call(request, headers)
        text, json_length = codec.infer_response(answer, wanted)
        kind = b"application/json" if json_length is None else b"application/octet-stream"
        extra = [] if json_length is None else [(BINARY_LENGTH, str(json_length).encode())]
        return text, [(b"content-type", kind), *extra, *_identity(codec.parameters(answer))]

    async def predict(self, headers: Mapping[bytes, bytes], body: bytes) -> Answer:
        """The plain form: `{"model"?, "version"?, "instances": [...]}` or `{"inputs": {name: [...]}}`."""
        document = codec.parse_object(body)
        unknown = set(document) - {"model", "version", "inputs", "instances", "id"}
        if unknown:
            raise codec.invalid(min(unknown), "unknown field; model, version, inputs, instances and id are known")
        model = document.get("model") or await self.only_model()
        if not isinstance(model, str):
            raise codec.invalid("model", "a string is expected")
        signature = await self._up.signature(model)
        request = messages.ModelInferRequest(
            model_name=model, model_version=str(document.get("version") or ""), id=str(document.get("id") or "")
        )
        for name, data in _named_inputs(document, signature).items():
            _add(request, name, data, signature)
        answer = await self._call(request, headers)
        outputs = {
            output.name: codec.decode_elements(raw, output.datatype, output.shape).tolist()
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }
        parameters = codec.parameters(answer)
        identity = {
            name.removeprefix(IDENTITY): value for name, value in parameters.items() if name.startswith(IDENTITY)
        }
        reply = {"model": model, **identity, "version": answer.model_version, "outputs": outputs}
        return orjson.dumps(reply), [(b"content-type", b"application/json"), *_identity(parameters)]

    async def only_model(self) -> str:
        """The model to use when the request names none.

        Raises:
            FailedPrecondition: `MODEL_AMBIGUOUS`, naming those that serve.
            NotFound: `MODEL_NOT_FOUND`, when none does.
        """
        if self._default_model:
            return self._default_model
        index = await self._up.call(
            self._up.inference.RepositoryIndex, messages.RepositoryIndexRequest(ready=True), idempotent=True
        )
        names = sorted({entry.name for entry in index.models})
        if len(names) == 1:
            return str(names[0])
        if not names:
            raise NotFound(
                "no model serves yet; register one with POST /reload or start a training run",
                reason="MODEL_NOT_FOUND",
                field="model",
            )
        raise FailedPrecondition(
            f"model: several serve, name one of {', '.join(names)}", reason="MODEL_AMBIGUOUS", field="model"
        )

    async def _call(self, request: Any, headers: Mapping[bytes, bytes]) -> Any:
        timeout = _timeout(headers, self._timeout)
        try:
            return await self._up.call(self._up.inference.ModelInfer, request, timeout=timeout)
        except Unavailable as error:
            if error.reason != "DRAINING":
                raise
            # Refused before it was started: the one case in which trying again cannot run it twice.
            return await self._up.call(self._up.inference.ModelInfer, request, timeout=timeout)


def _timeout(headers: Mapping[bytes, bytes], default_seconds: float) -> float:
    """The caller's `x-request-timeout-seconds`, at most the default."""
    value = headers.get(b"x-request-timeout-seconds")
    if value is None:
        return default_seconds
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise codec.invalid("x-request-timeout-seconds", f"{value[:20]!r} is not a positive number of seconds")
    return min(seconds, default_seconds)


def _named_inputs(document: Mapping[str, Any], signature: Any) -> dict[str, Any]:
    """The tensors of a plain request by input name."""
    if ("inputs" in document) == ("instances" in document):
        raise codec.invalid("inputs", 'give either "inputs" ({name: data}) or "instances" (data of the only input)')
    names = [tensor.name for tensor in signature.inputs]
    if "instances" in document:
        if len(names) != 1:
            raise codec.invalid(
                "instances", f'the model has {len(names)} inputs ({", ".join(names)}); name them in "inputs"'
            )
        return {names[0]: document["instances"]}
    inputs = document["inputs"]
    if not isinstance(inputs, dict):
        raise codec.invalid("inputs", "an object of input name to data is expected")
    return inputs


def _add(request: Any, name: str, data: Any, signature: Any) -> None:
    tensor = next((tensor for tensor in signature.inputs if tensor.name == name), None)
    if tensor is None:
        known = ", ".join(item.name for item in signature.inputs)
        raise codec.invalid(f"inputs.{name[:80]}", f"unknown input; the model has {known}")
    array = codec.to_array(data, tensor.datatype, f"inputs.{name}")
    shape = (
        [1, *array.shape] if array.ndim == len(tensor.shape) - 1 else array.shape
    )  # one row may come without its batch dimension
    request.inputs.add(name=name, datatype=tensor.datatype, shape=shape)
    request.raw_input_contents.append(encode_raw(array, tensor.datatype))


def _identity(parameters: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), str(value).encode()) for name, value in parameters.items() if name.startswith(IDENTITY)]


def is_prediction(method: str, path: str) -> bool:
    """True for the routes that this module answers."""
    return method == "POST" and (path == "/predict" or INFER_PATH.fullmatch(path) is not None)
