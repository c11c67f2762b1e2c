"""Counts and times of one version since it was loaded, in the split that the protocol's statistics ask for. Not the Prometheus metrics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

EXACT_ROWS = 128  # batch sizes up to this are counted one by one; above, by the next power of two, so that clients can't grow the table
LATENCY_WINDOW = 2048  # requests; enough for a p99 over some twenty samples, 16 KiB


@dataclass(slots=True)
class Timer:
    """How often, and how many nanoseconds in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Counts one."""
        self.count += 1
        self.ns += ns


@dataclass(slots=True)
class BatchStats:
    """The runs of one batch size."""

    compute_input: Timer = field(default_factory=Timer)
    compute_infer: Timer = field(default_factory=Timer)
    compute_output: Timer = field(default_factory=Timer)


@dataclass(slots=True)
class VersionStats:
    """Written by the data plane on its event loop. `refused`: what fitted the signature and the model refused; other bad requests are not counted."""

    success: Timer = field(default_factory=Timer)
    failure: Timer = field(default_factory=Timer)
    refused: int = 0
    queue: Timer = field(default_factory=Timer)
    compute_input: Timer = field(default_factory=Timer)
    compute_infer: Timer = field(default_factory=Timer)
    compute_output: Timer = field(default_factory=Timer)
    num_rows: int = 0
    num_runs: int = 0
    batches: dict[int, BatchStats] = field(default_factory=dict)
    last_at_ms: int = 0
    latencies_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCY_WINDOW))

    def ran(self, rows: int, infer_ns: int, input_ns: int = 0, output_ns: int = 0) -> None:
        """Counts one run of the engine; the times beside it are those of joining and parting its requests."""
        self.num_runs += 1
        size = rows if rows <= EXACT_ROWS else 1 << (rows - 1).bit_length()
        batch = self.batches.get(size)
        if batch is None:
            batch = self.batches[size] = BatchStats()
        infer = batch.compute_infer
        infer.count += 1
        infer.ns += infer_ns
        if input_ns or output_ns:
            batch.compute_input.ns += input_ns
            batch.compute_output.ns += output_ns
        batch.compute_input.count = batch.compute_output.count = infer.count

    def answered(self, rows: int, total_ns: int, queue_ns: int, input_ns: int, infer_ns: int) -> None:
        """Counts one answered request and where its time went."""
        count = self.success.count + 1
        for timer, ns in (
            (self.success, total_ns),
            (self.queue, queue_ns),
            (self.compute_input, input_ns),
            (self.compute_infer, infer_ns),
        ):
            timer.count = count
            timer.ns += ns
        self.num_rows += rows
        self.last_at_ms = time.time_ns() // 1_000_000
        self.latencies_seconds.append(total_ns / 1e9)

    def percentile_seconds(self, share: float) -> float:
        """Percentile of the last window; 0 when it is empty."""
        return percentile(self.latencies_seconds, share)


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
