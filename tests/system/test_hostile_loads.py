"""Hostile artifacts given to a real replica under traffic: each is refused, nothing of it runs, and what is served never notices."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

import hostile
from interlock.api.inference.v1 import runtime_service_pb2 as pb
from interlock.errors import InterlockError
from replica_world import Remote
from system.test_inference_kill import a_process, infer_request

pytestmark = [pytest.mark.system, pytest.mark.slow]


async def loaded(remote: Remote, version: str, path: Path) -> None:
    await remote.prepare(version, str(path))
    await remote.command("Warm", pb.WarmRequest(fence=remote.fence, version=f"models/policy/versions/{version}"))


async def test_a_replica_refuses_them_all_and_goes_on_serving(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    more = {
        "INTERLOCK_INFERENCE_TORCH_MODULES": '["torch_models"]',
        "PYTHONPATH": os.pathsep.join((str(Path(hostile.__file__).parent), os.environ.get("PYTHONPATH", ""))),
    }
    async with a_process(tmp_path / "home", **more) as (remote, process):
        await remote.load("1")
        await remote.route(1, "1")
        answers, stop = 0, asyncio.Event()

        async def caller() -> None:
            nonlocal answers
            while not stop.is_set():
                reply = await remote.oip.ModelInfer(infer_request(), timeout=10)
                assert reply.model_version == "1"
                answers += 1

        async with asyncio.TaskGroup() as group:
            group.create_task(caller())
            for number, name in enumerate(hostile.SAMPLE, 2):
                path = hostile.ARTIFACTS[name](tmp_path / name.replace(":", "-") / "v", canary)
                with pytest.raises(InterlockError) as refused:
                    await loaded(remote, str(number), path)
                assert refused.value.reason not in ("LOAD_CRASHED", "INTERNAL"), (name, refused.value)
                assert not canary.exists(), name
            stop.set()
        assert answers > 100
        assert process.returncode is None
        state = await remote.state()
        assert [slot.state for slot in state.slots if slot.version.endswith("/1")] == [pb.Slot.STATE_SERVING]
        assert not psutil.Process(process.pid).children(), "no child is left behind"
