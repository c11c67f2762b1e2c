"""The inference process killed at every point of a swap: it comes back with its last assignment, and never with a torn one."""

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
import psutil
import pytest

from interlock.api.inference.v1 import runtime_service_pb2 as pb
from interlock.api.oip import messages
from interlock.errors import Unavailable
from interlock.runtime.channels import open_channel
from replica_world import Remote

pytestmark = pytest.mark.system


@asynccontextmanager
async def a_process(
    home: Path, failpoint: str = "", port: int = 0
) -> AsyncIterator[tuple[Remote, asyncio.subprocess.Process]]:
    """A real replica process; killed at the end if it still lives."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("INTERLOCK_")}
    env |= {
        "INTERLOCK_HOME": str(home),
        "INTERLOCK_INFERENCE_PORT": str(port),
        "INTERLOCK_INFERENCE_METRICS_PORT": "0",
        "INTERLOCK_PROBE_INTERVAL_SECONDS": "0",
    }
    if failpoint:
        env["INTERLOCK_FAILPOINT"] = f"inference.{failpoint}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "interlock_inference", stdout=asyncio.subprocess.PIPE, env=env
    )
    assert process.stdout is not None
    try:
        event: dict[str, Any] = {}
        async with asyncio.timeout(60):
            while event.get("event") != "listening":
                event = json.loads(await process.stdout.readline())
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(process.stdout.read())
            address = event["address"]
            async with open_channel(address) as channel:
                yield Remote(home, channel, int(address.rsplit(":", 1)[1]), event["metrics_port"]), process
            if process.returncode is None:
                process.kill()
            await process.wait()
            await reading
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def assignment_file(home: Path) -> Path:
    """The one replica's."""
    return next(home.glob("replica-*.json"))


def infer_request() -> messages.ModelInferRequest:
    request = messages.ModelInferRequest(
        model_name="policy", raw_input_contents=[np.zeros((1, 4), np.float32).tobytes()]
    )
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    return request


async def answering_version(remote: Remote, within_seconds: float = 30.0) -> str:
    """The version that answers, once one does."""
    watch = remote.runtime.WatchState(pb.WatchStateRequest())
    async with asyncio.timeout(within_seconds):
        while not (await watch.read()).state.routes:
            pass
    watch.cancel()
    return str((await remote.oip.ModelInfer(infer_request(), timeout=10)).model_version)


@pytest.mark.parametrize(
    ("failpoint", "survivor", "epoch"), [("load", "1", 1), ("warm", "1", 1), ("switch", "2", 2), ("drain", "2", 2)]
)
async def test_killed_at(tmp_path: Path, failpoint: str, survivor: str, epoch: int) -> None:
    """`switch` is after the assignment was written and before it came into force: the restart finishes it, as the controller will ask."""
    async with a_process(tmp_path) as (before, _):
        await before.load("1")
        await before.route(1, "1")
    file = assignment_file(tmp_path)
    async with a_process(tmp_path) as (again, _):
        assert await answering_version(again) == "1"
    if failpoint in {"load", "warm"}:  # a restart would pass this point while it restores: begin with nothing assigned
        saved = file.read_bytes()
        file.unlink()
    async with a_process(tmp_path, failpoint) as (remote, process):
        if failpoint in {"switch", "drain"}:
            assert await answering_version(remote) == "1"
        with pytest.raises(Unavailable):
            await remote.swap(2, "1", "2")
        assert await asyncio.wait_for(process.wait(), 30) == -signal.SIGKILL
    if failpoint in {"load", "warm"}:
        file.write_bytes(saved)
    async with a_process(tmp_path) as (after, _):
        assert await answering_version(after) == survivor
        state = await after.state()
        assert [route.epoch for route in state.routes] == [epoch]
        await after.swap(epoch + 1, survivor, "3")  # and it goes on from there
        assert await answering_version(after) == "3"


async def _swap_until_dead(remote: Remote, epoch: int) -> None:
    """Version n at epoch n, one after the other."""
    with pytest.raises(Unavailable):
        await _swap_for_ever(remote, epoch)


async def _swap_for_ever(remote: Remote, epoch: int) -> None:
    while True:
        epoch += 1
        await remote.load(str(epoch))
        await remote.route(epoch, str(epoch))
        if epoch > 1:
            await remote.drain(str(epoch - 1))
            await remote.release(str(epoch - 1))


async def test_killed_at_random_moments_under_swaps(tmp_path: Path) -> None:
    """Whatever moment the kill finds, the file is whole and what it names is what serves."""
    delays = np.random.default_rng(7).uniform(0.0, 0.25, 4)
    epoch = 0
    for delay in delays:
        async with a_process(tmp_path) as (remote, process):
            if epoch:
                await answering_version(remote)
                routes = (await remote.state()).routes
                epoch = routes[0].epoch
                assert (await remote.oip.ModelInfer(infer_request(), timeout=10)).model_version == str(epoch)

            async with asyncio.TaskGroup() as group:
                group.create_task(_swap_until_dead(remote, epoch))
                await asyncio.sleep(0.3 + float(delay))
                process.kill()
        epoch = json.loads(assignment_file(tmp_path).read_text())["models"]["policy"]["epoch"]
    assert epoch > 0


async def test_sigterm_ends_cleanly_and_listens_on_loopback_only(tmp_path: Path) -> None:
    async with a_process(tmp_path) as (remote, process):
        await remote.load("1")
        await remote.route(1, "1")
        listening = [c for c in psutil.Process(process.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}
        assert {c.laddr.port for c in listening} == {remote.port, remote.metrics_port}
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_refusals_at_the_start(tmp_path: Path) -> None:
    base = {name: value for name, value in os.environ.items() if not name.startswith("INTERLOCK_")} | {
        "INTERLOCK_HOME": str(tmp_path)
    }
    for extra, text in (
        ({"INTERLOCK_HOST": "0.0.0.0"}, "there are no API keys"),
        ({"INTERLOCK_INFERENCE_PROT": "1"}, "did you mean INTERLOCK_INFERENCE_PORT"),
        ({"INTERLOCK_INFERENCE_PORT": "0", "INTERLOCK_INFERENCE_PROVIDERS": '["gpu"]'}, "'gpu' is not one of"),
    ):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "interlock_inference",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=base | extra,
        )
        async with asyncio.timeout(60):
            _, error = await process.communicate()
        assert process.returncode == 2
        assert text in error.decode()
