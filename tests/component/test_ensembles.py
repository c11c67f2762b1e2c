"""Ensembles in a replica: one consistent set of versions per request, members that are swapped under load, and checks before a switch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_models
from controller_world import a_controller, state_of
from dataplane_world import Call, World
from dataplane_world import dataplane_world as a_world
from interlock.api.controller.v1 import model_service_pb2, swap_service_pb2
from interlock.api.oip import messages
from interlock.core.ensemble import SERVING, Step
from interlock.core.route import Route, Weight
from interlock.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, Unavailable
from interlock.stores import artifacts, modelspec
from interlock.stores.modelspec import BatchingSpec, ModelSpec, TensorSpec
from interlock_inference import ensembles, health
from interlock_inference.assignment import AssignmentFile
from interlock_inference.replica import Wanted
from interlock_inference.slots import Slot
from replica_world import a_replica

X = np.ones((1, 4), np.float32)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path) as made:
        yield made


async def load(world: World, model: str, version: str, body: bytes | None = None, **more: Any) -> Slot:
    folder = world.home / "models" / model / version
    onnx_models.write_version(folder, body or onnx_models.constant(float(version)), name=model, **more)
    return await loaded(world, model, version)


async def loaded(world: World, model: str, version: str) -> Slot:
    folder = world.home / "models" / model / version
    async for _ in world.replica.prepare(Wanted(model, version, str(folder))):
        pass
    return (await world.replica.warm(model, version, 0))[0]


async def route(world: World, model: str, epoch: int, *versions: str) -> None:
    weights = tuple(Weight(version, 1) for version in versions)
    await world.replica.apply_route(1, Route(model, epoch, weights), versions[0] if versions else "", 0.0)


def two(a: str = SERVING, b: str = SERVING) -> tuple[Step, ...]:
    """Both members from x, side by side."""
    return Step("a", {"x": "x"}, {"y": "from_a"}, a), Step("b", {"x": "x"}, {"y": "from_b"}, b)


def chain() -> tuple[Step, ...]:
    """a, then b, then a again: the same version of it both times."""
    return (
        Step("a", {"x": "x"}, {"y": "once"}),
        Step("b", {"x": "once"}, {"y": "from_b"}),
        Step("a", {"x": "from_b"}, {"y": "from_a"}),
    )


def write(world: World, steps: tuple[Step, ...], outputs: tuple[str, ...] = ("from_a", "from_b"), **more: Any) -> Path:
    return write_ensemble(world.home / "models" / "both" / "1", steps, outputs, **more)


def write_ensemble(
    folder: Path, steps: tuple[Step, ...], outputs: tuple[str, ...], columns: int = 4, datatype: str = "FP32"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = tuple(TensorSpec(name, datatype, (-1, columns)) for name in outputs)
    modelspec.write_spec(
        folder, ModelSpec("both", (TensorSpec("x", "FP32", (-1, 4)),), made, "ensemble", "", steps=steps)
    )
    artifacts.write_manifest(folder)
    return folder


async def served(world: World, steps: tuple[Step, ...], a: bytes | None = None) -> Slot:
    for model, body in (("a", a), ("b", None)):
        await load(world, model, "1", body)
        await route(world, model, 1, "1")
    write(world, steps)
    slot = await loaded(world, "both", "1")
    await route(world, "both", 1, "1")
    return slot


async def ask(world: World, **more: Any) -> Any:
    return await world.plane.infer(Call({"x": X}, model="both", **more))


@pytest.mark.parametrize("steps", [two(), chain(), two("1", "1")], ids=["side by side", "chain", "named versions"])
async def test_an_ensemble_answers_and_names_its_members(world: World, steps: tuple[Step, ...]) -> None:
    slot = await served(world, steps)
    reply = await ask(world)
    assert [float(output[0, 0]) for output in reply.outputs] == [1.0, 1.0]
    assert (reply.slot, reply.names) == (slot, ("from_a", "from_b"))
    assert {member.name for member in reply.members} == {"models/a/versions/1", "models/b/versions/1"}
    only_b = await ask(world, outputs=("from_b",))
    assert [output.shape for output in only_b.outputs] == [(1, 4)]
    assert slot.stats.success.count == 2
    assert world.registry.find("a", "1").stats.success.count >= 2, "a member counts what it answers"
    assert all(each.in_flight == 0 for each in world.registry.all_slots())


async def test_a_request_is_answered_by_one_set_of_versions_under_swaps(world: World) -> None:
    """`a` stands at both ends of a slow chain and is swapped all the time: a request that began with one version ends with it."""
    slow = onnx_models.slow(0.0, size=200)
    for model, body in (("a", None), ("b", slow)):
        await load(world, model, "1", body)
        await route(world, model, 1, "1")
    steps = (
        Step("a", {"x": "x"}, {"y": "first"}),
        Step("b", {"x": "first"}, {"y": "zero"}),
        Step("a", {"x": "zero"}, {"y": "last"}),
    )
    write(world, steps, ("first", "last"))
    await loaded(world, "both", "1")
    await route(world, "both", 1, "1")
    answers, stop = [], asyncio.Event()

    async def caller() -> None:
        while not stop.is_set():
            reply = await ask(world)
            answers.append((float(reply.outputs[0][0, 0]), float(reply.outputs[1][0, 0]), reply.members[0].version))
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(caller())
        for epoch in range(2, 8):
            version, before = str(epoch), str(epoch - 1)
            await load(world, "a", version)
            await world.replica.compare("a", before, version, 0)
            await route(world, "a", epoch, version)
            assert (await world.replica.drain("a", before, 20.0)).num_cut == 0
            await world.replica.release("a", before)
        stop.set()
    assert len({version for *_, version in answers}) > 3
    assert all(first == last == float(version) for first, last, version in answers)
    assert all(slot.in_flight == 0 for slot in world.registry.all_slots())


async def test_a_split_member_gives_both_its_steps_the_same_version(world: World) -> None:
    await served(world, chain())
    await load(world, "a", "2")
    await route(world, "a", 2, "1", "2")
    seen = {tuple(sorted({m.version for m in (await ask(world)).members if m.model == "a"})) for _ in range(20)}
    assert seen == {("1",), ("2",)}


async def test_looking_whether_it_is_ready_does_not_take_a_turn_of_the_split(world: World) -> None:
    await served(world, two())
    await load(world, "a", "2")
    await route(world, "a", 2, "1", "2")
    seen = []
    for _ in range(10):
        assert health.wanted(world.registry)["models/both"]
        seen.append((await ask(world)).members[0].version)
    assert sorted(seen) == ["1"] * 5 + ["2"] * 5


async def test_members_batch_what_ensembles_ask_of_them(world: World) -> None:
    slow = await load(world, "a", "1", onnx_models.slow(1.0, size=300), batching=BatchingSpec())
    await route(world, "a", 1, "1")
    await load(world, "b", "1")
    await route(world, "b", 1, "1")
    write(world, two())
    await loaded(world, "both", "1")
    await route(world, "both", 1, "1")
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(world)) for _ in range(16)]
    assert all(float(task.result().outputs[0][0, 0]) == 1.0 for task in tasks)
    assert max(slow.stats.batches) > 1


async def test_deadlines_cancellation_and_drains_leave_nothing_behind(world: World) -> None:
    slot = await served(world, two())
    await load(world, "a", "2", onnx_models.slow(2.0, size=700))
    await route(world, "a", 2, "2")
    with pytest.raises(DeadlineExceeded):
        await ask(world, deadline=0.0)
    async with asyncio.TaskGroup() as group:
        cancelled, cut = group.create_task(ask(world)), group.create_task(outcome(ask(world)))
        while slot.in_flight < 2:
            await asyncio.sleep(0)
        cancelled.cancel()
        await route(world, "both", 2)
        drained = await world.replica.drain("both", "1", 0.0)
        assert isinstance(await cut, Unavailable) == bool(drained.num_cut)
    async with asyncio.timeout(20):
        while any(each.in_flight for each in world.registry.all_slots()):
            await asyncio.sleep(0.01)
    assert world.plane.num_queued == 0


async def outcome(awaitable: Any) -> Any:
    try:
        return await awaitable
    except Unavailable as error:
        return error


async def test_a_step_that_fails_is_named(world: World) -> None:
    slot = await served(world, chain(), a=onnx_models.constant(100.0))
    await load(world, "b", "2", up_to_fifty())
    await route(world, "b", 2, "2")
    with pytest.raises(InvalidArgument, match="step 1, models/b/versions/2") as failed:
        await ask(world)
    assert (failed.value.reason, failed.value.metadata["member"]) == ("INPUT_REFUSED", "models/b/versions/2")
    assert slot.stats.refused == world.registry.find("b", "2").stats.refused == 1


def up_to_fifty() -> bytes:
    """y = x, for elements up to 50: a larger one is an index beyond a table's end."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "i"], ["z"]),
        helper.make_node("Add", ["x", "z"], ["y"]),
    ]
    table = numpy_helper.from_array(np.zeros(51, np.float32), "table")
    return onnx_models.make(nodes, [info[0]], [info[1]], (table,))


