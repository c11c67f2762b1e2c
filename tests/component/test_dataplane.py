"""The data plane over real ONNX models: answers under swaps, deadlines, cancellation, cuts, overload; and the replica's commands behind it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_models
from dataplane_world import Call, World
from dataplane_world import a_call as call
from dataplane_world import dataplane_world as a_world
from interlock.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InterlockError,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from interlock.stores import artifacts, golden
from interlock_inference.assignment import Assignment, AssignmentFile
from interlock_inference.replica import Wanted
from interlock_inference.slots import SlotState


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path) as made:
        yield made


async def test_swaps_under_load_fail_nothing_and_name_the_version_that_answered(world: World) -> None:
    """REQUIREMENTS S1: blue-green without a failed request; here twenty swaps under sixteen callers."""
    await world.load("1")
    await world.route(1, "1")
    stop, answers = asyncio.Event(), []

    async def ask() -> None:
        reply = await world.plane.infer(call())
        answers.append((reply.slot.version, float(reply.outputs[0][0, 0]), reply.epoch))

    async def caller() -> None:
        while not stop.is_set():
            await ask()
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(caller())
        for epoch in range(2, 22):
            previous, version = str(epoch - 1), str(epoch)
            await world.load(version)
            await world.route(epoch, version)
            await ask()
            assert (await world.replica.drain("policy", previous, 5.0)).num_cut == 0
            assert await world.replica.release("policy", previous)
        stop.set()
    assert {version for version, _, _ in answers} == {str(n) for n in range(1, 22)}
    assert len(answers) > 100
    assert all(float(version) == value for version, value, _ in answers)
    assert all(int(version) == epoch for version, _, epoch in answers)
    assert [slot.version for slot in world.replica.slots()] == ["21"]


async def test_swaps_of_slow_models_in_threads_fail_nothing(world: World) -> None:
    await world.load("1", onnx_models.slow(1.0))
    await world.route(1, "1")
    assert not world.plane._is_short(world.registry.find("policy", "1"), {"x": np.ones((1, 4), np.float32)})
    stop, answers = asyncio.Event(), []

    async def caller() -> None:
        while not stop.is_set():
            reply = await world.plane.infer(call())
            answers.append((reply.slot.version, float(reply.outputs[0][0, 0])))

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(caller())
        for epoch in range(2, 5):
            await world.load(str(epoch), onnx_models.slow(float(epoch)))
            await world.route(epoch, str(epoch))
            assert (await world.replica.drain("policy", str(epoch - 1), 20.0)).num_cut == 0
            await world.replica.release("policy", str(epoch - 1))
        stop.set()
    assert answers
    assert all(float(version) == value for version, value in answers)
    assert world.plane.num_queued == 0


async def test_a_deadline_that_has_passed_is_dropped_before_compute(world: World) -> None:
    slot = await world.load("1")
    await world.route(1, "1")
    with pytest.raises(DeadlineExceeded) as expired:
        await world.plane.infer(call(deadline=time.monotonic() - 0.001))
    assert expired.value.reason == "DEADLINE_EXPIRED"
    assert (slot.stats.compute_infer.count, slot.stats.failure.count, slot.in_flight) == (0, 1, 0)


async def test_a_request_that_expires_in_the_queue_is_not_run(world: World) -> None:
    slot = await world.load("1", onnx_models.slow(1.0))
    await world.route(1, "1")
    async with asyncio.TaskGroup() as group:
        first = group.create_task(world.plane.infer(call()))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded):
            await world.plane.infer(call(deadline=time.monotonic() + 0.0001))
    assert first.result().slot is slot
    assert slot.stats.compute_infer.count == 1


async def test_a_cancelled_request_gives_its_slot_back_when_the_thread_is_done(world: World) -> None:
    slot = await world.load("1", onnx_models.slow(1.0))
    await world.route(1, "1")
    async with asyncio.TaskGroup() as group:
        running = group.create_task(world.plane.infer(call()))
        queued = group.create_task(world.plane.infer(call()))
        await asyncio.sleep(0.001)
        assert slot.in_flight == 2
        running.cancel()
        queued.cancel()
    assert running.cancelled()
    assert queued.cancelled()
    await world.route(2)
    assert (await world.replica.drain("policy", "1", 20.0)).num_cut == 0
    assert slot.in_flight == 0
    assert world.plane.num_queued == 0


async def test_a_drain_that_runs_out_cuts_with_a_retryable_error_and_closes_after_the_thread(world: World) -> None:
    slot = await world.load("1", onnx_models.slow(1.0, size=1000, repeats=10))
    await world.route(1, "1")
    async with asyncio.TaskGroup() as group:
        cut = group.create_task(_caught(world.plane.infer(call(request_id="slow-one"))))
        await asyncio.sleep(0.001)
        await world.route(2)
        drained = await world.replica.drain("policy", "1", 0.001)
        assert drained.cut_request_ids == ("slow-one",)
        await world.replica.release("policy", "1")
        assert slot.opened is not None, "the thread still runs"
    assert isinstance(cut.result(), Unavailable)
    await asyncio.to_thread(world.plane.close)
    await asyncio.sleep(0)
    assert slot.opened is None


async def _caught(awaitable: object) -> InterlockError | None:
    try:
        await awaitable  # type: ignore[misc]
    except InterlockError as error:
        return error
    return None


async def test_a_full_queue_sheds(tmp_path: Path) -> None:
    async with a_world(tmp_path, queue_limit=2) as world:
        slot = await world.load("1", onnx_models.slow(1.0))
        await world.route(1, "1")
        async with asyncio.TaskGroup() as group:
            results = [group.create_task(_caught(world.plane.infer(call()))) for _ in range(5)]
        shed = [r.result() for r in results if r.result() is not None]
        assert len(shed) == 3
        assert all(isinstance(error, ResourceExhausted) and error.reason == "QUEUE_FULL" for error in shed)
        assert slot.in_flight == 0


async def test_a_large_request_of_a_fast_model_leaves_the_loop(world: World) -> None:
    slot = await world.load("1")
    assert world.plane._is_short(slot, {"x": np.ones((1, 4), np.float32)})
    assert not world.plane._is_short(slot, {"x": np.ones((1_000_000, 4), np.float32)})


async def test_wanted_outputs(world: World) -> None:
    await world.load("1")
    await world.route(1, "1")
    for outputs, text in ((("z",), "unknown output 'z'"), (("y", "y"), "twice")):
        with pytest.raises(InvalidArgument, match=text):
            await world.plane.infer(call(outputs=outputs))
    assert world.registry.find("policy", "1").stats.refused == 0, "no fault of the model's, whoever's it is"


async def test_what_the_model_refuses_is_counted_and_is_no_failure(world: World) -> None:
    indices = helper.make_tensor_value_info("x", TensorProto.INT64, ["batch"])
    rows = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    table = numpy_helper.from_array(np.zeros((3, 2), np.float32), "table")
    body = onnx_models.make([helper.make_node("Gather", ["table", "x"], ["y"])], [indices], [rows], (table,))
    path = world.home / "gather.onnx"
    path.write_bytes(body)
    async for _ in world.replica.prepare(Wanted("policy", "9", str(path))):
        pass
    slot, _ = await world.replica.warm("policy", "9", 1)
    await world.plane.infer(Call({"x": np.array([2])}, version="9"))
    with pytest.raises(InvalidArgument, match="out of data bounds") as refused:
        await world.plane.infer(Call({"x": np.array([3])}, version="9"))
    assert refused.value.reason == "INPUT_REFUSED"
    assert (slot.stats.refused, slot.stats.failure.count, slot.stats.success.count) == (1, 0, 1)


# --- the replica's commands ---


async def test_fences_and_epochs(world: World) -> None:
    await world.load("1")
    await world.load("2")
    await world.route(5, "1", token=7)
    await world.route(5, "1", token=7)  # the same command again changes nothing
    with pytest.raises(Aborted) as epoch:
        await world.route(4, "2", token=7)
    assert epoch.value.reason == "STALE_EPOCH"
    with pytest.raises(Aborted) as other_weights:
        await world.route(5, "2", token=7)
    assert other_weights.value.reason == "STALE_EPOCH"
    with pytest.raises(Aborted) as token:
        await world.route(6, "2", token=6)
    assert token.value.reason == "STALE_CONTROLLER"
    with pytest.raises(FailedPrecondition, match="not loaded") as absent:
        await world.route(6, "3", token=8)
    assert absent.value.reason == "VERSION_NOT_READY"
    assert (await world.plane.infer(call())).slot.version == "1"
    assert world.replica.fencing_token == 8
    with pytest.raises(FailedPrecondition) as routed:
        await world.replica.release("policy", "1")
    assert routed.value.reason == "VERSION_ROUTED"
    with pytest.raises(FailedPrecondition) as parked:
        world.replica.park("policy", "1")
    assert parked.value.reason == "VERSION_ROUTED"


class GatedFile(AssignmentFile):
    """An assignment file whose writes wait for a gate."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate, self.reached = threading.Event(), threading.Event()

    def write(self, assignment: Assignment) -> None:
        self.reached.set()
        assert self.gate.wait(30)
        super().write(assignment)


