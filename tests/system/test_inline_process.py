"""`interlock serve --inline` as a person starts it: one process, from a model file to an answer, and down in order."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

import onnx_models
from rooms import environment, until

pytestmark = [pytest.mark.system]
ROW = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}]}


def serve(env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "interlock.cli", "serve", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_one_process_serves_a_file_watches_it_and_stops_in_order(tmp_path: Path) -> None:
    model = tmp_path / "policy.onnx"
    model.write_bytes(onnx_models.constant(1.0))
    env = environment(tmp_path / "home", INFERENCE_REPOSITORY_POLL_SECONDS="0.1", INFERENCE_REPOSITORY_SETTLE_SECONDS="0.1")  # fmt: skip
    process = serve(env, "--inline", "--no-grpc", "--model", f"policy={model}")
    url = f"http://127.0.0.1:{env['INTERLOCK_GATEWAY_PORT']}"
    try:

        def answer() -> float | None:
            try:
                got = httpx.post(f"{url}/v2/models/policy/infer", json=ROW)
            except httpx.ConnectError:
                return None
            return float(got.json()["outputs"][0]["data"][0]) if got.status_code == 200 else None

        assert until(answer, "the first answer") == 1.0
        assert psutil.Process(process.pid).children(recursive=True) == []
        model.write_bytes(onnx_models.constant(2.0))
        until(lambda: answer() == 2.0, "the changed file")
        assert httpx.get(f"{url}/health").json()["models"] == {"policy": "healthy"}
        assert not [c for c in psutil.Process(process.pid).net_connections() if c.laddr.port == int(env["INTERLOCK_INFERENCE_PORT"])]  # fmt: skip
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0, out
        events = [json.loads(line)["event"] for line in out.splitlines() if line.startswith("{")]
        assert events[-1] == "stopped"
        assert "Traceback" not in out
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give a ROOM, or --inline"),
        (("gateway", "--inline"), "give a ROOM, or --inline"),
        (("--inline", "--model", "policy"), "NAME=PATH is expected"),
        (("controller", "--model", "a=b"), "belong to inference"),
        (("--inline", "--no-grpc"), "inference.repository or inference.models"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    process = serve(environment(tmp_path / "home"), *arguments)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 2, out
    assert told in out
    assert "Traceback" not in out
