"""Properties of guard, recovery and retention against oracles that are too simple to be wrong."""

from __future__ import annotations

import statistics

from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core import guard, recovery, retention
from interlock.core.fields import parse, plain
from interlock.core.recovery import CheckpointState
from interlock.core.steps import StepRecord

Z = guard.Statistic.ROBUST_Z
SMALL = st.floats(-100, 100, allow_nan=False)


@given(st.lists(SMALL, max_size=60), st.sampled_from([2.0, 5.0]), st.integers(1, 3), st.booleans())
def test_robust_rule_equals_the_oracle(values: list[float], limit: float, hits: int, below: bool) -> None:
    """The oracle keeps the whole history and recomputes everything at each step."""
    direction = guard.Direction.BELOW if below else guard.Direction.ABOVE
    rule = guard.Rule("r", "m", Z, limit, direction, hits=hits, out_of=3, window=10, warm_up=4)
    policy, state = guard.GuardPolicy("p", rules=(rule,)), guard.GuardState()
    clean: list[float] = []
    marks: list[bool] = []
    for step, value in enumerate(values):
        state, verdict = guard.observe(policy, state, StepRecord(1, step + 1, step, 0.0, {"m": value}))
        window = clean[-10:]
        if len(window) < 4:
            expected, bad = "inconclusive", False
        else:
            middle = statistics.median(window)
            spread = statistics.median([abs(point - middle) for point in window]) * 1.4826
            distance = middle - value if below else value - middle
            bad = distance / max(spread, 1e-9, 0.1 * abs(middle)) > limit
            marks.append(bad)
            expected = "trip" if bad and sum(marks[-3:]) >= hits else "pass"
        if not bad:
            clean.append(value)
        assert verdict.outcome == expected


Event = st.one_of(
    st.tuples(st.just("pass"), st.integers(1, 5)),
    st.tuples(st.just("trip"), st.integers(0, 8)),
    st.tuples(st.just("inconclusive"), st.just(1)),
    st.tuples(st.just("begin"), st.just(0)),
    st.tuples(st.just("durable"), st.integers(0, 3)),
    st.tuples(st.just("late"), st.just(0)),
    st.tuples(st.just("resume"), st.just(0)),
)
POLICY = recovery.RecoveryPolicy(confirm_after=3, rewind=2, max_rollbacks=2, budget_steps=30, cool_down=2)


class Run:
    """Feeds events to the ledger and holds the oracle's own books beside it."""

    def __init__(self) -> None:
        self.ledger = recovery.Ledger("run")
        self.seq = self.step = 0
        self.passes_since: dict[str, int] = {}
        self.commands: list[recovery.Command] = []

    def judged(self, outcome: guard.Outcome, trip: guard.Trip | None = None) -> None:
        self.seq += 1
        self.step += 1
        record = StepRecord(self.ledger.attempt, self.seq, self.step, 0.0, {})
        verdict = guard.Verdict(outcome, trip)
        self.take(recovery.judged(POLICY, guard.ROBUST, self.ledger, record, verdict))

    def take(self, decision: recovery.Decision) -> None:
        before = self.ledger
        self.ledger, commands = decision
        self.commands += commands
        for command in commands:
            if isinstance(command, recovery.RollBack):
                check_target(before, command.rollback)
                self.step = command.rollback.to_step

    def event(self, kind: str, amount: int) -> None:
        if kind == "pass":
            for _ in range(amount):
                self.judged(guard.Outcome.PASS)
        elif kind == "inconclusive":
            self.judged(guard.Outcome.INCONCLUSIVE)
        elif kind == "trip":
            onset = max(0, self.step + 1 - amount)
            trip = guard.Trip(
                "r", "m", 1, 1, 0, self.step + 1, self.seq + 1, onset, guard.Severity.FATAL, guard.Action.ROLL_BACK
            )
            self.judged(guard.Outcome.TRIP, trip)
        elif kind == "resume":
            self.ledger = recovery.resumed(self.ledger)
        else:
            self.checkpoint(kind, amount)

    def checkpoint(self, kind: str, amount: int) -> None:
        if kind == "begin":
            name = f"c{self.step}-{self.ledger.attempt}"
            self.take(recovery.begun(self.ledger, name, attempt=self.ledger.attempt, step=self.step, seq=self.seq))
        elif kind == "late" and self.ledger.attempt > 1:
            name = f"late{len(self.ledger.entries)}"
            self.take(recovery.begun(self.ledger, name, attempt=self.ledger.attempt - 1, step=self.step, seq=self.seq))
            assert self.ledger.entries[-1].state is CheckpointState.QUARANTINED
        elif kind == "durable" and len(self.ledger.entries) > amount:
            self.take(recovery.durable(POLICY, self.ledger, self.ledger.entries[-1 - amount].checkpoint))