@asynccontextmanager
async def a_gated_world(home: Path) -> AsyncIterator[tuple[World, GatedFile]]:
    """With versions 1 and 2 loaded; every write of the assignment waits."""
    file = GatedFile(home / "replica.json")
    async with a_world(home, file) as world:
        for version in ("1", "2"):
            await world.load(version)
        try:
            yield world, file
        finally:
            file.gate.set()


async def test_a_caller_that_leaves_half_way_leaves_a_route_in_force(tmp_path: Path) -> None:
    """Written down and in force are one step: a call cancelled between the two must not leave them apart."""
    async with a_gated_world(tmp_path) as (world, file), asyncio.TaskGroup() as group:
        applying = group.create_task(world.route(1, "1", token=3))
        await asyncio.to_thread(file.reached.wait, 30)
        applying.cancel()
        await asyncio.wait((applying,))
        assert world.replica.routes() == []
        file.gate.set()
        await world.route(1, "1", token=3)  # the controller asks again
        assert (await world.plane.infer(call())).epoch == 1
        assert file.read().models["policy"].route.epoch == 1


async def test_commands_of_a_new_controller_at_once_lose_nothing(tmp_path: Path) -> None:
    """Higher tokens and routes, written by calls that overlap: the file ends with all of it."""
    async with a_gated_world(tmp_path) as (world, file):
        async with asyncio.TaskGroup() as group:
            for token in (5, 6, 7):
                group.create_task(world.replica.obey(token))
            await asyncio.to_thread(file.reached.wait, 30)
            group.create_task(world.route(1, "1", token=7))
            group.create_task(world.replica.obey(8))
            for _ in range(5):
                await asyncio.sleep(0)
            file.gate.set()
        last = file.read()
        assert last.fencing_token == world.replica.fencing_token == 8
        assert last.models["policy"].route == world.registry.snapshot.routes["policy"].route


