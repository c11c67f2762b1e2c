"""Recovery: the ledger of a run's checkpoints, and what a trip does about it. Pure; the guard judges, a shell carries out.

Rules of the file:

- A checkpoint is CANDIDATE when it is begun; GOOD when it is durable and `confirm_after` steps after it passed; QUARANTINED when
  the guard trips while it is a candidate. Only PASS counts: an inconclusive step confirms nothing.
- A rollback goes to the youngest good checkpoint of the current line at least `rewind` steps before the onset. When there is none,
  to the youngest good one before the onset, then to the oldest good one; `fallback` says which. With none at all the run pauses.
- A rollback always changes something: `plans` is an escalation list, indexed by the number of rollbacks still in the budget window.
- Budget: at most `max_rollbacks` in the last `budget_steps` records; then the run pauses for a person. During the cool-down after a
  rollback only FATAL trips act.
- `attempt` goes up with the decision, not with the loop's obedience: records and checkpoints of an older attempt change nothing more,
  and a checkpoint that arrives from one is quarantined.
- The line: checkpoints younger than a rollback's target stay what they are, but are no longer targets.
- The id of a rollback follows from run and attempt, so two deciders with the same ledger mean the same rollback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from interlock.core.fields import refuse
from interlock.core.guard import Action, GuardPolicy, Mode, Outcome, Severity, Trip, Verdict
from interlock.core.steps import StepRecord
from interlock.errors import FailedPrecondition, NotFound


class CheckpointState(StrEnum):
    """The life of a checkpoint; GOOD and QUARANTINED can be turned into each other only by a person."""

    CANDIDATE = "candidate"
    GOOD = "good"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Plan:
    """What changes when training goes on from the target.

    Attributes:
        lr_factor: the learning rate is multiplied by this for `lr_steps` steps.
        skip_before, skip_after: the data of steps [onset - before, onset + after] is skipped; both 0 skips nothing.
        reset_moments: the optimizer's running moments are dropped.
        new_seed: random generators are seeded anew from run and attempt.
        go_back: how many more good checkpoints back than the rule says.
    """

    lr_factor: float = 1.0
    lr_steps: int = 0
    skip_before: int = 0
    skip_after: int = 0
    reset_moments: bool = False
    new_seed: bool = False
    go_back: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.lr_factor <= 10:
            raise refuse("lr_factor", f"must be above 0 and at most 10, got {self.lr_factor}")
        for name in ("lr_steps", "skip_before", "skip_after", "go_back"):
            if getattr(self, name) < 0:
                raise refuse(name, f"must not be negative, got {getattr(self, name)}")

    @property
    def skips_data(self) -> bool:
        """Whether a window of data is left out."""
        return self.skip_before + self.skip_after > 0


ESCALATION = (
    Plan(lr_factor=0.5, lr_steps=200, new_seed=True),
    Plan(lr_factor=0.25, lr_steps=400, new_seed=True, reset_moments=True, skip_before=5, skip_after=20),
    Plan(lr_factor=0.1, lr_steps=800, new_seed=True, reset_moments=True, skip_before=20, skip_after=100, go_back=1),
)


@dataclass(frozen=True, slots=True)
class RecoveryPolicy:
    """When a checkpoint is good, how far back a rollback goes, what it changes and how often it may happen."""

    confirm_after: int = 50
    rewind: int = 10
    max_rollbacks: int = 3
    budget_steps: int = 2000
    cool_down: int = 10
    plans: tuple[Plan, ...] = ESCALATION

    def __post_init__(self) -> None:
        for name, least in (
            ("confirm_after", 1),
            ("rewind", 0),
            ("max_rollbacks", 0),
            ("budget_steps", 1),
            ("cool_down", 0),
        ):
            if getattr(self, name) < least:
                raise refuse(name, f"must be at least {least}, got {getattr(self, name)}")
        if not self.plans:
            raise refuse(
                "plans", "needs at least one plan: a rollback that changes nothing fails again in the same place"
            )


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint in the ledger. `on_line` is False once a rollback went behind it."""

    checkpoint: str
    attempt: int
    step: int
    seq: int
    state: CheckpointState = CheckpointState.CANDIDATE
    durable: bool = False
    on_line: bool = True
    clean_steps: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Rollback:
    """One decided rollback: from where, to where, why, and what changes. `attempt` is the one it starts."""

    rollback: str
    attempt: int
    checkpoint: str
    from_step: int
    from_seq: int
    to_step: int
    onset_step: int
    plan: Plan
    level: int
    reason: str
    actor: str = "guard"
    rule: str = ""
    metric: str = ""
    value: float = 0.0
    limit: float = 0.0
    fallback: str = ""


