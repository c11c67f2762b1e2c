"""Reload, rollback and version: the source documents' verbs on top of swaps (seeds 000, 001, 004)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

import interlock
from interlock.api.controller.v1 import model_service_pb2 as model_pb
from interlock.api.controller.v1 import swap_service_pb2 as swap_pb
from interlock.api.inference.v1 import runtime_service_pb2 as runtime_pb
from interlock.api.types.v1 import types_pb2
from interlock.core import names
from interlock.errors import FailedPrecondition, InvalidArgument, NotFound
from interlock.runtime.access import Principal, Scope
from interlock_gateway.dependencies import Up, needs
from interlock_gateway.reload_words import ENDED, reload_state, served_already, state_name
from interlock_gateway.upstreams import Upstreams

router = APIRouter(tags=["admin"])
INFER = [needs(Scope.INFER)]
RELOAD_SECONDS = 120.0
REGISTER_SECONDS = 60.0
ADMIN = needs(Scope.ADMIN)
GOING_BACK = frozenset({"REVERTING", "REVERTED"})
"""A rollback in the middle of a swap is that swap going back: reverted is what was wanted of it."""


class Reload(BaseModel):
    """What to serve. Nothing: the newest version that may serve."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field("", description="the served name; empty: the only one")
    model_path: str = Field(
        "", description="an ONNX file, or a folder with model.toml and manifest.json, as the controller sees it"
    )
    version: str = Field("", description="a version that is registered already")
    wait: bool = Field(True, description="answer when the swap has ended; false answers 202 at once")
    request_id: str = Field("", max_length=128, description="idempotency key")
    reason: str = Field("reload over HTTP", max_length=500)
    drain_seconds: float | None = Field(None, gt=0, le=3600)


class RollbackModel(BaseModel):
    """What to go back to. Nothing: the version that served before."""

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    version: str = ""
    quarantine: bool = Field(False, description="forbid the version that is left behind")
    wait: bool = True
    request_id: str = Field("", max_length=128)
    reason: str = Field("rollback over HTTP", max_length=500)


@router.post("/reload")
@router.post("/admin/model/reload")
async def reload(request: Request, up: Up, body: Reload | None = None, principal: Principal = ADMIN) -> JSONResponse:
    """Registers what is named, swaps to it without dropping a request, and answers when it serves; a failure leaves the old one serving."""
    body = body or Reload()
    change = types_pb2.Change(request_id=body.request_id, reason=body.reason, actor=principal.name)
    model = body.model or await _model_for(up, request.app.state.settings.gateway.default_model)
    version = await _version_for(up, body, model, change, principal)
    spec = swap_pb.SwapSpec(candidate_version=version)
    if body.drain_seconds is not None:
        spec.drain_timeout.FromNanoseconds(int(body.drain_seconds * 1e9))
    asked = swap_pb.CreateSwapRequest(change=change, spec=spec)
    try:
        answer = await up.call(up.swaps.CreateSwap, asked, actor=principal.name)
    except FailedPrecondition as error:
        if error.reason != "ALREADY_STABLE":
            raise
        return JSONResponse({"success": True, "swap": None, "version": version, **served_already(model, error.message)})
    return await _outcome(up, model, answer.swap, body.wait)


async def _model_for(up: Upstreams, default_model: str) -> str:
    """The configured model, or the only one there is."""
    if default_model:
        return default_model
    models = [
        names.parse_model(m.name)
        for m in (await up.call(up.models.ListModels, model_pb.ListModelsRequest(), idempotent=True)).models
    ]
    if len(models) == 1:
        return models[0]
    known = ", ".join(models) or "none is registered yet"
    raise InvalidArgument(f"model: name one of the models ({known})", reason="MODEL_AMBIGUOUS", field="model")


async def _version_for(up: Upstreams, body: Reload, model: str, change: Any, principal: Principal) -> str:
    if body.model_path and body.version:
        raise InvalidArgument(
            "model_path: give either model_path or version", reason="INVALID_REQUEST", field="model_path"
        )
    if body.model_path:
        registered = model_pb.RegisterVersionRequest(
            change=change, model=names.model_name(model), artifact_uri=body.model_path
        )
        return str(
            (
                await up.call(up.models.RegisterVersion, registered, timeout=REGISTER_SECONDS, actor=principal.name)
            ).version.name
        )
    if body.version:
        return names.version_name(model, body.version)
    listed = await up.call(
        up.models.ListVersions, model_pb.ListVersionsRequest(model=names.model_name(model)), idempotent=True
    )
    usable = [v.name for v in listed.versions if v.state == model_pb.Version.STATE_AVAILABLE]
    if not usable:
        raise NotFound(f"model {model} has no version that may serve", reason="VERSION_NOT_FOUND", field="version")
    return str(usable[0])


