"""The inputs of a few real requests per model, kept in memory for warm-up and comparison. Bounded in number and bytes; nothing is written down."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from interlock_inference.engines import Array

KEEP = 64  # requests per model: enough for a comparison of some ten milliseconds
SAMPLE_BYTES_MAX = 1 << 20  # larger requests are not kept: 64 of them would be felt
DENSE_FIRST = 64  # the first requests are all kept, so that a young model has something to compare on
EVERY = 17  # later one in so many; odd, so that it does not beat against a client that alternates


class Recorder:
    """A ring of recent inputs per model."""

    def __init__(self, keep: int = KEEP, every: int = EVERY) -> None:
        self._keep = keep
        self._every = every
        self._seen: dict[str, int] = {}
        self._rings: dict[str, deque[Mapping[str, Array]]] = {}

    def offer(self, model: str, inputs: Mapping[str, Array]) -> None:
        """Keeps the inputs of this request if it is its turn. They must not be changed afterwards."""
        seen = self._seen.get(model, 0)
        self._seen[model] = seen + 1
        if seen >= DENSE_FIRST and seen % self._every:
            return
        if sum(array.nbytes for array in inputs.values()) > SAMPLE_BYTES_MAX:
            return
        self._rings.setdefault(model, deque(maxlen=self._keep)).append(inputs)

    def samples(self, model: str, limit: int) -> list[Mapping[str, Array]]:
        """At most `limit` recorded inputs, newest first."""
        ring = self._rings.get(model, ())
        return list(reversed(ring))[:limit]
