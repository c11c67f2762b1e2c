"""Gateway and inference in one process: the same answers, errors and headers as through the hop, with and without a gRPC listener."""

from __future__ import annotations

import asyncio
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from onnx import TensorProto

import onnx_models
from gateway_world import BAD, ROW, http_request, raw, tensor, world
from inline_world import inline, settings
from interlock.api.oip import messages, rpc
from interlock.runtime.channels import open_channel
from rooms import free_ports


def put(home: Path, version: str, body: bytes | None = None) -> None:
    onnx_models.write_version(home / "models" / "policy" / version, body or onnx_models.constant(float(version)))


def seen(answer: httpx.Response) -> tuple[int, Any, dict[str, str]]:
    """What must be the same in both forms: everything but ids and times."""
    body = answer.json()
    for changing in ("request_id", "trace_id", "traceparent", "metadata"):
        body.pop(changing, None)
    body.get("parameters", {}).pop("traceparent", None)
    headers = {k: v for k, v in answer.headers.items() if k.startswith("interlock") or k == "content-type"}
    return answer.status_code, body, headers


async def test_the_same_answers_and_refusals_as_through_the_hop(tmp_path: Path) -> None:
    put(tmp_path / "near", "1")
    asked: dict[str, tuple[str, Any]] = {name: (path, body) for name, (path, body, *_) in BAD.items()} | {
        "a row": ("/v2/models/policy/infer", {**ROW, "id": "abc"}),
        "a version": ("/v2/models/policy/versions/1/infer", ROW),
        "no such version": ("/v2/models/policy/versions/9/infer", ROW),
        "some outputs": ("/v2/models/policy/infer", {**ROW, "outputs": [{"name": "y"}]}),
        "no such output": ("/v2/models/policy/infer", {**ROW, "outputs": [{"name": "z"}]}),
        "a priority": ("/v2/models/policy/infer", {**ROW, "parameters": {"priority": 1, "timeout": 1_000_000}}),
        "a bad priority": ("/v2/models/policy/infer", {**ROW, "parameters": {"priority": "high"}}),
        "no rows": ("/v2/models/policy/infer", tensor([], [0, 4])),
        "plain": ("/predict", {"instances": [[0, 0, 0, 0]]}),
    }
    async with world(tmp_path / "far") as far, inline(settings(tmp_path / "near")) as (near, _):
        for name, (path, body) in asked.items():
            there, here = await far.http.post(path, json=body), await near.post(path, json=body)
            assert seen(here) == seen(there), name
            assert here.headers["traceparent"]
            assert here.headers["x-request-id"]


async def test_binary_tensors_and_pipelined_requests(tmp_path: Path) -> None:
    put(tmp_path, "1")
    rows = np.zeros((3, 4), np.float32)
    item = {"name": "x", "datatype": "FP32", "shape": [3, 4], "parameters": {"binary_data_size": rows.nbytes}}
    head = orjson.dumps({"inputs": [item], "parameters": {"binary_data_output": True}})
    length = {"inference-header-content-length": str(len(head))}
    async with inline(settings(tmp_path)) as (http, port):
        answer = await http.post("/v2/models/policy/infer", content=head + rows.tobytes(), headers=length)
        cut = int(answer.headers["inference-header-content-length"])
        got = np.frombuffer(answer.content[cut:], np.float32)
        assert got.tolist() == [1.0] * 12
        short = await http.post("/v2/models/policy/infer", content=head + rows.tobytes()[:-1], headers=length)
        assert (short.status_code, short.json()["field"]) == (400, "inputs[0].parameters.binary_data_size")
        body = orjson.dumps(ROW)
        heard = await raw(port, http_request(body) * 5)
        assert heard.count(b"HTTP/1.1 200") == 5


async def test_a_slow_model_waits_in_a_thread_and_meets_its_deadline(tmp_path: Path) -> None:
    put(tmp_path, "1", onnx_models.slow(1.0))
    async with inline(settings(tmp_path)) as (http, port):
        async with asyncio.TaskGroup() as group:
            several = [group.create_task(http.post("/v2/models/policy/infer", json=ROW)) for _ in range(5)]
        assert {answer.result().status_code for answer in several} == {200}
        late = await http.post("/v2/models/policy/infer", json=ROW, headers={"x-request-timeout-seconds": "0.000001"})
        assert (late.status_code, late.json()["reason"]) == (504, "DEADLINE_EXPIRED")
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(http_request(orjson.dumps(ROW)))
            await writer.drain()
            writer.close()
        async with asyncio.timeout(20):
            while 'interlock_slot_in_flight{model="policy",version="1"} 0.0' not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.02)


