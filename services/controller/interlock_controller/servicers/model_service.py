"""ModelService."""

from __future__ import annotations

from typing import Any

from interlock.api.controller.v1 import model_service_pb2 as pb
from interlock.api.controller.v1 import model_service_pb2_grpc as rpc
from interlock.core import names
from interlock.core.swap import State
from interlock.errors import NotFound
from interlock.runtime.access import Keys, actor_of
from interlock.runtime.telemetry import current_traceparent
from interlock.stores.controller import ControllerStore
from interlock_controller import convert, story
from interlock_controller.registry import Registry
from interlock_controller.swaps import HISTORY, Swaps


class ModelServicer(rpc.ModelServiceServicer):
    """Registers versions, moves models between them and explains what serves."""

    def __init__(self, registry: Registry, swaps: Swaps, store: ControllerStore, keys: Keys) -> None:
        self._registry = registry
        self._swaps = swaps
        self._store = store
        self._keys = keys

    def _actor(self, request: Any, context: Any) -> str:
        return (
            actor_of(context, self._keys)
            if self._keys.required
            else request.change.actor or actor_of(context, self._keys)
        )

    async def RegisterVersion(self, request: pb.RegisterVersionRequest, context: Any) -> pb.RegisterVersionResponse:
        """Takes an artifact in."""
        row = await self._registry.register(
            names.parse_model(request.model),
            request.artifact_uri,
            digest=request.digest,
            origin=convert.origin_of(request.origin),
            metrics=dict(request.metrics),
            actor=self._actor(request, context),
            request=convert.request_of(request, "RegisterVersion"),
        )
        return pb.RegisterVersionResponse(version=convert.version_message(row))

    def _model(self, model: str) -> pb.Model:
        self._swaps.check_model(model, "name")
        route = self._store.route(model)
        running = next((s for s in self._store.active_swaps(model) if s.state is not State.KEEP_WARM), None)
        heaviest = route.heaviest()
        first = self._store.versions(model)[-1]
        return pb.Model(
            name=names.model_name(model),
            route=convert.route_message(route),
            active_swap=names.swap_name(running.id) if running else "",
            aliases={"stable": names.version_name(model, heaviest)} if heaviest else {},
            create_time=convert.timestamp(first.created_at),
        )

    async def GetModel(self, request: pb.GetModelRequest, _context: Any) -> pb.GetModelResponse:
        """Reads one."""
        return pb.GetModelResponse(model=self._model(names.parse_model(request.name, "name")))

    async def ListModels(self, _request: pb.ListModelsRequest, _context: Any) -> pb.ListModelsResponse:
        """All of them, by name."""
        return pb.ListModelsResponse(models=[self._model(model) for model in self._store.models()])

    async def ListVersions(self, request: pb.ListVersionsRequest, _context: Any) -> pb.ListVersionsResponse:
        """Newest first."""
        model = names.parse_model(request.model)
        self._swaps.check_model(model)
        return pb.ListVersionsResponse(versions=[convert.version_message(v) for v in self._store.versions(model)])

    async def RollbackModel(self, request: pb.RollbackModelRequest, context: Any) -> pb.RollbackModelResponse:
        """Moves a model back."""
        model = names.parse_model(request.model)
        of, version = names.parse_version(request.version) if request.version else (model, "")
        if of != model:
            raise NotFound(
                f"{request.version} is not a version of {request.model}", reason="VERSION_NOT_FOUND", field="version"
            )
        swap = self._swaps.roll_back(
            model,
            version,
            actor=self._actor(request, context),
            why=request.change.reason,
            request=convert.request_of(request, "RollbackModel"),
            trace=current_traceparent(),
            quarantine=request.quarantine,
        )
        return pb.RollbackModelResponse(swap=convert.swap_message(swap))

    async def Quarantine(self, request: pb.QuarantineRequest, context: Any) -> pb.QuarantineResponse:
        """Forbids or allows a version."""
        model, version = names.parse_version(request.version)
        actor = self._actor(request, context)
        if not request.quarantined:
            return pb.QuarantineResponse(version=convert.version_message(self._swaps.allow(model, version, actor)))
        row, swap = self._swaps.quarantine(model, version, request.change.reason, actor, current_traceparent())
        return pb.QuarantineResponse(
            version=convert.version_message(row), swap=names.swap_name(swap.id) if swap is not None else ""
        )

    async def Explain(self, request: pb.ExplainRequest, _context: Any) -> pb.ExplainResponse:
        """The whole story of a version."""
        model = names.parse_model(request.model)
        self._swaps.check_model(model)
        route = self._store.route(model)
        version = names.parse_version(request.version)[1] if request.version else route.heaviest()
        if version is None:
            raise NotFound(
                f"model {model!r} serves nothing; name a version", reason="VERSION_NOT_FOUND", field="version"
            )
        row = self._swaps.version(model, version)
        swaps = [
            s
            for s in reversed(self._store.swaps(model, limit=HISTORY))
            if version in (s.spec.candidate, s.stable_version)
        ]
        rollbacks = list(reversed(self._store.rollbacks(row.origin.run))) if row.origin.run else []
        return pb.ExplainResponse(
            version=convert.version_message(row),
            route=convert.route_message(route),
            swaps=[convert.swap_message(s) for s in swaps],
            rollbacks=[convert.rollback_message(r) for r in rollbacks],
            sentences=story.tell(row, route, swaps, rollbacks),
        )
