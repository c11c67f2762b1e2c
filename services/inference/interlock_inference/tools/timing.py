"""Rates and percentiles of something that is called again and again. Knows nothing of models.

Cases are measured in turn, round after round, so that a machine that is busy for a while disturbs all of them alike; a case's figure is the
round with the median rate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

CALLS_MAX = 1_000_000

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Timing:
    """What one measurement gave. Percentiles are nearest-rank."""

    calls: int
    seconds: float
    p50_ms: float
    p95_ms: float
    p99_ms: float

    @property
    def calls_per_second(self) -> float:
        """Finished calls over the whole time."""
        return self.calls / self.seconds


Measure = Callable[[float], Timing]
"""Measures for about so many seconds."""


def timed(call: Callable[[], object]) -> Measure:
    """One call after the other, on this thread; at least one."""

    def measure(seconds: float) -> Timing:
        times: list[float] = []
        start = now = time.perf_counter()
        while not times or (now - start < seconds and len(times) < CALLS_MAX):
            call()
            before, now = now, time.perf_counter()
            times.append(now - before)
        return timing(times, now - start)

    return measure


def timing(times: Iterable[float], seconds: float) -> Timing:
    """Figures of single times in seconds. At least one is needed."""
    ordered = sorted(times)
    p50, p95, p99 = (1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95, 0.99))
    return Timing(len(ordered), seconds, p50, p95, p99)


def interleaved(
    cases: Mapping[Key, Measure], *, rounds: int, seconds: float, tick: Callable[[Key], None] = lambda key: None
) -> dict[Key, list[Timing]]:
    """Every case once a round, after one short call of each that is thrown away. `tick` is told of each measurement before it begins."""
    for measure in cases.values():
        measure(0.0)
    found: dict[Key, list[Timing]] = {key: [] for key in cases}
    for _ in range(rounds):
        for key, measure in cases.items():
            tick(key)
            found[key].append(measure(seconds))
    return found


def median(timings: Iterable[Timing]) -> Timing:
    """The measurement with the median rate, the lower of the middle two."""
    ordered = sorted(timings, key=lambda t: t.calls_per_second)
    return ordered[(len(ordered) - 1) // 2]


def ratio(left: Iterable[Timing], right: Iterable[Timing], share: float = 0.5) -> float:
    """Left's rate to right's, round by round: the median, or the ratio that `share` of the rounds stay at or below."""
    ratios = sorted(a.calls_per_second / b.calls_per_second for a, b in zip(left, right, strict=True))
    return statistics.median(ratios) if share == 0.5 else ratios[int(share * len(ratios))]