# --- before it serves ---


@pytest.mark.parametrize(
    ("steps", "change", "field"),
    [
        ((Step("a", {"x": "x"}, {"y": "from_a"}), Step("none", {"x": "x"}, {"y": "from_b"})), {}, "steps"),
        ((Step("a", {"x": "x"}, {"y": "from_a"}), Step("b", {"x": "x"}, {"y": "from_b"}, "9")), {}, "steps"),
        ((Step("a", {"z": "x"}, {"y": "from_a"}), Step("b", {"x": "x"}, {"y": "from_b"})), {}, "steps[0].inputs.x"),
        ((Step("a", {"x": "x", "z": "x"}, {"y": "from_a"}), Step("b", {"x": "x"}, {"y": "from_b"})), {}, "steps[0].inputs.z"),
        ((Step("a", {"x": "x"}, {"z": "from_a"}), Step("b", {"x": "x"}, {"y": "from_b"})), {}, "steps[0].outputs.z"),
        ((Step("wide", {"x": "x"}, {"y": "from_a"}), Step("b", {"x": "x"}, {"y": "from_b"})), {}, "steps[0].inputs.x"),
        (two(), {"columns": 5}, "outputs[0]"),
        (two(), {"datatype": "FP64"}, "outputs[0]"),
    ],
)  # fmt: skip
async def test_what_does_not_fit_is_refused_at_load(
    world: World, steps: tuple[Step, ...], change: dict[str, Any], field: str
) -> None:
    await load(world, "wide", "1", onnx_models.constant(1.0, columns=7), columns=7)
    await route(world, "wide", 1, "1")
    for model in ("a", "b"):
        await load(world, model, "1")
        await route(world, model, 1, "1")
    write(world, steps, **change)
    with pytest.raises(FailedPrecondition) as refused:
        await loaded(world, "both", "1")
    assert refused.value.field == field
    assert refused.value.reason in ("ENSEMBLE_MEMBER_MISSING", "SIGNATURE_MISMATCH")


