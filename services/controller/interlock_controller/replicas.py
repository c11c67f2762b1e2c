"""One replica as seen from here: commands out, its state in. Messages of the wire stop in this module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from grpc import aio

from interlock.api.inference.v1 import runtime_service_pb2 as pb
from interlock.api.inference.v1 import runtime_service_pb2_grpc as rpc
from interlock.api.types.v1 import types_pb2
from interlock.core import names
from interlock.core.route import Route
from interlock.core.swap import Ack, Comparison, Drained, WarmUp
from interlock.core.swap_plan import (
    ApplyRoute,
    Compare,
    Drain,
    Park,
    Prepare,
    Release,
    Replica,
    ReplicaCommand,
    Slot,
    SlotState,
    Warm,
)
from interlock.runtime.channels import Caller, open_channel
from interlock.stores.controller import Origin, VersionRow

PREPARE_SECONDS, WARM_SECONDS, COMPARE_SECONDS, SHORT_SECONDS, RELEASE_SECONDS = 120.0, 60.0, 60.0, 5.0, 30.0
"""Deadlines of the contract (protos, RuntimeService)."""

_SLOT_STATES = {
    pb.Slot.STATE_INITIALIZING: SlotState.INITIALIZING,
    pb.Slot.STATE_WARMING_UP: SlotState.WARMING_UP,
    pb.Slot.STATE_READY: SlotState.READY,
    pb.Slot.STATE_SERVING: SlotState.SERVING,
    pb.Slot.STATE_DRAINING: SlotState.DRAINING,
    pb.Slot.STATE_STOPPED: SlotState.STOPPED,
}

Result = WarmUp | Comparison | Ack | Drained | None


@dataclass(frozen=True, slots=True)
class View:
    """A replica's state as it last told it: its slots and route epochs per model."""

    instance: str
    epochs: Mapping[str, int] = field(default_factory=dict)
    slots: Mapping[str, Mapping[str, Slot]] = field(default_factory=dict)
    token: int = 0

    def of(self, name: str, model: str) -> Replica:
        """The core's view of one model on this replica."""
        return Replica(name, self.instance, self.epochs.get(model, 0), self.slots.get(model, {}))


