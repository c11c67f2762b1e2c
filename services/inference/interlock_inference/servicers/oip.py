"""The Open Inference Protocol's service over the data plane and the registry. What is loaded and routed is decided elsewhere."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import grpc

import interlock
from interlock.api.oip import messages as pb
from interlock.core.names import check_id
from interlock.errors import InterlockError, InvalidArgument, NotFound, Unimplemented
from interlock.runtime import telemetry
from interlock.runtime.infer import STATUS, TRACE
from interlock.runtime.status import to_status
from interlock.runtime.streams import reading
from interlock.runtime.tracing import caller_traceparent
from interlock_inference import ensembles
from interlock_inference.dataplane import DataPlane
from interlock_inference.folder import by_number
from interlock_inference.replica import Replica
from interlock_inference.repository import Opened
from interlock_inference.servicers.codec import InferCall, ResponseMaker
from interlock_inference.slots import ANSWERS, Registry, Slot, SlotState, model_not_found
from interlock_inference.stats import Timer, VersionStats

Context = grpc.aio.ServicerContext[Any, Any]
EXTENSIONS = ("model_configuration", "model_repository", "statistics", "binary_tensor_data", "parameters")


class Admin(Protocol):
    """Asks whoever owns the routes to change them; a replica never does that by itself."""

    async def load(self, model: str, version: str) -> None:
        """Serves a version by a swap; returns when it is served. `version` empty: the newest in the repository."""
        ...

    async def unload(self, model: str) -> None:
        """Takes a model out of service."""
        ...

    def versions(self) -> Mapping[tuple[str, str], str]:
        """Every (model, version) that lies in the repository, with why it is not served. Blocking."""
        ...


class OipServicer:
    """`inference.GRPCInferenceService`."""

    def __init__(
        self,
        plane: DataPlane,
        registry: Registry,
        replica: Replica,
        admin: Admin,
        stopping: asyncio.Event,
    ) -> None:
        self._plane = plane
        self._registry = registry
        self._replica = replica
        self._admin = admin
        self._stopping = stopping
        self._maker = ResponseMaker()

    # --- inference ---

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """Answers one request within its caller's deadline."""
        remaining = context.time_remaining()
        call = InferCall(request, _deadline(request, remaining))
        reply = await self._plane.infer(call)
        return self._maker.response(request, reply, _trace(request, context))

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Answers requests in their order; a request that fails is answered by its error and the stream goes on."""
        whole = any(name == STATUS for name, _ in context.invocation_metadata() or ())
        async for request in reading(aiter(requests), self._stopping):
            yield await self._stream_one(request, context, whole)

    async def _stream_one(
        self, request: pb.ModelInferRequest, context: Context, whole: bool
    ) -> pb.ModelStreamInferResponse:
        try:
            response = pb.ModelStreamInferResponse(infer_response=await self.ModelInfer(request, context))
        except InterlockError as error:
            failed = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
            failed.parameters["interlock-reason"].string_param = error.reason
            if whole:
                status = to_status(error).SerializeToString()
                failed.parameters[STATUS].string_param = base64.b64encode(status).decode()
            response = pb.ModelStreamInferResponse(error_message=error.message or error.reason, infer_response=failed)
        if "triton_enable_empty_final_response" in request.parameters:
            response.infer_response.parameters["triton_final_response"].bool_param = True
        return response

    # --- health and metadata ---

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """True: it answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """True when every model that this replica was told to serve is served."""
        return pb.ServerReadyResponse(ready=self._replica.is_ready() and not self._stopping.is_set())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """True when a request for the model, or for that version of it, would be admitted."""
        return pb.ModelReadyResponse(ready=self._is_ready(request.name, request.version))

    def _is_ready(self, model: str, version: str) -> bool:
        snapshot = self._registry.snapshot
        if version:
            slot = snapshot.slots.get(model, {}).get(version)
            return slot is not None and ensembles.is_ready(slot, snapshot)
        return ensembles.is_model_ready(model, snapshot)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """Who this is."""
        return pb.ServerMetadataResponse(name="interlock", version=interlock.__version__, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """Tensors of the version asked for, or of the one that serves."""
        slot = self._described(request.name, request.version)
        assert slot.opened is not None, "a described slot is loaded"
        answering = [s.version for s in self._registry.snapshot.slots[slot.model].values() if s.state in ANSWERS]
        made = pb.ModelMetadataResponse(name=slot.model, versions=answering, platform=slot.opened.engine.platform)
        for spec in slot.specs.values():
            made.inputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        for spec in slot.output_specs.values():
            made.outputs.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        return made

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """The same in Triton's terms. `max_batch_size` 0: shapes are complete, no batch dimension is implied."""
        slot = self._described(request.name, request.version)
        assert slot.opened is not None, "a described slot is loaded"
        said = slot.opened.spec
        config = pb.ModelConfig(
            name=slot.model,
            platform=slot.opened.engine.platform,
            backend=_BACKENDS[said.engine if said else "onnx"],
            default_model_filename=said.file if said else "model.onnx",
            instance_group=[_instances(slot.opened)],
        )
        for spec in slot.specs.values():
            config.input.add(name=spec.name, data_type=_triton_type(spec.datatype), dims=spec.shape)
        for spec in slot.output_specs.values():
            config.output.add(name=spec.name, data_type=_triton_type(spec.datatype), dims=spec.shape)
        for key, value in (
            ("interlock-version", slot.name),
            ("interlock-digest", slot.digest),
            ("interlock-step", str(slot.step)),
        ):
            config.parameters[key].string_value = value
        return pb.ModelConfigResponse(config=config)

    def _described(self, model: str, version: str) -> Slot:
        """The loaded slot to describe: the one named, or the route's heaviest, or the newest loaded."""
        _check_model(model)
        routed = self._registry.snapshot.routes.get(model)
        named = version or (routed.route.heaviest() if routed else None)
        slots = (
            [self._registry.find(model, named)]
            if named
            else list(self._registry.snapshot.slots.get(model, {}).values())
        )
        loaded = [slot for slot in slots if slot.opened is not None]
        if not loaded:
            raise (
                model_not_found(model)
                if not named
                else NotFound(f"{slots[0].name} is {slots[0].state}", reason="VERSION_NOT_FOUND")
            )
        return loaded[-1]

    # --- statistics and repository ---

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        """Counts and times per loaded version."""
        slots = [
            s
            for s in self._registry.all_slots()
            if request.name in ("", s.model) and request.version in ("", s.version) and s.state in _COUNTED
        ]
        if request.name and not slots:
            self._registry.find(request.name, request.version)
            raise model_not_found(request.name)
        return pb.ModelStatisticsResponse(model_stats=[_statistics(slot) for slot in slots])

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        """Every version that lies in the repository or is loaded."""
        lying = await asyncio.to_thread(self._admin.versions)
        loaded = {(slot.model, slot.version): slot for slot in self._registry.all_slots()}
        made = pb.RepositoryIndexResponse()
        for model, version in sorted(lying.keys() | loaded.keys(), key=by_number):
            slot = loaded.get((model, version))
            ready = slot is not None and slot.state in ANSWERS
            if ready or not request.ready:
                reason = lying[model, version] if slot is None else (slot.error or slot.state)
                state = "READY" if ready else "UNAVAILABLE"
                made.models.add(name=model, version=version, state=state, reason="" if ready else reason)
        return made

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Serves a version by a swap; the parameter `version` says which, else the newest in the repository."""
        model = _repository_model(request.model_name, request.repository_name)
        unknown = sorted(set(request.parameters) - {"version"})
        if unknown:
            raise Unimplemented(
                f"parameters.{unknown[0][:80]}: a version is loaded as it lies in the repository; only `version` can be said",
                reason="UNSUPPORTED",
                field="parameters",
            )
        version = request.parameters["version"].string_param if "version" in request.parameters else ""
        await self._admin.load(model, check_id(version, "parameters.version") if version else "")
        return pb.RepositoryModelLoadResponse(model_name=model, isLoaded=True)

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Takes the model out of service."""
        model = _repository_model(request.model_name, request.repository_name)
        ensembles.check_model_not_needed(model, self._registry)
        await self._admin.unload(model)
        return pb.RepositoryModelUnloadResponse(model_name=model, isUnloaded=True)

    # --- not supported ---

    async def _unsupported(self, request: Any, context: Context) -> Any:
        raise Unimplemented(
            "this Triton extension is not supported here: send tensors in messages; logs and traces are set by configuration",
            reason="UNSUPPORTED",
        )

    SystemSharedMemoryStatus = SystemSharedMemoryRegister = SystemSharedMemoryUnregister = _unsupported
    CudaSharedMemoryStatus = CudaSharedMemoryRegister = CudaSharedMemoryUnregister = _unsupported
    TraceSetting = LogSettings = _unsupported


def _instances(opened: Opened) -> pb.ModelInstanceGroup:
    """Count 0: as many as the threads that all versions share allow."""
    on_gpu = any(provider.startswith(("CUDA", "Tensorrt", "cuda")) for provider in opened.engine.providers)
    made = pb.ModelInstanceGroup(count=opened.spec.instances if opened.spec else 0)
    made.kind = pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU
    return made


_BACKENDS = {"onnx": "onnxruntime", "torch": "pytorch", "ensemble": ""}
_COUNTED = frozenset(SlotState) - {SlotState.INITIALIZING, SlotState.STOPPED}


def _deadline(request: pb.ModelInferRequest, remaining: float | None) -> float | None:
    """The nearer of the call's deadline and Triton's `timeout` parameter: microseconds, 0 for none."""
    asked = request.parameters["timeout"].int64_param / 1e6 if "timeout" in request.parameters else 0.0
    if asked > 0:
        remaining = asked if remaining is None else min(asked, remaining)
    return None if remaining is None else time.monotonic() + remaining


def _trace(request: pb.ModelInferRequest, context: Context) -> str:
    """The trace of a request: the one it says itself (on a stream), its call's span's, the caller's own, else a new one that nobody samples."""
    if TRACE in request.parameters:
        traceparent = request.parameters[TRACE].string_param
        return traceparent if telemetry.trace_id_of(traceparent) else telemetry.new_traceparent()
    traceparent = caller_traceparent(context)
    if telemetry.exporting() or telemetry.is_sampled(traceparent):
        traceparent = telemetry.current_traceparent() or traceparent
    return traceparent if telemetry.trace_id_of(traceparent) else telemetry.new_traceparent()


def _check_model(model: str) -> None:
    if not model:
        raise InvalidArgument("name: which model?", reason="INVALID_NAME", field="name")


def _repository_model(model_name: str, repository_name: str) -> str:
    """KServe's client sends the model's name in field 1, which is Triton's `repository_name`."""
    return check_id(model_name or repository_name, "model_name")


def _triton_type(datatype: str) -> Any:
    return getattr(pb, "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}")


def _duration(timer: Timer) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=timer.count, ns=timer.ns)


def _statistics(slot: Slot) -> pb.ModelStatistics:
    stats: VersionStats = slot.stats
    return pb.ModelStatistics(
        name=slot.model,
        version=slot.version,
        last_inference=stats.last_at_ms,
        inference_count=stats.num_rows,
        execution_count=stats.num_runs,
        inference_stats=pb.InferStatistics(
            success=_duration(stats.success),
            fail=_duration(stats.failure),
            queue=_duration(stats.queue),
            compute_input=_duration(stats.compute_input),
            compute_infer=_duration(stats.compute_infer),
            compute_output=_duration(stats.compute_output),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=rows,
                compute_input=_duration(batch.compute_input),
                compute_infer=_duration(batch.compute_infer),
                compute_output=_duration(batch.compute_output),
            )
            for rows, batch in sorted(stats.batches.items())
        ],
    )
