"""The prediction routes, without a framework: `/v2/models/{model}[/versions/{version}]/infer`, `/predict` and `/batch`.

A prediction costs one JSON parse, one hop (none in the inline form) and one JSON dump; everything else of HTTP (documentation, validation
models, middleware) would cost more than the model, so it stands in `web`.
"""

from __future__ import annotations

import re
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from interlock.api.oip import messages
from interlock.errors import FailedPrecondition, InterlockError, InvalidArgument, NotFound
from interlock.runtime.images import IMAGE, LABELS, SCORES
from interlock.runtime.infer import TRACE, Answerer, Buffer, InferAnswer, InferRequest, Tensor
from interlock_gateway import codec, problems, uploads
from interlock_gateway.uploads import File
from interlock_gateway.upstreams import Upstreams

INFER_PATH = re.compile(r"/v2/models/([^/?%]+)(?:/versions/([^/?%]+))?/infer")
INFER_TEMPLATE = "/v2/models/{model}/infer"
PREDICT, BATCH = "/predict", "/batch"
IMAGE_PLACE = re.compile(r"image\[(\d+)\]")
IDENTITY = "interlock-"
"""Response parameters with this prefix say which weights answered; each is also a header of the same name."""
BINARY_LENGTH = b"inference-header-content-length"
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")

