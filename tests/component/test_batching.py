"""Requests that find together while the engine is busy: who goes with whom, who gets what, and that nothing is left behind."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto

import onnx_models
from batching_world import BAD, CRASH, World, a_world
from dataplane_world import a_call, dataplane_world
from interlock.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from interlock.runtime.clock import SystemClock
from interlock.stores import artifacts, modelspec
from interlock.stores.modelspec import BatchingSpec, ModelSpec, TensorSpec
from interlock_inference.batching import is_by_rows
from interlock_inference.engines import Signature
from interlock_inference.replica import Wanted
from interlock_inference.slots import SlotState

SPEC = BatchingSpec(max_rows=8)


async def settled(world: World, waiting: int) -> None:
    """Until so many requests wait in version 1's lane."""
    lane = world.registry.find("m", "1").lane
    assert lane is not None
    async with asyncio.timeout(10):
        while lane.num_waiting != waiting:
            await asyncio.sleep(0)


def values(reply: Any, output: int = 0) -> list[float]:
    return [float(row[0]) for row in reply.outputs[output]]


async def test_one_request_runs_at_once_and_alone() -> None:
    async with a_world(SPEC) as world:
        world.engines["1"].gate.set()
        async with asyncio.TaskGroup() as group:
            reply = await world.ask(group, 3.0)
        assert values(reply) == [3.0]
        assert world.counts.rows == [1]
        lane = world.registry.find("m", "1").lane
        assert lane is not None
        assert lane.timer is None


async def test_what_waited_goes_together_and_each_gets_its_own() -> None:
    async with a_world(SPEC) as world, asyncio.TaskGroup() as group:
        await world.hold(group)
        tasks = [world.ask(group, float(n), rows=1 + n % 2) for n in range(5)]
        await settled(world, 5)
        world.engines["1"].gate.set()
        for n, task in enumerate(tasks):
            reply = await task
            assert values(reply) == [float(n)] * (1 + n % 2)
            assert values(reply, 1) == [n + 1.0] * (1 + n % 2)
        assert world.engines["1"].sizes == [1, 7]
        assert world.counts.rows == [1, 7]


async def test_instances_run_side_by_side_and_what_waits_goes_to_the_first_that_is_free() -> None:
    async with a_world(SPEC, instances=2) as world, asyncio.TaskGroup() as group:
        first, second = await world.hold(group), world.ask(group, 1.0)
        async with asyncio.timeout(10):
            while len(world.engines["1"].runs) < 2:
                await asyncio.sleep(0)
        tasks = [world.ask(group, float(n)) for n in range(5)]
        await settled(world, 5)
        assert world.engines["1"].sizes == [1, 1], "two run, and no third"
        world.engines["1"].gate.set()
        assert [values(await task) for task in tasks] == [[float(n)] for n in range(5)]
        await asyncio.wait((first, second))
        assert world.engines["1"].sizes == [1, 1, 5]


async def test_a_versions_own_threads_end_with_it() -> None:
    async with a_world(SPEC, instances=3) as world, asyncio.TaskGroup() as group:
        task = await world.hold(group)
        world.load("2")
        world.engines["2"].gate.set()
        world.route("2")
        world.engines["1"].gate.set()
        await task
        slot = world.registry.find("m", "1")
        threads = slot.threads
        assert threads is not None
        slot.move(SlotState.STOPPED)
        world.registry.drop(slot)
        async with asyncio.timeout(10):
            while any(thread.is_alive() for thread in threads._threads):
                await asyncio.sleep(0)
        assert values(await world.ask(group, 1.0)) == [2.0]


async def test_statistics_of_batches() -> None:
    async with a_world(SPEC) as world, asyncio.TaskGroup() as group:
        await world.hold(group)
        tasks = [world.ask(group, float(n)) for n in range(5)]
        await settled(world, 5)
        world.engines["1"].gate.set()
        await asyncio.wait(tasks)
        stats = world.registry.find("m", "1").stats
        assert (stats.success.count, stats.num_rows, stats.num_runs, stats.queue.count) == (6, 6, 2, 6)
        assert {rows: batch.compute_infer.count for rows, batch in stats.batches.items()} == {1: 1, 5: 1}
        assert stats.queue.ns > 0


