"""Health and metrics, with the bodies and codes of the source documents (seed 001)."""

from __future__ import annotations

import asyncio
import itertools
import math
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from interlock.api.controller.v1 import swap_service_pb2 as swap_pb
from interlock.api.inference.v1 import runtime_service_pb2 as runtime_pb
from interlock.api.oip import messages
from interlock.core import names
from interlock.errors import InterlockError, NotFound
from interlock.runtime.access import Scope
from interlock.runtime.arrays import LENGTH, NUMPY_TYPES
from interlock_gateway.dependencies import Needs, Up, needs
from interlock_gateway.reload_words import reload_state
from interlock_gateway.upstreams import Upstreams

router = APIRouter(tags=["health"])
PUBLIC = [needs(Scope.PUBLIC)]
PROBE_SECONDS = 2.0
MEMORY_DEGRADED_BYTES = 30 << 30  # seed 001: degraded above 30 GB
INFERENCE_DEGRADED_SECONDS = 5.0  # seed 001: degraded above 5 s
SERVING = runtime_pb.Slot.STATE_SERVING


async def _replica(up: Upstreams) -> Any | None:
    """The replica's state; None when it does not answer."""
    try:
        return (await up.call(up.runtime.GetState, runtime_pb.GetStateRequest(), timeout=PROBE_SECONDS)).state
    except InterlockError:
        return None


async def _answers(up: Upstreams, method: Any, request: Any) -> bool:
    try:
        await up.call(method, request, timeout=PROBE_SECONDS)
    except InterlockError:
        return False
    return True


async def _rooms(up: Upstreams) -> dict[str, bool]:
    from interlock.api.controller.v1 import model_service_pb2 as model_pb
    from interlock.api.trainer.v1 import run_service_pb2 as run_pb

    if up.alone:
        return {"inference": await _answers(up, up.inference.ServerLive, messages.ServerLiveRequest())}
    async with asyncio.TaskGroup() as group:
        inference = group.create_task(_answers(up, up.inference.ServerLive, messages.ServerLiveRequest()))
        trainer = group.create_task(_answers(up, up.runs.ListRuns, run_pb.ListRunsRequest(page_size=1)))
        controller = group.create_task(_answers(up, up.models.ListModels, model_pb.ListModelsRequest()))
    return {"inference": inference.result(), "trainer": trainer.result(), "controller": controller.result()}


def _model_states(state: Any | None) -> dict[str, str]:
    """healthy for every model that serves, degraded when the replica is over its memory mark."""
    if state is None:
        return {}
    word = "degraded" if state.memory_bytes > MEMORY_DEGRADED_BYTES else "healthy"
    return {names.parse_version(slot.version)[0]: word for slot in state.slots if slot.state == SERVING}


@router.get("/health", dependencies=PUBLIC)
async def health(up: Up) -> JSONResponse:
    """Every room and every model. 503 only when nothing can be predicted at all."""
    rooms, models = await _rooms(up), _model_states(await _replica(up))
    healthy = all(rooms.values())
    status = "healthy" if healthy and models else "degraded" if rooms["inference"] else "unhealthy"
    body = {
        "status": status,
        "rooms": {name: "up" if alive else "down" for name, alive in rooms.items()},
        "models": models,
    }
    return JSONResponse(body, 200 if rooms["inference"] else 503)


@router.get("/health/live", dependencies=PUBLIC)
async def live() -> dict[str, str]:
    """The gateway's event loop turns."""
    return {"status": "alive"}


@router.get("/health/ready", dependencies=PUBLIC)
async def ready(up: Up) -> JSONResponse:
    """200 while at least one model can answer."""
    models = _model_states(await _replica(up))
    return JSONResponse(
        {"status": "ready"} if models else {"status": "not_ready", "reason": "no model serves"}, 200 if models else 503
    )


