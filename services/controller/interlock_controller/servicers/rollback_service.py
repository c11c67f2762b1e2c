"""RollbackService."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

from google.protobuf import json_format

from interlock.api.controller.v1 import rollback_service_pb2 as pb
from interlock.api.controller.v1 import rollback_service_pb2_grpc as rpc
from interlock.api.trainer.v1 import run_service_pb2 as run_pb
from interlock.core import names
from interlock.errors import InvalidArgument, Unavailable
from interlock.runtime.access import Keys, actor_of
from interlock.runtime.telemetry import current_traceparent, trace_id_of
from interlock.stores.controller import ControllerStore, RollbackRow
from interlock_controller import convert
from interlock_controller.rollbacks import Rollbacks
from interlock_controller.trainer import TrainerClient, checkpoint_row

CONTROLLER = "controller"


class RollbackServicer(rpc.RollbackServiceServicer):
    """Decides, records and orders rollbacks across rooms."""

    def __init__(self, rollbacks: Rollbacks, trainer: TrainerClient, store: ControllerStore, keys: Keys) -> None:
        self._rollbacks = rollbacks
        self._trainer = trainer
        self._store = store
        self._keys = keys

    async def DecideRollback(self, request: pb.DecideRollbackRequest, _context: Any) -> pb.DecideRollbackResponse:
        """Confirms or replaces what the trainer would do, on record before it is answered."""
        proposed = request.proposed
        _check(proposed, "proposed")
        known = self._rollbacks.known(proposed.rollback_id)
        if known is not None:
            return pb.DecideRollbackResponse(
                decision=_document(known, proposed), record=convert.rollback_message(known)
            )
        rows = [checkpoint_row(proposed.run, c) for c in request.checkpoints]
        decided, why = self._rollbacks.decide(_row(proposed, CONTROLLER), proposed.onset_step, rows)
        decision = run_pb.Rollback()
        decision.CopyFrom(proposed)
        decision.decided_by = CONTROLLER
        decision.target_checkpoint, decision.to_step = decided.target, decided.to_step
        if why and not decided.target:
            decision.state = run_pb.Rollback.STATE_PAUSED
        if not decision.trace_id:
            decision.trace_id = trace_id_of(current_traceparent())
        document = json_format.MessageToJson(decision, indent=None)
        stored, _ = self._rollbacks.put(_with(decided, document, current_traceparent()), CONTROLLER)
        return pb.DecideRollbackResponse(decision=decision, record=convert.rollback_message(stored))

    async def ReportRollback(self, request: pb.ReportRollbackRequest, _context: Any) -> pb.ReportRollbackResponse:
        """Takes in what a trainer or a loop did by itself, or how a decided one ended."""
        rollback = request.rollback
        _check(rollback, "rollback")
        row = _row(rollback, rollback.decided_by or "trainer")
        document = json_format.MessageToJson(rollback, indent=None)
        stored, _ = self._rollbacks.put(_with(row, document, current_traceparent()), row.decided_by)
        return pb.ReportRollbackResponse(record=convert.rollback_message(stored))

    async def RollbackRun(self, request: pb.RollbackRunRequest, context: Any) -> pb.RollbackRunResponse:
        """A person's rollback: the trainer carries it out, versions of what is left behind are forbidden."""
        names.parse_run(request.run)
        if request.checkpoint:
            names.parse_checkpoint(request.checkpoint)
        key = convert.request_of(request, "RollbackRun")
        rollback_id = self._store.answered(key) if key is not None else None
        known = self._rollbacks.known(rollback_id) if rollback_id else None
        if known is not None:
            return pb.RollbackRunResponse(record=convert.rollback_message(known))
        rollback_id = rollback_id or f"rb-{uuid.uuid4().hex[:12]}"
        if key is not None and self._store.answered(key) is None:
            self._store.remember(
                key, rollback_id
            )  # before the order: asked again after a crash, it is the same rollback
        actor = (
            actor_of(context, self._keys)
            if self._keys.required
            else request.change.actor or actor_of(context, self._keys)
        )
        request.change.actor = actor
        try:
            done = await self._trainer.roll_back(request.run, request.checkpoint, rollback_id, request.change)
        except Unavailable as error:
            raise Unavailable(
                f"the trainer at {self._trainer.address} does not answer: {error.message}",
                reason="TRAINER_UNREACHABLE",
                retry_after_seconds=2.0,
            ) from error
        done.rollback_id = done.rollback_id or rollback_id
        document = json_format.MessageToJson(done, indent=None)
        stored, swaps = self._rollbacks.put(_with(_row(done, CONTROLLER), document, current_traceparent()), actor)
        return pb.RollbackRunResponse(
            record=convert.rollback_message(stored), swaps=[names.swap_name(swap.id) for swap in swaps]
        )

    async def ListRollbacks(self, request: pb.ListRollbacksRequest, _context: Any) -> pb.ListRollbacksResponse:
        """Newest first."""
        if request.run:
            names.parse_run(request.run)
        rows = self._store.rollbacks(request.run)
        return pb.ListRollbacksResponse(rollbacks=[convert.rollback_message(row) for row in rows])


def _check(rollback: run_pb.Rollback, field: str) -> None:
    if not rollback.rollback_id:
        raise InvalidArgument(
            f"{field}.rollback_id: is empty; the record is kept under it",
            reason="INVALID_ID",
            field=f"{field}.rollback_id",
        )
    names.parse_run(rollback.run, f"{field}.run")


def _row(rollback: run_pb.Rollback, decided_by: str) -> RollbackRow:
    return RollbackRow(
        rollback.rollback_id,
        rollback.run,
        rollback.rule,
        rollback.value,
        rollback.limit,
        rollback.from_step,
        rollback.to_step,
        rollback.target_checkpoint,
        decided_by,
        rollback.attempt,
        tuple(rollback.quarantined_checkpoints),
        created_at=rollback.create_time.ToNanoseconds() / 1e9,
    )


def _with(row: RollbackRow, document: str, trace: str) -> RollbackRow:
    return replace(row, document=document, trace=trace)


def _document(row: RollbackRow, fallback: run_pb.Rollback) -> run_pb.Rollback:
    """The decision as it was answered the first time."""
    decision = run_pb.Rollback()
    if not row.document:
        decision.CopyFrom(fallback)
        return decision
    json_format.Parse(row.document, decision, ignore_unknown_fields=True)
    return decision
