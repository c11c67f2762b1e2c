"""A real replica after hundreds of requests that ended in every way, with swaps among them: no file, thread or held version is left."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

import onnx_models
from interlock.api.oip import messages
from replica_world import Remote, a_process, infer_request

pytestmark = pytest.mark.system
ROUNDS = 40


def bad_request() -> messages.ModelInferRequest:
    made = infer_request()
    made.inputs[0].name = "no such input"
    return made


async def every_way(remote: Remote) -> None:
    """One request of each kind and end."""
    with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
        await remote.oip.ModelInfer(infer_request(), timeout=10)
    with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
        await remote.oip.ModelInfer(bad_request(), timeout=10)
    with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
        await remote.oip.ModelInfer(infer_request(), timeout=0.003)
    for cancelled in (remote.oip.ModelInfer(infer_request(), timeout=10), remote.oip.ModelStreamInfer(timeout=10)):
        await asyncio.sleep(0.002)
        cancelled.cancel()
    stream = remote.oip.ModelStreamInfer(timeout=10)
    with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
        for request in (infer_request(), bad_request(), infer_request()):
            await stream.write(request)
            await stream.read()
        await stream.done_writing()
        await stream.read()


async def test_nothing_is_left_in_a_real_process(tmp_path: Path) -> None:
    async with a_process(tmp_path, INTERLOCK_INFERENCE_TRY_LOADS="false") as (remote, process):
        await remote.load("1", onnx_models.slow(1.0, size=200, repeats=2))
        await remote.route(1, "1")
        for epoch in (2, 3):  # what is made once is made before it counts
            await asyncio.gather(*(every_way(remote) for _ in range(8)))  # noqa: TID251  a test's own
            await remote.swap(epoch, str(epoch - 1), str(epoch))
        seen = psutil.Process(process.pid)
        files, threads = seen.num_fds(), seen.num_threads()
        for round_ in range(ROUNDS):
            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(every_way(remote))
                if round_ % 8 == 0:
                    epoch += 1
                    group.create_task(remote.swap(epoch, str(epoch - 1), str(epoch)))
        async with asyncio.timeout(10):
            while any(slot.in_flight_count for slot in (await remote.state()).slots):
                await asyncio.sleep(0.02)
        answer = await asyncio.to_thread(httpx.get, f"http://127.0.0.1:{remote.metrics_port}/metrics")
        text = answer.text
        assert "interlock_infer_queue_depth 0.0" in text
        assert {
            line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith("interlock_slot_in_flight{")
        } == {"0.0"}
        assert [slot.version for slot in (await remote.state()).slots] == [f"models/policy/versions/{epoch}"]
        assert seen.num_fds() <= files
        assert seen.num_threads() <= threads