@router.get("/health/llm", dependencies=PUBLIC)
async def one_model(request: Request, up: Up, model: str, run_inference: bool = False) -> JSONResponse:
    """One model; with `run_inference` it is asked for a real prediction of zeros, which needs the infer scope like any prediction."""
    if run_inference:
        Needs(Scope.INFER)(request)
    state = await _replica(up)
    slot = (
        next((s for s in state.slots if names.parse_version(s.version)[0] == model and s.state == SERVING), None)
        if state
        else None
    )
    seconds, problem = await _timed_inference(up, model) if run_inference and slot else (None, None)
    status = _status(slot, state, seconds, problem)
    now = datetime.now(UTC)
    body = {
        "model_name": model,
        "status": status,
        "loaded": slot is not None,
        "inference_ready": slot is not None and problem is None,
        "last_inference_ms": None if seconds is None else round(seconds * 1000, 3),
        "memory_mb": round(state.memory_bytes / 2**20, 1) if state else None,
        "gpu_memory_mb": None,
        "error_message": problem or (None if slot else "not loaded" if state else "the replica does not answer"),
        "checked_at": now.isoformat(),
        "uptime_seconds": round(now.timestamp() - state.start_time.ToSeconds(), 1) if state else None,
    }
    return JSONResponse(body, 503 if status == "unhealthy" else 200)


def _status(slot: Any | None, state: Any | None, seconds: float | None, problem: str | None) -> str:
    if slot is None or state is None or problem:
        return "unhealthy"
    slow = seconds is not None and seconds > INFERENCE_DEGRADED_SECONDS
    return "degraded" if slow or state.memory_bytes > MEMORY_DEGRADED_BYTES else "healthy"


async def _timed_inference(up: Upstreams, model: str) -> tuple[float | None, str | None]:
    """(seconds, problem) of one prediction of zeros."""
    start = up.clock.monotonic()
    try:
        signature = await up.signature(model)
        request = messages.ModelInferRequest(model_name=model)
        for tensor in signature.inputs:
            shape = [1 if size < 0 else size for size in tensor.shape]
            request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
            request.raw_input_contents.append(bytes(math.prod(shape) * _item_bytes(tensor.datatype)))
        await up.call(up.inference.ModelInfer, request, timeout=INFERENCE_DEGRADED_SECONDS * 2)
    except InterlockError as error:
        return None, f"{error.reason}: {error.message}"
    return up.clock.monotonic() - start, None


def _item_bytes(datatype: str) -> int:
    """Bytes of one zero element; an empty BYTES element is its length alone."""
    return LENGTH.size if datatype == "BYTES" else NUMPY_TYPES[datatype].itemsize


@router.get("/health/llm/all", dependencies=PUBLIC)
async def all_models(up: Up) -> JSONResponse:
    """Every model; 200 while at least one is healthy."""
    state = await _replica(up)
    models = _model_states(state)
    counts = {
        word: sum(1 for value in models.values() if value == word) for word in ("healthy", "degraded", "unhealthy")
    }
    status = "healthy" if models and counts["healthy"] == len(models) else "degraded" if models else "unhealthy"
    body: dict[str, Any] = {"status": status, **{f"{word}_count": count for word, count in counts.items()}}
    body |= {
        "total_models": len(models),
        "models": models,
        "memory_mb": round(state.memory_bytes / 2**20, 1) if state else None,
        "gpu_available": any(
            "CUDA" in provider for slot in (state.slots if state else ()) for provider in slot.providers
        ),
        "checked_at": datetime.now(UTC).isoformat(),
    }
    return JSONResponse(body, 200 if models else 503)


@router.get("/health/llm/reload/{model}", dependencies=PUBLIC)
async def reload(up: Up, model: str) -> dict[str, Any]:
    """The newest swap of a model in the source documents' words; `idle` when there was none."""
    try:
        answer = await up.call(
            up.swaps.ListSwaps, swap_pb.ListSwapsRequest(model=names.model_name(model), page_size=1), idempotent=True
        )
    except NotFound:
        answer = swap_pb.ListSwapsResponse()
    return reload_state(model, answer.swaps[0] if answer.swaps else None)


@router.get("/metrics", dependencies=PUBLIC)
@router.get("/health/metrics", dependencies=PUBLIC)
async def metrics(request: Request) -> Response:
    """The gateway's metrics for Prometheus; in the inline form the replica's too."""
    text = b"".join(generate_latest(registry) for registry in request.app.state.registries)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/health/metrics/json", dependencies=PUBLIC)
async def metrics_json(request: Request) -> dict[str, float]:
    """The gateway's metrics as one flat object, for a look by eye: `name_label=value,...` to number."""
    flat: dict[str, float] = {}
    for family in itertools.chain.from_iterable(registry.collect() for registry in request.app.state.registries):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            flat[f"{sample.name}_{labels}" if labels else sample.name] = sample.value
    return flat