async def test_health_metrics_version_and_documentation_of_the_one_process(tmp_path: Path) -> None:
    put(tmp_path, "1")
    async with inline(settings(tmp_path)) as (http, _):
        await http.post("/v2/models/policy/infer", json=ROW)
        text = (await http.get("/metrics")).text
        for name in (
            "api_request_total",
            "interlock_infer_requests_total",
            "llm_model_loaded",
            "interlock_route_epoch",
        ):
            assert f"\n{name}{{" in text
        assert (
            "interlock_infer_requests_total_model=policy,version=1,code=OK"
            in (await http.get("/health/metrics/json")).json()
        )
        health = await http.get("/health")
        assert health.json() == {"status": "healthy", "rooms": {"inference": "up"}, "models": {"policy": "healthy"}}
        version = (await http.get("/version")).json()
        assert (version["model"], version["version"], version["epoch"]) == ("policy", "1", 1)
        assert (await http.get("/version", params={"model": "nobody"})).status_code == 404
        probe = await http.get("/health/llm", params={"model": "policy", "run_inference": "true"})
        assert probe.json()["inference_ready"]
        index = (await http.post("/v2/repository/index")).json()
        assert [(entry["version"], entry["state"]) for entry in index] == [("1", "READY")]
        assert (await http.get("/v2/models/policy/config")).json()["name"] == "policy"
        assert (await http.get("/docs")).status_code == 200


async def test_grpc_beside_http(tmp_path: Path) -> None:
    put(tmp_path, "1")
    (port,) = free_ports(1)
    async with (
        inline(settings(tmp_path, listen=True, port=port)) as (http, _),
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        request = messages.ModelInferRequest(model_name="policy", raw_input_contents=[bytes(16)])
        request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        answer = await rpc.Stub(channel).ModelInfer(request, timeout=10)
        assert answer.model_version == "1"
        assert (await http.post("/v2/models/policy/infer", json=ROW)).status_code == 200


async def test_nothing_to_serve_and_nobody_to_say_it_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as refused:
        async with inline(settings(tmp_path, repository="")):
            pass
    assert "inference.repository" in str(refused.value.exceptions[0])


async def num_answered(http: httpx.AsyncClient) -> float:
    counted: dict[str, float] = (await http.get("/health/metrics/json")).json()
    return counted.get("api_request_total_endpoint=/v2/models/{model}/infer,method=POST,status=200", 0.0)


async def test_a_caller_that_reads_late_gets_all_its_answers_and_is_waited_for(tmp_path: Path) -> None:
    put(tmp_path, "1")
    rows = 100_000
    item = {"name": "x", "datatype": "FP32", "shape": [rows, 4], "parameters": {"binary_data_size": rows * 16}}
    head = orjson.dumps({"inputs": [item], "parameters": {"binary_data_output": True}})
    length = b"inference-header-content-length: %d" % len(head)
    async with inline(settings(tmp_path)) as (http, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
        before = await num_answered(http)
        for _ in range(8):
            writer.write(http_request(head + bytes(rows * 16), length))
        await asyncio.sleep(0.3)
        answered = await num_answered(http) - before
        heard, size = [], 0
        while size < 8 * rows * 16:
            heard.append(await asyncio.wait_for(reader.read(1 << 20), 20))
            assert heard[-1], "the connection stays open"
            size += len(heard[-1])
        writer.close()
    assert answered < 8, "the answers to come are not made before the first ones are read"
    assert b"".join(heard).count(b"HTTP/1.1 200") == 8


async def test_a_request_that_comes_in_while_the_one_before_is_answered(tmp_path: Path) -> None:
    put(tmp_path, "1", onnx_models.slow(1.0))
    whole = http_request(orjson.dumps(ROW))
    async with inline(settings(tmp_path)) as (_, port):
        for cut in (5, 60, len(whole) - 5):
            heard = await raw(port, whole + whole[:cut], whole[cut:], pause=0.2)
            assert heard.count(b"HTTP/1.1 200") == 2, cut


LARGE = """
import http.client, json, sys
rows = 1 << 20
size = rows * 16 * 4
head = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 16], "parameters": {"binary_data_size": size}}],
                   "parameters": {"binary_data_output": True}}).encode()
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
for _ in range(2):
    connection.putrequest("POST", "/v2/models/policy/infer")
    connection.putheader("Content-Length", str(len(head) + size))
    connection.putheader("Inference-Header-Content-Length", str(len(head)))
    connection.endheaders(head)
    block = bytes(range(256)) * 4096
    for _ in range(size // len(block)):
        connection.send(block)
    answer = connection.getresponse()
    length = int(answer.getheader("Inference-Header-Content-Length"))
    head_out = json.loads(answer.read(length))
    assert answer.status == 200, head_out
    for _ in range(size // len(block)):
        assert answer.read(len(block)) == block
    assert answer.read() == b""
print(head_out["outputs"][0]["shape"])
"""


async def test_a_tensor_of_64_mib_is_copied_once_on_its_way_in_and_not_on_its_way_out(tmp_path: Path) -> None:
    """What the process holds at its peak: the body as it came, and what the engine made of it."""
    body = onnx_models.identity(TensorProto.FLOAT, ["batch", 16])
    onnx_models.write_version(tmp_path / "models" / "policy" / "1", body, columns=16)
    async with inline(settings(tmp_path, {"max_body_mb": 80})) as (_, port):
        tracemalloc.start()
        try:
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", LARGE, str(port), stdout=asyncio.subprocess.PIPE)  # fmt: skip
            out, _ = await process.communicate()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (process.returncode, out.strip()) == (0, b"[1048576, 16]")
    assert peak < 2.25 * (64 << 20), f"{peak / (64 << 20):.2f} times the tensor"
