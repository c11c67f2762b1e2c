"""The gateway's predictions over streams that stay open: errors whole, nobody waits behind anybody, a replica that comes back is asked again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_models
from gateway_world import BAD, ROW, world
from interlock.errors import DeadlineExceeded, InvalidArgument, NotFound, Unavailable
from interlock.runtime.access import KEY_HEADER
from interlock.runtime.channels import open_channel
from interlock.runtime.infer import TRACE, InferAnswer, InferRequest, Tensor
from interlock.runtime.telemetry import new_traceparent
from interlock_gateway.streams import Streams
from replica_world import Remote, a_replica
from rooms import free_ports

PATH = "/inference.GRPCInferenceService/ModelStreamInfer"


def row(model: str = "policy", **more: Any) -> InferRequest:
    return InferRequest(model, "", "", [Tensor("x", "FP32", [1, 4], np.zeros((1, 4), np.float32))], **more)


async def ask(streams: Streams, request: InferRequest, timeout: float = 10.0) -> InferAnswer:
    return await streams(request, timeout=timeout, metadata={KEY_HEADER: "", TRACE: new_traceparent()})


@asynccontextmanager
async def lines(home: Path, body: bytes | None = None, **inference: Any) -> AsyncIterator[tuple[Remote, Streams]]:
    async with a_replica(home, **inference) as replica, open_channel(replica.url) as channel:
        await replica.load("1", body)
        await replica.route(1, "1")
        yield replica, Streams(channel.stream_stream(PATH))


async def test_one_stream_carries_one_prediction_after_the_other(tmp_path: Path) -> None:
    async with lines(tmp_path) as (_, streams):
        trace = new_traceparent()
        for _ in range(5):
            answer = await streams(row(), timeout=5, metadata={KEY_HEADER: "", TRACE: trace})
            assert answer.outputs[0].array().tolist() == [[1.0] * 4]
            assert answer.parameters["traceparent"] == trace
        assert len(streams._kept) == 1
        async with asyncio.TaskGroup() as group:
            for _ in range(7):
                group.create_task(ask(streams, row()))
        assert len(streams._kept) == 7
        large = InferRequest("policy", "", "", [Tensor("x", "FP32", [50_000, 4], np.zeros((50_000, 4), np.float32))])
        assert np.asarray((await ask(streams, large)).outputs[0].array()).shape == (50_000, 4)


async def test_errors_come_whole_and_leave_the_stream_in_use(tmp_path: Path) -> None:
    async with lines(tmp_path) as (_, streams):
        with pytest.raises(NotFound) as lost:
            await ask(streams, row("nobody"))
        assert (lost.value.reason, lost.value.metadata) == ("MODEL_NOT_FOUND", {"model": "nobody"})
        wrong = InferRequest("policy", "", "", [Tensor("x", "FP32", [1, 3], bytes(12))])
        with pytest.raises(InvalidArgument) as refused:
            await ask(streams, wrong)
        assert (refused.value.reason, refused.value.field) == ("INVALID_TENSOR", "inputs[0].shape")
        assert len(streams._kept) == 1
        assert (await ask(streams, row())).version == "1"


async def test_nobody_waits_behind_anybody_and_a_deadline_gives_the_stream_up(tmp_path: Path) -> None:
    async with lines(tmp_path, onnx_models.slow(1.0, repeats=40)) as (replica, streams):
        await replica.load("2", model="quick")
        await replica.route(1, "2", model="quick")
        slow = asyncio.get_running_loop().create_task(ask(streams, row(), 20))
        await asyncio.sleep(0.02)
        for _ in range(20):
            await ask(streams, row("quick"))
        assert not slow.done()
        await slow
        with pytest.raises(DeadlineExceeded):
            await ask(streams, row(), 0.001)
        with pytest.raises(DeadlineExceeded) as asked:
            await ask(streams, row(parameters={"timeout": 1}))
        assert asked.value.reason == "DEADLINE_EXPIRED"
        gone = asyncio.get_running_loop().create_task(ask(streams, row()))
        await asyncio.sleep(0.02)
        gone.cancel()
        async with asyncio.timeout(20):
            while any(slot.in_flight_count for slot in (await replica.state()).slots):
                await asyncio.sleep(0.01)
        assert (await ask(streams, row("quick"))).version == "2"


async def test_a_replica_that_comes_back_is_asked_over_new_streams(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    async with open_channel(f"127.0.0.1:{port}") as channel:
        streams = Streams(channel.stream_stream(PATH))
        async with a_replica(tmp_path, port=port) as replica:
            await replica.load("1")
            await replica.route(1, "1")
            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(ask(streams, row()))
        with pytest.raises(Unavailable):
            await ask(streams, row())
        async with a_replica(tmp_path, port=port):  # it serves again what it was assigned
            async with asyncio.timeout(20):
                while True:
                    try:
                        answer = await ask(streams, row())
                        break
                    except (Unavailable, NotFound):
                        await asyncio.sleep(0.05)
            assert answer.version == "1"


async def test_the_gateway_says_the_same_over_streams_and_over_calls(tmp_path: Path) -> None:
    """A sampled trace takes the way of a call of its own: a span belongs to a call."""
    sampled = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    async with world(tmp_path) as w:
        for name, (path, body, *_) in {**BAD, "good": ("/v2/models/policy/infer", ROW)}.items():
            streamed, called = await w.http.post(path, json=body), await w.http.post(path, json=body, headers=sampled)
            told = [{k: v for k, v in a.json().items() if k in ("status", "reason", "field", "detail", "outputs")} for a in (streamed, called)]  # fmt: skip
            assert told[0] == told[1], name