def check_target(before: recovery.Ledger, rollback: recovery.Rollback) -> None:
    """Oracle of the target rule: look at every good one, oldest to youngest."""
    good = [e for e in before.entries if e.state is CheckpointState.GOOD and e.durable and e.on_line]
    assert rollback.checkpoint in [e.checkpoint for e in good]
    far = [e.step for e in good if e.step <= rollback.onset_step - POLICY.rewind]
    if far and rollback.plan.go_back == 0:
        assert rollback.to_step == max(far)
    assert (rollback.fallback == "") == bool(far)


@settings(max_examples=300)
@given(st.lists(Event, max_size=60))
def test_recovery_keeps_its_promises(events: list[tuple[str, int]]) -> None:
    run = Run()
    for kind, amount in events:
        previous = run.ledger
        run.event(kind, amount)
        states = {entry.checkpoint: entry for entry in run.ledger.entries}
        for entry in previous.entries:
            after = states[entry.checkpoint]
            assert entry.state in (after.state, CheckpointState.CANDIDATE), (
                "good and quarantined are final without a person"
            )
        for entry in run.ledger.entries:
            if entry.state is CheckpointState.GOOD:
                assert entry.durable
                assert entry.clean_steps >= POLICY.confirm_after
        assert run.ledger.attempt - 1 == len(run.ledger.rollbacks)
        assert recovery.rollbacks_in_budget(POLICY, run.ledger) <= POLICY.max_rollbacks
        line = [entry.step for entry in sorted(run.ledger.entries, key=lambda e: e.seq) if entry.on_line]
        assert line == sorted(line), "steps only grow along the line"
    assert parse(recovery.Ledger, plain(run.ledger)) == run.ledger


@given(st.lists(Event, max_size=40))
def test_adopting_a_rollback_twice_is_once(events: list[tuple[str, int]]) -> None:
    run = Run()
    for kind, amount in events:
        before = run.ledger
        run.event(kind, amount)
        for rollback in run.ledger.rollbacks[len(before.rollbacks) :]:
            again, changed = recovery.adopt(run.ledger, rollback)
            assert (again, changed) == (run.ledger, False)


def _kept() -> st.SearchStrategy[list[retention.Kept]]:
    one = st.builds(
        retention.Kept,
        checkpoint=st.just(""),
        seq=st.integers(0, 20000),
        state=st.sampled_from(CheckpointState),
        metric=st.none() | st.floats(-10, 10),
        pinned=st.booleans(),
    )
    unique = st.lists(one, max_size=15, unique_by=lambda kept: kept.seq)
    return unique.map(lambda items: [retention.Kept(f"c{k.seq}", k.seq, k.state, k.metric, k.pinned) for k in items])


@given(_kept(), st.integers(1, 4), st.integers(0, 2), st.integers(0, 2), st.sampled_from(retention.Better), st.data())
def test_retention_equals_the_oracle(
    items: list[retention.Kept], last: int, best: int, quarantined: int, better: retention.Better, data: st.DataObject
) -> None:
    policy = retention.RetentionPolicy(last, best, "reward", better, quarantined)
    ids = [item.checkpoint for item in items] or ["none"]
    used = [data.draw(st.frozensets(st.sampled_from(ids), max_size=2)) for _ in range(4)]
    gone = set(retention.expired(items, policy, retention.InUse(*used)))
    for item in items:
        younger = [other for other in items if other.seq > item.seq]
        bad = item.state is CheckpointState.QUARANTINED
        younger_alike = [other for other in younger if (other.state is CheckpointState.QUARANTINED) == bad]
        keep = item.pinned or any(item.checkpoint in group for group in used)
        keep |= len(younger_alike) < (quarantined if bad else last)
        if item.state is CheckpointState.GOOD:
            good = [other for other in items if other.state is CheckpointState.GOOD]
            keep |= not any(other in younger for other in good)
            if item.metric is not None:
                sign = 1 if better is retention.Better.HIGHER else -1
                key = (sign * item.metric, item.seq)
                beats = [o for o in good if o.metric is not None and (sign * o.metric, o.seq) > key]
                keep |= len(beats) < best
        assert (item.checkpoint in gone) == (not keep)
