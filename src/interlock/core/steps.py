"""The step record: what a training loop says about one optimizer update. Not a store and not a wire format.

- `seq` starts at 1, has no gap, is never reused and goes on over attempts: it is the order in which things happened.
- `step` is the optimizer update the loop believes it is at; it goes back after a rollback, and `attempt` goes up by one.
- A metric that has no value in a step is left out; NaN and infinity are values, and every guard trips on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NONFINITE_GRADIENTS = "nonfinite_gradients"
"""Metric that the loop adds to a step whose update it skipped: the number of parameters with a NaN or infinite gradient."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer update of a run. `time` is seconds since the epoch."""

    attempt: int
    seq: int
    step: int
    time: float
    metrics: Mapping[str, float]


def checkpoint_id(step: int, attempt: int) -> str:
    """`step-000001500-a2`: sorts by step as text up to a billion; order in decisions is by number all the same."""
    return f"step-{step:09d}-a{attempt}"
