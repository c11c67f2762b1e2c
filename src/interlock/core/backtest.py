"""Backtest: replays a guard policy over recorded steps and says where it would have tripped. Pure; changes nothing and rolls nothing back.

A recorded history cannot be taken back, so after a trip the replay goes on: hit counters are cleared and trips are not counted for
`cool_down` steps, as they would not act in a run. The reference of ratio rules is the value at the last multiple of `save_every`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from interlock.core import guard
from interlock.core.guard import GuardPolicy, GuardState, Severity, Trip
from interlock.core.steps import StepRecord

ACTING = (Severity.CRITICAL, Severity.FATAL)


@dataclass(frozen=True, slots=True)
class Score:
    """How a policy did on one history. `lag` is None for a healthy run and for a fault that was missed."""

    num_steps: int
    num_false: int
    fault_step: int | None
    lag: int | None
    rules: tuple[str, ...]


def replay(policy: GuardPolicy, records: Sequence[StepRecord], *, save_every: int, cool_down: int) -> tuple[Trip, ...]:
    """The trips that would have acted, in order."""
    state, trips, quiet_until = GuardState(), [], -1
    for record in records:
        state, verdict = guard.observe(policy, state, record)
        trip = verdict.trip
        if trip is not None and trip.severity in ACTING and record.step > quiet_until:
            trips.append(trip)
            quiet_until = record.step + cool_down
            state = guard.rewound(state)
        if record.step % save_every == 0:
            state = guard.mark_reference(state, record)
    return tuple(trips)


def score(
    policy: GuardPolicy, records: Sequence[StepRecord], *, fault_step: int | None, save_every: int, cool_down: int
) -> Score:
    """False trips and, with a fault, the number of steps until the first trip at or after it."""
    trips = replay(policy, records, save_every=save_every, cool_down=cool_down)
    false = [trip for trip in trips if fault_step is None or trip.step < fault_step]
    hits = [trip for trip in trips if fault_step is not None and trip.step >= fault_step]
    lag = hits[0].step - fault_step if hits and fault_step is not None else None
    rules = tuple(trip.rule for trip in (hits[:1] if fault_step is not None else false))
    return Score(len(records), len(false), fault_step, lag, rules)
