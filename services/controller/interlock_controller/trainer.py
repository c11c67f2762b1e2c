"""The trainer as seen from here: its runs and checkpoints in, exports and rollbacks out. Messages of the wire stop in this module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from google.protobuf.json_format import MessageToDict
from grpc import aio

from interlock.api.trainer.v1 import checkpoint_service_pb2 as checkpoint_pb
from interlock.api.trainer.v1 import checkpoint_service_pb2_grpc as checkpoint_rpc
from interlock.api.trainer.v1 import run_service_pb2 as run_pb
from interlock.api.trainer.v1 import run_service_pb2_grpc as run_rpc
from interlock.api.types.v1 import types_pb2
from interlock.core import names
from interlock.core.promotion import PromotionPolicy
from interlock.core.retention import Better
from interlock.runtime.channels import Caller, open_channel
from interlock.stores.controller import CheckpointRow, Origin

SHORT_SECONDS, EXPORT_SECONDS, ROLLBACK_SECONDS = 5.0, 120.0, 10.0
_STATES = {
    run_pb.Checkpoint.STATE_CANDIDATE: "CANDIDATE",
    run_pb.Checkpoint.STATE_GOOD: "GOOD",
    run_pb.Checkpoint.STATE_QUARANTINED: "QUARANTINED",
}


@dataclass(frozen=True, slots=True)
class Update:
    """One message of the trainer's watch: a run's promotion policy, if it has one, and a checkpoint, if one changed."""

    run: str
    policy: PromotionPolicy | None = None
    checkpoint: CheckpointRow | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """A servable artifact that the trainer wrote."""

    artifact_uri: str
    digest: str
    origin: Origin
    metrics: Mapping[str, float] = field(default_factory=dict)


class TrainerClient:
    """Speaks to the trainer. Closed by its owner."""

    def __init__(self, address: str, caller: Caller) -> None:
        self.address = address
        self._caller = caller
        self._channel: aio.Channel = open_channel(address)
        self._runs = run_rpc.RunServiceStub(self._channel)
        self._checkpoints = checkpoint_rpc.CheckpointServiceStub(self._channel)

    async def close(self) -> None:
        """Ends the connection and whatever runs on it."""
        await self._channel.close()

    async def catch_up(self) -> list[Update]:
        """Every run that promotes, with every checkpoint of it: what may have happened while nobody watched."""
        answer = await self._caller.unary(
            self._runs.ListRuns, run_pb.ListRunsRequest(page_size=1000), timeout=SHORT_SECONDS, idempotent=True
        )
        updates = []
        for run in answer.runs:
            update = Update(run.name, policy_of(run))
            updates.append(update)
            if update.policy is not None:
                updates += [Update(run.name, update.policy, row) for row in await self.checkpoints(run.name)]
        return updates

    async def checkpoints(self, run: str) -> list[CheckpointRow]:
        """A run's checkpoints as the trainer lists them."""
        request = checkpoint_pb.ListRequest(run=run)
        answer = await self._caller.unary(self._checkpoints.List, request, timeout=SHORT_SECONDS, idempotent=True)
        return [checkpoint_row(run, c) for c in answer.checkpoints]

    async def watch(self) -> AsyncIterator[Update]:
        """Every change of every run. Ends or raises when the trainer goes away."""
        async for message in self._caller.stream(self._runs.WatchRun, run_pb.WatchRunRequest()):
            checkpoint = (
                checkpoint_row(message.run.name, message.checkpoint) if message.HasField("checkpoint") else None
            )
            yield Update(message.run.name, policy_of(message.run), checkpoint)

    async def export(self, checkpoint: str, why: str) -> Exported:
        """Has a servable artifact written; one that exists is returned.

        Raises:
            FailedPrecondition, Unavailable, NotFound: as the contract says.
        """
        change = types_pb2.Change(reason=why, actor="controller")
        request = checkpoint_pb.ExportRequest(change=change, name=checkpoint)
        answer = await self._caller.unary(self._checkpoints.Export, request, timeout=EXPORT_SECONDS, idempotent=True)
        origin = answer.origin
        metrics = {k: float(v) for k, v in MessageToDict(answer.metrics).items() if isinstance(v, int | float)}
        return Exported(
            answer.artifact_uri,
            answer.digest,
            Origin(origin.run, origin.checkpoint or checkpoint, origin.step, origin.attempt, origin.checkpoint_digest),
            metrics,
        )

    async def pin(self, checkpoint: str, pinned: bool) -> None:
        """Keeps a checkpoint from retention, or lets it go again."""
        change = types_pb2.Change(reason="backs a version", actor="controller")
        request = checkpoint_pb.PinRequest(change=change, name=checkpoint, pinned=pinned)
        await self._caller.unary(self._checkpoints.Pin, request, timeout=SHORT_SECONDS, idempotent=True)

    async def roll_back(self, run: str, checkpoint: str, rollback_id: str, change: types_pb2.Change) -> run_pb.Rollback:
        """Orders a rollback; younger checkpoints are quarantined."""
        request = run_pb.RollbackRunRequest(
            change=change, name=run, checkpoint=checkpoint, rollback_id=rollback_id, quarantine_younger=True
        )
        answer = await self._caller.unary(self._runs.RollbackRun, request, timeout=ROLLBACK_SECONDS)
        rollback: run_pb.Rollback = answer.rollback
        return rollback


def policy_of(run: run_pb.Run) -> PromotionPolicy | None:
    """A run's promotion policy; None when its checkpoints do not reach traffic."""
    if not run.HasField("promotion") or not run.promotion.model:
        return None
    promotion = run.promotion
    minimize = promotion.direction == run_pb.PromotionPolicy.DIRECTION_MINIMIZE
    return PromotionPolicy(
        names.parse_model(promotion.model, "promotion.model"),
        promotion.metric,
        Better.LOWER if minimize else Better.HIGHER,
        promotion.min_improvement,
        promotion.min_interval.ToNanoseconds() / 1e9,
    )


def checkpoint_row(run: str, checkpoint: run_pb.Checkpoint) -> CheckpointRow:
    """A checkpoint as it goes on record."""
    return CheckpointRow(
        checkpoint.name,
        run,
        checkpoint.step,
        checkpoint.attempt,
        _STATES.get(checkpoint.state, "CANDIDATE"),
        checkpoint.digest,
        dict(checkpoint.metrics),
        checkpoint.create_time.ToNanoseconds() / 1e9,
    )
