"""RunService: creates, steers and follows runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from interlock.api.trainer.v1 import run_service_pb2 as pb
from interlock.api.trainer.v1 import run_service_pb2_grpc as pb_grpc
from interlock.api.types.v1 import types_pb2
from interlock.core import names
from interlock.core.fields import plain
from interlock.core.policy import RunPolicy, run_policy
from interlock.errors import FailedPrecondition, InvalidArgument, Unimplemented
from interlock.runtime.access import Keys, actor_of
from interlock.stores.trainer import TrainerStore, request_digest
from interlock.training import terms, wire
from interlock_trainer.children import Children
from interlock_trainer.recipes import FAULTS, check, check_installed
from interlock_trainer.runs import Runs, Spec
from interlock_trainer.session import Session, Spawn
from interlock_trainer.watching import Change

PAGE = 100
ORDER_SECONDS = 5.0


class RunServicer(pb_grpc.RunServiceServicer):
    """Runs for people, the gateway and the controller."""

    def __init__(self, runs: Runs, children: Children, store: TrainerStore, keys: Keys, spawn: Spawn) -> None:
        self._runs = runs
        self._children = children
        self._store = store
        self._keys = keys
        self._spawn = spawn

    def _named(self, name: str) -> Session:
        return self._runs.get(names.parse_run(name, "name"))

    async def CreateRun(self, request: pb.CreateRunRequest, context: Any) -> pb.CreateRunResponse:
        """Records the run, then starts its process."""
        digest = request_digest(_without_change(request))
        known = self._store.answered(request.change.request_id, "CreateRun", digest)
        if known is not None:
            return pb.CreateRunResponse(run=self._runs.message(self._runs.get(known)))
        spec = self._spec(request)
        session = self._runs.create(spec, int(spec.parameters["max_steps"]))
        self._store.answer(request.change.request_id, "CreateRun", digest, spec.run)
        self._spawn(self._children.keep(session))
        return pb.CreateRunResponse(run=self._runs.message(session))

    def _spec(self, request: pb.CreateRunRequest) -> Spec:
        given = wire.data_of(request.parameters)
        if request.max_step_count:
            given["max_steps"] = request.max_step_count
        parameters = plain(check(request.recipe, given))
        check_installed(request.recipe)
        run = names.check_id(request.run_id or self._runs.new_id(request.recipe), "run_id")
        promotion = wire.promotion_value(request.promotion) if request.HasField("promotion") else None
        return Spec(run, request.recipe, _policy(request), promotion, parameters)

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        """One run."""
        return pb.GetRunResponse(run=self._runs.message(self._named(request.name)))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        """Runs, newest first; the page token is the number of runs passed."""
        if request.page_token and not request.page_token.isdigit():
            raise InvalidArgument("page_token: not one that ListRuns gave", reason="INVALID_FIELD", field="page_token")
        if request.page_size < 0:
            raise InvalidArgument("page_size: is negative", reason="INVALID_FIELD", field="page_size")
        begin, size = int(request.page_token or 0), request.page_size or PAGE
        ordered = sorted(self._runs, key=lambda session: (-session.row.create_time, session.run))
        token = str(begin + size) if begin + size < len(ordered) else ""
        page = [self._runs.message(session) for session in ordered[begin : begin + size]]
        return pb.ListRunsResponse(runs=page, next_page_token=token)

    async def PauseRun(self, request: pb.PauseRunRequest, context: Any) -> pb.PauseRunResponse:
        """Pauses at the next boundary."""
        session = self._named(request.name)
        session.pause(self._reason(request.change, context))
        return pb.PauseRunResponse(run=self._runs.message(session))

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Any) -> pb.ResumeRunResponse:
        """Goes on."""
        session = self._named(request.name)
        session.resume()
        return pb.ResumeRunResponse(run=self._runs.message(session))

    async def StopRun(self, request: pb.StopRunRequest, context: Any) -> pb.StopRunResponse:
        """Saves and ends; answers at once, WatchRun tells when it has ended."""
        session = self._named(request.name)
        session.stop(self._reason(request.change, context))
        return pb.StopRunResponse(run=self._runs.message(session))

    async def RollbackRun(self, request: pb.RollbackRunRequest, context: Any) -> pb.RollbackRunResponse:
        """Rolls back to a named checkpoint, or to the youngest good one."""
        session = self._named(request.name)
        known = session.rollbacks.get(request.rollback_id)
        if known is None:
            digest = request_digest(_without_change(request))
            answered = self._store.answered(request.change.request_id, "RollbackRun", digest)
            known = session.rollbacks.get(answered or "")
            if known is None:
                known = self._roll_back(session, request, context)
                self._store.answer(request.change.request_id, "RollbackRun", digest, known.rollback.rollback)
        return pb.RollbackRunResponse(run=self._runs.message(session), rollback=session.rollback_message(known))

    def _roll_back(self, session: Session, request: pb.RollbackRunRequest, context: Any) -> Any:
        checkpoint = ""
        if request.checkpoint:
            run, checkpoint = names.parse_checkpoint(request.checkpoint, "checkpoint")
            if run != session.run:
                raise InvalidArgument(
                    f"checkpoint: {request.checkpoint} belongs to another run than {request.name}",
                    reason="INVALID_FIELD",
                    field="checkpoint",
                )
            session.info(checkpoint)
        reason, actor = self._reason(request.change, context), actor_of(context, self._keys)
        row = session.roll_back(checkpoint, actor, reason, name=request.rollback_id)
        if request.quarantine_younger:
            session.quarantine_younger(row.rollback, reason)
        return row

    async def InjectFault(self, request: pb.InjectFaultRequest, context: Any) -> pb.InjectFaultResponse:
        """A drill; waits until the loop has taken it."""
        session = self._named(request.name)
        if request.fault not in FAULTS:
            raise InvalidArgument(
                f"fault: {request.fault!r} is not one of {', '.join(FAULTS)}", reason="UNKNOWN_FAULT", field="fault"
            )
        session.refuse_ended()
        num_steps = max(request.step_count, 1)
        try:
            await session.ordered(
                lambda order: terms.ChangeOrder(order, request.fault, request.value, num_steps), ORDER_SECONDS
            )
        except FailedPrecondition as error:
            if error.reason == "UNKNOWN_FAULT":
                raise InvalidArgument(error.message, reason="UNKNOWN_FAULT", field="fault") from None
            raise
        return pb.InjectFaultResponse(run=self._runs.message(session))

    async def ForkRun(self, request: pb.ForkRunRequest, context: Any) -> pb.ForkRunResponse:
        """Planned."""
        raise Unimplemented("ForkRun is planned; create a run and roll it to a checkpoint of its own meanwhile")

    async def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> AsyncIterator[pb.WatchRunResponse]:
        """The runs and their checkpoints as they are, then every change; ends after one run's terminal state."""
        run = names.parse_run(request.name, "name") if request.name else ""
        watched = [self._runs.get(run)] if run else list(self._runs)
        with self._runs.hub.watch(run) as watcher:
            for session in watched:
                for message in self._snapshot(session):
                    yield message
            while not (run and self._runs.get(run).terminal and watcher.queue.empty()):
                change = await watcher.queue.get()
                yield self._change(change)

    def _snapshot(self, session: Session) -> list[pb.WatchRunResponse]:
        run = self._runs.message(session)
        checkpoints = reversed(session.checkpoint_messages())
        return [pb.WatchRunResponse(run=run), *(pb.WatchRunResponse(run=run, checkpoint=item) for item in checkpoints)]

    def _change(self, change: Change) -> pb.WatchRunResponse:
        session = self._runs.get(change.run)
        return pb.WatchRunResponse(
            run=self._runs.message(session),
            checkpoint=session.checkpoint_message(change.checkpoint) if change.checkpoint else None,
            rollback=session.rollback_message(change.rollback) if change.rollback else None,
        )

    def _reason(self, change: types_pb2.Change, context: Any) -> str:
        return f"{actor_of(context, self._keys)}: {change.reason or 'asked'}"


def _without_change(request: Any) -> bytes:
    copy = type(request)()
    copy.CopyFrom(request)
    copy.ClearField("change")
    body: bytes = copy.SerializeToString(deterministic=True)
    return body


def _policy(request: pb.CreateRunRequest) -> RunPolicy:
    """The run's policy: `policy` as data, the fields beside it on top."""
    try:
        table = wire.data_of(request.policy)
        if request.guard_policy:
            table["guard"] = request.guard_policy
        policy = run_policy(table or "robust")
        if request.save_every_steps:
            policy = replace(policy, save_every=request.save_every_steps)
        if request.keep_count:
            policy = replace(policy, retention=replace(policy.retention, keep_last=request.keep_count))
        if request.confirm_after_steps:
            policy = replace(policy, recovery=replace(policy.recovery, confirm_after=request.confirm_after_steps))
    except InvalidArgument as error:
        raise InvalidArgument(error.message, reason="INVALID_POLICY", field=error.field) from None
    return policy
