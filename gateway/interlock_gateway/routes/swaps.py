"""Swaps, models and routes as resources, with server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from interlock.api.controller.v1 import model_service_pb2 as model_pb
from interlock.api.controller.v1 import swap_service_pb2 as swap_pb
from interlock.api.types.v1 import types_pb2
from interlock.core import names
from interlock.runtime.access import Principal, Scope
from interlock_gateway.dependencies import Up, needs
from interlock_gateway.routes import resources
from interlock_gateway.routes.resources import Count, Steer, plain, sse

router = APIRouter(tags=["swaps"])
ADMIN = needs(Scope.ADMIN)
ADMIN_ONLY = [ADMIN]


class NewSwap(BaseModel):
    """A swap to start."""

    model_config = ConfigDict(extra="forbid")

    model: str
    version: str
    concurrency: Literal["REJECT", "QUEUE", "SUPERSEDE"] = "REJECT"
    warmup_iterations: int = Field(0, ge=0, le=1000)
    drain_seconds: float | None = Field(None, gt=0, le=3600)
    soak_seconds: float = Field(0.0, ge=0, le=86_400)
    keep_warm_seconds: float = Field(0.0, ge=0, le=86_400)
    approval_required: bool = False
    force: bool = False
    request_id: str = Field("", max_length=128)
    reason: str = Field("swap over HTTP", max_length=500)


def _spec(body: NewSwap) -> Any:
    spec = swap_pb.SwapSpec(
        candidate_version=names.version_name(body.model, body.version),
        concurrency=swap_pb.SwapSpec.Concurrency.Value(f"CONCURRENCY_{body.concurrency}"),
        warmup_iterations=body.warmup_iterations,
        approval_required=body.approval_required,
        force=body.force,
    )
    if body.drain_seconds is not None:
        spec.drain_timeout.FromNanoseconds(int(body.drain_seconds * 1e9))
    spec.soak_duration.FromNanoseconds(int(body.soak_seconds * 1e9))
    spec.keep_warm_duration.FromNanoseconds(int(body.keep_warm_seconds * 1e9))
    return spec


@router.post("/swaps")
async def create(up: Up, body: NewSwap, principal: Principal = ADMIN) -> JSONResponse:
    """Starts a swap; 202 with the resource, whose events stand at `/swaps/{swap}/events`."""
    change = types_pb2.Change(request_id=body.request_id, reason=body.reason, actor=principal.name)
    answer = await up.call(
        up.swaps.CreateSwap, swap_pb.CreateSwapRequest(change=change, spec=_spec(body)), actor=principal.name
    )
    return JSONResponse(plain(answer.swap), 202, headers={"location": f"/{answer.swap.name}"})


@router.get("/swaps", dependencies=ADMIN_ONLY)
async def listed(up: Up, model: str = "", page_size: Annotated[int, Query(ge=0, le=1000)] = 100) -> dict[str, Any]:
    """Swaps, newest first."""
    asked = swap_pb.ListSwapsRequest(model=names.model_name(model) if model else "", page_size=page_size)
    return plain(await up.call(up.swaps.ListSwaps, asked, idempotent=True))


@router.get("/swaps/{swap}", dependencies=ADMIN_ONLY)
async def one(up: Up, swap: str) -> dict[str, Any]:
    """One swap."""
    return plain(
        (await up.call(up.swaps.GetSwap, swap_pb.GetSwapRequest(name=names.swap_name(swap)), idempotent=True)).swap
    )


@router.get("/swaps/{swap}/receipt", dependencies=ADMIN_ONLY)
async def receipt(up: Up, swap: str) -> dict[str, Any]:
    """What an ended swap did."""
    return plain(
        (
            await up.call(up.swaps.GetReceipt, swap_pb.GetReceiptRequest(name=names.swap_name(swap)), idempotent=True)
        ).receipt
    )


@router.get("/swaps/{swap}/events", dependencies=ADMIN_ONLY)
async def events(request: Request, up: Up, swap: str, after_revision: Count = 0) -> StreamingResponse:
    """Server-sent events: the swap now, then after every change; ends when the swap does. `id` is the revision to resume from."""
    last = resources.last_event_id(request)
    asked = swap_pb.WatchSwapRequest(
        name=names.swap_name(swap), after_revision=after_revision if last is None else last
    )
    # One read before the stream starts, so that an unknown swap is a 404 and not a broken stream.
    await up.call(up.swaps.GetSwap, swap_pb.GetSwapRequest(name=asked.name), idempotent=True)

    async def stream() -> AsyncIterator[bytes]:
        async for message in up.watch(up.swaps.WatchSwap, asked):
            yield sse("swap", plain(message.swap), str(message.swap.revision))

    return resources.events(stream())


@router.post("/swaps/{swap}/{verb}")
async def steer(
    up: Up,
    swap: str,
    verb: Literal["approve", "reject", "promote", "abort"],
    body: Steer | None = None,
    principal: Principal = ADMIN,
) -> dict[str, Any]:
    """Approves, rejects, promotes or aborts."""
    body = body or Steer()
    change = types_pb2.Change(request_id=body.request_id, reason=body.reason, actor=principal.name)
    name = f"{verb.capitalize()}Swap"
    message = getattr(swap_pb, f"{name}Request")(change=change, name=names.swap_name(swap))
    return plain((await up.call(getattr(up.swaps, name), message, actor=principal.name)).swap)


@router.get("/models", dependencies=ADMIN_ONLY)
async def models(up: Up) -> dict[str, Any]:
    """Every model with what serves."""
    return plain(await up.call(up.models.ListModels, model_pb.ListModelsRequest(), idempotent=True))


@router.get("/models/{model}/versions", dependencies=ADMIN_ONLY)
async def versions(up: Up, model: str) -> dict[str, Any]:
    """A model's versions, newest first."""
    return plain(
        await up.call(
            up.models.ListVersions, model_pb.ListVersionsRequest(model=names.model_name(model)), idempotent=True
        )
    )


@router.get("/models/{model}/explain", dependencies=ADMIN_ONLY)
async def explain(up: Up, model: str, version: str = "") -> dict[str, Any]:
    """The whole story of what serves."""
    asked = model_pb.ExplainRequest(
        model=names.model_name(model), version=names.version_name(model, version) if version else ""
    )
    return plain(await up.call(up.models.Explain, asked, idempotent=True))