async def test_max_rows_and_a_request_that_is_larger_alone() -> None:
    async with a_world(SPEC) as world, asyncio.TaskGroup() as group:
        await world.hold(group)
        tasks = [world.ask(group, 1.0, rows=rows) for rows in (3, 3, 3, 20, 5)]
        await settled(world, 5)
        world.engines["1"].gate.set()
        await asyncio.wait(tasks)
        assert world.engines["1"].sizes == [1, 6, 3, 20, 5]


async def test_preferred_rows_are_run_first_and_the_rest_is_not_kept_waiting() -> None:
    async with a_world(BatchingSpec(max_rows=64, preferred_rows=(2, 4))) as world, asyncio.TaskGroup() as group:
        await world.hold(group)
        tasks = [world.ask(group, 1.0) for _ in range(7)]
        await settled(world, 7)
        world.engines["1"].gate.set()
        await asyncio.wait(tasks)
        assert world.engines["1"].sizes == [1, 4, 2, 1]


async def test_shapes_and_wanted_outputs_do_not_mix() -> None:
    async with a_world(SPEC) as world, asyncio.TaskGroup() as group:
        await world.hold(group)
        asked: list[dict[str, Any]] = [{"columns": 2}, {"columns": 3}, {"outputs": ("z",)}, {}, {"columns": 3}]
        tasks = [world.ask(group, float(n), **more) for n, more in enumerate(asked)]
        await settled(world, 5)
        world.engines["1"].gate.set()
        replies = [await task for task in tasks]
        assert [values(reply)[0] for reply in replies] == [0.0, 1.0, 3.0, 3.0, 4.0]
        assert [reply.outputs[0].shape[1] for reply in replies] == [2, 3, 2, 2, 3]
        assert [run.shape for run in world.engines["1"].runs] == [(1, 2), (2, 2), (2, 3), (1, 2)]


async def test_higher_priorities_go_first() -> None:
    spec = BatchingSpec(max_rows=2, priority_levels=3, default_priority=2)
    async with a_world(spec) as world, asyncio.TaskGroup() as group:
        await world.hold(group)
        tasks = [world.ask(group, float(n), priority=p) for n, p in enumerate((3, 0, 1, 99, 3, 1))]
        await settled(world, 6)
        world.engines["1"].gate.set()
        await asyncio.wait(tasks)
        order = [[float(row[0]) for row in run] for run in world.engines["1"].runs[1:]]
        assert order == [[2.0, 5.0], [1.0, 3.0], [0.0, 4.0]]


@pytest.mark.parametrize(("value", "kind"), [(BAD, InvalidArgument), (CRASH, Internal)])
async def test_a_bad_request_fails_alone(value: float, kind: type[Exception]) -> None:
    async with a_world(SPEC) as world, asyncio.TaskGroup() as group:
        await world.hold(group)
        tasks = [world.ask(group, v) for v in (1.0, value, 2.0)]
        await settled(world, 3)
        world.engines["1"].gate.set()
        first, bad, last = [await task for task in tasks]
        assert isinstance(bad, kind)
        assert "secret" not in bad.message
        assert (values(first), values(last)) == ([1.0], [2.0])
        assert world.engines["1"].sizes == [1, 3, 1, 1, 1], "once more, and not again"
        assert world.counts.rows == [1, 1, 1], "runs that failed are not counted"


async def test_expired_and_cancelled_work_is_not_run() -> None:
    async with a_world(SPEC) as world, asyncio.TaskGroup() as group:
        held = await world.hold(group)
        gone = world.ask(group, 1.0)
        late = world.ask(group, 2.0, deadline=time.monotonic() + 0.01)
        kept = world.ask(group, 3.0, deadline=time.monotonic() + 60)
        await settled(world, 3)
        gone.cancel()
        held.cancel()
        await settled(world, 2)
        slot = world.registry.find("m", "1")
        assert slot.in_flight == 3, "the one that runs keeps its hold, though its caller is gone"
        await asyncio.sleep(0.02)
        world.engines["1"].gate.set()
        assert isinstance(await late, DeadlineExceeded)
        assert values(await kept) == [3.0]
        await asyncio.wait((gone, held))
        assert gone.cancelled()
        assert held.cancelled()
        assert [float(run[0, 0]) for run in world.engines["1"].runs] == [1000.0, 3.0]


