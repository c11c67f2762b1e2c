"""One run inside the trainer service: what its loop reports moves the pure core, what the core decides is persisted, announced, ordered.

Order of things for every report: one transaction with all it changes; then the watchers; then the orders. Everything runs on the event
loop's one thread, so a report is handled whole before the next. After a restart of the service the session is rebuilt from the database:
records that were stored after the last persisted supervision are judged again, with the same result.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from interlock.api.trainer.v1 import loop_service_pb2 as loop_pb
from interlock.api.trainer.v1 import run_service_pb2 as run_pb
from interlock.core import recovery, retention, supervision
from interlock.core.fields import parse, plain
from interlock.core.ports import Clock
from interlock.core.promotion import PromotionPolicy
from interlock.core.recovery import CheckpointState, Rollback
from interlock.core.retention import Kept
from interlock.core.steps import StepRecord
from interlock.core.supervision import Supervision
from interlock.errors import FailedPrecondition, InterlockError, NotFound, Unavailable
from interlock.runtime import telemetry as traces
from interlock.stores.checkpoints import CheckpointStore
from interlock.stores.trainer import RollbackRow, RunRow, TrainerStore
from interlock.training import terms, wire
from interlock.training.terms import CheckpointInfo, Hello, Order, Result
from interlock_trainer import telemetry
from interlock_trainer.decisions import Controller
from interlock_trainer.watching import Change, Hub

_log = structlog.get_logger(__name__)
TERMINAL = ("completed", "failed")
INTERRUPTED = "INTERRUPTED"
SAVE_FAILED = "SAVE_FAILED"
PERSIST_SECONDS = 2.0  # how much judging a restart repeats at most
PROGRESS_SECONDS = 1.0  # how often watchers hear of mere steps

Spawn = Callable[[Awaitable[None]], None]


@dataclass(frozen=True, slots=True)
class Shared:
    """What every session of a service uses. `home` is the state folder: the only place where files of runs are touched from here."""

    home: Path
    store: TrainerStore
    hub: Hub
    controller: Controller
    clock: Clock
    spawn: Spawn


@dataclass(eq=False, slots=True)
class Line:
    """One attached loop: what is to be sent to it. Bounded by what is open: acknowledgements and orders, a handful a second."""

    queue: asyncio.Queue[loop_pb.AttachResponse | None] = field(default_factory=asyncio.Queue)


class Session:
    """A run. All methods are called on the event loop's thread."""

    def __init__(self, shared: Shared, row: RunRow, state: Supervision) -> None:
        self._shared = shared
        self._store = shared.store
        self.row = row
        self.state = state
        self.infos: dict[str, CheckpointInfo] = {}
        self.pinned: set[str] = set()
        self.exported: list[str] = []
        self.rollbacks: dict[str, RollbackRow] = {row.rollback.rollback: row for row in self._store.rollbacks(row.run)}
        for body, pinned in self._store.checkpoints(row.run):
            self._remember(body, pinned)
        self._line: Line | None = None
        self._waiting: dict[str, asyncio.Future[Result]] = {}
        self._grown = asyncio.Event()
        self._before: recovery.Ledger | None = None
        self._num_orders = self._store.num_orders(row.run)
        self._persisted_at = self._progress_at = 0.0

    def _remember(self, body: dict[str, Any], pinned: bool) -> None:
        exported = body.pop("exported", False)
        info = parse(CheckpointInfo, body)
        self.infos[info.checkpoint] = info
        if pinned:
            self.pinned.add(info.checkpoint)
        if exported:
            self.exported.append(info.checkpoint)

    # --- looking ---

    @property
    def run(self) -> str:
        """The run's id."""
        return self.row.run

    @property
    def attached(self) -> bool:
        """Whether a loop is on the line."""
        return self._line is not None

    @property
    def terminal(self) -> bool:
        """Whether the run has ended for good."""
        return self.row.state in TERMINAL

    @property
    def head_seq(self) -> int:
        """The highest sequence number stored."""
        return self.row.head_seq

    @property
    def promotion(self) -> PromotionPolicy | None:
        """How good checkpoints reach traffic."""
        return parse(PromotionPolicy, json.loads(self.row.promotion)) if self.row.promotion else None

    async def grown(self, timeout_seconds: float) -> None:
        """Waits until more records are stored or the run's state changes, or for `timeout_seconds`."""
        event = self._grown
        try:
            async with asyncio.timeout(timeout_seconds):
                await event.wait()
        except TimeoutError:
            return

    def info(self, checkpoint: str) -> CheckpointInfo:
        """A checkpoint; raises NotFound `CHECKPOINT_NOT_FOUND`."""
        if checkpoint not in self.infos:
            raise NotFound(
                f"run {self.run} has no checkpoint {checkpoint!r}",
                reason="CHECKPOINT_NOT_FOUND",
                field="name",
                metadata={"run": self.run, "checkpoint": checkpoint},
            )
        return self.infos[checkpoint]

    # --- persisting and telling ---

    def _edit(self, **changes: Any) -> None:
        self.row = replace(self.row, update_time=self._shared.clock.now(), **changes)

    def persist(self) -> None:
        """Writes the run and its supervision."""
        self._persisted_at = self._shared.clock.monotonic()
        self._store.put_run(self.row, self.state)

    def announce(self, checkpoint: CheckpointInfo | None = None, rollback: RollbackRow | None = None) -> None:
        """Tells watchers and readers of the stream."""
        self._shared.hub.announce(Change(self.run, checkpoint, rollback))
        self._wake()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    def _set_info(self, info: CheckpointInfo) -> CheckpointInfo:
        self.infos[info.checkpoint] = info
        body = plain(info) | {"exported": info.checkpoint in self.exported}
        self._store.put_checkpoint(self.run, info.checkpoint, info.seq, body)
        return info

    def _set_rollback(self, row: RollbackRow) -> RollbackRow:
        self.rollbacks[row.rollback.rollback] = row
        self._store.put_rollback(self.run, row)
        return row

    def set_state(self, state: str, message: str = "") -> None:
        """Changes the run's state, persists and announces it."""
        self._edit(state=state, message=message)
        self.persist()
        _log.info("run_state", run=self.run, state=state, message=message)
        self.announce()

    # --- the loop's line ---

    def connect(self, hello: Hello) -> Line:
        """A loop says hello; its line replaces an older one. The welcome and the open orders lie in the line's queue."""
        self._line_over()
        line = self._line = Line()
        if self.terminal and self.row.owned:
            return self._turn_away(line)
        self._edit(
            pid=hello.pid,
            recipe=hello.recipe or self.row.recipe,
            servable=hello.servable,
            checkpoint_folder=hello.checkpoint_folder,
            promotion=json.dumps(plain(hello.promotion)) if hello.promotion else self.row.promotion,
            head_seq=self._store.steps.head(self.run),
        )
        self.state = replace(self.state, policy=hello.policy)
        self._catch_up(hello.attempt)
        restore = self._restart() if hello.starting else None
        paused = self.state.ledger.paused or self.row.state == "paused"
        pending = any(row.state == "rolling_back" for row in self.rollbacks.values())
        state = "paused" if paused else "rolling_back" if pending else "running"
        self._edit(state=state, graceful=False, message=self.row.message if paused else "")
        self.persist()
        welcome = loop_pb.Welcome(acknowledged_seq=self.head_seq, attempt=self.state.ledger.attempt)
        if restore:
            welcome.restore.CopyFrom(wire.rollback_message(self.run, restore))
        line.queue.put_nowait(loop_pb.AttachResponse(welcome=welcome))
        self._send_open_orders(line)
        if paused and hello.starting:
            self.order(lambda order: terms.PauseOrder(order, self.row.message or "still paused"))
        _log.info("loop_attached", run=self.run, pid=hello.pid, attempt=self.state.ledger.attempt, seq=self.head_seq)
        self.announce()
        return line

    def _turn_away(self, line: Line) -> Line:
        """The run ended while its process was starting: it is told to stop, and changes nothing."""
        welcome = loop_pb.Welcome(acknowledged_seq=self.head_seq, attempt=self.state.ledger.attempt)
        line.queue.put_nowait(loop_pb.AttachResponse(welcome=welcome))
        self.order(lambda order: terms.StopOrder(order, "the run has ended"))
        return line

    def _restart(self) -> Rollback | None:
        """Where a starting loop begins; orders that only its dead predecessor could obey are closed."""
        for body in self._store.open_orders(self.run):
            message = loop_pb.Order.FromString(body)
            if message.WhichOneof("action") in ("roll_back", "change", "pause", "resume"):
                self._store.finish_order(self.run, message.order_id)
        self.state, commands = supervision.restarted(self.state, graceful=self.row.graceful)
        rollback = next((c.rollback for c in commands if isinstance(c, recovery.RollBack)), None)
        for row in self.rollbacks.values():
            if row.state == "rolling_back":
                self._set_rollback(replace(row, state="completed", complete_time=self._shared.clock.now()))
        if rollback:
            self._carry_out_quarantines(commands)
            _log.info("loop_restarts", run=self.run, checkpoint=rollback.checkpoint, attempt=rollback.attempt)
        return rollback

    def _catch_up(self, attempt: int) -> None:
        """The loop is in an attempt this service has no record of: it began by itself while nobody answered."""
        if attempt > self.state.ledger.attempt:
            self.state = replace(self.state, ledger=replace(self.state.ledger, attempt=attempt))

    def _send_open_orders(self, line: Line) -> None:
        for body in self._store.open_orders(self.run):
            line.queue.put_nowait(loop_pb.AttachResponse(order=loop_pb.Order.FromString(body)))
        for row in self.rollbacks.values():
            if row.state == "rolling_back" and not row.order:
                self._shared.spawn(self._decide(row.rollback.rollback))

    def disconnect(self, line: Line) -> None:
        """The line is gone; a run that has not ended waits for its loop."""
        if self._line is line:
            self._line = None
            if not self.terminal:
                _log.warning("loop_detached", run=self.run)
                self.set_state("paused" if self.state.ledger.paused else "detached", self.row.message)

    def is_current(self, line: Line) -> bool:
        """Whether no younger line has replaced this one."""
        return self._line is line

    def _line_over(self) -> None:
        if self._line is not None:
            self._line.queue.put_nowait(None)
            self._line = None

    # --- reports ---

    def take_steps(self, records: Sequence[StepRecord]) -> None:
        """Stores, judges, acts. Records that are stored already change nothing."""
        if not records:
            return
        before = self.state.ledger
        with self._store.transaction():
            fresh = self._store.steps.append(self.run, records)
            commands = self._judge(fresh)
            if fresh:
                self._edit(head_seq=fresh[-1].seq, step=fresh[-1].step, latest={**self.row.latest, **fresh[-1].metrics})
            told = self._persist_commands(commands)
            if told or before.entries != self.state.ledger.entries or self._persist_due():
                self.persist()
        self._acknowledge()
        if fresh:
            telemetry.count_steps(self.run, len(fresh), self.row.step, self.row.latest)
        self._after(told, commands)
        self._progress()

    def _judge(self, records: Sequence[StepRecord]) -> list[recovery.Command]:
        out: list[recovery.Command] = []
        for record in records:
            if record.attempt > self.state.ledger.attempt:
                self._catch_up(record.attempt)
            ledger = self.state.ledger
            self.state, verdict, commands = supervision.observed(self.state, record)
            if verdict is not None:
                telemetry.VERDICTS.labels(self.run, verdict.outcome.value).inc()
                if verdict.trip:
                    telemetry.TRIPS.labels(self.run, verdict.trip.rule).inc()
            if any(isinstance(command, recovery.RollBack) for command in commands):
                self._before = ledger
            out += commands
        return out

    def catch_up_judging(self) -> None:
        """After a restart of the service: judges what was stored after the supervision was last persisted."""
        while records := self._store.steps.read(self.run, self.state.ledger.last_seq + 1, 1000):
            before = self.state.ledger.last_seq
            commands = self._judge(records)
            self._after(self._persist_commands(commands), commands)
            if self.state.ledger.last_seq == before:
                break
        self._edit(head_seq=self._store.steps.head(self.run))
        self.persist()

    def _persist_due(self) -> bool:
        return self._shared.clock.monotonic() - self._persisted_at > PERSIST_SECONDS

    def _acknowledge(self) -> None:
        if self._line:
            message = loop_pb.AttachResponse(acknowledged=loop_pb.Acknowledged(seq=self.head_seq))
            self._line.queue.put_nowait(message)

    def _progress(self) -> None:
        now = self._shared.clock.monotonic()
        if now - self._progress_at > PROGRESS_SECONDS:
            self._progress_at = now
            self.announce()
        else:
            self._wake()

    def take(self, event: terms.Begun | terms.Saved | terms.Changed) -> None:
        """A checkpoint began, is durable, is gone or is damaged."""
        info = event.info
        commands: tuple[recovery.Command, ...] = ()
        with self._store.transaction():
            if isinstance(event, terms.Begun):
                if info.checkpoint not in self.infos:
                    self._set_info(info)
                self.state, commands = supervision.begun(
                    self.state,
                    info.checkpoint,
                    attempt=info.attempt,
                    step=info.step,
                    seq=info.seq,
                    initial=event.initial,
                )
            elif isinstance(event, terms.Saved):
                self._set_info(replace(info, state=self._state_of(info.checkpoint)))
                self.state, commands = supervision.durable(self.state, info.checkpoint)
                self._say_saving("")
            elif event.deleted:
                self._say_saving(info.message)
                self._forget(info.checkpoint)
            else:
                self.state = supervision.damaged(self.state, info.checkpoint, info.message)
                self._set_info(
                    replace(
                        self.infos.get(info.checkpoint, info), state=CheckpointState.QUARANTINED, message=info.message
                    )
                )
            told = self._persist_commands(commands)
            self.persist()
        if info.checkpoint in self.infos and not isinstance(event, terms.Begun):
            self.announce(checkpoint=self.infos[info.checkpoint])
        self._after(told, commands)
        self._expire()

    def _say_saving(self, problem: str) -> None:
        """Shows on the run that its saves fail, until one succeeds; a run that waits for a person says that instead."""
        if problem:
            _log.error("checkpoint_not_saved", run=self.run, problem=problem)
        if self.row.message.startswith(SAVE_FAILED) or (problem and not self.row.message):
            self._edit(message=f"{SAVE_FAILED}: {problem}; training goes on" if problem else "")

    def _state_of(self, checkpoint: str) -> CheckpointState:
        states = {entry.checkpoint: entry.state for entry in self.state.ledger.entries}
        return states.get(checkpoint, CheckpointState.CANDIDATE)

    def _forget(self, checkpoint: str) -> None:
        self.infos.pop(checkpoint, None)
        self._store.drop_checkpoint(self.run, checkpoint)
        self.state = supervision.gone(self.state, checkpoint)

    def take_rollback(self, rollback: Rollback) -> None:
        """The loop went back by itself while nobody answered."""
        self.state, changed = supervision.adopted(self.state, rollback)
        if changed:
            now = self._shared.clock.now()
            row = self._set_rollback(RollbackRow(rollback, "completed", now, now, "loop"))
            self.persist()
            self.announce(rollback=row)

    def take_goodbye(self, error: str) -> None:
        """The loop ended."""
        if self.terminal:
            return
        interrupted = error.startswith(INTERRUPTED)
        self._edit(pid=0, graceful=interrupted or not error)
        if interrupted:
            self.set_state("detached", "")
        elif not error:
            self._delete_what_is_left()
            self.set_state("completed")
        elif self.row.owned:
            self.set_state("detached", error)
        else:
            self.set_state("failed", f"LOOP_FAILED: {error}")

    def _delete_what_is_left(self) -> None:
        """Orders to delete that came too late for the loop are carried out here, where its folder is on this machine."""
        checkpoints = self.local_checkpoints()
        for body in self._store.open_orders(self.run):
            order = wire.order_value(loop_pb.Order.FromString(body))
            if isinstance(order, terms.DeleteOrder) and checkpoints is not None:
                for checkpoint in order.checkpoints:
                    checkpoints.delete(checkpoint)
                self._store.finish_order(self.run, order.order)

    def local_checkpoints(self) -> CheckpointStore | None:
        """The run's checkpoints, if they lie in this service's own state folder; a path that a loop names is never followed elsewhere."""
        own = (self._shared.home / "runs" / self.run / "checkpoints").resolve()
        return CheckpointStore(own) if self.row.checkpoint_folder == str(own) and own.is_dir() else None

    # --- what commands do ---

    def _carry_out_quarantines(self, commands: Sequence[recovery.Command]) -> list[Change]:
        told: list[Change] = []
        for command in commands:
            if isinstance(command, (recovery.Confirm, recovery.Quarantine)) and command.checkpoint in self.infos:
                good = isinstance(command, recovery.Confirm)
                state = CheckpointState.GOOD if good else CheckpointState.QUARANTINED
                reason = "" if isinstance(command, recovery.Confirm) else command.reason
                info = self._set_info(replace(self.infos[command.checkpoint], state=state, message=reason))
                telemetry.CHECKPOINTS.labels(self.run, state.value).inc()
                _log.info(
                    "checkpoint_judged", run=self.run, checkpoint=command.checkpoint, state=state.value, reason=reason
                )
                told.append(Change(self.run, info))
        return told

    def _persist_commands(self, commands: Sequence[recovery.Command]) -> list[Change]:
        """What the commands mean for the database; returns what to announce after the transaction."""
        told = self._carry_out_quarantines(commands)
        quarantined = tuple(c.checkpoint for c in commands if isinstance(c, recovery.Quarantine))
        for command in commands:
            if isinstance(command, recovery.RollBack):
                told.append(Change(self.run, None, self._begin_rollback(command.rollback, quarantined)))
            elif isinstance(command, (recovery.Pause, recovery.Stop)):
                self._edit(state="paused", message=f"GUARD: {command.reason}")
                told.append(Change(self.run))
            elif isinstance(command, recovery.Note):
                _log.warning("guard_noted", run=self.run, reason=command.reason)
        return told

    def _begin_rollback(self, rollback: Rollback, quarantined: tuple[str, ...]) -> RollbackRow:
        self._edit(state="rolling_back", message=rollback.reason)
        with traces.span("run.rollback", run=self.run, rule=rollback.rule, to_step=rollback.to_step):
            traceparent = traces.current_traceparent()
        _log.warning(
            "rollback_decided",
            run=self.run,
            rollback=rollback.rollback,
            rule=rollback.rule or rollback.actor,
            metric=rollback.metric,
            value=rollback.value,
            limit=rollback.limit,
            from_step=rollback.from_step,
            to_step=rollback.to_step,
            onset_step=rollback.onset_step,
            checkpoint=rollback.checkpoint,
            quarantined=list(quarantined),
            trace_id=traces.trace_id_of(traceparent),
        )
        return self._set_rollback(
            RollbackRow(
                rollback, "rolling_back", self._shared.clock.now(), quarantined=quarantined, traceparent=traceparent
            )
        )

    def _after(self, told: Sequence[Change], commands: Sequence[recovery.Command]) -> None:
        """After the transaction: announces and orders."""
        for change in told:
            self.announce(change.checkpoint, change.rollback)
        for command in commands:
            if isinstance(command, recovery.RollBack):
                self._shared.spawn(self._decide(command.rollback.rollback))
            elif isinstance(command, recovery.Pause):
                self.order(lambda order, reason=command.reason: terms.PauseOrder(order, reason))  # type: ignore[misc]  # a bound default
            elif isinstance(command, recovery.Stop):
                self.order(lambda order, reason=command.reason: terms.StopOrder(order, reason))  # type: ignore[misc]  # a bound default
        if any(isinstance(command, (recovery.Confirm, recovery.RollBack)) for command in commands):
            self._expire()

    def _expire(self) -> None:
        policy = self.state.policy.retention
        entries = {entry.checkpoint: entry for entry in self.state.ledger.entries}
        kept = [
            Kept(name, info.seq, info.state, info.metrics.get(policy.best_metric), name in self.pinned)
            for name, info in self.infos.items()
            if name in entries
        ]
        pending = frozenset(row.rollback.checkpoint for row in self.rollbacks.values() if row.state == "rolling_back")
        in_use = retention.InUse(
            serving=frozenset(self.exported[-1:]),
            previous_serving=frozenset(self.exported[-2:-1]),
            rollback_target=pending,
            in_flight=frozenset(name for name, entry in entries.items() if not entry.durable),
        )
        gone = retention.expired(kept, policy, in_use)
        if gone:
            for checkpoint in gone:
                self._forget(checkpoint)
            self.persist()
            self.order(lambda order: terms.DeleteOrder(order, gone))

    # --- rollbacks ---

    async def _decide(self, name: str) -> None:
        """Asks the controller, then orders the loop; with no answer in time the trainer's own decision holds."""
        row = self.rollbacks[name]
        headers = {"traceparent": row.traceparent} if row.traceparent else {}
        with traces.continued(headers), traces.span("trainer.decide_rollback", run=self.run, rollback=name):
            decision = await self._shared.controller.decide(
                self.rollback_message(row), self.checkpoint_messages(), self.state.policy.guard.name
            )
        row = self.rollbacks[name]
        if row.state != "rolling_back" or row.order:
            return
        if decision is not None and decision.state == run_pb.Rollback.STATE_PAUSED:
            self._withdraw(row, decision.message or "the controller wants a person to look")
            return
        rollback = row.rollback if decision is None else self._as_decided(row.rollback, decision)
        decided_by = "trainer" if decision is None else "controller"
        order = self.order(lambda order: terms.RollBackOrder(order, rollback))
        self._set_rollback(replace(self.rollbacks[name], rollback=rollback, decided_by=decided_by, order=order))

    def _as_decided(self, own: Rollback, decision: run_pb.Rollback) -> Rollback:
        """The controller's target, if it is one that can be restored."""
        target = wire.rollback_value(decision).checkpoint
        entry = next((e for e in self.state.ledger.entries if e.checkpoint == target), None)
        if target == own.checkpoint or entry is None or not entry.durable or entry.state is not CheckpointState.GOOD:
            return own
        return replace(own, checkpoint=target, to_step=entry.step)

    def _withdraw(self, row: RollbackRow, reason: str) -> None:
        if self._before is not None:
            ledger = replace(
                self.state.ledger, attempt=self._before.attempt, rollbacks=self._before.rollbacks, paused=True
            )
            self.state = replace(self.state, ledger=ledger)
        self._set_rollback(
            replace(row, state="paused", decided_by="controller", complete_time=self._shared.clock.now())
        )
        self.set_state("paused", f"CONTROLLER: {reason}")
        self.order(lambda order: terms.PauseOrder(order, reason))

    def _rollback_done(self, row: RollbackRow, result: Result) -> None:
        now = self._shared.clock.now()
        if result.error:
            telemetry.ROLLBACKS.labels(self.run, "failed").inc()
            row = self._set_rollback(replace(row, state="failed", complete_time=now))
            _log.error("rollback_failed", run=self.run, rollback=row.rollback.rollback, error=result.error)
            self.announce(rollback=row)
            self._again(row, result.error)
            return
        telemetry.ROLLBACKS.labels(self.run, "completed").inc()
        row = self._set_rollback(replace(row, state="completed", complete_time=now))
        rollback = row.rollback
        _log.warning(
            "run_rolled_back",
            run=self.run,
            rule=rollback.rule or rollback.actor,
            value=rollback.value,
            limit=rollback.limit,
            from_step=rollback.from_step,
            to_step=result.step,
            attempt=result.attempt,
            seconds=round(now - row.create_time, 3),
            trace_id=traces.trace_id_of(row.traceparent),
        )
        self._edit(state="paused" if self.state.ledger.paused else "running", message="", step=result.step)
        self.persist()
        self.announce(rollback=row)
        self._shared.spawn(self.report(row.rollback.rollback))

    def _again(self, row: RollbackRow, error: str) -> None:
        """The target could not be restored: the next good one, or a person."""
        try:
            reason = f"{row.rollback.checkpoint} could not be restored: {error}"
            self.roll_back("", row.rollback.actor, reason, plan=row.rollback.plan)
        except InterlockError as problem:
            self.state = supervision.paused(self.state)
            self.set_state("paused", f"{problem.reason}: {problem.message}")
            why = problem.message
            self.order(lambda order: terms.PauseOrder(order, why))

    async def report(self, name: str) -> None:
        """Tells the controller how a rollback ended; tried again by `report_open` until it was told."""
        row = self.rollbacks[name]
        headers = {"traceparent": row.traceparent} if row.traceparent else {}
        with traces.continued(headers):
            told = await self._shared.controller.report(self.rollback_message(row))
        if told:
            self._set_rollback(replace(self.rollbacks[name], reported=True))

    async def report_open(self) -> None:
        """Reports every ended rollback that the controller has not been told of."""
        for name, row in list(self.rollbacks.items()):
            if (
                row.state in ("completed", "failed", "paused")
                and not row.reported
                and row.rollback.actor != supervision.RESTART
            ):
                await self.report(name)

    def roll_back(
        self,
        checkpoint: str,
        actor: str,
        reason: str,
        *,
        plan: recovery.Plan | None = None,
        name: str = "",
        ask: bool = False,
    ) -> RollbackRow:
        """A rollback that a person or the controller asks for; raises as `recovery.requested` does."""
        self.refuse_ended()
        state, commands = supervision.requested(
            self.state, checkpoint=checkpoint, actor=actor, reason=reason, plan=plan
        )
        rollback = next(c.rollback for c in commands if isinstance(c, recovery.RollBack))
        if name:
            renamed = replace(rollback, rollback=name)
            rollbacks = tuple(renamed if r.rollback == rollback.rollback else r for r in state.ledger.rollbacks)
            state = replace(state, ledger=replace(state.ledger, rollbacks=rollbacks))
            rollback = renamed
        self.state = state
        quarantined = tuple(c.checkpoint for c in commands if isinstance(c, recovery.Quarantine))
        with self._store.transaction():
            told = self._carry_out_quarantines(commands)
            row = self._begin_rollback(rollback, quarantined)
            self.persist()
        for change in told:
            self.announce(change.checkpoint)
        order = "" if ask else self.order(lambda order: terms.RollBackOrder(order, rollback))
        row = self._set_rollback(replace(row, decided_by="controller" if name else "trainer", order=order))
        self.announce(rollback=row)
        return row

    # --- orders ---

    def order(self, make: Callable[[str], Order]) -> str:
        """Persists an order, sends it if a loop is on the line, and returns its id; it stays open until its result comes."""
        self._num_orders += 1
        name = f"{self.run}-order-{self._num_orders}"
        message = wire.order_message(self.run, make(name))
        self._store.put_order(self.run, name, message.SerializeToString())
        if self._line:
            self._line.queue.put_nowait(loop_pb.AttachResponse(order=message))
        return name

    async def ordered(self, make: Callable[[str], Order], timeout_seconds: float) -> Result:
        """Orders and waits for the result.

        Raises:
            Unavailable: `LOOP_DETACHED`: no loop is on the line, or it did not answer in time.
            FailedPrecondition: with the reason the loop gave.
        """
        if not self.attached:
            raise Unavailable(f"run {self.run} has no loop attached", reason="LOOP_DETACHED", retry_after_seconds=1.0)
        name = self.order(make)
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[name] = future
        try:
            async with asyncio.timeout(timeout_seconds):
                result = await future
        except TimeoutError:
            raise Unavailable(
                f"run {self.run} did not answer in {timeout_seconds:g} s", reason="LOOP_DETACHED"
            ) from None
        finally:
            self._waiting.pop(name, None)
        if result.error:
            reason, _, message = result.error.partition(": ")
            raise FailedPrecondition(message or result.error, reason=reason or "ORDER_FAILED")
        return result

    def take_result(self, result: Result) -> None:
        """An order was carried out, or not."""
        self._store.finish_order(self.run, result.order)
        if result.artifact and not result.error:
            self._exported(result.checkpoint)
        for row in list(self.rollbacks.values()):
            if row.order == result.order and row.state == "rolling_back":
                self._rollback_done(row, result)
        future = self._waiting.get(result.order)
        if future is not None and not future.done():
            future.set_result(result)

    def _exported(self, checkpoint: str) -> None:
        self.exported = [name for name in self.exported if name != checkpoint] + [checkpoint]
        if checkpoint in self.infos:
            self._set_info(self.infos[checkpoint])

    # --- what people ask for ---

    def refuse_ended(self) -> None:
        """Raises FailedPrecondition `RUN_ENDED` for a run that has ended."""
        if self.terminal:
            raise FailedPrecondition(
                f"run {self.run} has ended ({self.row.state})", reason="RUN_ENDED", metadata={"state": self.row.state}
            )

    def pause(self, reason: str) -> None:
        """Stops stepping at the next boundary."""
        self.refuse_ended()
        if self.row.state != "paused":
            self.order(lambda order: terms.PauseOrder(order, reason))
            self.set_state("paused", f"ASKED: {reason}")

    def resume(self) -> None:
        """Goes on; lifts the guard's pause and starts its budget anew."""
        self.refuse_ended()
        self.state = supervision.resumed(self.state)
        self.order(terms.ResumeOrder)
        self.set_state("running" if self.attached else "detached")

    def stop(self, reason: str) -> None:
        """Saves and ends; a run without a loop ends at once."""
        if self.terminal:
            return
        if self.attached:
            self.order(lambda order: terms.StopOrder(order, reason))
        else:
            self.set_state("completed", f"ASKED: {reason}")

    def mark(self, checkpoint: str, state: CheckpointState, reason: str) -> CheckpointInfo:
        """A person declares a checkpoint good or quarantined."""
        self.info(checkpoint)
        ledger, commands = recovery.marked(self.state.ledger, checkpoint, state, reason)
        self.state = replace(self.state, ledger=ledger)
        with self._store.transaction():
            told = self._carry_out_quarantines(commands)
            self.persist()
        for change in told:
            self.announce(change.checkpoint)
        return self.infos[checkpoint]

    def quarantine_younger(self, rollback: Rollback, reason: str) -> None:
        """Quarantines every checkpoint younger than a rollback's target, good ones too."""
        seq = self.info(rollback.checkpoint).seq
        for info in list(self.infos.values()):
            if info.seq > seq and info.digest and info.state is not CheckpointState.QUARANTINED:
                self.mark(info.checkpoint, CheckpointState.QUARANTINED, reason)

    def pin(self, checkpoint: str, pinned: bool) -> CheckpointInfo:
        """Keeps a checkpoint from retention, or lets it go."""
        info = self.info(checkpoint)
        self._store.pin(self.run, checkpoint, pinned)
        (self.pinned.add if pinned else self.pinned.discard)(checkpoint)
        self.announce(checkpoint=info)
        if not pinned:
            self._expire()
        return info

    # --- messages ---

    def rollback_message(self, row: RollbackRow) -> run_pb.Rollback:
        """A rollback for the wire."""
        states = {
            "rolling_back": run_pb.Rollback.STATE_ROLLING_BACK,
            "completed": run_pb.Rollback.STATE_COMPLETED,
            "failed": run_pb.Rollback.STATE_FAILED,
            "paused": run_pb.Rollback.STATE_PAUSED,
        }
        return wire.rollback_message(
            self.run,
            row.rollback,
            state=states[row.state],
            quarantined=row.quarantined,
            decided_by=row.decided_by,
            create_time=row.create_time,
            complete_time=row.complete_time,
            trace_id=traces.trace_id_of(row.traceparent),
        )

    def checkpoint_message(self, info: CheckpointInfo) -> run_pb.Checkpoint:
        """A checkpoint for the wire."""
        return wire.checkpoint_message(self.run, info, pinned=info.checkpoint in self.pinned)

    def checkpoint_messages(self) -> list[run_pb.Checkpoint]:
        """Every durable checkpoint for the wire, youngest first."""
        durable = [info for info in self.infos.values() if info.digest]
        return [self.checkpoint_message(info) for info in sorted(durable, key=lambda info: -info.seq)]

    def best_checkpoint(self) -> str:
        """The good checkpoint that is best by the promotion metric; empty without one."""
        promotion = self.promotion
        if promotion is None:
            return ""
        sign = 1.0 if promotion.better is retention.Better.HIGHER else -1.0
        measured = [
            (sign * info.metrics[promotion.metric], info.seq, info.checkpoint)
            for info in self.infos.values()
            if info.state is CheckpointState.GOOD and promotion.metric in info.metrics
        ]
        return max(measured)[2] if measured else ""
