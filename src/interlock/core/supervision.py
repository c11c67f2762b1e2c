"""One run under supervision: the guard's state, the ledger and what was kept for each checkpoint, moved by events. Pure.

The trainer service and the supervisor embedded in a loop both drive this and nothing else, so both come to the same decisions.

Rules of the file:

- Events come in the loop's order: records by seq, `begun` right after the record whose state it saves.
- A record of an older attempt is stored by the shell and judged by nobody.
- A rollback takes the guard back to what it knew at the target, hit counters cleared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from interlock.core import guard, recovery
from interlock.core.guard import GuardState, Outcome, Verdict
from interlock.core.policy import RunPolicy
from interlock.core.recovery import CheckpointState, Command, Ledger, Plan, RollBack, Rollback
from interlock.core.steps import StepRecord

RESTART = "restart"


@dataclass(frozen=True, slots=True)
class Supervision:
    """Everything a supervisor knows about one run; plain data. `last` is the youngest record that was judged."""

    policy: RunPolicy
    ledger: Ledger
    guard: GuardState = field(default_factory=GuardState)
    kept: Mapping[str, GuardState] = field(default_factory=dict)
    last: StepRecord | None = None


Moved = tuple[Supervision, tuple[Command, ...]]


def begin(run: str, policy: RunPolicy) -> Supervision:
    """A run that has not trained yet."""
    return Supervision(policy, Ledger(run))


def observed(state: Supervision, record: StepRecord) -> tuple[Supervision, Verdict | None, tuple[Command, ...]]:
    """One step: the verdict (None when the record is stale or the run is paused) and what to do."""
    ledger = state.ledger
    if record.attempt != ledger.attempt or ledger.paused or record.seq <= ledger.last_seq:
        return state, None, ()
    guard_state, verdict = guard.observe(state.policy.guard, state.guard, record)
    ledger, commands = recovery.judged(state.policy.recovery, state.policy.guard, ledger, record, verdict)
    state = replace(state, guard=guard_state, ledger=ledger, last=record)
    return _rewind(state, commands), verdict, commands


def begun(state: Supervision, checkpoint: str, *, attempt: int, step: int, seq: int, initial: bool = False) -> Moved:
    """A checkpoint of the state after `seq` is being written; its metrics become the guard's reference."""
    ledger, commands = recovery.begun(state.ledger, checkpoint, attempt=attempt, step=step, seq=seq, initial=initial)
    guard_state = state.guard
    if state.last is not None and attempt == ledger.attempt:
        guard_state = guard.mark_reference(guard_state, state.last)
    kept = {**state.kept, checkpoint: guard_state}
    return replace(state, ledger=ledger, guard=guard_state, kept=kept), commands


def durable(state: Supervision, checkpoint: str) -> Moved:
    """The checkpoint is safe on disk."""
    ledger, commands = recovery.durable(state.policy.recovery, state.ledger, checkpoint)
    return replace(state, ledger=ledger), commands


def gone(state: Supervision, checkpoint: str) -> Supervision:
    """The checkpoint is no longer on disk."""
    kept = {name: value for name, value in state.kept.items() if name != checkpoint}
    return replace(state, ledger=recovery.forgotten(state.ledger, checkpoint), kept=kept)


def damaged(state: Supervision, checkpoint: str, reason: str) -> Supervision:
    """The checkpoint's bytes are not what was written: quarantined, whatever it was."""
    known = any(entry.checkpoint == checkpoint and entry.durable for entry in state.ledger.entries)
    if not known:
        return state
    ledger, _ = recovery.marked(state.ledger, checkpoint, CheckpointState.QUARANTINED, reason)
    return replace(state, ledger=ledger)


def requested(state: Supervision, *, checkpoint: str, actor: str, reason: str, plan: Plan | None = None) -> Moved:
    """A rollback asked for by a person or the controller; raises as `recovery.requested` does."""
    ledger, commands = recovery.requested(state.ledger, checkpoint=checkpoint, actor=actor, reason=reason, plan=plan)
    return _rewind(replace(state, ledger=ledger), commands), commands


def adopted(state: Supervision, rollback: Rollback) -> tuple[Supervision, bool]:
    """A rollback that was decided elsewhere; False when it was known already."""
    ledger, changed = recovery.adopt(state.ledger, rollback)
    if not changed:
        return state, False
    ledger = replace(ledger, paused=False)
    return _rewind(replace(state, ledger=ledger), (RollBack(rollback),)), True


def restarted(state: Supervision, *, graceful: bool) -> Moved:
    """Where a loop that starts again begins: after a crash the youngest good checkpoint of the line, after an orderly end the youngest
    one that is not quarantined. No command when there is none: it starts from scratch."""
    usable = [
        entry
        for entry in state.ledger.entries
        if entry.on_line and entry.durable and entry.state is not CheckpointState.QUARANTINED
    ]
    trusted = [entry for entry in usable if graceful or entry.state is CheckpointState.GOOD] or usable
    if not trusted:
        return state, ()
    target = max(trusted, key=lambda entry: entry.seq)
    paused = state.ledger.paused
    state, commands = requested(state, checkpoint=target.checkpoint, actor=RESTART, reason="the loop starts again")
    return replace(state, ledger=replace(state.ledger, paused=paused)), commands


def resumed(state: Supervision) -> Supervision:
    """A person lets the run go on."""
    return replace(state, ledger=recovery.resumed(state.ledger))


def paused(state: Supervision) -> Supervision:
    """The run waits for a person."""
    return replace(state, ledger=replace(state.ledger, paused=True))


def _rewind(state: Supervision, commands: tuple[Command, ...]) -> Supervision:
    for command in commands:
        if isinstance(command, RollBack):
            target = state.kept.get(command.rollback.checkpoint)
            return replace(state, guard=guard.rewound(target), last=None)
    return state


def passed(verdict: Verdict | None) -> bool:
    """Whether a verdict is a PASS."""
    return verdict is not None and verdict.outcome is Outcome.PASS
