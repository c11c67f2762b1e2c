"""The load generator's arithmetic: percentiles, windows, counts, and that a stall is seen by every request that was due in it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.client.load import Load, Mark, Sample, Sender, figures
from interlock.errors import Unavailable


@dataclass
class FakeTarget:
    """Answers at once, fails every `fail_every`-th, stalls while `gate` is clear; `enough` is set with the `until`-th."""

    fail_every: int = 0
    until: int = 100
    enough: asyncio.Event = field(default_factory=asyncio.Event)
    protocol: str = "fake"
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    sent: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def open(self, connections: int) -> AsyncIterator[Sender]:
        yield self

    async def send(self, request_id: str) -> str:
        self.sent.append(request_id)
        number = len(self.sent)
        if number == self.until:
            self.enough.set()
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.fail_every and number % self.fail_every == 0:
            raise Unavailable("no", reason="MODEL_NOT_READY")
        return "1"


@given(st.lists(st.floats(min_value=0, max_value=10), min_size=1))
def test_figures_against_a_sorted_list(seconds: list[float]) -> None:
    made = figures([Sample(0.0, s, "grpc", "1") for s in seconds])
    ordered = sorted(round(s * 1e3, 3) for s in seconds)
    assert made.max_ms == ordered[-1]
    assert made.p50_ms in ordered
    assert made.p50_ms <= made.p99_ms <= made.max_ms
    assert sum(1 for s in ordered if s <= made.p99_ms) >= 0.99 * len(ordered)


def test_windows_split_every_sample_once() -> None:
    load = Load([], rate=1.0)
    load.samples = [Sample(float(n), 0.001 * n, "grpc" if n % 2 else "http", "1" if n < 10 else "2") for n in range(20)]
    load.samples.append(Sample(5.0, 0.5, "grpc", "", "MODEL_NOT_READY: no"))
    load.marks = [Mark("swap 1", 4.5, 6.0), Mark("swap 2", 10.0, 11.0)]
    report = load.report()
    assert (report.count, report.failed) == (21, 1)
    assert sum(f.count for f in report.windows.values()) == 21
    assert report.windows["before"].count == 5
    assert report.windows["during"].count == 3 + 1 + 3  # 5 to 7 s and the failed one; 10 to 12 s
    assert report.windows["during"].failed == 1
    assert report.protocols["grpc"].count == 11
    assert report.versions == {"1": 10, "2": 10}
    assert report.errors == {"MODEL_NOT_READY": 1}
    assert "21 requests" in report.table()
    assert "error MODEL_NOT_READY: 1" in report.table()


def test_an_empty_load_reports_zeros() -> None:
    report = Load([]).report()
    assert (report.count, report.rate, report.windows["all"].p99_ms) == (0, 0.0, 0.0)


async def test_failures_are_counted_and_do_not_end_the_load() -> None:
    target = FakeTarget(fail_every=10)
    target.gate.set()
    load = Load([target], rate=None, concurrency=1)
    await load.run(target.enough)
    report = load.report()
    assert report.failed == load.num_failed == report.count // 10
    assert report.errors == {"MODEL_NOT_READY": report.failed}
    assert len(set(target.sent)) == report.count


async def test_a_stall_is_felt_by_everything_that_was_due_in_it() -> None:
    """What an open loop is for: a closed loop would send one request into the stall and report one slow answer."""
    target, stopping = FakeTarget(until=50), asyncio.Event()
    load = Load([target], rate=500.0)
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run(stopping))
        await target.enough.wait()
        target.gate.set()
        stopping.set()
    samples = sorted(load.samples, key=lambda s: s.due)
    assert len(samples) >= 50
    assert samples[0].seconds >= samples[25].seconds >= samples[49].seconds
    assert samples[0].seconds >= 49 / 500.0
    assert [s.due for s in samples[:3]] == pytest.approx([0.0, 0.002, 0.004])
