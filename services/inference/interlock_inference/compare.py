"""How far apart two versions answer the same inputs. Pure arithmetic on arrays; which inputs, and what is too far, is decided elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from interlock_inference.engines import Array

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
RELATIVE_FLOOR = 1e-6  # below this magnitude a difference is judged absolutely


@dataclass(slots=True)
class Comparison:
    """The worst of what was seen.

    Attributes:
        top1_agreement: share of rows whose largest element stands at the same place; 1 when no output has more than one column.
        subject: the ensemble in which the largest difference was seen; empty: in the versions' own answers.
        num_nonfinite: elements of the candidate that are NaN or infinite where the stable version's are finite.
    """

    num_samples: int = 0
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    num_rows: int = 0
    num_rows_agreeing: int = 0
    num_nonfinite: int = 0
    subject: str = ""
    stable_seconds: list[float] = field(default_factory=list)
    candidate_seconds: list[float] = field(default_factory=list)

    @property
    def top1_agreement(self) -> float:
        """See the class."""
        return self.num_rows_agreeing / self.num_rows if self.num_rows else 1.0

    def merge(self, subject: str, other: Comparison) -> None:
        """Takes in what was seen of an ensemble that has one of the two as its member."""
        worse = (
            other.num_nonfinite > self.num_nonfinite
            or other.max_abs_error > self.max_abs_error
            or other.max_rel_error > self.max_rel_error
            or other.top1_agreement < self.top1_agreement
        )
        self.subject = subject if worse else self.subject
        self.max_abs_error = max(self.max_abs_error, other.max_abs_error)
        self.max_rel_error = max(self.max_rel_error, other.max_rel_error)
        self.num_nonfinite += other.num_nonfinite
        if other.top1_agreement < self.top1_agreement:
            self.num_rows, self.num_rows_agreeing = other.num_rows, other.num_rows_agreeing

    def add(self, stable: Mapping[str, Array], candidate: Mapping[str, Array]) -> None:
        """Takes in the outputs of both for one input."""
        self.num_samples += 1
        for name, expected in stable.items():
            self._add_output(expected, candidate[name])

    def _add_output(self, expected: Array, actual: Array) -> None:
        if expected.shape != actual.shape:
            self.max_abs_error = self.max_rel_error = float("inf")
            return
        if expected.dtype.kind not in "fiu":
            self._add_exact(expected, actual)
            return
        left, right = expected.astype(np.float64), actual.astype(np.float64)
        self.num_nonfinite += int(np.count_nonzero(np.isfinite(left) & ~np.isfinite(right)))
        both = np.isfinite(left) & np.isfinite(right)
        if both.any():
            difference = np.abs(left[both] - right[both])
            self.max_abs_error = max(self.max_abs_error, float(difference.max()))
            self.max_rel_error = max(
                self.max_rel_error, float((difference / np.maximum(np.abs(left[both]), RELATIVE_FLOOR)).max())
            )
        if expected.ndim >= 2 and expected.shape[-1] > 1 and expected.size:
            agree = left.argmax(-1) == right.argmax(-1)
            self.num_rows += agree.size
            self.num_rows_agreeing += int(np.count_nonzero(agree))

    def _add_exact(self, expected: Array, actual: Array) -> None:
        """Booleans and strings differ or do not: 1 is the distance."""
        if not np.array_equal(expected, actual):
            self.max_abs_error, self.max_rel_error = max(self.max_abs_error, 1.0), max(self.max_rel_error, 1.0)


def compare(stable: Run, candidate: Run, samples: Sequence[Mapping[str, Array]]) -> Comparison:
    """Runs every sample through both, the two in turn so that neither has the warmer cache. Blocks."""
    made = Comparison()
    for inputs in samples:
        before = time.perf_counter()
        expected = stable(inputs)
        between = time.perf_counter()
        actual = candidate(inputs)
        made.stable_seconds.append(between - before)
        made.candidate_seconds.append(time.perf_counter() - between)
        made.add(expected, actual)
    return made


def median_ms(seconds: Sequence[float]) -> float:
    """Milliseconds; 0 for none."""
    return median(seconds) * 1e3 if seconds else 0.0