Headers = Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of uploads: bytes of one file, files of one `/batch`."""

    upload_bytes: int = 20 << 20
    files: int = 64


@dataclass(slots=True)
class _Asked:
    """What the images of one upload are asked with."""

    model: str
    version: str
    request_id: str
    headers: Headers
    traceparent: str


@dataclass(slots=True)
class _Seen:
    """What was answered for images: by whom, and a body per image."""

    model: str
    parameters: Mapping[str, Any]
    rows: list[dict[str, Any]]


@dataclass(slots=True)
class Answer:
    """A prediction as it goes out: `body`, then `tensors` as they lie."""

    body: bytes
    headers: list[tuple[bytes, bytes]]
    tensors: Sequence[Buffer] = ()


class Predictor:
    """Answers predictions.

    Args:
        answerer: who runs them.
        timeout_seconds: deadline of a prediction when the caller names none.
        default_model: the model of `/predict` when the request names none; empty: the only one that serves.
    """

    def __init__(
        self,
        upstreams: Upstreams,
        answerer: Answerer,
        timeout_seconds: float,
        default_model: str = "",
        limits: Limits = Limits(),
    ) -> None:
        self._limits = limits
        self._up = upstreams
        self._answerer = answerer
        self._timeout = timeout_seconds
        self._default_model = default_model

    def begin(
        self, path: str, headers: Headers, body: Buffer, traceparent: str
    ) -> Answer | Coroutine[Any, Any, Answer]:
        """Answers at once if it can, else returns what to await, which must be started. Raises InterlockError."""
        route = infer_route(path)
        if route is None:
            if path == BATCH or uploads.is_upload(headers):
                return self._images(path, headers, bytes(body), traceparent)
            return self._predict(headers, bytes(body), traceparent)
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
        identity = _plain_identity(answer.parameters)
        reply = {"model": model, **identity, "version": answer.version, "traceparent": traceparent, "outputs": outputs}
        text = orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)
        return Answer(text, [_JSON, *_identity(answer.parameters)])

    async def _images(self, path: str, headers: Headers, body: bytes, traceparent: str) -> Answer:
        """Uploaded images: one to `/predict`, several to `/batch`, where each is answered or refused by itself."""
        limits = self._limits
        upload = uploads.read(headers, body, files_max=limits.files if path == BATCH else 1)
        model = upload.fields.get("model") or await self.only_model()
        asked = _Asked(model, upload.fields.get("version", ""), upload.fields.get("id", ""), headers, traceparent)
        if path != BATCH:
            uploads.check(upload.files[0], 0, max_bytes=limits.upload_bytes)
            seen = await self._ask_images(asked, upload.files)
            return _image_answer(seen, traceparent, {"file": upload.files[0].name, **seen.rows[0]})
        refused: dict[int, InterlockError] = {}
        for index, file in enumerate(upload.files):
            try:
                uploads.check(file, index, max_bytes=limits.upload_bytes)
            except InterlockError as error:
                refused[index] = error
        good = [index for index in range(len(upload.files)) if index not in refused]
        seen = await self._each(asked, upload.files, good, refused)
        results = [
            {"file": file.name, "error": problems.problem(refused[index])}
            if index in refused
            else {"file": file.name, **seen.rows[good.index(index)]}
            for index, file in enumerate(upload.files)
        ]
        counts = {"num_ok": len(good), "num_failed": len(refused)}
        return _image_answer(seen, traceparent, {**counts, "results": results})

    async def _each(
        self, asked: _Asked, files: Sequence[File], good: list[int], refused: dict[int, InterlockError]
    ) -> _Seen:
        """All good files in one request; where that fails for one of them, it joins the refused and the others are asked again.

        Raises:
            InterlockError: what is not one file's fault.
        """
        while good:
            try:
                return await self._ask_images(asked, [files[index] for index in good])
            except InvalidArgument as error:
                place = IMAGE_PLACE.match(error.field)
                if place is None or int(place[1]) >= len(good):
                    raise
                refused[good.pop(int(place[1]))] = error
        return _Seen(asked.model, {}, [])

    async def _ask_images(self, asked: _Asked, files: Sequence[File]) -> _Seen:
        images = np.empty(len(files), dtype=object)
        images[:] = [file.body for file in files]
        tensor = Tensor(IMAGE, "BYTES", [len(files)], images)
        request = InferRequest(asked.model, asked.version, asked.request_id, [tensor])
        answer = await self.ask(request, asked.headers, asked.traceparent)
        outputs = {output.name: codec.listed(output.array(), output.datatype) for output in answer.outputs}
        return _Seen(answer.model, {**answer.parameters, "version": answer.version}, _rows(outputs, len(files)))

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


def _image_answer(seen: _Seen, traceparent: str, body: Mapping[str, Any]) -> Answer:
    identity = _plain_identity(seen.parameters)
    version = seen.parameters.get("version", "")
    reply = {"model": seen.model, **identity, "version": version, "traceparent": traceparent, **body}
    return Answer(orjson.dumps(reply), [_JSON, *_identity(seen.parameters)])


def _rows(outputs: Mapping[str, Any], num_images: int) -> list[dict[str, Any]]:
    """One body per image: labels with their scores where the version makes them, else the rows of its outputs."""
    if LABELS in outputs and SCORES in outputs:
        pairs = zip(outputs[LABELS], outputs[SCORES], strict=True)
        return [
            {"predictions": [{"label": label, "score": score} for label, score in zip(*pair, strict=True)]}
            for pair in pairs
        ]
    whole = {
        name: values for name, values in outputs.items() if not isinstance(values, list) or len(values) != num_images
    }
    if whole:
        raise FailedPrecondition(
            f"output {min(whole)!r} has no row per image; ask this model with tensors", reason="POSTPROCESS_FAILED"
        )
    return [{"outputs": {name: values[row] for name, values in outputs.items()}} for row in range(num_images)]


def _plain_identity(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(IDENTITY): value for name, value in parameters.items() if name.startswith(IDENTITY)}


async def _later(begun: Coroutine[Any, Any, InferAnswer], wanted: Mapping[str, bool], traceparent: str) -> Answer:
    return _infer_answer(await begun, wanted, traceparent)


def _infer_answer(answer: InferAnswer, wanted: Mapping[str, bool], traceparent: str) -> Answer:
    text, tensors = codec.infer_response(answer, wanted, traceparent)
    identity = _identity(answer.parameters)
    if not tensors:
        return Answer(text, [_JSON, *identity])
    return Answer(text, [_BINARY, (BINARY_LENGTH, b"%d" % len(text)), *identity], tensors)


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
    return _identity_headers(tuple([item for item in parameters.items() if item[0] != TRACE]))


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
    return method == "POST" and (path in (PREDICT, BATCH) or infer_route(path) is not None)
