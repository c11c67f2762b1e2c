"""Other people's clients, unchanged: every call of tritonclient over gRPC and HTTP, KServe's client, and buf curl by reflection.

One process serves both faces (the inline form, its folder in explicit mode), so that the repository calls have an owner too. tritonclient's
HTTP client brings gevent and KServe's an older psutil: each runs in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import onnx_models
from inline_world import inline, settings
from rooms import ROOT, free_ports

KSERVE = ROOT / ".kserve" / "bin" / "python"

TRITON_REFUSED = """
def refuses(name, call):
    try:
        call()
    except InferenceServerException as error:
        refused[name] = [error.status(), error.message()]


refuses("no such model", lambda: client.load_model("nobody"))
refuses("override", lambda: client.load_model("policy", config="{}"))
refuses("classification", lambda: client.infer("policy", inputs, outputs=[triton.InferRequestedOutput("y", class_count=1)]))
refuses("system", lambda: client.get_system_shared_memory_status())
refuses("system register", lambda: client.register_system_shared_memory("r", "/k", 10))
refuses("system unregister", lambda: client.unregister_system_shared_memory())
refuses("cuda", lambda: client.get_cuda_shared_memory_status())
refuses("cuda register", lambda: client.register_cuda_shared_memory("r", b"aGFuZGxl", 0, 10))
refuses("cuda unregister", lambda: client.unregister_cuda_shared_memory("r"))
refuses("trace", lambda: client.get_trace_settings("policy"))
refuses("trace update", lambda: client.update_trace_settings(settings={"trace_level": "MAX"}))
refuses("logs", lambda: client.get_log_settings())
refuses("logs update", lambda: client.update_log_settings({"log_info": True}))
client.close()
print(json.dumps([seen, refused]))
"""

TRITON_HTTP = """
import json, sys
import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

client = triton.InferenceServerClient(sys.argv[2], concurrency=2)
seen, refused = {}, {}
client.load_model("policy", config=None)
seen["loaded newest"] = client.is_model_ready("policy", "2")
client.unload_model("policy")
seen["unloaded"] = not client.is_model_ready("policy")
client.load_model("policy")
seen["live"], seen["ready"] = client.is_server_live(), client.is_server_ready()
seen["model"], seen["none"] = client.is_model_ready("policy"), client.is_model_ready("none")
seen["server"] = client.get_server_metadata()["name"]
seen["metadata"] = client.get_model_metadata("policy", "2")["inputs"][0]["shape"]
seen["config"] = client.get_model_config("policy", "2")["name"]
seen["index"] = {m["version"]: m["state"] for m in client.get_model_repository_index()}
values = np.zeros((2, 4), np.float32)


def asked(binary_in, binary_out, compress=None):
    x = triton.InferInput("x", [2, 4], "FP32")
    x.set_data_from_numpy(values, binary_data=binary_in)
    outputs = [triton.InferRequestedOutput("y", binary_data=binary_out)]
    options = {"priority": 1, "timeout": 1_000_000, "request_id": "7", "parameters": {"own": "kept"}}
    return [x], outputs, options


for name, flags in {"json": (False, False), "binary in": (True, False), "binary out": (False, True), "binary": (True, True)}.items():
    inputs, outputs, options = asked(*flags)
    answer = client.infer("policy", inputs, outputs=outputs, **options)
    seen[name] = [answer.as_numpy("y").tolist(), answer.get_response()["id"], answer.get_response()["model_version"]]
inputs, outputs, options = asked(True, True)
seen["async"] = client.async_infer("policy", inputs, outputs=outputs).get_result().as_numpy("y").tolist()
seen["statistics"] = client.get_inference_statistics("policy")["model_stats"][0]["inference_count"]
client.unload_model("policy")


"""

TRITON_GRPC = """
import json, queue, sys
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

client = triton.InferenceServerClient(sys.argv[1])
seen, refused = {}, {}
client.load_model("policy")
seen["loaded newest"] = client.is_model_ready("policy", "2")
client.unload_model("policy")
seen["unloaded"] = not client.is_model_ready("policy")
client.load_model("policy")
seen["live"], seen["ready"] = client.is_server_live(), client.is_server_ready()
seen["model"], seen["none"] = client.is_model_ready("policy"), client.is_model_ready("none")
seen["server"] = client.get_server_metadata(as_json=True)["name"]
seen["metadata"] = list(client.get_model_metadata("policy", "2").inputs[0].shape)
seen["config"] = client.get_model_config("policy", "2").config.name
seen["index"] = {m.version: m.state for m in client.get_model_repository_index().models}
x = triton.InferInput("x", [2, 4], "FP32")
x.set_data_from_numpy(np.zeros((2, 4), np.float32))
inputs, outputs = [x], [triton.InferRequestedOutput("y")]
answer = client.infer("policy", [x], outputs=outputs, request_id="7", priority=1, timeout=1_000_000, client_timeout=10, parameters={"own": "kept"})
seen["infer"] = [answer.as_numpy("y").tolist(), answer.get_response().id, answer.get_response().model_version]
compressed = client.infer("policy", [x], compression_algorithm="gzip")
seen["compressed"] = compressed.as_numpy("y").tolist()
got = queue.Queue()
client.async_infer("policy", [x], lambda result, error: got.put((result, error)))
result, error = got.get(timeout=20)
seen["async"] = result.as_numpy("y").tolist()
client.start_stream(lambda result, error: got.put((result, error)))
for n in range(3):
    client.async_stream_infer("policy", [x], request_id=str(n), enable_empty_final_response=n == 2)