async def test_a_version_is_not_released_while_its_route_is_being_written(tmp_path: Path) -> None:
    async with a_gated_world(tmp_path) as (world, file):
        async with asyncio.TaskGroup() as group:
            group.create_task(world.route(1, "1"))
            await asyncio.to_thread(file.reached.wait, 30)
            releasing = group.create_task(_caught(world.replica.release("policy", "1")))
            for _ in range(5):
                await asyncio.sleep(0)
            file.gate.set()
        refused = releasing.result()
        assert refused is not None
        assert refused.reason == "VERSION_ROUTED"
        assert (await world.plane.infer(call())).slot.version == "1"


async def test_loads_that_fail_leave_the_served_version_alone(world: World) -> None:
    await world.load("1")
    await world.route(1, "1")
    bad = world.artifact("2", onnx_models.constant(2.0)[:-9])
    wrong = world.artifact("3", onnx_models.constant(3.0, columns=5), columns=5)
    missing = str(world.home / "models" / "policy" / "4")
    cases = (
        (Wanted("policy", "2", bad), FailedPrecondition, "INVALID_ARTIFACT"),
        (Wanted("policy", "3", wrong, "", ("policy", "1")), FailedPrecondition, "SIGNATURE_MISMATCH"),
        (Wanted("policy", "4", missing), NotFound, "ARTIFACT_MISSING"),
        (Wanted("policy", "5", world.artifact("5"), "blake3:00"), FailedPrecondition, "DIGEST_MISMATCH"),
    )
    for wanted, error, reason in cases:
        for _ in range(2):  # asking again tries again
            with pytest.raises(error) as refused:
                async for _ in world.replica.prepare(wanted):
                    pass
            assert refused.value.reason == reason
        slot = world.registry.find("policy", wanted.version)
        assert slot.state is SlotState.STOPPED
        assert slot.error.startswith(reason)
        with pytest.raises(FailedPrecondition):
            await world.replica.warm("policy", wanted.version, 1)
        assert await world.replica.release("policy", wanted.version)
        assert not await world.replica.release("policy", wanted.version)
    assert (await world.plane.infer(call())).slot.version == "1"


