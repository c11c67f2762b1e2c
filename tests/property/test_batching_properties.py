"""Whatever mix of requests meets at a busy engine: each gets exactly its own answer or its own refusal, and nothing is left behind."""

import asyncio
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnx_models
from batching_world import BAD, Call, a_world, outcome
from interlock.errors import DeadlineExceeded, InvalidArgument
from interlock.stores.modelspec import BatchingSpec
from interlock_inference.batching import Pace, choose
from interlock_inference.engines import EngineOptions
from interlock_inference.engines.onnx import load

FATES = ("answered", "answered", "answered", "cancelled", "expired", "bad")


@dataclass(frozen=True)
class Asked:
    """One request of an example."""

    fate: str
    rows: int
    columns: int
    priority: int
    outputs: tuple[str, ...]
    after_swap: bool


ASKED = st.builds(
    Asked,
    fate=st.sampled_from(FATES),
    rows=st.integers(1, 5),
    columns=st.integers(1, 2),
    priority=st.integers(0, 4),
    outputs=st.sampled_from([(), ("z",), ("z", "y")]),
    after_swap=st.booleans(),
)
SPECS = st.builds(
    BatchingSpec,
    max_rows=st.sampled_from([4, 9, 64]),
    preferred_rows=st.sampled_from([(), (2,), (2, 4)]),
    max_delay_ms=st.sampled_from([0.0, 0.0, 1.0]),
    priority_levels=st.sampled_from([1, 3]),
)


def content(number: int, asked: Asked) -> np.ndarray:
    """Its own numbers in every row, so that no answer can be another's."""
    if asked.fate == "bad":
        return np.full((asked.rows, asked.columns), BAD, np.float32)
    rows = 10.0 * number + np.arange(asked.rows)
    return np.repeat(rows[:, None], asked.columns, 1).astype(np.float32) + np.float32(0.1)


@given(st.lists(ASKED, max_size=14), SPECS, st.integers(1, 2))
@settings(max_examples=150, deadline=None)
def test_each_gets_its_own(requests: list[Asked], spec: BatchingSpec, num_threads: int) -> None:
    asyncio.run(meet(requests, spec, num_threads))


async def meet(requests: list[Asked], spec: BatchingSpec, num_threads: int) -> None:
    async with a_world(spec, num_threads=num_threads) as world, asyncio.TaskGroup() as group:
        held = [world.ask(group, 9000.0, columns=3 + n) for n in range(num_threads)]  # every thread is busy
        while len(world.engines["1"].runs) < num_threads:
            await asyncio.sleep(0)
        world.load("2")
        tasks: list[Any] = [None] * len(requests)
        arrays = [content(number, asked) for number, asked in enumerate(requests)]
        for number, asked in sorted(enumerate(requests), key=lambda pair: pair[1].after_swap):
            if asked.after_swap:
                world.route("2")
            more = {"priority": asked.priority, "outputs": asked.outputs}
            if asked.fate == "expired":
                more["deadline"] = time.monotonic() + 1e-4
            tasks[number] = ask(world, group, arrays[number], more)
            await asyncio.sleep(0)  # it is admitted now
        await asyncio.sleep(0.001)
        for asked, task in zip(requests, tasks, strict=True):
            if asked.fate == "cancelled":
                task.cancel()
        await asyncio.sleep(0)
        for engine in world.engines.values():
            engine.gate.set()
        await asyncio.wait((*held, *tasks))
        for asked, sent, task in zip(requests, arrays, tasks, strict=True):
            check(asked, sent, task)
        for engine in world.engines.values():
            check_runs(engine.runs, requests, spec)


def ask(world: Any, group: asyncio.TaskGroup, sent: np.ndarray, more: dict[str, Any]) -> Any:
    return group.create_task(outcome(world.plane.infer(Call({"x": sent}, **more))))