client.async_stream_infer("nobody", [x], request_id="lost")
streamed = [got.get(timeout=20) for _ in range(4)]
client.stop_stream()
seen["stream"] = [r.get_response().id for r, e in streamed if r is not None]
seen["stream refusal"] = "nobody" in str([e for r, e in streamed if e is not None][0])
seen["statistics"] = client.get_inference_statistics("policy").model_stats[0].inference_count
client.unload_model("policy")


"""

KSERVE_CLIENT = """
import asyncio, json, sys
import numpy as np
import grpc
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb, grpc_predict_v2_pb2_grpc as pb_grpc

seen = {}


def request():
    x = InferInput("x", [2, 4], "FP32")
    x.set_data_from_numpy(np.zeros((2, 4), np.float32), binary_data=False)
    return InferRequest(model_name="policy", infer_inputs=[x], request_id="7")


async def over_grpc():
    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        loaded = await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="policy"))
        seen["loaded"] = [loaded.model_name, loaded.isLoaded]
        unloaded = await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="policy"))
        seen["unloaded"] = [unloaded.model_name, unloaded.isUnloaded]
        await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="policy"))
        metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="policy"))
        seen["metadata"] = list(metadata.inputs[0].shape)
        seen["server"] = (await stub.ServerMetadata(pb.ServerMetadataRequest())).name
    async with InferenceGRPCClient(sys.argv[1]) as client:
        seen["grpc"] = [await client.is_server_live(), await client.is_server_ready(), await client.is_model_ready("policy")]
        answer = await client.infer(request())
        seen["grpc infer"] = [answer.outputs[0].as_numpy().tolist(), answer.id, answer.model_version]


async def over_http():
    client = InferenceRESTClient(config=RESTConfig(protocol="v2"))
    base = "http://" + sys.argv[2]
    seen["http"] = [await client.is_server_live(base), await client.is_server_ready(base), await client.is_model_ready(base, "policy")]
    answer = await client.infer(base, request(), model_name="policy")
    seen["http infer"] = [answer.outputs[0].as_numpy().tolist(), answer.id, answer.model_version]
    await client.close()


asyncio.run(over_grpc())
asyncio.run(over_http())
print(json.dumps(seen))
"""


@asynccontextmanager
async def both_faces(home: Path) -> AsyncIterator[tuple[str, str]]:
    """(gRPC, HTTP) addresses of one process with two versions of `policy` in its folder."""
    for version in ("1", "2"):
        onnx_models.write_version(home / "models" / "policy" / version, onnx_models.constant(float(version)))
    (port,) = free_ports(1)
    async with inline(settings(home, listen=True, port=port, repository_mode="explicit")) as (_, http_port):
        yield f"127.0.0.1:{port}", f"127.0.0.1:{http_port}"


async def run(*command: str | Path, **environment: str) -> str:
    """A program's standard output; its standard error when it fails."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, **environment}
    )
    async with asyncio.timeout(90):
        out, error = await process.communicate()
    assert process.returncode == 0, f"{out.decode()}\n{error.decode()}"
    return out.decode()


TWOS = [[2.0] * 4] * 2
COMMON = {
    "loaded newest": True, "unloaded": True, "live": True, "ready": True, "model": True, "none": False, "server": "interlock",
    "metadata": [-1, 4], "config": "policy", "index": {"1": "UNAVAILABLE", "2": "READY"}, "async": TWOS,
}  # fmt: skip
UNSUPPORTED = {
    "system", "system register", "system unregister", "cuda", "cuda register", "cuda unregister", "trace", "trace update", "logs", "logs update",
}  # fmt: skip


def check_refusals(refused: dict[str, Any], codes: dict[str, str]) -> None:
    for name in UNSUPPORTED:
        status, message = refused.pop(name)
        assert status == codes["unimplemented"], name
        assert "not supported here" in message
    assert refused.pop("no such model")[0] == codes["not found"]
    status, message = refused.pop("override")
    assert status == codes["unimplemented"]
    assert "parameters.config" in message
    status, message = refused.pop("classification")
    assert status in (codes["unimplemented"], codes["invalid"])
    assert "classification" in message
    assert not refused