async def test_a_wait_that_is_too_long_is_refused_or_put_behind() -> None:
    for action, sizes in (("reject", [1, 1]), ("continue", [1, 1, 2])):
        spec = BatchingSpec(max_rows=2, timeout_ms=200, timeout_action=action)
        async with a_world(spec) as world, asyncio.TaskGroup() as group:
            await world.hold(group)
            old = [world.ask(group, 1.0) for _ in range(2)]
            await settled(world, 2)
            await asyncio.sleep(0.25)
            young = world.ask(group, 2.0, columns=3)
            await settled(world, 3)
            world.engines["1"].gate.set()
            assert values(await young) == [2.0]
            replies = [await task for task in old]
            refused = [isinstance(reply, DeadlineExceeded) for reply in replies]
            assert refused == [action == "reject"] * 2
            assert world.engines["1"].sizes == sizes


async def test_a_models_own_queue_limit_sheds() -> None:
    async with a_world(BatchingSpec(queue_limit=2)) as world, asyncio.TaskGroup() as group:
        await world.hold(group)
        tasks = [world.ask(group, 1.0) for _ in range(4)]
        await settled(world, 2)
        await asyncio.sleep(0)
        world.engines["1"].gate.set()
        replies = [await task for task in tasks]
        assert [isinstance(reply, ResourceExhausted) for reply in replies] == [False, False, True, True]
        assert world.counts.reasons.count("QUEUE_FULL") == 2


async def test_a_delay_ends_when_enough_wait_or_its_time_is_over_or_everybody_left() -> None:
    spec = BatchingSpec(max_rows=64, preferred_rows=(3,), max_delay_ms=1000)
    async with a_world(spec) as world, asyncio.TaskGroup() as group:
        world.engines["1"].gate.set()
        lane = world.registry.find("m", "1").lane
        assert lane is not None
        tasks = [world.ask(group, 1.0) for _ in range(2)]
        await settled(world, 2)
        assert lane.timer is not None
        tasks.append(world.ask(group, 1.0))
        await asyncio.wait(tasks)
        assert world.engines["1"].sizes == [3]
        alone = world.ask(group, 1.0)
        await settled(world, 1)
        alone.cancel()
        await settled(world, 0)
        assert lane.timer is None
        hurried = await world.ask(group, 1.0, deadline=time.monotonic() + 1.5)
        assert values(hurried) == [1.0], "it has not the time to wait for company"
        assert values(await world.ask(group, 2.0)) == [2.0]
        assert world.engines["1"].sizes == [3, 1, 1]


async def test_batches_never_mix_versions_in_the_middle_of_a_swap() -> None:
    async with a_world(SPEC) as world, asyncio.TaskGroup() as group:
        await world.hold(group)
        before = [world.ask(group, float(n)) for n in range(3)]
        await settled(world, 3)
        world.load("2")
        world.route("2")
        after = [world.ask(group, float(n)) for n in range(3)]
        await asyncio.sleep(0)
        for engine in world.engines.values():
            engine.gate.set()
        old, new = [await task for task in before], [await task for task in after]
        assert [(r.slot.version, r.epoch, values(r)) for r in old] == [("1", 1, [float(n)]) for n in range(3)]
        assert [(r.slot.version, r.epoch, values(r)) for r in new] == [("2", 2, [2.0 * n]) for n in range(3)]


async def test_a_drain_waits_for_the_lane() -> None:
    async with a_world(SPEC) as world, asyncio.TaskGroup() as group:
        await world.hold(group)
        tasks = [world.ask(group, float(n)) for n in range(3)]
        await settled(world, 3)
        world.route()
        slot = world.registry.find("m", "1")
        draining = group.create_task(slot.drain(SystemClock(), 20.0))
        await asyncio.sleep(0)
        world.engines["1"].gate.set()
        drained = await draining
        assert (drained.num_drained, drained.num_cut) == (4, 0)
        assert [values(await task) for task in tasks] == [[0.0], [1.0], [2.0]]


