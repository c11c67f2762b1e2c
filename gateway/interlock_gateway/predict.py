"""The prediction routes, without a framework: `/v2/models/{model}[/versions/{version}]/infer` and `/predict`.

A prediction costs one JSON parse, one hop (none in the inline form) and one JSON dump; everything else of HTTP (documentation, validation
models, middleware) would cost more than the model, so it stands in `web`.
"""

from __future__ import annotations

import re
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from interlock.api.oip import messages
from interlock.errors import FailedPrecondition, NotFound
from interlock.runtime.infer import Answerer, InferAnswer, InferRequest, Tensor
from interlock_gateway import codec
from interlock_gateway.upstreams import Upstreams

INFER_PATH = re.compile(r"/v2/models/([^/?%]+)(?:/versions/([^/?%]+))?/infer")
INFER_TEMPLATE = "/v2/models/{model}/infer"
IDENTITY = "interlock-"
"""Response parameters with this prefix say which weights answered; each is also a header of the same name."""
BINARY_LENGTH = b"inference-header-content-length"
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")

Headers = Mapping[bytes, bytes]


@dataclass(slots=True)
class Answer:
    """A prediction as it goes out."""

    body: bytes
    headers: list[tuple[bytes, bytes]]


class Predictor:
    """Answers predictions.

    Args:
        answerer: who runs them.
        timeout_seconds: deadline of a prediction when the caller names none.
        default_model: the model of `/predict` when the request names none; empty: the only one that serves.
    """

    def __init__(
        self, upstreams: Upstreams, answerer: Answerer, timeout_seconds: float, default_model: str = ""
    ) -> None:
        self._up = upstreams
        self._answerer = answerer
        self._timeout = timeout_seconds
        self._default_model = default_model

    def begin(self, path: str, headers: Headers, body: bytes, traceparent: str) -> Answer | Coroutine[Any, Any, Answer]:
        """Answers at once if it can, else returns what to await, which must be started. Raises InterlockError."""
        route = infer_route(path)
        if route is None:
            return self._predict(headers, body, traceparent)
        length = headers.get(BINARY_LENGTH)
        if length is not None and not length.isdigit():
            raise codec.invalid("Inference-Header-Content-Length", f"{length[:20]!r} is not a number")
        request, wanted = codec.infer_request(*route, body, int(length) if length else None)
        begun = self._answerer.begin(request, _timeout(headers, self._timeout), traceparent)
        if isinstance(begun, InferAnswer):
            return _infer_answer(begun, wanted, traceparent)
        return _later(begun, wanted, traceparent)

    async def _predict(self, headers: Headers, body: bytes, traceparent: str) -> Answer:
        """The plain form: `{"model"?, "version"?, "instances": [...]}` or `{"inputs": {name: [...]}}`."""
        document = codec.parse_object(body)
        unknown = set(document) - {"model", "version", "inputs", "instances", "id"}
        if unknown:
            raise codec.invalid(min(unknown), "unknown field; model, version, inputs, instances and id are known")
        model = document.get("model") or await self.only_model()
        if not isinstance(model, str):
            raise codec.invalid("model", "a string is expected")
        signature = await self._up.signature(model)
        tensors = [_tensor(name, data, signature) for name, data in _named_inputs(document, signature).items()]
        request = InferRequest(model, str(document.get("version") or ""), str(document.get("id") or ""), tensors)
        answer = await self.ask(request, headers, traceparent)
        outputs = {tensor.name: codec.plain(tensor.array(), tensor.datatype) for tensor in answer.outputs}
        identity = {
            name.removeprefix(IDENTITY): value for name, value in answer.parameters.items() if name.startswith(IDENTITY)
        }
        reply = {"model": model, **identity, "version": answer.version, "traceparent": traceparent, "outputs": outputs}
        text = orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)
        return Answer(text, [_JSON, *_identity(answer.parameters)])

    async def ask(self, request: InferRequest, headers: Headers, traceparent: str) -> InferAnswer:
        """One prediction within the caller's time."""
        begun = self._answerer.begin(request, _timeout(headers, self._timeout), traceparent)
        return begun if isinstance(begun, InferAnswer) else await begun

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


async def _later(begun: Coroutine[Any, Any, InferAnswer], wanted: Mapping[str, bool], traceparent: str) -> Answer:
    return _infer_answer(await begun, wanted, traceparent)


def _infer_answer(answer: InferAnswer, wanted: Mapping[str, bool], traceparent: str) -> Answer:
    text, json_length = codec.infer_response(answer, wanted, traceparent)
    identity = _identity(answer.parameters)
    if json_length is None:
        return Answer(text, [_JSON, *identity])
    return Answer(text, [_BINARY, (BINARY_LENGTH, b"%d" % json_length), *identity])


def _timeout(headers: Headers, default_seconds: float) -> float:
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


def _tensor(name: str, data: Any, signature: Any) -> Tensor:
    known = next((tensor for tensor in signature.inputs if tensor.name == name), None)
    if known is None:
        names = ", ".join(item.name for item in signature.inputs)
        raise codec.invalid(f"inputs.{name[:80]}", f"unknown input; the model has {names}")
    array = codec.to_array(data, known.datatype, f"inputs.{name}")
    if array.ndim == len(known.shape) - 1:  # one row may come without its batch dimension
        array = array[None]
    return Tensor(name, known.datatype, array.shape, array)


def _identity(parameters: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    return _identity_headers(tuple(parameters.items()))


@lru_cache(256)  # a version's answers all carry the same
def _identity_headers(parameters: tuple[tuple[str, Any], ...]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), str(value).encode()) for name, value in parameters if name.startswith(IDENTITY)]


@lru_cache(1024)
def infer_route(path: str) -> tuple[str, str] | None:
    """(model, version or "") of the protocol's own prediction route; None for another path."""
    match = INFER_PATH.fullmatch(path)
    return None if match is None else (match[1], match[2] or "")


def is_prediction(method: str, path: str) -> bool:
    """True for the routes that this module answers."""
    return method == "POST" and (path == "/predict" or infer_route(path) is not None)
