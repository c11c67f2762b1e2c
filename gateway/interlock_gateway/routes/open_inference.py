"""The Open Inference Protocol's REST routes besides infer, which `interlock_gateway.predict` answers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from interlock.api.oip import messages
from interlock.errors import InterlockError, Unimplemented
from interlock.runtime.access import Scope
from interlock_gateway.codec import invalid, parse_object
from interlock_gateway.dependencies import Up, needs

router = APIRouter(tags=["open inference protocol"])
PUBLIC, INFER, ADMIN = [needs(Scope.PUBLIC)], [needs(Scope.INFER)], [needs(Scope.ADMIN)]
LOAD_SECONDS = 130.0  # a swap may take two minutes


@router.get("/v2/health/live", dependencies=PUBLIC)
async def server_live(up: Up) -> JSONResponse:
    """200 while the replica answers."""
    try:
        answer = await up.call(up.inference.ServerLive, messages.ServerLiveRequest(), timeout=2)
    except InterlockError:
        return JSONResponse({"live": False}, 503)
    return JSONResponse({"live": answer.live}, 200 if answer.live else 503)


@router.get("/v2/health/ready", dependencies=PUBLIC)
async def server_ready(up: Up) -> JSONResponse:
    """200 while the replica can answer predictions."""
    try:
        answer = await up.call(up.inference.ServerReady, messages.ServerReadyRequest(), timeout=2)
    except InterlockError:
        return JSONResponse({"ready": False}, 503)
    return JSONResponse({"ready": answer.ready}, 200 if answer.ready else 503)


@router.get("/v2", dependencies=PUBLIC)
async def server_metadata(up: Up) -> dict[str, Any]:
    """Name, version and extensions of the server."""
    answer = await up.call(up.inference.ServerMetadata, messages.ServerMetadataRequest(), idempotent=True)
    return {"name": answer.name, "version": answer.version, "extensions": list(answer.extensions)}


@router.get("/v2/models/stats", dependencies=INFER)
@router.get("/v2/models/{model}/stats", dependencies=INFER)
@router.get("/v2/models/{model}/versions/{version}/stats", dependencies=INFER)
async def model_statistics(up: Up, model: str = "", version: str = "") -> dict[str, Any]:
    """Counts and times per version."""
    answer = await up.call(
        up.inference.ModelStatistics, messages.ModelStatisticsRequest(name=model, version=version), idempotent=True
    )
    return _plain(answer)


@router.get("/v2/models/{model}/ready", dependencies=PUBLIC)
@router.get("/v2/models/{model}/versions/{version}/ready", dependencies=PUBLIC)
async def model_ready(up: Up, model: str, version: str = "") -> JSONResponse:
    """200 when the model, or that version of it, can answer."""
    answer = await up.call(
        up.inference.ModelReady, messages.ModelReadyRequest(name=model, version=version), idempotent=True
    )
    body = {"name": model, "ready": answer.ready} | ({"version": version} if version else {})
    return JSONResponse(body, 200 if answer.ready else 503)


@router.get("/v2/models/{model}", dependencies=INFER)
@router.get("/v2/models/{model}/versions/{version}", dependencies=INFER)
async def model_metadata(up: Up, model: str, version: str = "") -> dict[str, Any]:
    """Inputs, outputs and versions."""
    answer = await up.call(
        up.inference.ModelMetadata, messages.ModelMetadataRequest(name=model, version=version), idempotent=True
    )
    tensors = {
        side: [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in getattr(answer, side)]
        for side in ("inputs", "outputs")
    }
    return {"name": answer.name, "versions": list(answer.versions), "platform": answer.platform, **tensors}


@router.get("/v2/models/{model}/config", dependencies=INFER)
@router.get("/v2/models/{model}/versions/{version}/config", dependencies=INFER)
async def model_config(up: Up, model: str, version: str = "") -> dict[str, Any]:
    """The model's configuration in Triton's form."""
    answer = await up.call(
        up.inference.ModelConfig, messages.ModelConfigRequest(name=model, version=version), idempotent=True
    )
    return _plain(answer.config)


@router.post("/v2/repository/index", dependencies=INFER)
async def repository_index(request: Request, up: Up) -> list[dict[str, Any]]:
    """Every model and version the replica holds; the body may say `{"ready": true}`."""
    only_ready = bool((await _body(request)).get("ready", False))
    answer = await up.call(
        up.inference.RepositoryIndex, messages.RepositoryIndexRequest(ready=only_ready), idempotent=True
    )
    return [_plain(entry) for entry in answer.models]


@router.post("/v2/repository/models/{model}/load", dependencies=ADMIN)
async def repository_load(request: Request, up: Up, model: str) -> dict[str, Any]:
    """Serves a version of the repository, `{"parameters": {"version": "3"}}` or the newest; answers when it serves."""
    parameters = (await _body(request)).get("parameters") or {}
    if not isinstance(parameters, dict):
        raise invalid("parameters", "an object is expected")
    asked = messages.RepositoryModelLoadRequest(model_name=model)
    for name, value in parameters.items():
        asked.parameters[str(name)].string_param = str(value)
    await up.call(up.inference.RepositoryModelLoad, asked, timeout=LOAD_SECONDS)
    return {}


@router.post("/v2/repository/models/{model}/unload", dependencies=ADMIN)
async def repository_unload(up: Up, model: str) -> dict[str, Any]:
    """Takes a model out of service."""
    asked = messages.RepositoryModelUnloadRequest(model_name=model)
    await up.call(up.inference.RepositoryModelUnload, asked, timeout=LOAD_SECONDS)
    return {}


def _plain(message: Any) -> dict[str, Any]:
    """A message as Triton writes it over HTTP: field names as in the proto, whole numbers as numbers, enums by name."""
    made: dict[str, Any] = {}
    for field, value in message.ListFields():
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            made[field.name] = {key: _value(entry.fields_by_name["value"], item) for key, item in value.items()}
        elif field.is_repeated:
            made[field.name] = [_value(field, item) for item in value]
        else:
            made[field.name] = _value(field, value)
    return made


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return _plain(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value


async def _body(request: Request) -> dict[str, Any]:
    body = await request.body()
    return parse_object(body) if body else {}


async def unsupported() -> None:
    """Triton's extensions that are bound to one machine's memory or to Triton's own process; docs/reference/oip.md says why."""
    raise Unimplemented(
        "this Triton extension is not supported here: send tensors in requests; logs and traces are set by configuration",
        reason="UNSUPPORTED",
    )


_SHARED_MEMORY = "/v2/{kind}sharedmemory"
for _path in (
    *(f"{_SHARED_MEMORY}{rest}" for rest in ("/status", "/unregister")),
    *(f"{_SHARED_MEMORY}/region/{{name}}/{verb}" for verb in ("status", "register", "unregister")),
    "/v2/trace/setting",
    "/v2/models/{model}/trace/setting",
    "/v2/logging",
):
    router.add_api_route(_path, unsupported, methods=["GET", "POST"], dependencies=ADMIN, include_in_schema=False)