async def test_an_ensemble_is_no_member(world: World) -> None:
    await served(world, two())
    folder = world.home / "models" / "all" / "1"
    folder.mkdir(parents=True)
    tensor = TensorSpec("x", "FP32", (-1, 4)), TensorSpec("y", "FP32", (-1, 4))
    steps = (Step("both", {"x": "x"}, {"from_a": "y"}),)
    modelspec.write_spec(folder, ModelSpec("all", tensor[:1], tensor[1:], "ensemble", "", steps=steps))
    artifacts.write_manifest(folder)
    with pytest.raises(FailedPrecondition, match="an ensemble itself"):
        await loaded(world, "all", "1")


# --- a member's swap re-verifies it ---


async def test_a_candidate_is_compared_inside_the_ensembles_that_use_its_model(world: World) -> None:
    """What is a small difference in the member's answer may be a large one in the ensemble's."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    times = numpy_helper.from_array(np.float32(1000), "k")
    body = onnx_models.make([helper.make_node("Mul", ["x", "k"], ["y"])], [info[0]], [info[1]], (times,))
    await load(world, "a", "1", onnx_models.constant(1.0))
    await route(world, "a", 1, "1")
    await load(world, "b", "1", body)
    await route(world, "b", 1, "1")
    write(world, chain()[:2], ("from_b",))
    await loaded(world, "both", "1")
    await route(world, "both", 1, "1")
    await load(world, "a", "2", onnx_models.constant(1.125))
    seen, _ = await world.replica.compare("a", "1", "2", 0)
    assert seen.max_abs_error == pytest.approx(125.0)
    assert seen.subject == "models/both/versions/1"
    reply = await world.plane.infer(Call({"x": X}, model="both"))
    assert float(reply.outputs[0][0, 0]) == 1000.0, "nothing was switched"


async def test_a_candidate_that_breaks_an_ensemble_fails_its_comparison_with_the_ensembles_name(world: World) -> None:
    await served(world, chain(), a=onnx_models.constant(100.0))
    await load(world, "b", "2", up_to_fifty())
    with pytest.raises(
        FailedPrecondition, match="models/both/versions/1 does not answer with models/b/versions/2"
    ) as refused:
        await world.replica.compare("b", "1", "2", 0)
    assert refused.value.reason == "ENSEMBLE_BROKEN"
    assert refused.value.metadata["cause"] == "INPUT_REFUSED"
    assert [float(v[0, 0]) for v in (await ask(world)).outputs] == [100.0, 1.0]


async def test_a_version_that_an_ensemble_names_is_not_taken_from_it(world: World) -> None:
    await served(world, two(a="1"))
    await load(world, "a", "2")
    with pytest.raises(FailedPrecondition, match="models/both/versions/1") as swapped:
        await world.replica.compare("a", "1", "2", 0)
    await route(world, "a", 2, "2")
    for act in (world.replica.drain("a", "1", 1.0), world.replica.release("a", "1")):
        with pytest.raises(FailedPrecondition, match="models/both/versions/1") as refused:
            await act
        assert refused.value.reason == swapped.value.reason == "MEMBER_OF_ENSEMBLE"
    await route(world, "both", 2)
    await world.replica.release("both", "1")
    assert await world.replica.release("a", "1")


# --- health and restarts ---


async def test_it_is_ready_when_its_members_are(world: World) -> None:
    await served(world, two())
    names = ("models/both", "models/both/versions/1", "models/a")
    assert len({health.wanted(world.registry)[name] for name in names}) == 1
    with pytest.raises(FailedPrecondition, match="models/both/versions/1"):
        ensembles.check_model_not_needed("a", world.registry)
    await route(world, "a", 2)
    states = health.wanted(world.registry)
    assert states["models/both"] == states["models/both/versions/1"] == states["models/a"] != states["models/b"]
    with pytest.raises(Unavailable, match="models/a, which is part") as refused:
        await ask(world)
    assert refused.value.reason == "MEMBER_NOT_READY"
    await route(world, "a", 3, "1")
    assert float((await ask(world)).outputs[0][0, 0]) == 1.0


async def test_a_restart_loads_members_before_their_ensemble(tmp_path: Path) -> None:
    file = AssignmentFile(tmp_path / "replica.json")
    async with a_world(tmp_path, file) as world:
        await served(world, two())
    async with a_world(tmp_path, file) as after:
        await after.replica.restore()
        assert after.replica.is_ready()
        assert float((await ask(after)).outputs[0][0, 0]) == 1.0


async def test_inputs_are_held_to_the_ensembles_own_signature(world: World) -> None:
    await served(world, two())
    with pytest.raises(InvalidArgument):
        await ask(world, outputs=("none",))


# --- with a controller, over the wire ---


async def test_a_members_swap_is_judged_by_its_ensemble(tmp_path: Path) -> None:
    """REQUIREMENTS S1: any failure before the switch leaves the old version serving; here it shows only in the ensemble."""
    home = tmp_path / "home"
    async with a_replica(home) as replica, a_controller(home, [replica.url]) as controller:
        for model, body in (("a", onnx_models.constant(100.0)), ("b", None)):
            assert state_of(await controller.swap_to(await controller.register(1.0, body, model=model))) == "COMPLETED"
        folder = write_ensemble(tmp_path / "both", chain(), ("from_a", "from_b"))
        request = model_service_pb2.RegisterVersionRequest(model="models/both", artifact_uri=str(folder))
        version = (await controller.call("model", "RegisterVersion", request)).version.name
        assert state_of(await controller.swap_to(version)) == "COMPLETED"
        assert (await replica.oip.ModelReady(messages.ModelReadyRequest(name="both"), timeout=10)).ready
        failed = await controller.swap_to(await controller.register(2.0, up_to_fifty(), model="b"))
        assert state_of(failed) == "FAILED"
        assert "models/both/versions/1 does not answer with models/b/versions/2" in failed.message
        limits = swap_service_pb2.CompareLimits(abs_error_max=1e6)
        worse = await controller.swap_to(await controller.register(3.0, scaled(1e9), model="b"), compare_limits=limits)
        assert state_of(worse) == "FAILED"
        assert "in models/both/versions/1 on" in worse.message
        after = await replica.oip.ModelInfer(a_request(), timeout=10)
        assert after.parameters["interlock-members"].string_param == "models/a/versions/1,models/b/versions/1"


def scaled(factor: float) -> bytes:
    """y = 1 + factor * relu(x - 50): `constant(1)` for what warm-ups make up, and far from it for a hundred."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    nodes = [
        helper.make_node("Sub", ["x", "fifty"], ["d"]),
        helper.make_node("Relu", ["d"], ["r"]),
        helper.make_node("Mul", ["r", "factor"], ["m"]),
        helper.make_node("Add", ["m", "one"], ["y"]),
    ]
    named = {"fifty": 50.0, "factor": factor, "one": 1.0}
    weights = tuple(numpy_helper.from_array(np.float32(value), name) for name, value in named.items())
    return onnx_models.make(nodes, [info[0]], [info[1]], weights)


def a_request() -> Any:
    request = messages.ModelInferRequest(model_name="both", raw_input_contents=[X.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    return request