@dataclass(frozen=True, slots=True)
class Ledger:
    """Everything recovery knows about one run; plain data.

    `budget_from_seq`: rollbacks before it no longer count, because a person has resumed the run since.
    """

    run: str
    attempt: int = 1
    entries: tuple[Entry, ...] = ()
    rollbacks: tuple[Rollback, ...] = ()
    paused: bool = False
    budget_from_seq: int = 0
    last_seq: int = 0
    last_step: int = 0


@dataclass(frozen=True, slots=True)
class Confirm:
    """A candidate became good."""

    checkpoint: str


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A checkpoint must never be used again, nor anything that descends from it."""

    checkpoint: str
    reason: str


@dataclass(frozen=True, slots=True)
class RollBack:
    """The loop goes back."""

    rollback: Rollback


@dataclass(frozen=True, slots=True)
class Pause:
    """The loop waits for a person."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The run ends."""

    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """Nothing is done; the reason is recorded."""

    reason: str


Command = Confirm | Quarantine | RollBack | Pause | Stop | Note
Decision = tuple[Ledger, tuple[Command, ...]]


def begun(ledger: Ledger, checkpoint: str, *, attempt: int, step: int, seq: int, initial: bool = False) -> Decision:
    """A checkpoint is being written. The `initial` one, of a run that has not trained yet, is good by definition."""
    if any(entry.checkpoint == checkpoint for entry in ledger.entries):
        return ledger, ()
    state, reason = (CheckpointState.GOOD, "initial") if initial else (CheckpointState.CANDIDATE, "")
    entry = Entry(checkpoint, attempt, step, seq, state=state, reason=reason)
    if attempt == ledger.attempt:
        return replace(ledger, entries=(*ledger.entries, entry)), ()
    reason = f"saved by attempt {attempt}, which attempt {ledger.attempt} has replaced"
    entry = replace(entry, state=CheckpointState.QUARANTINED, on_line=False, reason=reason)
    return replace(ledger, entries=(*ledger.entries, entry)), (Quarantine(checkpoint, reason),)


def durable(policy: RecoveryPolicy, ledger: Ledger, checkpoint: str) -> Decision:
    """The checkpoint's bytes are safe on disk; a candidate that has its clean steps already becomes good."""
    ledger = _edit(ledger, checkpoint, lambda entry: replace(entry, durable=True))
    return _confirm(policy, ledger)


def forgotten(ledger: Ledger, checkpoint: str) -> Ledger:
    """The checkpoint is gone from disk: expired, or never finished."""
    return replace(ledger, entries=tuple(entry for entry in ledger.entries if entry.checkpoint != checkpoint))


def judged(
    policy: RecoveryPolicy, guard: GuardPolicy, ledger: Ledger, record: StepRecord, verdict: Verdict
) -> Decision:
    """What the verdict on one step does to the ledger, and what must be done about it."""
    if record.attempt != ledger.attempt or ledger.paused or record.seq <= ledger.last_seq:
        return ledger, ()
    ledger = replace(ledger, last_seq=record.seq, last_step=record.step)
    if verdict.outcome is Outcome.INCONCLUSIVE:
        return ledger, ()
    if verdict.trip is None:
        return _confirm(policy, _each_candidate(ledger, _cleaner))
    excuse = _excuse(policy, guard, ledger, verdict.trip)
    if excuse:
        return _each_candidate(ledger, lambda entry: replace(entry, clean_steps=0)), (Note(excuse),)
    return tripped(policy, ledger, verdict.trip)


def tripped(policy: RecoveryPolicy, ledger: Ledger, trip: Trip) -> Decision:
    """Quarantines every candidate and does what the trip's action asks for."""
    reason = describe(trip)
    ledger, quarantines = _quarantine_candidates(ledger, reason)
    if trip.action is Action.STOP:
        return replace(ledger, paused=True), (*quarantines, Stop(reason))
    if trip.action is Action.PAUSE:
        return replace(ledger, paused=True), (*quarantines, Pause(reason))
    level = rollbacks_in_budget(policy, ledger)
    if level >= policy.max_rollbacks:
        spent = (
            f"{level} rollbacks within {policy.budget_steps} steps spend the budget of {policy.max_rollbacks}; {reason}"
        )
        return replace(ledger, paused=True), (*quarantines, Pause(spent))
    plan = policy.plans[min(level, len(policy.plans) - 1)]
    target, fallback = find_target(policy, ledger, trip.onset_step, plan.go_back)
    if target is None:
        return replace(ledger, paused=True), (*quarantines, Pause(f"no good checkpoint to go back to; {reason}"))
    rollback = _rollback(ledger, target, plan, level, reason, onset_step=trip.onset_step, fallback=fallback)
    rollback = replace(rollback, rule=trip.rule, metric=trip.metric, value=trip.value, limit=trip.limit)
    ledger, _ = adopt(ledger, rollback)
    return ledger, (*quarantines, RollBack(rollback))