async def test_a_drain_that_runs_out_cuts_the_lane_and_the_engine_outlives_its_run() -> None:
    async with a_world(SPEC) as world, asyncio.TaskGroup() as group:
        held = await world.hold(group)
        tasks = [world.ask(group, float(n), request_id=f"r{n}") for n in range(3)]
        await settled(world, 3)
        world.route()
        slot, engine = world.registry.find("m", "1"), world.engines["1"]
        drained = await slot.drain(SystemClock(), 0.001)
        assert drained.num_cut == 4
        replies = [await task for task in (held, *tasks)]
        assert all(isinstance(reply, Unavailable) and reply.reason == "DRAINING" for reply in replies)
        assert slot.in_flight == 1, "those that waited have let go"
        slot.move(SlotState.STOPPED)
        assert not engine.closed
        engine.gate.set()
        async with asyncio.timeout(10):
            while not engine.closed:
                await asyncio.sleep(0)
        assert len(engine.runs) == 1
        assert world.counts.rows == [], "a released version's series do not come back"


async def test_a_replica_that_stops_answers_those_who_wait() -> None:
    async with a_world(SPEC) as world, asyncio.TaskGroup() as group:
        held = await world.hold(group)
        tasks = [world.ask(group, 1.0) for _ in range(3)]
        await settled(world, 3)
        closing = group.create_task(asyncio.to_thread(world.plane.close))
        replies = [await task for task in tasks]
        assert all(isinstance(reply, Unavailable) for reply in replies)
        world.engines["1"].gate.set()
        await closing
        assert values(await held) == [1000.0]


async def test_outputs_without_a_row_per_row_stop_the_batching_and_not_the_answers(monkeypatch: Any) -> None:
    async with a_world(SPEC) as world, asyncio.TaskGroup() as group:
        engine, run = world.engines["1"], world.engines["1"].run
        monkeypatch.setattr(engine, "run", lambda inputs, names: [o.sum(0, keepdims=True) for o in run(inputs, names)])
        await world.hold(group)
        tasks = [world.ask(group, float(n)) for n in range(3)]
        await settled(world, 3)
        engine.gate.set()
        assert [values(await task) for task in tasks] == [[0.0], [1.0], [2.0]]
        assert engine.sizes == [1, 3, 1, 1, 1]
        engine.gate.clear()
        engine.begun.clear()
        tasks = [await world.hold(group), *(world.ask(group, float(n)) for n in range(3))]
        await settled(world, 3)
        engine.gate.set()
        await asyncio.wait(tasks)
        assert engine.sizes == [1, 3, 1, 1, 1, *[1] * 4]


# --- which versions batch, over real models ---


async def test_a_warm_up_refuses_batching_that_changes_answers(tmp_path: Path) -> None:
    async with dataplane_world(tmp_path) as world:
        for version, body in (("1", onnx_models.softmax_over_rows()), ("2", onnx_models.constant(2.0))):
            artifact = world.artifact(version, body, batching=SPEC)
            async for _ in world.replica.prepare(Wanted("policy", version, artifact)):
                pass
        with pytest.raises(FailedPrecondition, match=r"\[batching\], and output 'y' is another one") as refused:
            await world.replica.warm("policy", "1", 0)
        assert refused.value.reason == "WARMUP_FAILED"
        slot, warmup = await world.replica.warm("policy", "2", 0)
        assert slot.lane is not None
        assert slot.lane.pace.seconds(1) > 0
        assert warmup.hop_seconds > 0


async def test_versions_that_do_not_batch_have_no_lane(tmp_path: Path) -> None:
    async with dataplane_world(tmp_path) as world:
        assert (await world.load("1")).lane is None, "its maker says nothing"
        off = world.artifact("2", batching=BatchingSpec(enabled=False))
        fixed = tmp_path / "fixed"
        fixed.mkdir()
        (fixed / "model.onnx").write_bytes(onnx_models.identity(TensorProto.FLOAT, [1, 4]))
        tensor = (TensorSpec("x", "FP32", (1, 4)),)
        modelspec.write_spec(fixed, ModelSpec("policy", tensor, (TensorSpec("y", "FP32", (1, 4)),), batching=SPEC))
        artifacts.write_manifest(fixed)
        for version, artifact in (("2", off), ("3", str(fixed))):
            async for _ in world.replica.prepare(Wanted("policy", version, artifact)):
                pass
            slot, _ = await world.replica.warm("policy", version, 0)
            assert slot.lane is None
            assert slot.state is SlotState.READY


