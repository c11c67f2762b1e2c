"""The inference client and the load generator against a real replica and a real gateway's face of HTTP."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_models
from interlock.client import InferenceClient
from interlock.client.load import GrpcTarget, HttpTarget, Load
from interlock.errors import InvalidArgument, NotFound
from interlock.runtime import arrays
from replica_world import a_replica

INPUTS = {"x": np.zeros((1, 4), np.float32)}


async def test_numpy_in_numpy_out(tmp_path: Path) -> None:
    async with a_replica(tmp_path) as remote, InferenceClient(remote.url) as client:
        with pytest.raises(NotFound):
            await client.infer("policy", INPUTS)
        assert not await client.is_ready("policy")
        await remote.load("3", step=1500)
        await remote.route(1, "3")
        assert await client.is_ready("policy")
        answer = await client.infer("policy", {"x": np.ones((2, 4), np.float32)}, request_id="mine")
        assert answer["y"].tolist() == [[3.0] * 4] * 2
        assert (answer.version, answer.step, answer.epoch, answer.request_id) == (
            "models/policy/versions/3",
            1500,
            1,
            "mine",
        )
        assert answer.digest.startswith("blake3:")
        assert (await client.infer("policy", INPUTS, version="3", outputs=["y"])).epoch == 1
        assert (await client.metadata("policy")).inputs[0].name == "x"
        with pytest.raises(InvalidArgument) as wrong:
            await client.infer("policy", {"x": np.array([[1.0, 2.0, 3.0, 4.0]])})  # an array goes as it is: FP64
        assert wrong.value.field == "inputs[0].datatype"
        assert (await client.infer("policy", {"x": [[1, 2, 3, 4]]}))["y"].tolist() == [[3.0] * 4]
        with pytest.raises(InvalidArgument, match="unknown input 'z'"):
            await client.infer("policy", {"z": [1]})


async def test_text_goes_as_bytes(tmp_path: Path) -> None:
    async with a_replica(tmp_path) as remote, InferenceClient(remote.url) as client:
        path = tmp_path / "text.onnx"
        path.write_bytes(onnx_models.identity(8))
        await remote.prepare("1", str(path), model="text")
        from interlock.api.inference.v1 import runtime_service_pb2 as pb

        await remote.command("Warm", pb.WarmRequest(fence=remote.fence, version="models/text/versions/1"))
        await remote.route(1, "1", model="text")
        answer = await client.infer("text", {"x": ["a", "ü", ""]})
        assert answer["y"].tolist() == [b"a", "ü".encode(), b""]


def test_types_without_a_datatype_are_refused() -> None:
    with pytest.raises(ValueError, match="complex128"):
        arrays.datatype_of(np.zeros(1, np.complex128))


async def test_load_over_grpc_counts_versions_over_swaps(tmp_path: Path) -> None:
    async with a_replica(tmp_path) as remote:
        await remote.load("1")
        await remote.route(1, "1")
        load, stopping = Load([GrpcTarget(remote.url, "policy", INPUTS)], rate=200.0), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(stopping))
            await asyncio.sleep(0.2)
            with load.marked("swap"):
                await remote.swap(2, "1", "2")
            await asyncio.sleep(0.2)
            stopping.set()
        report = load.report()
    assert (report.failed, set(report.versions)) == (0, {"1", "2"})
    assert report.count == sum(report.versions.values())
    assert report.marks[0]["name"] == "swap"


async def answer_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: list[bytes]) -> None:
    """A server that answers every third request with 503 and closes after it."""
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            break
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        seen.append(head + await reader.readexactly(length))
        bad = len(seen) % 3 == 0
        body = b'{"error":"no","status":{"reason":"DRAINING"}}' if bad else b'{"model_version":"7"}'
        status = b"503 Service Unavailable\r\nconnection: close" if bad else b"200 OK"
        writer.write(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))
        if bad:
            break
    writer.close()


async def test_load_over_http_reads_answers_and_errors(tmp_path: Path) -> None:
    seen: list[bytes] = []
    enough = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_http(reader, writer, seen)
        if len(seen) >= 9:
            enough.set()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        load, stopping = (
            Load([HttpTarget(f"127.0.0.1:{port}", "policy", INPUTS, key="k")], rate=None, concurrency=1),
            asyncio.Event(),
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(stopping))
            await enough.wait()
            stopping.set()
    report: Any = load.report()
    assert report.failed == report.count // 3
    assert report.errors == {"DRAINING": report.failed}
    assert report.versions == {"7": report.count - report.failed}
    assert b"POST /v2/models/policy/infer HTTP/1.1" in seen[0]
    assert b"x-api-key: k" in seen[0]
    assert b'"datatype":"FP32","shape":[1,4]' in seen[0]


async def test_load_on_a_closed_port_counts_connections(unused_tcp_port: int) -> None:
    load, stopping = (
        Load([HttpTarget(f"127.0.0.1:{unused_tcp_port}", "policy", INPUTS)], rate=None, concurrency=1),
        asyncio.Event(),
    )
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run(stopping))
        await asyncio.sleep(0.05)
        stopping.set()
    assert set(load.report().errors) == {"CONNECTION"}
