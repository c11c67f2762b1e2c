"""A replica killed in the middle of a swap, with another one up: the swap goes on without it, no request fails, and when it comes back it
is brought to the route."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

import onnx_models
from controller_world import Controller, a_controller, state_of
from interlock.api.controller.v1 import swap_service_pb2
from interlock.api.inference.v1 import runtime_service_pb2
from replica_world import Remote, a_process, a_replica
from rooms import free_ports
from system.test_controller_kill import Load

pytestmark = pytest.mark.system


async def routed(replica: Remote, epoch: int) -> runtime_service_pb2.ReplicaState:
    """Waits until a replica applies an epoch and holds nothing else."""
    watch = replica.runtime.WatchState(runtime_service_pb2.WatchStateRequest(), wait_for_ready=True)
    async with asyncio.timeout(30):
        while True:
            state = (await watch.read()).state
            if epoch in [route.epoch for route in state.routes] and len(state.slots) == 1:
                watch.cancel()
                return state


async def swap_under_load(controller: Controller, sound: Remote, version: str, death: asyncio.Event) -> None:
    """Swaps to `version` while requests run on the sound replica; `death` is set when the other one may be killed."""
    load = Load(sound)
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        swap = await controller.create(version, soak_duration=Duration(nanos=200_000_000))
        death.set()
        ended = (await controller.watch(swap.name))[-1]
        await asyncio.sleep(0.1)
        load.stop.set()
    load.check()
    assert state_of(ended) == "COMPLETED", ended.message
    assert load.answers[-1][1] == "2"


@pytest.mark.parametrize("place", ["switch", "drain"])
async def test_a_replica_that_dies_at(tmp_path: Path, place: str) -> None:
    async with a_replica(tmp_path / "sound") as sound:
        port = free_ports(1)[0]  # the replica's assignment is kept under its port
        async with (
            a_process(tmp_path / "mortal", port=port) as (first, _),
            a_controller(tmp_path, [sound.url, first.url]) as controller,
        ):
            await controller.swap_to(await controller.register(1.0))
            version = await controller.register(2.0)
        async with a_process(tmp_path / "mortal", place, port) as (mortal, process):
            await routed(mortal, 1)  # it restored its assignment by itself: the point is not passed on the way there
            async with a_controller(tmp_path, [sound.url, mortal.url]) as controller:
                await swap_under_load(controller, sound, version, asyncio.Event())
                assert await asyncio.wait_for(process.wait(), 30) == -signal.SIGKILL
                async with a_process(tmp_path / "mortal", port=port) as (back, _):
                    assert [slot.version for slot in (await routed(back, 2)).slots] == [version]


@pytest.mark.parametrize("state", ["LOADING", "WARMING", "SWITCHING", "DRAINING"])
async def test_a_replica_that_is_killed_in(tmp_path: Path, state: str) -> None:
    async with (
        a_replica(tmp_path / "sound") as sound,
        a_process(tmp_path / "mortal") as (mortal, process),
        a_controller(tmp_path, [sound.url, mortal.url]) as controller,
    ):
        await controller.swap_to(await controller.register(1.0))
        version = await controller.register(2.0, onnx_models.slow(2.0, size=200))
        death = asyncio.Event()

        async def kill() -> None:
            await death.wait()
            swaps = controller.stub("swap")

            newest = (await swaps.ListSwaps(swap_service_pb2.ListSwapsRequest(page_size=1))).swaps[0]
            await controller.watch(newest.name, until=state)
            process.kill()

        async with asyncio.TaskGroup() as group:
            group.create_task(kill())
            await swap_under_load(controller, sound, version, death)
        assert await asyncio.wait_for(process.wait(), 30) == -signal.SIGKILL
        async with a_process(tmp_path / "mortal", port=mortal.port) as (back, _):
            assert [slot.version for slot in (await routed(back, 2)).slots] == [version]