def signature(shapes: dict[str, tuple[int, ...]], symbols: dict[str, tuple[str, ...]]) -> Signature:
    output = (TensorSpec("y", "FP32", (-1,)),)
    return Signature(tuple(TensorSpec(n, "FP32", s) for n, s in shapes.items()), output, symbols)


def test_which_signatures_go_row_by_row() -> None:
    both = {"a": (-1, 2), "b": (-1,)}
    assert is_by_rows(signature(both, {"a": ("n", ""), "b": ("n",)}))
    assert is_by_rows(signature(both, {}))
    assert not is_by_rows(signature(both, {"a": ("n", ""), "b": ("m",)})), "two free sizes are two dimensions"
    assert not is_by_rows(signature({"a": (-1, -1)}, {"a": ("n", "n")})), "joined, it would be another matrix"
    assert not is_by_rows(signature({"a": (-1, 2), "b": ()}, {})), "a scalar has no rows"
    assert not is_by_rows(signature({"a": (8, 2)}, {}))


async def test_swaps_of_batching_models_under_load_fail_nothing(tmp_path: Path) -> None:
    async with dataplane_world(tmp_path) as world:
        await world.load("1", onnx_models.slow(1.0, size=200), batching=BatchingSpec())
        await world.route(1, "1")
        stop, answers = asyncio.Event(), []

        async def caller(number: int) -> None:
            while not stop.is_set():
                rows = 1 + number % 3
                reply = await world.plane.infer(a_call(rows))
                assert reply.outputs[0].shape == (rows, 4)
                answers.append((reply.slot.version, {float(v) for v in reply.outputs[0].flat}))

        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(caller(number))
            for epoch in range(2, 8):
                await world.load(str(epoch), onnx_models.slow(float(epoch), size=200), batching=BatchingSpec())
                await world.route(epoch, str(epoch))
                assert (await world.replica.drain("policy", str(epoch - 1), 20.0)).num_cut == 0
                await world.replica.release("policy", str(epoch - 1))
            stop.set()
        assert {version for version, _ in answers} == {str(n) for n in range(1, 8)}
        assert all(values == {float(version)} for version, values in answers)
        slot = world.registry.find("policy", "7")
        assert (world.plane.num_queued, slot.in_flight) == (0, 0)


async def test_a_stall_in_one_thread_does_not_hold_back_the_next_batch() -> None:
    """Two threads: while one run is stuck, later requests of the same version go on in the other."""
    async with a_world(SPEC, num_threads=2) as world, asyncio.TaskGroup() as group:
        engine = world.engines["1"]
        stuck = await world.hold(group)
        engine.begun.clear()
        second = world.ask(group, 1.0)
        assert await asyncio.to_thread(engine.begun.wait, 30)
        third = world.ask(group, 2.0)
        await settled(world, 1)
        assert engine.sizes == [1, 1]
        engine.gate.set()
        assert [values(await task) for task in (stuck, second, third)] == [[1000.0], [1.0], [2.0]]


async def test_one_who_leaves_while_a_failed_batch_is_run_again_is_left_out() -> None:
    async with a_world(SPEC) as world, asyncio.TaskGroup() as group:
        engine = world.engines["1"]
        await world.hold(group)
        tasks = [world.ask(group, value) for value in (BAD, 1.0, 2.0)]
        await settled(world, 3)
        run, loop, left = engine.run, asyncio.get_running_loop(), threading.Event()

        def leaving(inputs: Any, names: Any) -> Any:
            if len(inputs["x"]) == 1 and inputs["x"][0, 0] == BAD:
                loop.call_soon_threadsafe(tasks[1].cancel)
                loop.call_soon_threadsafe(loop.call_soon, left.set)
                assert left.wait(30)
            return run(inputs, names)

        engine.run = leaving  # type: ignore[method-assign]
        engine.gate.set()
        await asyncio.wait(tasks)
        assert tasks[1].cancelled()
        assert values(tasks[2].result()) == [2.0]
        assert engine.sizes == [1, 3, 1, 1]
