"""The administrator's client: swaps, models, runs and checkpoints over gRPC, in ids and plain dictionaries.

    async with AdminClient("127.0.0.1:8003", trainer="127.0.0.1:8002") as admin:
        version = await admin.register("digits", "export/digits.onnx")
        swap = await admin.swap("digits", version)
        async for state in admin.watch_swap(swap["name"]):
            print(state["state"], state["progress_percent"])

Every method raises `interlock.errors` classes. Dictionaries have the protos' field names; enums are their names without the prefix.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from google.protobuf.json_format import MessageToDict

from interlock.api.controller.v1 import model_service_pb2 as model_pb
from interlock.api.controller.v1 import rollback_service_pb2 as rollback_pb
from interlock.api.controller.v1 import swap_service_pb2 as swap_pb
from interlock.api.controller.v1.model_service_pb2_grpc import ModelServiceStub
from interlock.api.controller.v1.rollback_service_pb2_grpc import RollbackServiceStub
from interlock.api.controller.v1.swap_service_pb2_grpc import SwapServiceStub
from interlock.api.trainer.v1 import checkpoint_service_pb2 as checkpoint_pb
from interlock.api.trainer.v1 import metrics_service_pb2 as metrics_pb
from interlock.api.trainer.v1 import run_service_pb2 as run_pb
from interlock.api.trainer.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from interlock.api.trainer.v1.metrics_service_pb2_grpc import MetricsServiceStub
from interlock.api.trainer.v1.run_service_pb2_grpc import RunServiceStub
from interlock.api.types.v1 import types_pb2
from interlock.core import names
from interlock.runtime.channels import Caller, open_channel

_SHORT, _LONG = 5.0, 120.0


def plain(message: Any) -> dict[str, Any]:
    """A message as a dictionary with defaults included and enum prefixes dropped."""
    document: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {name: _short(value) for name, value in document.items()}


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    return (
        value.removeprefix("STATE_").removeprefix("STRATEGY_").removeprefix("CONCURRENCY_")
        if isinstance(value, str)
        else value
    )


class AdminClient:
    """Talks to a controller and, for runs, to a trainer. Use it as an async context manager.

    Args:
        controller: `host:port` of the controller.
        trainer: `host:port` of the trainer; needed for runs and checkpoints only.
        key: API key with the admin scope; empty where none is required.
        actor: who is at work, for the history; a key's own name wins over it.
    """

    def __init__(
        self, controller: str = "127.0.0.1:8003", *, trainer: str = "127.0.0.1:8002", key: str = "", actor: str = ""
    ) -> None:
        self._controller_address = controller
        self._trainer_address = trainer
        self._caller = Caller(key)
        self._actor = actor
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Opens the channels; they connect when first used."""
        controller = await self._stack.enter_async_context(open_channel(self._controller_address))
        trainer = await self._stack.enter_async_context(open_channel(self._trainer_address))
        self._swaps, self._models, self._rollbacks = (
            SwapServiceStub(controller),
            ModelServiceStub(controller),
            RollbackServiceStub(controller),
        )
        self._runs, self._metrics, self._checkpoints = (
            RunServiceStub(trainer),
            MetricsServiceStub(trainer),
            CheckpointServiceStub(trainer),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the channels."""
        await self._stack.aclose()

    async def _call(self, method: Any, request: Any, *, timeout: float = _SHORT, idempotent: bool = False) -> Any:
        return await self._caller.unary(method, request, timeout=timeout, idempotent=idempotent, actor=self._actor)

    # --- models -----------------------------------------------------------------------------------------------------------------

    async def models(self) -> list[dict[str, Any]]:
        """Every model with its route."""
        return [
            plain(m)
            for m in (await self._call(self._models.ListModels, model_pb.ListModelsRequest(), idempotent=True)).models
        ]

    async def versions(self, model: str) -> list[dict[str, Any]]:
        """A model's versions, newest first."""
        request = model_pb.ListVersionsRequest(model=names.model_name(model))
        return [plain(v) for v in (await self._call(self._models.ListVersions, request, idempotent=True)).versions]

    async def register(self, model: str, artifact: str, *, digest: str = "", reason: str = "") -> str:
        """Copies an artifact into the model repository; returns the version id."""
        request = model_pb.RegisterVersionRequest(
            change=_change(reason), model=names.model_name(model), artifact_uri=artifact, digest=digest
        )
        answer = await self._call(self._models.RegisterVersion, request, timeout=_LONG, idempotent=True)
        return names.parse_version(answer.version.name)[1]

    async def rollback_model(
        self, model: str, version: str = "", *, quarantine: bool = False, reason: str = ""
    ) -> dict[str, Any]:
        """Starts the swap that moves a model back to `version`, or to the one that served before."""
        target = names.version_name(model, version) if version else ""
        request = model_pb.RollbackModelRequest(
            change=_change(reason), model=names.model_name(model), version=target, quarantine=quarantine
        )
        return plain((await self._call(self._models.RollbackModel, request, idempotent=True)).swap)

    async def quarantine(
        self, model: str, version: str, *, quarantined: bool = True, reason: str = ""
    ) -> dict[str, Any]:
        """Forbids a version, or lifts it."""
        request = model_pb.QuarantineRequest(
            change=_change(reason), version=names.version_name(model, version), quarantined=quarantined
        )
        return plain(await self._call(self._models.Quarantine, request, idempotent=True))

    async def explain(self, model: str, version: str = "") -> dict[str, Any]:
        """The story of what serves."""
        target = names.version_name(model, version) if version else ""
        return plain(
            await self._call(
                self._models.Explain,
                model_pb.ExplainRequest(model=names.model_name(model), version=target),
                idempotent=True,
            )
        )

    # --- swaps ------------------------------------------------------------------------------------------------------------------

    async def swap(
        self, model: str, version: str, *, reason: str = "", spec: Mapping[str, Any] | None = None, request_id: str = ""
    ) -> dict[str, Any]:
        """Starts a swap; `spec` holds further fields of SwapSpec."""
        wanted = swap_pb.SwapSpec(candidate_version=names.version_name(model, version), **(spec or {}))
        request = swap_pb.CreateSwapRequest(change=_change(reason, request_id), spec=wanted)
        return plain((await self._call(self._swaps.CreateSwap, request, idempotent=True)).swap)

    async def swaps(self, model: str = "", page_size: int = 20) -> list[dict[str, Any]]:
        """Swaps, newest first."""
        request = swap_pb.ListSwapsRequest(model=names.model_name(model) if model else "", page_size=page_size)
        return [plain(s) for s in (await self._call(self._swaps.ListSwaps, request, idempotent=True)).swaps]

    async def watch_swap(self, name: str) -> AsyncIterator[dict[str, Any]]:
        """The swap now, then after every change, until it ends."""
        async for message in self._caller.stream(self._swaps.WatchSwap, swap_pb.WatchSwapRequest(name=name)):
            yield plain(message.swap)

    async def finished_swap(self, name: str) -> dict[str, Any]:
        """Waits for the end of a swap and returns it."""
        last: dict[str, Any] = {}
        async for state in self.watch_swap(name):
            last = state
        return last

    async def steer_swap(self, name: str, verb: str, *, reason: str = "") -> dict[str, Any]:
        """`verb` is approve, reject, promote or abort."""
        method = f"{verb.capitalize()}Swap"
        request = getattr(swap_pb, f"{method}Request")(change=_change(reason), name=name)
        return plain((await self._call(getattr(self._swaps, method), request, idempotent=True)).swap)

    async def receipt(self, name: str) -> dict[str, Any]:
        """The receipt of an ended swap."""
        return plain(
            (await self._call(self._swaps.GetReceipt, swap_pb.GetReceiptRequest(name=name), idempotent=True)).receipt
        )

    # --- runs -------------------------------------------------------------------------------------------------------------------

    async def create_run(
        self, recipe: str, *, parameters: Mapping[str, Any] | None = None, reason: str = "", **fields: Any
    ) -> dict[str, Any]:
        """Starts a run of a built-in recipe; `fields` are further fields of CreateRunRequest."""
        request = run_pb.CreateRunRequest(change=_change(reason), recipe=recipe, **fields)
        request.parameters.update(dict(parameters or {}))
        return plain((await self._call(self._runs.CreateRun, request, timeout=10, idempotent=True)).run)

    async def runs(self) -> list[dict[str, Any]]:
        """Runs, newest first."""
        return [
            plain(r) for r in (await self._call(self._runs.ListRuns, run_pb.ListRunsRequest(), idempotent=True)).runs
        ]

    async def run(self, run: str) -> dict[str, Any]:
        """One run."""
        return plain(
            (await self._call(self._runs.GetRun, run_pb.GetRunRequest(name=names.run_name(run)), idempotent=True)).run
        )

    async def watch_run(self, run: str) -> AsyncIterator[dict[str, Any]]:
        """The run now, then after every change, until it ends."""
        async for message in self._caller.stream(self._runs.WatchRun, run_pb.WatchRunRequest(name=names.run_name(run))):
            yield plain(message)

    async def step_metrics(self, run: str, from_seq: int = 0) -> AsyncIterator[dict[str, Any]]:
        """Step records from a sequence number on, then live ones, until the run ends."""
        request = metrics_pb.StreamStepMetricsRequest(run=names.run_name(run), from_seq=from_seq)
        async for message in self._caller.stream(self._metrics.StreamStepMetrics, request):
            for record in message.records:
                yield {"seq": record.seq, "step": record.step, "attempt": record.attempt, **record.metrics}

    async def steer_run(self, run: str, verb: str, *, reason: str = "") -> dict[str, Any]:
        """`verb` is pause, resume or stop."""
        method = f"{verb.capitalize()}Run"
        request = getattr(run_pb, f"{method}Request")(change=_change(reason), name=names.run_name(run))
        return plain((await self._call(getattr(self._runs, method), request, timeout=30, idempotent=True)).run)

    async def rollback_run(self, run: str, checkpoint: str = "", *, reason: str = "") -> dict[str, Any]:
        """Rolls a run back, through the controller, so that serving follows."""
        target = names.checkpoint_name(run, checkpoint) if checkpoint else ""
        request = rollback_pb.RollbackRunRequest(change=_change(reason), run=names.run_name(run), checkpoint=target)
        return plain(await self._call(self._rollbacks.RollbackRun, request, timeout=15, idempotent=True))

    async def rollbacks(self, run: str = "") -> list[dict[str, Any]]:
        """The controller's records of rollbacks, newest first."""
        request = rollback_pb.ListRollbacksRequest(run=names.run_name(run) if run else "")
        return [plain(r) for r in (await self._call(self._rollbacks.ListRollbacks, request, idempotent=True)).rollbacks]

    async def inject_fault(
        self, run: str, fault: str, value: float, *, step_count: int = 1, reason: str = "drill"
    ) -> None:
        """Injects a fault into a running recipe."""
        request = run_pb.InjectFaultRequest(
            change=_change(reason), name=names.run_name(run), fault=fault, value=value, step_count=step_count
        )
        await self._call(self._runs.InjectFault, request)

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    async def checkpoints(self, run: str) -> list[dict[str, Any]]:
        """Checkpoints, youngest first."""
        request = checkpoint_pb.ListRequest(run=names.run_name(run))
        return [plain(c) for c in (await self._call(self._checkpoints.List, request, idempotent=True)).checkpoints]

    async def pin(self, run: str, checkpoint: str, *, pinned: bool = True, reason: str = "") -> dict[str, Any]:
        """Keeps a checkpoint from retention, or lets it go."""
        request = checkpoint_pb.PinRequest(
            change=_change(reason), name=names.checkpoint_name(run, checkpoint), pinned=pinned
        )
        return plain((await self._call(self._checkpoints.Pin, request, idempotent=True)).checkpoint)

    async def verify(self, run: str, checkpoint: str) -> dict[str, Any]:
        """Reads every byte of a checkpoint and compares digests."""
        request = checkpoint_pb.VerifyRequest(name=names.checkpoint_name(run, checkpoint))
        return plain(await self._call(self._checkpoints.Verify, request, timeout=60, idempotent=True))


def _change(reason: str, request_id: str = "") -> types_pb2.Change:
    """A fresh request id per call makes the retries inside it safe."""
    return types_pb2.Change(request_id=request_id or uuid.uuid4().hex, reason=reason or "by a person")
