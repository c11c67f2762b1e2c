"""Asks the controller about a rollback, and reports what was done without it. Carries out nothing itself."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from interlock.api.controller.v1 import rollback_service_pb2 as pb
from interlock.api.controller.v1.rollback_service_pb2_grpc import RollbackServiceStub
from interlock.api.trainer.v1 import run_service_pb2 as run_pb
from interlock.errors import InterlockError
from interlock.runtime.channels import Caller, open_channel

_log = structlog.get_logger(__name__)


class Controller:
    """The controller as the trainer sees it: somebody who decides, and may not be there."""

    def __init__(self, address: str, caller: Caller, timeout_seconds: float) -> None:
        self._channel = open_channel(address)
        self._stub = RollbackServiceStub(self._channel)
        self._caller = caller
        self._timeout_seconds = timeout_seconds

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()

    async def decide(
        self, proposed: run_pb.Rollback, checkpoints: Iterable[run_pb.Checkpoint], guard_policy: str
    ) -> run_pb.Rollback | None:
        """The controller's decision; None when it does not answer in time, or not with one."""
        request = pb.DecideRollbackRequest(proposed=proposed, checkpoints=checkpoints, guard_policy=guard_policy)
        try:
            answer = await self._caller.unary(self._stub.DecideRollback, request, timeout=self._timeout_seconds)
        except InterlockError as error:
            _log.warning("controller_did_not_decide", rollback=proposed.rollback_id, error=error.message)
            return None
        decision: run_pb.Rollback = answer.decision
        return decision

    async def report(self, rollback: run_pb.Rollback) -> bool:
        """Tells the controller about a rollback; False when it could not be told."""
        try:
            request = pb.ReportRollbackRequest(rollback=rollback)
            await self._caller.unary(self._stub.ReportRollback, request, timeout=5.0)
        except InterlockError as error:
            _log.debug("rollback_not_reported", rollback=rollback.rollback_id, error=error.message)
            return False
        return True
