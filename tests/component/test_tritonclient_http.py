"""tritonclient's HTTP client, unchanged, against the gateway and a real replica. In a process of its own: it brings gevent."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from interlock.runtime.settings import Settings
from interlock_gateway.__main__ import serve
from replica_world import Remote, a_replica

STORY = """
import json, sys
import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

client = triton.InferenceServerClient(sys.argv[1])
seen = {
    "live": client.is_server_live(),
    "ready": client.is_server_ready(),
    "model": client.is_model_ready("policy"),
    "version": client.is_model_ready("policy", "1"),
    "none": client.is_model_ready("none"),
    "server": client.get_server_metadata()["name"],
    "metadata": client.get_model_metadata("policy"),
    "config": client.get_model_config("policy")["input"],
    "statistics": client.get_inference_statistics("policy")["model_stats"][0]["name"],
    "index": [(m["name"], m["version"], m["state"]) for m in client.get_model_repository_index()],
}
values = np.ones((2, 4), np.float32)


def ask(values, binary_in, binary_out, datatype="FP32"):
    x = triton.InferInput("x", list(values.shape), datatype)
    x.set_data_from_numpy(values, binary_data=binary_in)
    outputs = [triton.InferRequestedOutput("y", binary_data=binary_out)]
    return client.infer("policy", [x], outputs=outputs, request_id="r").as_numpy("y").tolist()


seen["json"] = ask(values, False, False)
seen["binary"] = [ask(values, True, False), ask(values, False, True), ask(values, True, True)]
try:
    ask(values.astype(np.int64), False, False, "INT64")
except InferenceServerException as error:
    seen["refused"] = [error.status(), error.message()]
client.close()
print(json.dumps(seen))
"""


@asynccontextmanager
async def a_gateway(replica: Remote) -> AsyncIterator[int]:
    """A gateway before the replica; its port."""
    nobody = {"port": 1}
    config = Settings(
        home=replica.home,
        probe_interval_seconds=0,
        inference={"port": replica.port},
        trainer=nobody,
        controller=nobody,
        gateway={"port": 0},
    )  # type: ignore[arg-type]
    stopping, started = asyncio.Event(), asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(config, stopping, started.set_result))
        try:
            yield await started
        finally:
            stopping.set()


async def story(port: int) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        STORY,
        f"127.0.0.1:{port}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    seen: dict[str, Any] = json.loads(out.splitlines()[-1])
    return seen


async def test_health_metadata_and_infer(tmp_path: Path) -> None:
    async with a_replica(tmp_path) as replica, a_gateway(replica) as port:
        await replica.load("1")
        await replica.route(1, "1")
        seen = await story(port)
    assert [seen[k] for k in ("live", "ready", "model", "version", "none")] == [True, True, True, True, False]
    assert seen["server"] == "interlock"
    assert seen["metadata"]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert seen["config"][0]["data_type"] == "TYPE_FP32"
    assert seen["statistics"] == "policy"
    assert seen["index"] == [["policy", "1", "READY"]]
    assert seen["json"] == [[1.0] * 4] * 2
    assert seen["binary"] == [seen["json"]] * 3
    status, message = seen["refused"]
    assert status == "400"
    assert "FP32" in message