async def test_a_loader_that_breaks_breaks_nothing_else(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.load("1")
    await world.route(1, "1")

    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    with monkeypatch.context() as patched:
        patched.setattr("interlock_inference.repository.open_artifact", broken)
        with pytest.raises(Internal) as crashed:
            async for _ in world.replica.prepare(Wanted("policy", "2", world.artifact("2"))):
                pass
    assert crashed.value.reason == "LOAD_CRASHED"
    assert "secret" not in crashed.value.message
    assert (await world.plane.infer(call())).slot.version == "1"
    await world.load("2")


async def test_one_load_for_many_askers_and_none_for_those_who_left(world: World) -> None:
    wanted = Wanted("policy", "1", world.artifact("1"))
    async with asyncio.timeout(20):
        stream = world.replica.prepare(wanted)
        await anext(stream)
        await stream.aclose()  # the first asker goes away
        percents = [[load.percent async for load in world.replica.prepare(wanted)] for _ in range(3)]
    assert all(p[-1] == 100.0 for p in percents)
    with pytest.raises(AlreadyExists) as conflict:
        async for _ in world.replica.prepare(Wanted("policy", "1", wanted.artifact_uri, "blake3:00")):
            pass
    assert conflict.value.reason == "VERSION_CONFLICT"


async def test_a_release_during_the_load_wins(world: World) -> None:
    stream = world.replica.prepare(Wanted("policy", "1", world.artifact("1")))
    await anext(stream)
    assert await world.replica.release("policy", "1")
    with pytest.raises(FailedPrecondition, match="released while it was loading"):
        async for _ in stream:
            pass
    assert world.replica.slots() == []


async def test_comparison_prefers_recorded_requests(world: World) -> None:
    await world.load("1")
    await world.load("2")
    made_up, num_recorded = await world.replica.compare("policy", "1", "2", 4)
    assert num_recorded == 0
    assert made_up.max_abs_error == 1.0
    await world.route(1, "1")
    for rows in (1, 2, 3):
        await world.plane.infer(call(rows))
    compared, num_recorded = await world.replica.compare("policy", "1", "2", 0)
    assert (compared.num_samples, num_recorded) == (3, 3)
    assert (compared.max_abs_error, compared.max_rel_error, compared.top1_agreement) == (1.0, 1.0, 1.0)
    await world.load("3", onnx_models.constant(float("nan")))
    poisoned, _ = await world.replica.compare("policy", "1", "3", 0)
    assert poisoned.num_nonfinite == 4 * (1 + 2 + 3)
    with pytest.raises(NotFound) as unknown:
        await world.replica.compare("policy", "1", "9", 0)
    assert unknown.value.reason == "SLOT_UNKNOWN"
    _, warmup = await world.replica.warm("policy", "3", 5)
    assert warmup.iterations == 5
    assert warmup.num_recorded == 3


async def test_the_golden_set_is_warmed_up_with_and_compared_on(world: World) -> None:
    chosen = {f"case-{n}": {"x": np.full((n, 4), n, np.float32)} for n in (1, 2, 3)}
    chosen["of another shape"] = {"x": np.zeros((1, 5), np.float32)}
    await world.load("1")
    async for _ in world.replica.prepare(Wanted("policy", "2", world.artifact("2", golden_inputs=chosen))):
        pass
    _, warmup = await world.replica.warm("policy", "2", 3)
    assert (warmup.iterations, warmup.num_recorded) == (3, 0)
    seen, num_recorded = await world.replica.compare("policy", "1", "2", 0)
    assert (seen.num_samples, seen.num_rows, num_recorded) == (3, 6, 0)
    await world.route(1, "1")
    await world.plane.infer(call())
    seen, num_recorded = await world.replica.compare("policy", "1", "2", 0)
    assert (seen.num_samples, num_recorded) == (4, 1)


async def test_a_warm_up_that_fails_says_what_it_needs(world: World) -> None:
    """Made-up inputs have 1 in a free dimension; this model needs a multiple of 3."""
    three = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 3])
    body = onnx_models.make(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [three],
        (numpy_helper.from_array(np.array([-1, 3]), "s"),),
    )
    folder = world.home / "r"
    for version, golden_inputs in (("1", {}), ("2", {"a": {"x": np.zeros(6, np.float32)}})):
        (folder / version).mkdir(parents=True)
        (folder / version / "model.onnx").write_bytes(body)
        if golden_inputs:
            golden.write(folder / version, golden_inputs)
        artifacts.write_manifest(folder / version)
        async for _ in world.replica.prepare(Wanted("policy", version, str(folder / version))):
            pass
    with pytest.raises(FailedPrecondition, match=r"golden\.npz") as failed:
        await world.replica.warm("policy", "1", 0)
    assert failed.value.reason == "WARMUP_FAILED"
    assert world.registry.find("policy", "1").state is SlotState.STOPPED
    assert (await world.replica.warm("policy", "2", 0))[0].state is SlotState.READY


