"""The controller killed by SIGKILL around every write of a swap, once before and once after: the next one takes the swap up, nothing is
lost or done twice, and the replica answers every request meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from controller_world import ENDED, Controller, a_controller, state_of
from interlock.api.controller.v1 import swap_service_pb2
from interlock.api.oip import messages
from interlock.core.swap import State
from interlock.errors import InterlockError, Unavailable
from interlock.runtime.channels import open_channel
from replica_world import Remote, a_replica

pytestmark = pytest.mark.system

FORWARD = [
    "ADMITTING",
    "LOADING",
    "WARMING",
    "VERIFYING",
    "GATED",
    "SWITCHING",
    "SOAKING",
    "DRAINING",
    "KEEP_WARM",
    "COMPLETED",
]
MOMENTS = ["before_persist", "after_persist"]


@asynccontextmanager
async def a_process(
    home: Path, replica: Remote, failpoint: str = ""
) -> AsyncIterator[tuple[Controller, asyncio.subprocess.Process]]:
    """A real controller process; killed at the end if it still lives."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("INTERLOCK_")}
    env |= {
        "INTERLOCK_HOME": str(home),
        "INTERLOCK_CONTROLLER_PORT": "0",
        "INTERLOCK_CONTROLLER_METRICS_PORT": "0",
        "INTERLOCK_CONTROLLER_REPLICAS": json.dumps([replica.url]),
        "INTERLOCK_CONTROLLER_TICK_SECONDS": "0.05",
        "INTERLOCK_TRAINER_PORT": "1",
        "INTERLOCK_PROBE_INTERVAL_SECONDS": "0",
    }
    if failpoint:
        env["INTERLOCK_FAILPOINT"] = f"controller.{failpoint}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "interlock_controller", stdout=asyncio.subprocess.PIPE, env=env
    )
    assert process.stdout is not None
    try:
        event: dict[str, Any] = {}
        async with asyncio.timeout(60):
            while event.get("event") != "listening":
                line = await process.stdout.readline()
                if not line:
                    break  # killed while it took over
                event = json.loads(line)
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(process.stdout.read())
            async with open_channel(event.get("address", "127.0.0.1:1")) as channel:
                yield Controller(home, channel), process
            if process.returncode is None:
                process.kill()
            await process.wait()
            await reading
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Load:
    """Requests without a pause; every one must be answered, by the version that it names."""

    def __init__(self, replica: Remote) -> None:
        self._replica = replica
        self._request = messages.ModelInferRequest(
            model_name="policy", raw_input_contents=[np.zeros((1, 4), np.float32).tobytes()]
        )
        self._request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        self.answers: list[tuple[float, str]] = []
        self.stop = asyncio.Event()

    async def run(self) -> None:
        while not self.stop.is_set():
            response = await self._replica.oip.ModelInfer(self._request, timeout=10)
            value = float(np.frombuffer(response.raw_output_contents[0], np.float32)[0])
            self.answers.append((value, str(response.model_version)))
            await asyncio.sleep(0.002)

    def check(self) -> None:
        assert len(self.answers) > 20, "too little traffic to say anything"
        assert all(str(int(value)) == version for value, version in self.answers)


@asynccontextmanager
async def a_serving_world(home: Path) -> AsyncIterator[tuple[Remote, Load, str, str]]:
    """A replica that serves version 1 under load, with version 2 sound and version 3 broken on record; no controller runs."""
    async with a_replica(home) as replica:
        async with a_controller(home, [replica.url]) as controller:
            await controller.swap_to(await controller.register(1.0))
            sound, broken = await controller.register(2.0), await controller.register(3.0, b"not a model")
        load = Load(replica)
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run())
            yield replica, load, sound, broken
            load.stop.set()
        load.check()


async def steer(controller: Controller, swap: str, verbs: dict[str, str]) -> str:
    """Gives a person's verb at each state that has one, until the swap has ended or the controller dies; the last state seen."""
    state = ""
    try:
        while state not in ENDED:
            now = await controller.get(swap)
            if state_of(now) != state and state_of(now) in verbs:
                await controller.tell(verbs[state_of(now)], swap)
            state = state_of(now)
            await asyncio.sleep(0.02)
    except Unavailable:
        pass
    return state


async def survive(
    home: Path, replica: Remote, failpoint: str, version: str, verbs: dict[str, str], **spec: Any
) -> tuple[Controller, str]:
    """Runs a swap into the failpoint, then to its end under a fresh controller; the swap's name and end."""
    async with a_process(home, replica, failpoint) as (controller, process):
        swap = await create(controller, version, **spec)
        await steer(controller, swap, verbs)
        assert await asyncio.wait_for(process.wait(), 30) == -signal.SIGKILL, "the failpoint was never reached"
    async with a_process(home, replica) as (controller, _):
        swap = swap or await create(controller, version, **spec)
        async with asyncio.timeout(60):
            end = await steer(controller, swap, verbs)
        seen = [state_of(s) for s in await controller.watch(swap)]
        assert len(seen) == len(set(seen)), f"a state was entered twice: {seen}"
        listed = await controller.receipt(swap)
        assert listed.swap == swap
        return controller, end


async def create(controller: Controller, version: str, **spec: Any) -> str:
    """The swap's name; empty when the controller died before it answered. The request id makes asking again harmless."""
    try:
        return str((await controller.create(version, request_id="the-one", **spec)).name)
    except InterlockError:
        return ""


