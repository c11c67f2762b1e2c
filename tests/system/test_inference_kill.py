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

import onnx_models
from controller_world import a_controller, state_of
from interlock.api.inference.v1 import runtime_service_pb2 as pb
from interlock.client.load import GrpcTarget, Load
from interlock.errors import Unavailable
from interlock.runtime.channels import open_channel
from replica_world import Remote, a_process, infer_request

pytestmark = pytest.mark.system


def assignment_file(home: Path) -> Path:
    """The one replica's."""
    return next(home.glob("replica-*.json"))


async def answering_version(remote: Remote, within_seconds: float = 30.0) -> str:
    """The version that answers, once one does."""
    watch = remote.runtime.WatchState(pb.WatchStateRequest())
    async with asyncio.timeout(within_seconds):
        while not (await watch.read()).state.routes:
            pass
    watch.cancel()
    return str((await remote.oip.ModelInfer(infer_request(), timeout=10)).model_version)


@pytest.mark.parametrize(
    ("failpoint", "survivor", "epoch"),
    [("load:2", "1", 1), ("warm:2", "1", 1), ("switch:2", "2", 2), ("drain:1", "2", 2)],
)
async def test_killed_at(tmp_path: Path, failpoint: str, survivor: str, epoch: int) -> None:
    """`switch` is after the assignment was written and before it came into force: the restart finishes it, as the controller will ask."""
    async with a_process(tmp_path, failpoint) as (remote, process):
        await remote.load("1")
        await remote.route(1, "1")
        assert await answering_version(remote) == "1"
        with pytest.raises(Unavailable):
            await remote.swap(2, "1", "2")
        assert await asyncio.wait_for(process.wait(), 30) == -signal.SIGKILL
    async with a_process(tmp_path) as (after, _):
        assert await answering_version(after) == survivor
        state = await after.state()
        assert [route.epoch for route in state.routes] == [epoch]
        await after.swap(epoch + 1, survivor, "3")  # and it goes on from there
        assert await answering_version(after) == "3"


@asynccontextmanager
async def kept_alive(home: Path, port: int, failpoint: str) -> AsyncIterator[list[int]]:
    """A replica that is started again when it dies, the failpoint set in its first life only; the exit codes of its lives."""
    ends: list[int] = []
    up = asyncio.Event()

    async def supervise() -> None:
        while True:
            async with a_process(home, "" if ends else failpoint, port) as (_, process):
                up.set()
                await process.wait()
                ends.append(process.returncode or 0)

    async with asyncio.TaskGroup() as group:
        supervising = group.create_task(supervise())
        await up.wait()
        try:
            yield ends
        finally:
            supervising.cancel()


@pytest.mark.parametrize("failpoint", ["load:2", "warm:2", "switch:2", "drain:1"])
async def test_the_controller_brings_a_killed_replica_to_where_it_belongs(
    tmp_path: Path, unused_tcp_port_factory: Any, failpoint: str
) -> None:
    """Two replicas; one dies in the swap and comes back. The other answers every request, and both end on the swap's outcome."""
    ports = [unused_tcp_port_factory() for _ in range(2)]
    homes = [tmp_path / "a", tmp_path / "b"]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    async with (
        kept_alive(homes[0], ports[0], failpoint) as ends,
        kept_alive(homes[1], ports[1], "") as others,
        a_controller(tmp_path, addresses) as controller,
        open_channel(addresses[0]) as first,
        open_channel(addresses[1]) as second,
    ):
        assert state_of(await controller.swap_to(await controller.register(1.0))) == "COMPLETED"
        load, stopping = (
            Load([GrpcTarget(addresses[1], "policy", {"x": np.zeros((1, 4), np.float32)})], rate=200.0),
            asyncio.Event(),
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(stopping))
            swap = await controller.swap_to(await controller.register(2.0))
            stopping.set()
        assert ends[:1] == [-signal.SIGKILL]
        assert others == []
        assert load.report().failed == 0, load.report().errors
        outcome = {"COMPLETED": "2", "FAILED": "1", "REVERTED": "1"}[state_of(swap)]
        for channel, port, home in ((first, ports[0], homes[0]), (second, ports[1], homes[1])):
            remote = Remote(home, channel, port)
            assert await settled_version(remote, (await controller.route()).epoch) == outcome


async def settled_version(remote: Remote, epoch: int) -> str:
    """The version that answers once the replica has the route of that epoch."""
    async with asyncio.timeout(60):
        while True:
            try:
                if [route.epoch for route in (await remote.state()).routes] == [epoch]:
                    return str((await remote.oip.ModelInfer(infer_request(), timeout=10)).model_version)
            except Unavailable:
                pass
            await asyncio.sleep(0.05)


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


async def test_a_killed_replica_takes_its_children_along_and_loads_them_again(tmp_path: Path) -> None:
    """A version of a MiB stays in a process of its own here; it ends with the replica, however that ends, and is there again after the restart."""
    settings = {"INTERLOCK_INFERENCE_ISOLATE_MB": "1"}
    async with a_process(tmp_path, **settings) as (remote, process):
        await remote.load("1", onnx_models.mlp((4, 512, 512, 4)))
        await remote.route(1, "1")
        assert await answering_version(remote) == "1"
        (child,) = psutil.Process(process.pid).children()
        assert (await remote.state()).memory_bytes > psutil.Process(process.pid).memory_info().rss
        process.kill()
        await process.wait()
        async with asyncio.timeout(10):
            while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.02)
    async with a_process(tmp_path, **settings) as (after, process):
        assert await answering_version(after) == "1"
        assert len(psutil.Process(process.pid).children()) == 1
