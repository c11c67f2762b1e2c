"""Golden histories of guard and recovery: steps and checkpoints in, verdicts and commands out.

Directives: `policy guard=<name> key=value...` starts a run; `steps <a>..<b> metric=value...` feeds steps (the loop obeys a rollback
at once: the next steps belong to the new attempt); `stale <a>..<b>` feeds steps of the attempt before; `save`, `begin`, `durable`
write checkpoints; `resume`, `roll-back checkpoint=` are a person; `ledger` shows what is known.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from interlock.core import guard, recovery
from interlock.core.fields import parse
from interlock.core.policy import guard_policy
from interlock.core.steps import StepRecord, checkpoint_id
from interlock.errors import InterlockError
from scenario.driver import Block, play

HISTORIES = sorted((Path(__file__).parent / "histories").glob("recovery_*.txt"))


class Story:
    """One run under one policy, driven by directives."""

    def __init__(self) -> None:
        self.guard = guard.ROBUST
        self.recovery = recovery.RecoveryPolicy()
        self.ledger = recovery.Ledger("run")
        self.state = guard.GuardState()
        self.kept: dict[str, guard.GuardState] = {}
        self.seq = 0
        self.last: StepRecord | None = None

    def handle(self, block: Block) -> str:
        try:
            answer: str = getattr(self, "do_" + block.directive.replace("-", "_"))(block)
        except InterlockError as error:
            return f"{error.kind} {error.reason}: {error.message}"
        return answer or "ok"

    def do_policy(self, block: Block) -> str:
        options = dict(block.options)
        self.__init__()  # type: ignore[misc]
        self.guard = replace(guard_policy(options.pop("guard")), mode=guard.Mode(options.pop("mode", "act")))
        self.recovery = parse(recovery.RecoveryPolicy, {key: int(value) for key, value in options.items()})
        return ""

    def do_steps(self, block: Block) -> str:
        return self._feed(block, self.ledger.attempt)

    def do_stale(self, block: Block) -> str:
        return self._feed(block, self.ledger.attempt - 1)

    def _feed(self, block: Block, attempt: int) -> str:
        first, _, last = block.words[1].partition("..")
        metrics = {key: float(value) for key, value in block.options.items()}
        lines: list[str] = []
        for step in range(int(first), int(last or first) + 1):
            lines += self._one(step, attempt, metrics)
            if any("ROLL BACK" in line for line in lines):
                break
        return "\n".join(_folded(lines))

    def _one(self, step: int, attempt: int, metrics: dict[str, float]) -> list[str]:
        self.seq += 1
        self.last = StepRecord(attempt, self.seq, step, 0.0, metrics)
        if attempt != self.ledger.attempt:
            verdict = guard.Verdict(guard.Outcome.PASS)
            label = "not judged"
        else:
            self.state, verdict = guard.observe(self.guard, self.state, self.last)
            label = _shown(verdict)
        self.ledger, commands = recovery.judged(self.recovery, self.guard, self.ledger, self.last, verdict)
        return [f"step {step}: {label}", *self._carry_out(commands)]

    def _carry_out(self, commands: tuple[recovery.Command, ...]) -> list[str]:
        for command in commands:
            if isinstance(command, recovery.RollBack):
                self.state = guard.rewound(self.kept.get(command.rollback.checkpoint))
        return [_command(command) for command in commands]

    def do_begin(self, block: Block) -> str:
        step = self.last.step if self.last else 0
        name = checkpoint_id(step, self.ledger.attempt)
        self.ledger, commands = recovery.begun(
            self.ledger, name, attempt=self.ledger.attempt, step=step, seq=self.seq, initial=not self.last
        )
        if self.last:
            self.state = guard.mark_reference(self.state, self.last)
        self.kept[name] = self.state
        return "\n".join([f"began {name}", *self._carry_out(commands)])

    def do_durable(self, block: Block) -> str:
        name = block.option("checkpoint") or self.ledger.entries[-1].checkpoint
        self.ledger, commands = recovery.durable(self.recovery, self.ledger, name)
        return "\n".join([f"durable {name}", *self._carry_out(commands)])

    def do_save(self, block: Block) -> str:
        return self.do_begin(block) + "\n" + self.do_durable(block)

    def do_resume(self, block: Block) -> str:
        self.ledger = recovery.resumed(self.ledger)
        return ""

    def do_roll_back(self, block: Block) -> str:
        self.ledger, commands = recovery.requested(
            self.ledger, checkpoint=block.option("checkpoint"), actor="ada", reason="by hand"
        )
        return "\n".join(self._carry_out(commands))

    def do_mark(self, block: Block) -> str:
        state = recovery.CheckpointState(block.option("state"))
        self.ledger, commands = recovery.marked(self.ledger, block.option("checkpoint"), state, "by hand")
        return "\n".join(self._carry_out(commands))

    def do_ledger(self, block: Block) -> str:
        lines = [f"attempt {self.ledger.attempt}" + (" paused" if self.ledger.paused else "")]
        for entry in self.ledger.entries:
            notes = (
                f"{entry.state.value}"
                + ("" if entry.durable else " not-durable")
                + ("" if entry.on_line else " off-line")
            )
            lines.append(f"{entry.checkpoint} {notes} clean={entry.clean_steps} {entry.reason}")
        return "\n".join(lines)


def _shown(verdict: guard.Verdict) -> str:
    if verdict.trip:
        trip = verdict.trip
        return f"TRIP {trip.rule} {trip.metric}={trip.value:g} limit={trip.limit:.4g} score={trip.score:.3g} onset={trip.onset_step}"
    return verdict.outcome.upper() if not verdict.why else f"INCONCLUSIVE {verdict.why.split(',')[0]}"


def _command(command: recovery.Command) -> str:
    if isinstance(command, recovery.RollBack):
        unchanged = asdict(recovery.Plan())
        plan = {key: value for key, value in asdict(command.rollback.plan).items() if value != unchanged[key]}
        shown = f"-> ROLL BACK {command.rollback.rollback}: {command.rollback.from_step} to {command.rollback.checkpoint}, plan {plan}"
        return shown + (f", fallback: {command.rollback.fallback}" if command.rollback.fallback else "")
    return f"-> {type(command).__name__} " + " ".join(str(value) for value in asdict(command).values())


def _folded(lines: list[str]) -> list[str]:
    """Equal verdicts of following steps as one line."""
    out: list[tuple[str, str, str]] = []
    for line in lines:
        head, _, label = line.partition(": ")
        number = head.removeprefix("step ") if head.startswith("step ") else ""
        if number and out and out[-1][2] == label and out[-1][0]:
            out[-1] = (out[-1][0], number, label)
        else:
            out.append((number, number, label if number else line))
    return [f"{a}..{b} {c}" if a != b else f"{a} {c}".strip() for a, b, c in out]


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_history(path: Path, rewrite: bool) -> None:
    play(path, Story().handle, rewrite=rewrite)


def test_there_are_histories() -> None:
    assert len(HISTORIES) >= 6