async def test_parked_versions_come_back_at_once(world: World) -> None:
    for version in ("1", "2"):
        await world.load(version)
    await world.route(1, "1")
    await world.route(2, "2")
    await world.replica.drain("policy", "1", 1.0)
    assert world.replica.park("policy", "1").parked
    await world.route(3, "1")
    slot = world.registry.find("policy", "1")
    assert (slot.state, slot.parked) == (SlotState.SERVING, False)
    assert (await world.plane.infer(call())).epoch == 3


async def test_a_new_process_serves_its_last_assignment(tmp_path: Path) -> None:
    async with a_world(tmp_path) as before:
        await before.load("1")
        await before.load("2")
        await before.route(4, "1", "2", token=9)
    async with a_world(tmp_path) as after:
        with pytest.raises(NotFound):
            await after.plane.infer(call())
        await after.replica.restore()
        versions = {(await after.plane.infer(call())).slot.version for _ in range(4)}
        assert versions == {"1", "2"}
        assert after.replica.fencing_token == 9
        with pytest.raises(Aborted):
            await after.route(5, "1", token=8)
        with pytest.raises(Aborted):
            await after.route(3, "1", token=9)


async def test_a_restart_without_the_artifact_serves_nothing_and_says_so(tmp_path: Path) -> None:
    async with a_world(tmp_path) as before:
        await before.load("1")
        await before.route(1, "1")
    (tmp_path / "models" / "policy" / "1" / "model.onnx").write_bytes(b"torn")
    async with a_world(tmp_path) as after:
        await after.replica.restore()
        slot = after.registry.find("policy", "1")
        assert slot.state is SlotState.STOPPED
        assert slot.error.startswith("DIGEST_MISMATCH")
        assert after.replica.routes() == []
    (tmp_path / "replica.json").write_text("{")
    async with a_world(tmp_path) as fresh:
        await fresh.replica.restore()
        assert fresh.replica.slots() == []
        assert (tmp_path / "replica.unreadable").exists()