def check(asked: Asked, sent: np.ndarray, task: Any) -> None:
    if asked.fate == "cancelled":
        assert task.cancelled()
        return
    reply = task.result()
    if asked.fate == "expired":
        assert isinstance(reply, DeadlineExceeded)
    elif asked.fate == "bad":
        assert isinstance(reply, InvalidArgument)
    else:
        version = "2" if asked.after_swap else "1"
        factor = np.float32(version)
        expected = {"y": sent * factor, "z": sent + factor}
        assert reply.slot.version == version
        assert tuple(reply.names) == (asked.outputs or ("y", "z"))
        for name, output in zip(reply.names, reply.outputs, strict=True):
            np.testing.assert_array_equal(output, expected[name])


def check_runs(runs: list[np.ndarray], requests: list[Asked], spec: BatchingSpec) -> None:
    """Never above max_rows but for one large request; never what has expired or gone before it began."""
    skipped = {
        float(np.float32(10.0 * n + np.float32(0.1)))
        for n, a in enumerate(requests)
        if a.fate in ("cancelled", "expired")
    }
    for run in runs:
        assert run.shape[0] <= max(spec.max_rows, 5)
        firsts = {float(row[0]) for row in run}
        assert not firsts & skipped


class Waiting:
    """As much of an entry as the choice looks at."""

    def __init__(self, rows: int, key: int | None, deadline: float) -> None:
        self.rows, self.key, self.deadline = rows, key, deadline


@given(
    st.lists(st.builds(Waiting, st.integers(1, 9), st.sampled_from([None, 1, 2]), st.floats(0, 1)), max_size=20),
    st.floats(0, 0.02),
    SPECS,
)
def test_the_choice(waiting: list[Waiting], per_row: float, spec: BatchingSpec) -> None:
    """The head always goes; the rest in order, of its key, within rows, time and the deadlines of those that would else be met."""
    chosen, _ = choose(waiting, spec, lambda rows: rows * per_row, 0.0)  # type: ignore[arg-type]
    if not waiting:
        assert chosen == []
        return
    head = waiting[0]
    assert chosen[0] is head
    assert [w for w in waiting if w in chosen] == chosen
    if len(chosen) > 1:
        rows = sum(w.rows for w in chosen)
        assert head.key is not None
        assert {w.key for w in chosen} == {head.key}
        assert rows <= spec.max_rows
        assert rows * per_row <= max(spec.max_run_ms / 1e3, 2 * per_row)
        joined = 0
        for each in chosen:
            joined += each.rows
            assert rows * per_row <= each.deadline or joined * per_row > each.deadline, "met when it joined, and missed"


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(1e-6, 10)), max_size=30), st.integers(1, 300))
def test_the_pace_stays_within_what_was_measured(measured: list[tuple[int, float]], rows: int) -> None:
    pace = Pace()
    for each, seconds in measured:
        pace.note(each, seconds)
    if not measured:
        assert pace.seconds(rows) == 0.0
        return
    low, high = min(s for _, s in measured), max(s for _, s in measured)
    assert low * 0.999 <= pace.seconds(rows) <= high * 512
    before = pace.seconds(rows)
    for _ in range(200):
        pace.relax(rows)
    assert pace.seconds(rows) < before / 10, "a stall that was measured once does not hold for ever"


@pytest.mark.parametrize(("sizes", "tolerance"), [((16, 64, 8), 1e-5), ((784, 256, 10), 1e-5)])
def test_rows_of_a_real_network_together_and_alone(tmp_path: Any, sizes: tuple[int, ...], tolerance: float) -> None:
    """Within 1e-5 of the largest output; the library multiplies in another order for other numbers of rows, so not bit for bit."""
    (tmp_path / "model.onnx").write_bytes(onnx_models.mlp(sizes))
    engine = load(tmp_path / "model.onnx", None, EngineOptions())
    sent = np.random.default_rng(1).standard_normal((33, sizes[0])).astype(np.float32)
    (together,) = engine.run({"x": sent}, ["y"])
    for row in range(33):
        (alone,) = engine.run({"x": sent[row : row + 1]}, ["y"])
        assert np.abs(alone - together[row]).max() <= tolerance * np.abs(together).max()
    assert math.isfinite(float(together.sum()))