async def test_every_call_of_tritonclient_over_http(tmp_path: Path) -> None:
    """JSON and the binary tensor extension."""
    async with both_faces(tmp_path) as addresses:
        seen, refused = json.loads(
            (await run(sys.executable, "-c", TRITON_HTTP + TRITON_REFUSED, *addresses)).splitlines()[-1]
        )
    whole = [TWOS, "7", "2"]
    answers = {"json": whole, "binary in": whole, "binary out": whole, "binary": whole, "statistics": 10}
    assert seen == {**COMMON, **answers}
    check_refusals(refused, {"unimplemented": "501", "not found": "404", "invalid": "400"})


async def test_every_call_of_tritonclient_over_grpc(tmp_path: Path) -> None:
    async with both_faces(tmp_path) as addresses:
        seen, refused = json.loads(
            (await run(sys.executable, "-c", TRITON_GRPC + TRITON_REFUSED, *addresses)).splitlines()[-1]
        )
    answers = {"infer": [TWOS, "7", "2"], "compressed": TWOS, "stream": ["0", "1", "2"], "stream refusal": True, "statistics": 12}  # fmt: skip
    assert seen == {**COMMON, **answers}
    codes = {"unimplemented": "StatusCode.UNIMPLEMENTED", "not found": "StatusCode.NOT_FOUND", "invalid": "StatusCode.INVALID_ARGUMENT"}  # fmt: skip
    check_refusals(refused, codes)


@pytest.mark.skipif(not KSERVE.exists(), reason="KServe's client is not there: `make kserve` puts it into .kserve/")
async def test_kserves_own_client_over_grpc_and_http(tmp_path: Path) -> None:
    """Its repository messages have the model's name in field 1."""
    async with both_faces(tmp_path) as addresses:
        out = await run(KSERVE, "-c", KSERVE_CLIENT, *addresses, PYTHONPATH="")
    whole = [TWOS, "7", "2"]
    assert json.loads(out.splitlines()[-1]) == {
        "loaded": ["policy", True], "unloaded": ["policy", True], "metadata": [-1, 4], "server": "interlock",
        "grpc": [True, True, True], "grpc infer": whole, "http": [True, True, True], "http infer": [TWOS, "7", None],  # it does not read the version
    }  # fmt: skip


CURLS: dict[str, tuple[Any, str]] = {
    # method: (request, what must stand in the answer)
    "ServerLive": ({}, '"live":true'),
    "ServerReady": ({}, '"ready":true'),
    "RepositoryModelLoad": ({"model_name": "policy"}, '"isLoaded":true'),
    "ModelReady": ({"name": "policy"}, '"ready":true'),
    "ServerMetadata": ({}, '"name":"interlock"'),
    "ModelMetadata": ({"name": "policy"}, '"datatype":"FP32"'),
    "ModelConfig": ({"name": "policy"}, '"dataType":"TYPE_FP32"'),
    "ModelInfer": (
        {
            "model_name": "policy",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "contents": {"fp32_contents": [0, 0, 0, 0]}}],
        },
        '"fp32Contents":[2,2,2,2]',
    ),
    "ModelStreamInfer": (
        {
            "model_name": "policy",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "contents": {"fp32_contents": [0, 0, 0, 0]}}],
        },
        '"fp32Contents":[2,2,2,2]',
    ),
    "ModelStatistics": ({"name": "policy"}, '"inferenceCount":"2"'),
    "RepositoryIndex": ({}, '"state":"READY"'),
    "RepositoryModelUnload": ({"model_name": "policy"}, '"isUnloaded":true'),
    "SystemSharedMemoryStatus": ({}, "unimplemented"),
    "SystemSharedMemoryRegister": ({}, "unimplemented"),
    "SystemSharedMemoryUnregister": ({}, "unimplemented"),
    "CudaSharedMemoryStatus": ({}, "unimplemented"),
    "CudaSharedMemoryRegister": ({}, "unimplemented"),
    "CudaSharedMemoryUnregister": ({}, "unimplemented"),
    "TraceSetting": ({}, "unimplemented"),
    "LogSettings": ({}, "unimplemented"),
}


async def test_every_call_by_buf_curl_and_reflection(tmp_path: Path) -> None:
    """No proto files on the client's side: the server describes itself."""
    from interlock.api.oip import rpc

    assert set(CURLS) == set(rpc.METHODS)
    buf = Path(sys.executable).parent / "buf"
    async with both_faces(tmp_path) as (grpc_address, _):
        for method, (request, expected) in CURLS.items():
            process = await asyncio.create_subprocess_exec(
                buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", json.dumps(request),
                f"http://{grpc_address}/{rpc.SERVICE_NAME}/{method}",
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, error = await asyncio.wait_for(process.communicate(), 30)
            said = (out + error).decode().replace(" ", "").replace("\n", "")
            assert expected in said, f"{method}: {said}"
