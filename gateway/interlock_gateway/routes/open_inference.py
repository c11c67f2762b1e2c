"""The Open Inference Protocol's REST routes besides infer, which `interlock_gateway.predict` answers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from google.protobuf.json_format import MessageToDict

from interlock.api.oip import messages
from interlock.errors import InterlockError
from interlock.runtime.access import Scope
from interlock_gateway.dependencies import Up, needs

router = APIRouter(tags=["open inference protocol"])
PUBLIC, INFER = [needs(Scope.PUBLIC)], [needs(Scope.INFER)]


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
    return MessageToDict(answer, preserving_proto_field_name=True)


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
    return MessageToDict(answer.config, preserving_proto_field_name=True)


@router.post("/v2/repository/index", dependencies=INFER)
async def repository_index(request: Request, up: Up) -> list[dict[str, Any]]:
    """Every model and version the replica holds; the body may say `{"ready": true}`."""
    from interlock_gateway.codec import parse_object

    body = await request.body()
    only_ready = bool(parse_object(body).get("ready", False)) if body else False
    answer = await up.call(
        up.inference.RepositoryIndex, messages.RepositoryIndexRequest(ready=only_ready), idempotent=True
    )
    return [MessageToDict(entry, preserving_proto_field_name=True) for entry in answer.models]
