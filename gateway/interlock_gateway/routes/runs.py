"""Training runs over HTTP: start, follow, steer (seed 000's `/rl/train`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from interlock.api.controller.v1 import rollback_service_pb2 as rollback_pb
from interlock.api.trainer.v1 import checkpoint_service_pb2 as checkpoint_pb
from interlock.api.trainer.v1 import metrics_service_pb2 as metrics_pb
from interlock.api.trainer.v1 import run_service_pb2 as run_pb
from interlock.api.types.v1 import types_pb2
from interlock.core import names
from interlock.runtime.access import Principal, Scope
from interlock_gateway.dependencies import Up, needs
from interlock_gateway.routes import resources
from interlock_gateway.routes.resources import Count, Steer, plain, sse

router = APIRouter(tags=["runs"])
TRAIN, ADMIN = needs(Scope.TRAIN), needs(Scope.ADMIN)
TRAIN_ONLY = [TRAIN]


class Train(BaseModel):
    """A run to start."""

    model_config = ConfigDict(extra="forbid")

    run_id: str = ""
    recipe: str = "ppo"
    parameters: dict[str, Any] = Field(default_factory=dict)
    guard_policy: str = ""
    save_every_steps: int = Field(0, ge=0)
    keep_count: int = Field(0, ge=0)
    max_step_count: int = Field(0, ge=0)
    promote_to: str = Field("", description="model that known-good checkpoints are promoted to")
    promotion_metric: str = "reward"
    maximize: bool = True
    request_id: str = Field("", max_length=128)
    reason: str = Field("run over HTTP", max_length=500)


class Rollback(Steer):
    """Where to go back to."""

    checkpoint: str = Field("", description="checkpoint id; empty: the youngest known-good one")


@router.post("/rl/train")
async def train(up: Up, body: Train, principal: Principal = TRAIN) -> JSONResponse:
    """Starts a run; its metrics stream at `/runs/{run}/metrics/events`."""
    asked = run_pb.CreateRunRequest(
        change=types_pb2.Change(request_id=body.request_id, reason=body.reason, actor=principal.name),
        run_id=body.run_id,
        recipe=body.recipe,
        guard_policy=body.guard_policy,
        save_every_steps=body.save_every_steps,
        keep_count=body.keep_count,
        max_step_count=body.max_step_count,
    )
    asked.parameters.update(body.parameters)
    if body.promote_to:
        direction = (
            run_pb.PromotionPolicy.DIRECTION_MAXIMIZE if body.maximize else run_pb.PromotionPolicy.DIRECTION_MINIMIZE
        )
        asked.promotion.CopyFrom(
            run_pb.PromotionPolicy(
                model=names.model_name(body.promote_to), metric=body.promotion_metric, direction=direction
            )
        )
    run = (await up.call(up.runs.CreateRun, asked, timeout=10, actor=principal.name)).run
    return JSONResponse(plain(run), 202, headers={"location": f"/{run.name}"})


@router.get("/runs", dependencies=TRAIN_ONLY)
async def listed(up: Up) -> dict[str, Any]:
    """Runs, newest first."""
    return plain(await up.call(up.runs.ListRuns, run_pb.ListRunsRequest(), idempotent=True))


@router.get("/runs/{run}", dependencies=TRAIN_ONLY)
async def one(up: Up, run: str) -> dict[str, Any]:
    """One run."""
    return plain((await up.call(up.runs.GetRun, run_pb.GetRunRequest(name=names.run_name(run)), idempotent=True)).run)


@router.get("/runs/{run}/checkpoints", dependencies=TRAIN_ONLY)
async def checkpoints(up: Up, run: str) -> dict[str, Any]:
    """Checkpoints, youngest first."""
    return plain(
        await up.call(up.checkpoints.List, checkpoint_pb.ListRequest(run=names.run_name(run)), idempotent=True)
    )


@router.get("/runs/{run}/metrics", dependencies=TRAIN_ONLY)
async def metrics(
    up: Up,
    run: str,
    from_step: Count = 0,
    to_step: Count = 0,
    limit: Annotated[int, Query(ge=0, le=1_000_000)] = 10_000,
) -> dict[str, Any]:
    """Step records of the live lineage."""
    asked = metrics_pb.QueryStepMetricsRequest(
        run=names.run_name(run), from_step=from_step, to_step=to_step, limit=limit
    )
    return plain(await up.call(up.metrics.QueryStepMetrics, asked, timeout=10, idempotent=True))


@router.get("/runs/{run}/metrics/events", dependencies=TRAIN_ONLY)
async def metric_events(
    request: Request, up: Up, run: str, from_seq: Annotated[int, Query(ge=-1, le=resources.INT64_MAX)] = 0
) -> StreamingResponse:
    """Server-sent events of step records from a sequence number on, or from now with -1; `id` is the last one sent, to resume after."""
    last = resources.last_event_id(request)
    asked = metrics_pb.StreamStepMetricsRequest(
        run=names.run_name(run), from_seq=from_seq if last is None else last + 1
    )
    await up.call(
        up.runs.GetRun, run_pb.GetRunRequest(name=asked.run), idempotent=True
    )  # an unknown run is a 404, not a broken stream

    async def stream() -> AsyncIterator[bytes]:
        async for message in up.watch(up.metrics.StreamStepMetrics, asked):
            if message.records:
                yield sse("steps", plain(message), str(message.records[-1].seq))

    return resources.events(stream())


@router.post("/runs/{run}/rollback")
async def rollback(up: Up, run: str, body: Rollback | None = None, principal: Principal = ADMIN) -> dict[str, Any]:
    """Rolls a run back, and traffic with it where a version descends from what is undone."""
    body = body or Rollback()
    asked = rollback_pb.RollbackRunRequest(
        change=types_pb2.Change(request_id=body.request_id, reason=body.reason, actor=principal.name),
        run=names.run_name(run),
        checkpoint=names.checkpoint_name(run, body.checkpoint) if body.checkpoint else "",
    )
    return plain(await up.call(up.rollbacks.RollbackRun, asked, timeout=15, actor=principal.name))


@router.post("/runs/{run}/{verb}")
async def steer(
    up: Up,
    run: str,
    verb: Literal["pause", "resume", "stop"],
    body: Steer | None = None,
    principal: Principal = TRAIN,
) -> dict[str, Any]:
    """Pauses, resumes or stops a run."""
    body = body or Steer()
    name = f"{verb.capitalize()}Run"
    change = types_pb2.Change(request_id=body.request_id, reason=body.reason, actor=principal.name)
    message = getattr(run_pb, f"{name}Request")(change=change, name=names.run_name(run))
    return plain((await up.call(getattr(up.runs, name), message, timeout=30, actor=principal.name)).run)
