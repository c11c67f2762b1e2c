"""When a load must wait because what serves got slower. Pure: measured figures in, a verdict and the next state out; no clock, no process.

Rules of this file
- The limit is set once, before the load: `factor` times the p99 of then, and never below `floor_seconds`.
- A load is paused above the limit and goes on when the p99 has been below `RESUME_SHARE` of it for `calm_seconds`: no flapping.
- Too few requests say nothing: a running load runs on, and for a paused one silence is calm.
- The pauses of one load together are bounded. After that it goes on unpaused, or is given up, as the policy says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

RESUME_SHARE = 0.8  # of the limit


class Verdict(StrEnum):
    """What a load is to do now."""

    GO = "go"
    WAIT = "wait"
    GIVE_UP = "give_up"


@dataclass(frozen=True, slots=True)
class PacingPolicy:
    """How much a load may cost what serves.

    Attributes:
        factor: times the p99 before the load; 0 turns pacing off.
        floor_seconds: a p99 below this is never a reason to pause.
        samples_min: requests in the window below which it says nothing.
        calm_seconds: how long it must be calm before the load goes on.
        slice_seconds: a load that goes on runs at least this long before it is judged again.
        pause_seconds_max: all pauses of one load together.
        gives_up: what follows then: True ends the load, False lets it run unpaused.
    """

    factor: float = 2.0
    floor_seconds: float = 0.010
    samples_min: int = 20
    calm_seconds: float = 0.5
    slice_seconds: float = 0.2
    pause_seconds_max: float = 30.0
    gives_up: bool = False

    def __post_init__(self) -> None:
        if self.factor and self.factor < 1:
            raise ValueError("factor: 0, or at least 1")


@dataclass(frozen=True, slots=True)
class Pacing:
    """One load's pacing. Times are on a monotonic clock.

    Attributes:
        limit_seconds: infinite where pacing is off.
        paused_seconds: of the pauses that have ended.
    """

    policy: PacingPolicy
    limit_seconds: float
    started_at: float
    paused_at: float | None = None
    calm_at: float | None = None
    paused_seconds: float = 0.0
    spent: bool = False

    def paused_until(self, now: float) -> float:
        """Seconds of all pauses up to now."""
        return self.paused_seconds + (now - self.paused_at if self.paused_at is not None else 0.0)


def begin(policy: PacingPolicy, p99_before: float | None, now: float) -> Pacing:
    """The state at the start of a load. `p99_before` is None when nothing was served that could be hurt."""
    limit = max(policy.floor_seconds, policy.factor * (p99_before or 0.0)) if policy.factor else float("inf")
    return Pacing(policy, limit, now)


def judge(state: Pacing, p99: float | None, now: float) -> tuple[Pacing, Verdict]:
    """What the load is to do now that the p99 of the last moment is this; None for too few requests."""
    if state.spent:
        return state, Verdict.GO
    if state.paused_at is None:
        return _running(state, p99, now)
    return _waiting(state, state.paused_at, p99, now)


def _running(state: Pacing, p99: float | None, now: float) -> tuple[Pacing, Verdict]:
    if p99 is None or p99 <= state.limit_seconds or now - state.started_at < state.policy.slice_seconds:
        return state, Verdict.GO
    return replace(state, paused_at=now, calm_at=None), Verdict.WAIT


def _waiting(state: Pacing, paused_at: float, p99: float | None, now: float) -> tuple[Pacing, Verdict]:
    policy = state.policy
    if state.paused_until(now) >= policy.pause_seconds_max:
        ended = _resumed(state, paused_at, now)
        return (ended, Verdict.GIVE_UP) if policy.gives_up else (replace(ended, spent=True), Verdict.GO)
    if p99 is not None and p99 > RESUME_SHARE * state.limit_seconds:
        return replace(state, calm_at=None), Verdict.WAIT
    calm_at = now if state.calm_at is None else state.calm_at
    if now - calm_at < policy.calm_seconds:
        return replace(state, calm_at=calm_at), Verdict.WAIT
    return _resumed(state, paused_at, now), Verdict.GO


def _resumed(state: Pacing, paused_at: float, now: float) -> Pacing:
    """A pause ends; the next slice begins."""
    return replace(
        state, paused_at=None, calm_at=None, started_at=now, paused_seconds=state.paused_seconds + now - paused_at
    )
