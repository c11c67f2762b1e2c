"""Predictions from a replica over gRPC, numpy in and out. Errors are `interlock.errors`, with the server's reason and field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from interlock.api.oip import messages, rpc
from interlock.runtime.arrays import Array, datatype_of, decode_raw, encode_raw, from_plain
from interlock.runtime.channels import Caller, open_channel


@dataclass(frozen=True, slots=True)
class Answer:
    """One prediction, and which version it came from.

    Attributes:
        outputs: arrays by name; views on the response, not writeable.
        version: `models/{model}/versions/{version}`.
        step: the training step of that version; 0 when unknown.
        epoch: of the route that picked it; 0 when the version was named.
        traceparent: of the server's span; empty when the request was not traced.
    """

    outputs: Mapping[str, Array]
    version: str
    step: int
    digest: str
    epoch: int
    request_id: str
    traceparent: str

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]


class InferenceClient:
    """A channel to one replica. Use it as an async context manager; calls may run concurrently.

    Args:
        address: `host:port` of the gRPC listener.
        key: an API key with the infer scope, where keys are required.
    """

    def __init__(self, address: str = "127.0.0.1:8001", *, key: str = "") -> None:
        self._channel = open_channel(address)
        self._stub = rpc.Stub(self._channel)
        self._caller = Caller(key)
        self._datatypes: dict[str, dict[str, str]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        request_id: str = "",
        timeout: float = 10.0,
    ) -> Answer:
        """Asks once, and again (at most 3 times in all, within `timeout` seconds) while the replica is UNAVAILABLE: a prediction changes nothing.

        Args:
            inputs: by name: arrays, sent as they are; or lists and numbers, sent in the model's own datatype (asked for once per model).
            version: a version to name; empty follows the route.
            outputs: which ones; empty takes all.

        Raises:
            InterlockError: as the server raised it, e.g. InvalidArgument with the field at fault.
        """
        plain = not all(isinstance(value, np.ndarray) for value in inputs.values())
        request = _request(model, inputs, outputs, await self._datatypes_of(model, version, timeout) if plain else {})
        request.model_version, request.id = version, request_id
        response = await self._caller.unary(self._stub.ModelInfer, request, timeout=timeout, idempotent=True)
        return _answer(response)

    async def _datatypes_of(self, model: str, version: str, timeout: float) -> Mapping[str, str]:
        """Datatype by input name. Believed for as long as the client lives: versions that follow each other have one signature."""
        if model not in self._datatypes:
            metadata = await self.metadata(model, version, timeout=timeout)
            self._datatypes[model] = {tensor.name: tensor.datatype for tensor in metadata.inputs}
        return self._datatypes[model]

    async def is_ready(self, model: str, version: str = "", *, timeout: float = 1.0) -> bool:
        """Whether a request for the model would be admitted now."""
        request = messages.ModelReadyRequest(name=model, version=version)
        return bool((await self._caller.unary(self._stub.ModelReady, request, timeout=timeout)).ready)

    async def metadata(self, model: str, version: str = "", *, timeout: float = 5.0) -> messages.ModelMetadataResponse:
        """Versions and tensors of a model. Raises NotFound."""
        request = messages.ModelMetadataRequest(name=model, version=version)
        response: messages.ModelMetadataResponse = await self._caller.unary(
            self._stub.ModelMetadata, request, timeout=timeout, idempotent=True
        )
        return response


def _request(
    model: str, inputs: Mapping[str, Any], outputs: Sequence[str], datatypes: Mapping[str, str]
) -> messages.ModelInferRequest:
    request = messages.ModelInferRequest(model_name=model)
    for name, value in inputs.items():
        if isinstance(value, np.ndarray) or name not in datatypes:
            array = np.asarray(value)
            datatype = datatype_of(array)
        else:
            datatype = datatypes[name]
            array = from_plain(value, datatype)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(encode_raw(array, datatype))
    for name in outputs:
        request.outputs.add(name=name)
    return request


def _answer(response: messages.ModelInferResponse) -> Answer:
    parameters = response.parameters
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return Answer(
        outputs={output.name: decode_raw(raw, output.datatype, output.shape) for output, raw in pairs},
        version=parameters["interlock-version"].string_param,
        step=parameters["interlock-step"].int64_param,
        digest=parameters["interlock-digest"].string_param,
        epoch=parameters["interlock-epoch"].int64_param,
        request_id=response.id,
        traceparent=parameters["traceparent"].string_param,
    )
