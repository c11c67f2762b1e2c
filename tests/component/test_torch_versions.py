"""Versions that run as PyTorch modules, in a replica: batched, swapped against ONNX versions of the same model, refused without harm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

import onnx_models
import torch_models
from dataplane_world import World
from dataplane_world import a_call as call
from dataplane_world import dataplane_world as a_world
from interlock.errors import FailedPrecondition
from interlock.stores.modelspec import BatchingSpec
from interlock_inference.engines import EngineOptions
from interlock_inference.replica import Wanted
from interlock_inference.slots import Slot, SlotState


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path, engines=EngineOptions(torch_modules=torch_models.MODULES)) as made:
        yield made


async def load(world: World, version: str) -> Slot:
    async for _ in world.replica.prepare(Wanted("policy", version, str(world.home / version))):
        pass
    return (await world.replica.warm("policy", version, 0))[0]


async def test_swaps_between_engines_fail_nothing(world: World) -> None:
    onnx_models.write_version(world.home / "1", onnx_models.constant(1.0))
    torch_models.constant(world.home / "2", 2.0)
    onnx_models.write_version(world.home / "3", onnx_models.constant(3.0))
    await load(world, "1")
    await world.route(1, "1")
    stop, answers = asyncio.Event(), []

    async def caller() -> None:
        while not stop.is_set():
            reply = await world.plane.infer(call())
            answers.append((reply.slot.version, float(reply.outputs[0][0, 0])))
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(caller())
        for epoch, (before, after) in enumerate((("1", "2"), ("2", "3")), 2):
            await load(world, after)
            seen, _ = await world.replica.compare("policy", before, after, 0)
            assert seen.max_abs_error == pytest.approx(1.0)
            await world.route(epoch, after)
            await world.replica.drain("policy", before, 5.0)
            await world.replica.release("policy", before)
            await asyncio.sleep(0.02)
        stop.set()
    assert {version for version, _ in answers} == {"1", "2", "3"}
    assert all(value == float(version) for version, value in answers)


async def test_a_torch_version_batches(world: World) -> None:
    sizes = [64, 1024, 1024, 4]
    module = torch_models.Mlp(sizes)
    said = torch_models.spec("Mlp", "x FP32 -1,64", module_args={"sizes": sizes}, batching=BatchingSpec())
    torch_models.write_version(world.home / "1", said, module)
    slot = await load(world, "1")
    assert slot.lane is not None
    await world.route(1, "1")
    rows = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(world.plane.infer(call_with(rows[i : i + 1]))) for i in range(64)]
    got = np.concatenate([task.result().outputs[0] for task in asked])
    opened = slot.opened
    assert opened is not None
    assert np.allclose(got, opened.engine.run({"x": rows}, ["y"])[0], atol=1e-5)
    assert max(slot.stats.batches) > 1, "requests that waited went together"


def call_with(rows: np.ndarray) -> object:
    made = call()
    made.inputs = {"x": rows}
    return made


async def test_rows_that_are_not_answered_by_themselves_are_found_at_warm_up(world: World) -> None:
    torch_models.write_version(world.home / "1", torch_models.spec("SoftmaxOverRows", batching=BatchingSpec()))
    with pytest.raises(FailedPrecondition, match=r"says \[batching\]") as refused:
        await load(world, "1")
    assert refused.value.reason == "WARMUP_FAILED"


async def test_a_refused_module_leaves_the_served_version_alone(world: World) -> None:
    torch_models.constant(world.home / "1", 1.0)
    await load(world, "1")
    await world.route(1, "1")
    torch_models.write_version(world.home / "2", torch_models.spec("os:system", module_args={"command": "true"}))
    with pytest.raises(FailedPrecondition) as refused:
        await load(world, "2")
    assert refused.value.reason == "MODULE_NOT_REGISTERED"
    assert world.registry.find("policy", "2").state is SlotState.STOPPED
    assert (await world.plane.infer(call())).outputs[0].tolist() == [[1.0] * 4]