async def final_state(home: Path, replica: Remote) -> tuple[int, list[str], int]:
    """(route epoch in the store, versions loaded on the replica, swaps on record)."""
    from interlock.stores.controller_sqlite import SqliteControllerStore

    store = SqliteControllerStore(home / "controller.db")
    epoch, swaps = store.route("policy").epoch, len(store.swaps("policy"))
    store.close()
    return epoch, [s.version.rsplit("/", 1)[1] for s in (await replica.state()).slots], swaps


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("state", ["PENDING", *FORWARD])
async def test_killed_on_the_way_forward(tmp_path: Path, state: str, moment: str) -> None:
    async with a_serving_world(tmp_path) as (replica, _, sound, _broken):
        _, end = await survive(
            tmp_path, replica, f"{state}:{moment}", sound, {"GATED": "ApproveSwap"}, approval_required=True
        )
        assert end == "COMPLETED"
        assert await final_state(tmp_path, replica) == (2, ["2"], 2)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("state", ["ABORTING", "FAILED"])
async def test_killed_while_a_broken_version_is_given_up(tmp_path: Path, state: str, moment: str) -> None:
    async with a_serving_world(tmp_path) as (replica, load, _, broken):
        _, end = await survive(tmp_path, replica, f"{state}:{moment}", broken, {})
        assert end == "FAILED"
        assert await final_state(tmp_path, replica) == (1, ["1"], 2)
        assert {version for _, version in load.answers} == {"1"}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("state", ["REVERTING", "REVERTED"])
async def test_killed_while_going_back(tmp_path: Path, state: str, moment: str) -> None:
    async with a_serving_world(tmp_path) as (replica, _, sound, _broken):
        _, end = await survive(
            tmp_path, replica, f"{state}:{moment}", sound, {"SOAKING": "AbortSwap"}, soak_duration=Duration(seconds=600)
        )
        assert end == "REVERTED"
        assert await final_state(tmp_path, replica) == (3, ["1"], 2)


async def test_killed_again_while_it_takes_over(tmp_path: Path) -> None:
    """A crash, a crash of the successor at the next write, and a third controller that finishes."""
    async with a_serving_world(tmp_path) as (replica, _, sound, _broken):
        async with a_process(tmp_path, replica, "LOADING:after_persist") as (controller, process):
            await create(controller, sound)
            assert await asyncio.wait_for(process.wait(), 30) == -signal.SIGKILL
        async with a_process(tmp_path, replica, "SWITCHING:after_persist") as (_, process):
            assert await asyncio.wait_for(process.wait(), 30) == -signal.SIGKILL
        async with a_process(tmp_path, replica) as (controller, _):
            swap = await create(controller, sound)
            assert state_of((await controller.watch(swap))[-1]) == "COMPLETED"
        assert await final_state(tmp_path, replica) == (2, ["2"], 2)


@pytest.mark.parametrize("moment", MOMENTS)
async def test_killed_in_a_canary(tmp_path: Path, moment: str) -> None:
    """Each share of a canary is its own epoch; none is skipped or taken twice."""
    async with a_serving_world(tmp_path) as (replica, _, sound, _broken):
        _, end = await survive(
            tmp_path, replica, f"CANARY:{moment}", sound, {"CANARY": "PromoteSwap"},
            strategy=swap_service_pb2.SwapSpec.STRATEGY_CANARY, canary_percents=[25], canary_step_duration=Duration(seconds=600),
        )  # fmt: skip
        assert end == "COMPLETED"
        assert await final_state(tmp_path, replica) == (3, ["2"], 2)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("verb", "end"), [("AbortSwap", "CANCELLED"), ("RejectSwap", "REJECTED")])
async def test_killed_while_a_persons_no_is_carried_out(tmp_path: Path, verb: str, end: str, moment: str) -> None:
    async with a_serving_world(tmp_path) as (replica, load, sound, _broken):
        _, reached = await survive(tmp_path, replica, f"{end}:{moment}", sound, {"GATED": verb}, approval_required=True)
        assert reached == end
        assert await final_state(tmp_path, replica) == (1, ["1"], 2)
        assert {version for _, version in load.answers} == {"1"}


@pytest.mark.parametrize("moment", MOMENTS)
async def test_killed_while_a_newer_swap_takes_over(tmp_path: Path, moment: str) -> None:
    """The older swap waits at its gate, the newer one ends it; the controller dies around the write that says so."""
    async with a_serving_world(tmp_path) as (replica, _, sound, _broken):
        async with a_process(tmp_path, replica, f"SUPERSEDED:{moment}") as (controller, process):
            older = (await controller.create(sound, approval_required=True)).name
            await controller.watch(older, until="GATED")
            newer = await create(controller, sound, concurrency=swap_service_pb2.SwapSpec.CONCURRENCY_SUPERSEDE)
            assert await asyncio.wait_for(process.wait(), 30) == -signal.SIGKILL, "the failpoint was never reached"
        async with a_process(tmp_path, replica) as (controller, _), asyncio.timeout(60):
            newer = newer or await create(
                controller, sound, concurrency=swap_service_pb2.SwapSpec.CONCURRENCY_SUPERSEDE
            )
            assert state_of((await controller.watch(newer))[-1]) == "COMPLETED"
            assert state_of((await controller.watch(older))[-1]) == "SUPERSEDED"
        assert await final_state(tmp_path, replica) == (2, ["2"], 3)


def test_every_state_is_killed_in() -> None:
    """The matrix above is the whole table: a new state needs a new row."""
    covered = {
        "PENDING",
        *FORWARD,
        "ABORTING",
        "FAILED",
        "REVERTING",
        "REVERTED",
        "CANARY",
        "CANCELLED",
        "REJECTED",
        "SUPERSEDED",
    }
    assert covered == {state.value for state in State}