class ReplicaClient:
    """Speaks to the replica at one address. Closed by its owner."""

    def __init__(self, address: str, caller: Caller) -> None:
        self.address = address
        self._caller = caller
        self._channel: aio.Channel = open_channel(address)
        self._stub = rpc.RuntimeServiceStub(self._channel)

    async def close(self) -> None:
        """Ends the connection and whatever runs on it."""
        await self._channel.close()

    async def watch(self) -> AsyncIterator[View]:
        """The state at once, then after every change. Ends or raises when the replica goes away."""
        async for message in self._caller.stream(self._stub.WatchState, pb.WatchStateRequest()):
            yield _view(message.state)

    async def state(self) -> View:
        """The state now, traffic included."""
        answer = await self._caller.unary(self._stub.GetState, pb.GetStateRequest(), timeout=SHORT_SECONDS)
        return _view(answer.state)

    async def execute(
        self, command: ReplicaCommand, fence: tuple[int, str], version: VersionRow | None, instance: str, now: float
    ) -> Result:
        """Carries one command out.

        Args:
            fence: the lease's token and the swap's id, empty for re-asserting an assignment.
            version: the version's record; needed for Prepare.
            instance: the replica process that was meant, for the result.

        Raises:
            InterlockError: the replica's refusal, or that it cannot be reached.
        """
        token, swap = fence
        fenced = pb.Fence(token=token, swap=names.swap_name(swap) if swap else "")
        match command:
            case Prepare():
                assert version is not None, "a version that is not registered is never prepared"
                await self._prepare(command, fenced, version)
            case Warm():
                return await self._warm(command, fenced, instance)
            case Compare():
                return await self._compare(command, fenced, instance)
            case ApplyRoute():
                return await self._apply(command, fenced, instance, now)
            case Drain():
                return await self._drain(command, fenced, instance)
            case Park():
                name = names.version_name(command.model, command.version)
                request = pb.ParkRequest(fence=fenced, version=name)
                await self._caller.unary(self._stub.Park, request, timeout=SHORT_SECONDS)
            case Release():
                name = names.version_name(command.model, command.version)
                released = pb.ReleaseRequest(fence=fenced, version=name)
                await self._caller.unary(self._stub.Release, released, timeout=RELEASE_SECONDS)
        return None

    async def _prepare(self, command: Prepare, fence: pb.Fence, version: VersionRow) -> None:
        request = pb.PrepareRequest(
            fence=fence,
            version=names.version_name(command.model, command.version),
            artifact_uri=version.artifact_uri,
            digest=version.digest,
            compatible_with=names.version_name(command.model, command.compatible_with)
            if command.compatible_with
            else "",
            origin=_origin(version.origin),
        )
        async for _ in self._caller.stream(self._stub.Prepare, request, timeout=PREPARE_SECONDS):
            pass  # progress reaches us through the watched state; an error status ends the stream and raises

    async def _warm(self, command: Warm, fence: pb.Fence, instance: str) -> WarmUp:
        name = names.version_name(command.model, command.version)
        request = pb.WarmRequest(fence=fence, version=name, iterations=command.iterations)
        answer = await self._caller.unary(self._stub.Warm, request, timeout=WARM_SECONDS)
        return WarmUp(self.address, instance, answer.iterations, answer.first_ms, answer.median_ms)

    async def _compare(self, command: Compare, fence: pb.Fence, instance: str) -> Comparison:
        request = pb.CompareRequest(
            fence=fence,
            stable_version=names.version_name(command.model, command.stable),
            candidate_version=names.version_name(command.model, command.candidate),
            sample_limit=command.samples,
        )
        answer = await self._caller.unary(self._stub.Compare, request, timeout=COMPARE_SECONDS)
        return Comparison(
            self.address,
            instance,
            answer.sample_count,
            answer.max_abs_error,
            answer.max_rel_error,
            answer.top1_agreement,
            answer.nonfinite_count,
            answer.ensemble,
        )

    async def _apply(self, command: ApplyRoute, fence: pb.Fence, instance: str, now: float) -> Ack:
        request = pb.ApplyRouteRequest(fence=fence, route=route_message(command.route, now))
        answer = await self._caller.unary(self._stub.ApplyRoute, request, timeout=SHORT_SECONDS)
        return Ack(self.address, instance, answer.route.epoch, answer.in_flight_count)

    async def _drain(self, command: Drain, fence: pb.Fence, instance: str) -> Drained:
        name = names.version_name(command.model, command.version)
        request = pb.DrainRequest(fence=fence, version=name)
        request.timeout.FromNanoseconds(int(command.seconds * 1e9))
        answer = await self._caller.unary(self._stub.Drain, request, timeout=command.seconds + SHORT_SECONDS)
        return Drained(
            self.address,
            instance,
            command.version,
            answer.drained_count,
            answer.cut_count,
            tuple(answer.cut_request_ids),
        )


def route_message(route: Route, at: float) -> types_pb2.Route:
    """A route as the wire has it; `at` is when it was committed."""
    message = types_pb2.Route(model=names.model_name(route.model), epoch=route.epoch)
    for weight in route.weights:
        message.weights.add(version=names.version_name(route.model, weight.version), weight=weight.weight)
    heaviest = route.heaviest()
    message.stable_version = names.version_name(route.model, heaviest) if heaviest else ""
    message.update_time.FromNanoseconds(int(at * 1e9))
    return message


def _origin(origin: Origin) -> types_pb2.Origin:
    return types_pb2.Origin(
        run=origin.run,
        checkpoint=origin.checkpoint,
        step=origin.step,
        attempt=origin.attempt,
        checkpoint_digest=origin.checkpoint_digest,
    )


def _view(state: pb.ReplicaState) -> View:
    traffic = {t.version: t for t in state.traffic}
    slots: dict[str, dict[str, Slot]] = {}
    for slot in state.slots:
        model, version = names.parse_version(slot.version, "slot.version")
        told = traffic.get(slot.version)
        slots.setdefault(model, {})[version] = Slot(
            _SLOT_STATES.get(slot.state, SlotState.STOPPED),
            slot.parked,
            slot.in_flight_count,
            told.success_count if told else 0,
            told.failure_count if told else 0,
            told.latency_seconds_p50 if told else 0.0,
            told.latency_seconds_p99 if told else 0.0,
            told.refused_count if told else 0,
        )
    epochs = {names.parse_model(route.model): route.epoch for route in state.routes}
    return View(state.replica, epochs, slots, state.fencing_token)