async def _outcome(
    up: Upstreams, model: str, swap: Any, wait: bool, wanted: frozenset[str] = frozenset({"COMPLETED"})
) -> JSONResponse:
    """200 with the ended swap, 412 when it ended in a state that nobody wanted, 202 when nobody waited."""
    if wait:
        watch = up.caller.stream(up.swaps.WatchSwap, swap_pb.WatchSwapRequest(name=swap.name), timeout=RELOAD_SECONDS)
        async for message in watch:
            swap = message.swap
    body = {
        "success": state_name(swap) in wanted,
        "swap": swap.name,
        "version": swap.spec.candidate_version,
        **reload_state(model, swap),
    }
    if not wait:
        return JSONResponse(body | {"success": True}, 202, headers={"location": f"/{swap.name}"})
    if state_name(swap) in ENDED - wanted:
        raise FailedPrecondition(
            f"the swap ended {state_name(swap)}: {swap.message}; {swap.stable_version or 'nothing'} serves as before",
            reason=swap.reason or "SWAP_FAILED",
            metadata={"swap": swap.name, "state": state_name(swap)},
        )
    return JSONResponse(body)


@router.post("/admin/model/rollback")
async def rollback(
    request: Request, up: Up, body: RollbackModel | None = None, principal: Principal = ADMIN
) -> JSONResponse:
    """Moves a model back to an earlier version; the rehearsed one-command procedure."""
    body = body or RollbackModel()
    model = body.model or await _model_for(up, request.app.state.settings.gateway.default_model)
    asked = model_pb.RollbackModelRequest(
        change=types_pb2.Change(request_id=body.request_id, reason=body.reason, actor=principal.name),
        model=names.model_name(model),
        version=names.version_name(model, body.version) if body.version else "",
        quarantine=body.quarantine,
    )
    answer = await up.call(up.models.RollbackModel, asked, actor=principal.name)
    wanted = {"REVERTED"} if state_name(answer.swap) in GOING_BACK else {"COMPLETED"}
    return await _outcome(up, model, answer.swap, body.wait, frozenset(wanted))


@router.get("/version", dependencies=INFER)
async def version(up: Up, model: str = "") -> dict[str, Any]:
    """What serves: version, training step, digest and route epoch, of one model or of all."""
    if up.alone:
        return _versions(await _served(up, model))
    models = (await up.call(up.models.ListModels, model_pb.ListModelsRequest(), idempotent=True)).models
    wanted = [m for m in models if not model or m.name == names.model_name(model)]
    if model and not wanted:
        raise NotFound(f"model {model!r} is not registered", reason="MODEL_NOT_FOUND", field="model")
    return _versions([await _serving(up, m) for m in wanted])


def _versions(serving: list[dict[str, Any]]) -> dict[str, Any]:
    first = serving[0] if len(serving) == 1 else {}
    return {"interlock": interlock.__version__, **first, "models": serving}


async def _served(up: Upstreams, model: str) -> list[dict[str, Any]]:
    """What a replica without a controller serves."""
    state = (await up.call(up.runtime.GetState, runtime_pb.GetStateRequest())).state
    slots = {slot.version: slot for slot in state.slots}
    serving = [
        {
            "model": names.parse_model(route.model),
            "version": names.parse_version(route.stable_version)[1],
            "epoch": route.epoch,
            "digest": slots[route.stable_version].digest,
            "step": slots[route.stable_version].origin.step,
            "since": route.update_time.ToJsonString(),
        }
        for route in state.routes
        if route.weights and model in ("", names.parse_model(route.model))
    ]
    if model and not serving:
        raise NotFound(f"model {model!r} is not served", reason="MODEL_NOT_FOUND", field="model")
    return serving


async def _serving(up: Upstreams, model: Any) -> dict[str, Any]:
    route = model.route
    body: dict[str, Any] = {
        "model": names.parse_model(model.name),
        "version": None,
        "epoch": route.epoch,
        "active_swap": model.active_swap or None,
    }
    if not route.stable_version:
        return body
    listed = await up.call(up.models.ListVersions, model_pb.ListVersionsRequest(model=model.name), idempotent=True)
    version = next(v for v in listed.versions if v.name == route.stable_version)
    body |= {"version": names.parse_version(version.name)[1], "digest": version.digest, "step": version.origin.step}
    return body | {
        "run": version.origin.run or None,
        "checkpoint": version.origin.checkpoint or None,
        "since": route.update_time.ToJsonString() if route.HasField("update_time") else None,
    }
