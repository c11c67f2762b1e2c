"""CheckpointService: saves, lists, pins, marks, verifies and exports checkpoints."""

from __future__ import annotations

import asyncio
from typing import Any

from interlock.api.trainer.v1 import checkpoint_service_pb2 as pb
from interlock.api.trainer.v1 import checkpoint_service_pb2_grpc as pb_grpc
from interlock.api.types.v1 import types_pb2
from interlock.core import names
from interlock.core.recovery import CheckpointState
from interlock.errors import DataLoss, FailedPrecondition, InvalidArgument
from interlock.runtime.access import Keys, actor_of
from interlock.training import terms, wire
from interlock_trainer.runs import Runs
from interlock_trainer.session import Session

SAVE_SECONDS = 60.0
EXPORT_SECONDS = 110.0  # the first export of a run traces its graph, the contract's deadline is 120 s


class CheckpointServicer(pb_grpc.CheckpointServiceServicer):
    """What people and the controller do with checkpoints."""

    def __init__(self, runs: Runs, keys: Keys) -> None:
        self._runs = runs
        self._keys = keys

    def _find(self, name: str) -> tuple[Session, str]:
        run, checkpoint = names.parse_checkpoint(name, "name")
        return self._runs.get(run), checkpoint

    async def Save(self, request: pb.SaveRequest, context: Any) -> pb.SaveResponse:
        """Saves at the next step boundary and waits until it is durable."""
        session = self._runs.get(names.parse_run(request.run, "run"))
        session.refuse_ended()
        reason = request.change.reason or "asked"
        result = await session.ordered(lambda order: terms.SaveOrder(order, reason), SAVE_SECONDS)
        return pb.SaveResponse(checkpoint=session.checkpoint_message(session.info(result.checkpoint)))

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListResponse:
        """Durable checkpoints, youngest first."""
        return pb.ListResponse(checkpoints=self._runs.get(names.parse_run(request.run, "run")).checkpoint_messages())

    async def Pin(self, request: pb.PinRequest, context: Any) -> pb.PinResponse:
        """Pins or unpins."""
        session, checkpoint = self._find(request.name)
        return pb.PinResponse(checkpoint=session.checkpoint_message(session.pin(checkpoint, request.pinned)))

    async def Mark(self, request: pb.MarkRequest, context: Any) -> pb.MarkResponse:
        """Marks good or quarantined."""
        session, checkpoint = self._find(request.name)
        state = wire.STATES_BACK.get(request.state)
        if state not in (CheckpointState.GOOD, CheckpointState.QUARANTINED):
            raise InvalidArgument(
                "state: must be STATE_GOOD or STATE_QUARANTINED", reason="INVALID_FIELD", field="state"
            )
        actor = actor_of(context, self._keys)
        reason = f"marked by {actor}: {request.change.reason}".rstrip(": ")
        return pb.MarkResponse(checkpoint=session.checkpoint_message(session.mark(checkpoint, state, reason)))

    async def Verify(self, request: pb.VerifyRequest, context: Any) -> pb.VerifyResponse:
        """Reads every byte; damage quarantines the checkpoint."""
        session, checkpoint = self._find(request.name)
        info = session.info(checkpoint)
        checkpoints = session.local_checkpoints()
        if checkpoints is None:
            raise FailedPrecondition(
                f"the checkpoints of run {session.run} lie on another machine, or in another state folder than this trainer's",
                reason="CHECKPOINTS_ELSEWHERE",
                metadata={"folder": session.row.checkpoint_folder},
            )
        try:
            manifest = await asyncio.to_thread(checkpoints.verify, checkpoint)
        except DataLoss as error:
            session.mark(checkpoint, CheckpointState.QUARANTINED, error.message)
            raise
        return pb.VerifyResponse(checkpoint=session.checkpoint_message(info), size_bytes=manifest.size_bytes)

    async def Export(self, request: pb.ExportRequest, context: Any) -> pb.ExportResponse:
        """Has the loop write a servable artifact and compare it with torch."""
        session, checkpoint = self._find(request.name)
        info = session.info(checkpoint)
        if info.state is not CheckpointState.GOOD and not request.force:
            raise FailedPrecondition(
                f"checkpoint {checkpoint} is {info.state.value}; only a good one is exported, or any with force",
                reason="CHECKPOINT_NOT_GOOD",
                field="name",
                metadata={"state": info.state.value},
            )
        if not session.row.servable:
            raise FailedPrecondition(f"run {session.run} was attached without serve", reason="NOT_SERVABLE")
        result = await session.ordered(lambda order: terms.ExportOrder(order, checkpoint), EXPORT_SECONDS)
        response = pb.ExportResponse(
            artifact_uri=result.artifact,
            digest=result.digest,
            origin=types_pb2.Origin(
                run=names.run_name(session.run),
                checkpoint=request.name,
                step=info.step,
                attempt=info.attempt,
                checkpoint_digest=info.digest,
            ),
            max_abs_error=result.max_abs_error,
            max_rel_error=result.max_rel_error,
        )
        response.metrics.update(dict(info.metrics))
        return response