def requested(ledger: Ledger, *, checkpoint: str, actor: str, reason: str, plan: Plan | None = None) -> Decision:
    """A person's (or the controller's) rollback; an empty checkpoint means the youngest good one of the line.

    Candidates younger than the target are quarantined. It spends no budget and lifts a pause.

    Raises:
        NotFound: `CHECKPOINT_NOT_FOUND`.
        FailedPrecondition: `CHECKPOINT_QUARANTINED`, or `CHECKPOINT_NOT_DURABLE`, or `NO_GOOD_CHECKPOINT`.
    """
    target = _named(ledger, checkpoint) if checkpoint else _youngest_good(ledger)
    if target.state is CheckpointState.QUARANTINED or not target.durable:
        why = "is quarantined" if target.state is CheckpointState.QUARANTINED else "is still being written"
        code = "CHECKPOINT_QUARANTINED" if target.state is CheckpointState.QUARANTINED else "CHECKPOINT_NOT_DURABLE"
        raise FailedPrecondition(f"checkpoint {target.checkpoint} {why}", reason=code, field="checkpoint")
    ledger, quarantines = _quarantine_candidates(ledger, reason, younger_than=target.seq)
    rollback = _rollback(ledger, target, plan or Plan(), 0, reason, onset_step=ledger.last_step, actor=actor)
    ledger, _ = adopt(replace(ledger, paused=False), rollback)
    return ledger, (*quarantines, RollBack(rollback))


def adopt(ledger: Ledger, rollback: Rollback) -> tuple[Ledger, bool]:
    """The ledger after a decided rollback, and whether that changed anything: adopting one twice does not."""
    if any(known.rollback == rollback.rollback for known in ledger.rollbacks) or rollback.attempt <= ledger.attempt:
        return ledger, False
    target = _named(ledger, rollback.checkpoint)
    entries = tuple(
        replace(entry, on_line=entry is target or (entry.on_line and entry.seq <= target.seq))
        for entry in ledger.entries
    )
    return replace(ledger, attempt=rollback.attempt, entries=entries, rollbacks=(*ledger.rollbacks, rollback)), True


def marked(ledger: Ledger, checkpoint: str, state: CheckpointState, reason: str) -> Decision:
    """A person declares a checkpoint good or quarantined.

    Raises:
        NotFound: `CHECKPOINT_NOT_FOUND`.
        FailedPrecondition: `CHECKPOINT_NOT_DURABLE` for one that is still being written.
    """
    entry = _named(ledger, checkpoint)
    if not entry.durable:
        raise FailedPrecondition(
            f"checkpoint {checkpoint} is still being written", reason="CHECKPOINT_NOT_DURABLE", field="checkpoint"
        )
    if entry.state is state:
        return ledger, ()
    ledger = _edit(ledger, checkpoint, lambda old: replace(old, state=state, reason=reason))
    if state is CheckpointState.QUARANTINED:
        return ledger, (Quarantine(checkpoint, reason),)
    return ledger, (Confirm(checkpoint),) if state is CheckpointState.GOOD else ()


def resumed(ledger: Ledger) -> Ledger:
    """A person lets the run go on: the pause is lifted and the budget starts anew."""
    return replace(ledger, paused=False, budget_from_seq=ledger.last_seq + 1)


def find_target(policy: RecoveryPolicy, ledger: Ledger, onset_step: int, go_back: int = 0) -> tuple[Entry | None, str]:
    """The checkpoint a rollback goes to, and the fallback taken, as text; empty when the rule itself was met."""
    good = _good_line(ledger)
    far = [entry for entry in good if entry.step <= onset_step - policy.rewind]
    if far:
        return far[max(0, len(far) - 1 - go_back)], ""
    near = [entry for entry in good if entry.step < onset_step]
    if near:
        return near[-1], f"no good checkpoint lies {policy.rewind} steps before the onset; took the youngest before it"
    if good:
        return good[0], "no good checkpoint lies before the onset; took the oldest"
    return None, "no good checkpoint"


def rollbacks_in_budget(policy: RecoveryPolicy, ledger: Ledger) -> int:
    """How many of the guard's rollbacks lie inside the budget window that ends at the ledger's last record."""
    since = max(ledger.last_seq - policy.budget_steps + 1, ledger.budget_from_seq)
    return sum(known.actor == "guard" and known.from_seq >= since for known in ledger.rollbacks)


