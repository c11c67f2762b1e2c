"""`interlock.api.inference.v1.RuntimeService`: the controller's commands, converted and passed to the replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import grpc
import psutil
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from interlock.api.inference.v1 import runtime_service_pb2 as pb
from interlock.api.inference.v1 import runtime_service_pb2_grpc as pb_grpc
from interlock.api.types.v1 import types_pb2
from interlock.core.names import model_name, parse_checkpoint, parse_model, parse_run, parse_version, version_name
from interlock.core.route import Route, Weight, check_weights
from interlock.errors import FailedPrecondition, InvalidArgument
from interlock.stores.modelspec import TensorSpec
from interlock_inference.assignment import AssignedModel
from interlock_inference.compare import median_ms
from interlock_inference.replica import Load, Replica, Wanted
from interlock_inference.slots import Origin, Slot, SlotState

Context = grpc.aio.ServicerContext[Any, Any]
DRAIN_SECONDS = 30.0  # seeds 000
WATCH_SECONDS = 1.0  # traffic figures change without a state change
_STATES = {state: getattr(pb.Slot, f"STATE_{state.upper()}") for state in SlotState}


class RuntimeServicer(pb_grpc.RuntimeServiceServicer):
    """Serves one replica's commands.

    Args:
        owner: who decides instead of a controller, as a phrase; commands are then refused.
    """

    def __init__(self, replica: Replica, replica_id: str, started_at: float, owner: str = "") -> None:
        self._owner = owner
        self._replica = replica
        self._replica_id = replica_id
        self._started_at = started_at

    async def _obey(self, token: int) -> None:
        self._check_owner()
        await self._replica.obey(token)

    def _check_owner(self) -> None:
        if self._owner:
            raise FailedPrecondition(
                f"this replica takes no commands: {self._owner} decides what it serves",
                reason="STANDALONE",
                metadata={"owner": self._owner},
            )

    async def Prepare(self, request: pb.PrepareRequest, context: Context) -> AsyncIterator[pb.PrepareResponse]:
        """Loads a version, streaming progress."""
        model, version = parse_version(request.version)
        wanted = Wanted(
            model,
            version,
            request.artifact_uri,
            request.digest,
            parse_version(request.compatible_with, "compatible_with") if request.compatible_with else None,
            _origin(request.origin),
        )
        await self._obey(request.fence.token)
        async for load in self._replica.prepare(wanted):
            yield _progress(load)

    async def Warm(self, request: pb.WarmRequest, context: Context) -> pb.WarmResponse:
        """Runs warm-up inferences."""
        model, version = parse_version(request.version)
        if not 0 <= request.iterations <= 1000:
            raise InvalidArgument(
                "iterations: from 0 (the default) to 1000", reason="INVALID_ITERATIONS", field="iterations"
            )
        await self._obey(request.fence.token)
        slot, warmup = await self._replica.warm(model, version, request.iterations)
        return pb.WarmResponse(
            slot=_slot(slot),
            iterations=warmup.iterations,
            recorded_count=warmup.num_recorded,
            first_ms=warmup.first_ms,
            median_ms=warmup.median_ms,
        )

    async def Compare(self, request: pb.CompareRequest, context: Context) -> pb.CompareResponse:
        """Compares two versions' answers."""
        model, stable = parse_version(request.stable_version, "stable_version")
        other, candidate = parse_version(request.candidate_version, "candidate_version")
        if other != model:
            raise InvalidArgument(
                "candidate_version: of another model than stable_version",
                reason="INVALID_NAME",
                field="candidate_version",
            )
        await self._obey(request.fence.token)
        seen, num_recorded = await self._replica.compare(model, stable, candidate, request.sample_limit)
        return pb.CompareResponse(
            sample_count=seen.num_samples,
            recorded_count=num_recorded,
            max_abs_error=seen.max_abs_error,
            max_rel_error=seen.max_rel_error,
            top1_agreement=seen.top1_agreement,
            nonfinite_count=seen.num_nonfinite,
            stable_median_ms=median_ms(seen.stable_seconds),
            candidate_median_ms=median_ms(seen.candidate_seconds),
            ensemble=seen.subject,
        )

    async def ApplyRoute(self, request: pb.ApplyRouteRequest, context: Context) -> pb.ApplyRouteResponse:
        """Puts a route in force."""
        self._check_owner()
        route, stable = _route(request.route)
        updated_at = request.route.update_time.ToNanoseconds() / 1e9
        applied = await self._replica.apply_route(request.fence.token, route, stable, updated_at)
        made = pb.ApplyRouteResponse(route=_route_message(applied.assigned), in_flight_count=applied.num_in_flight)
        made.switch_duration.FromNanoseconds(int(applied.switch_seconds * 1e9))
        return made

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Empties a version."""
        model, version = parse_version(request.version)
        await self._obey(request.fence.token)
        drained = await self._replica.drain(
            model, version, _seconds(request.timeout) if request.HasField("timeout") else DRAIN_SECONDS
        )
        return pb.DrainResponse(
            drained_count=drained.num_drained, cut_count=drained.num_cut, cut_request_ids=drained.cut_request_ids
        )

    async def Park(self, request: pb.ParkRequest, context: Context) -> pb.ParkResponse:
        """Keeps a version loaded, unrouted."""
        model, version = parse_version(request.version)
        await self._obey(request.fence.token)
        return pb.ParkResponse(slot=_slot(self._replica.park(model, version)))

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        """Unloads a version."""
        model, version = parse_version(request.version)
        await self._obey(request.fence.token)
        return pb.ReleaseResponse(released=await self._replica.release(model, version))

    async def GetState(self, request: pb.GetStateRequest, context: Context) -> pb.GetStateResponse:
        """Reports everything."""
        return pb.GetStateResponse(state=self._state())

    async def WatchState(self, request: pb.WatchStateRequest, context: Context) -> AsyncIterator[pb.WatchStateResponse]:
        """Reports everything now, after each change, and every second while traffic alone changes."""
        while True:
            changed = self._replica.changed.next()
            yield pb.WatchStateResponse(state=self._state())
            try:
                async with asyncio.timeout(WATCH_SECONDS):
                    await changed.wait()
            except TimeoutError:
                continue

    def _state(self) -> pb.ReplicaState:
        slots = self._replica.slots()
        return pb.ReplicaState(
            replica=self._replica_id,
            fencing_token=self._replica.fencing_token,
            slots=[_slot(slot) for slot in slots],
            routes=[_route_message(assigned) for assigned in self._replica.routes()],
            traffic=[_traffic(slot) for slot in slots],
            start_time=_timestamp(self._started_at),
            memory_bytes=psutil.Process().memory_info().rss + self._replica.kept_bytes,
        )


def _seconds(duration: Duration) -> float:
    seconds = duration.ToNanoseconds() / 1e9
    if not 0 <= seconds <= 86_400:
        raise InvalidArgument("timeout: from 0 s to one day", reason="INVALID_TIMEOUT", field="timeout")
    return seconds


def _timestamp(at: float) -> Timestamp:
    made = Timestamp()
    made.FromDatetime(datetime.fromtimestamp(at, UTC))
    return made


def _origin(origin: types_pb2.Origin) -> Origin:
    if origin.run:
        parse_run(origin.run, "origin.run")
    if origin.checkpoint:
        parse_checkpoint(origin.checkpoint, "origin.checkpoint")
    return Origin(origin.run, origin.checkpoint, origin.step, origin.attempt, origin.checkpoint_digest)


def _route(message: types_pb2.Route) -> tuple[Route, str]:
    model = parse_model(message.model, "route.model")
    if message.epoch < 1:
        raise InvalidArgument(f"route.epoch: {message.epoch} is below 1", reason="INVALID_EPOCH", field="route.epoch")
    weights = []
    for index, entry in enumerate(message.weights):
        owner, version = parse_version(entry.version, f"route.weights[{index}].version")
        if owner != model:
            raise InvalidArgument(
                f"route.weights[{index}].version: {entry.version} is not a version of {message.model}",
                reason="INVALID_WEIGHTS",
                field="route.weights",
            )
        if entry.weight:
            weights.append(Weight(version, entry.weight))
    return Route(model, message.epoch, check_weights(weights, "route.weights")), message.stable_version


def _route_message(assigned: AssignedModel) -> types_pb2.Route:
    route = assigned.route
    return types_pb2.Route(
        model=model_name(route.model),
        epoch=route.epoch,
        weights=[
            types_pb2.RouteWeight(version=version_name(route.model, w.version), weight=w.weight) for w in route.weights
        ],
        stable_version=assigned.stable_version,
        update_time=_timestamp(assigned.updated_at) if assigned.updated_at else None,
    )


def _tensor(spec: TensorSpec) -> pb.TensorSignature:
    return pb.TensorSignature(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def _slot(slot: Slot) -> pb.Slot:
    origin = slot.origin
    return pb.Slot(
        version=slot.name,
        state=_STATES[slot.state],
        digest=slot.digest,
        in_flight_count=slot.in_flight,
        memory_bytes=slot.opened.memory_bytes if slot.opened else 0,
        providers=slot.opened.engine.providers if slot.opened else (),
        inputs=[_tensor(spec) for spec in slot.specs.values()],
        outputs=[_tensor(spec) for spec in slot.output_specs.values()],
        warmup_seconds=slot.warmup.median_ms / 1e3 if slot.warmup else 0.0,
        error=slot.error,
        parked=slot.parked,
        origin=types_pb2.Origin(
            run=origin.run,
            checkpoint=origin.checkpoint,
            step=slot.step,
            attempt=origin.attempt,
            checkpoint_digest=origin.checkpoint_digest,
        ),
    )


def _progress(load: Load) -> pb.PrepareResponse:
    return pb.PrepareResponse(progress_percent=load.percent, message=load.message, slot=_slot(load.slot))


def _traffic(slot: Slot) -> pb.VersionTraffic:
    stats = slot.stats
    return pb.VersionTraffic(
        version=slot.name,
        success_count=stats.success.count,
        failure_count=stats.failure.count,
        refused_count=stats.refused,
        latency_seconds_p50=stats.percentile_seconds(0.5),
        latency_seconds_p99=stats.percentile_seconds(0.99),
    )