def describe(trip: Trip) -> str:
    """One line for logs and people: rule, metric, value, limit."""
    return f"rule {trip.rule}: {trip.metric}={trip.value:g} (limit {trip.limit:.4g}, score {trip.score:.3g}) at step {trip.step}"


def _excuse(policy: RecoveryPolicy, guard: GuardPolicy, ledger: Ledger, trip: Trip) -> str:
    """Why a trip is only recorded; empty when it acts."""
    if guard.mode is Mode.OBSERVE:
        return f"observed only: {describe(trip)}"
    if trip.severity is Severity.WARNING or trip.action is Action.RECORD:
        return f"recorded only: {describe(trip)}"
    last = ledger.rollbacks[-1].from_seq if ledger.rollbacks else None
    if trip.severity is not Severity.FATAL and last is not None and trip.seq - last <= policy.cool_down:
        return f"cooling down after a rollback: {describe(trip)}"
    return ""


def _rollback(
    ledger: Ledger,
    target: Entry,
    plan: Plan,
    level: int,
    reason: str,
    *,
    onset_step: int,
    actor: str = "guard",
    fallback: str = "",
) -> Rollback:
    attempt = ledger.attempt + 1
    return Rollback(
        rollback=f"{ledger.run}-rollback-{attempt}",
        attempt=attempt,
        checkpoint=target.checkpoint,
        from_step=ledger.last_step,
        from_seq=ledger.last_seq,
        to_step=target.step,
        onset_step=onset_step,
        plan=plan,
        level=level,
        reason=reason,
        actor=actor,
        fallback=fallback,
    )


def _named(ledger: Ledger, checkpoint: str) -> Entry:
    for entry in ledger.entries:
        if entry.checkpoint == checkpoint:
            return entry
    raise NotFound(
        f"run {ledger.run} has no checkpoint {checkpoint!r}",
        reason="CHECKPOINT_NOT_FOUND",
        field="checkpoint",
        metadata={"run": ledger.run, "checkpoint": checkpoint},
    )


def _good_line(ledger: Ledger) -> list[Entry]:
    usable = (
        entry for entry in ledger.entries if entry.on_line and entry.durable and entry.state is CheckpointState.GOOD
    )
    return sorted(usable, key=lambda entry: entry.seq)


def _youngest_good(ledger: Ledger) -> Entry:
    good = _good_line(ledger)
    if not good:
        raise FailedPrecondition(f"run {ledger.run} has no good checkpoint to go back to", reason="NO_GOOD_CHECKPOINT")
    return good[-1]


def _edit(ledger: Ledger, checkpoint: str, change: Callable[[Entry], Entry]) -> Ledger:
    entries = tuple(change(entry) if entry.checkpoint == checkpoint else entry for entry in ledger.entries)
    return replace(ledger, entries=entries)


def _each_candidate(ledger: Ledger, change: Callable[[Entry], Entry]) -> Ledger:
    if not any(entry.state is CheckpointState.CANDIDATE for entry in ledger.entries):
        return ledger
    entries = tuple(
        change(entry) if entry.state is CheckpointState.CANDIDATE and entry.attempt == ledger.attempt else entry
        for entry in ledger.entries
    )
    return replace(ledger, entries=entries)


def _cleaner(entry: Entry) -> Entry:
    return replace(entry, clean_steps=entry.clean_steps + 1)


def _confirm(policy: RecoveryPolicy, ledger: Ledger) -> Decision:
    ready = {
        entry.checkpoint
        for entry in ledger.entries
        if entry.state is CheckpointState.CANDIDATE and entry.durable and entry.clean_steps >= policy.confirm_after
    }
    if not ready:
        return ledger, ()
    reason = f"{policy.confirm_after} clean steps"
    entries = tuple(
        replace(entry, state=CheckpointState.GOOD, reason=reason) if entry.checkpoint in ready else entry
        for entry in ledger.entries
    )
    return replace(ledger, entries=entries), tuple(
        Confirm(entry.checkpoint) for entry in entries if entry.checkpoint in ready
    )


def _quarantine_candidates(
    ledger: Ledger, reason: str, *, younger_than: int = -1
) -> tuple[Ledger, tuple[Quarantine, ...]]:
    hit = {
        entry.checkpoint
        for entry in ledger.entries
        if entry.state is CheckpointState.CANDIDATE and entry.seq > younger_than
    }
    entries = tuple(
        replace(entry, state=CheckpointState.QUARANTINED, reason=reason) if entry.checkpoint in hit else entry
        for entry in ledger.entries
    )
    return replace(ledger, entries=entries), tuple(
        Quarantine(entry.checkpoint, reason) for entry in entries if entry.checkpoint in hit
    )
