"""Load from compiled clients, h2load for gRPC and wrk for HTTP, and what they report. Neither reads a gRPC status: a server's answers are checked beforehand.

Both keep a fixed number of requests in flight (closed loop): their latency at a full server says how long the queue is, not how good the server.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from interlock.api.oip import messages

MODEL = "bench"
WARM_SECONDS = 0.5
STREAMS = {1: (1, 1), 4: (1, 4), 16: (4, 4), 64: (8, 8)}
"""Requests in flight -> (connections, streams on each)."""
LUA = """
wrk.method = "POST"
wrk.body = io.open("{body}", "rb"):read("*a")
wrk.headers["Content-Type"] = "application/json"
"""


@dataclass(frozen=True, slots=True)
class Result:
    """One window."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float


def missing() -> list[str]:
    """Clients that are not installed."""
    return [name for name in ("h2load", "wrk", "taskset") if shutil.which(name) is None]


def rows_of(columns: int, rows: int) -> np.ndarray[Any, Any]:
    """The rows that every server is asked with."""
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


def grpc_message(x: np.ndarray[Any, Any]) -> bytes:
    """ModelInferRequest with raw contents."""
    request = messages.ModelInferRequest(model_name=MODEL, raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    return bytes(request.SerializeToString())


def json_body(x: np.ndarray[Any, Any], protocol: str) -> tuple[str, bytes]:
    """(path, body): the Open Inference Protocol's, or for servers without it, a plain document."""
    values = [round(float(value), 6) for value in x.ravel()]
    if protocol == "plain":
        return "/predict", orjson.dumps({"x": np.array(values).reshape(x.shape).tolist()})
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": values}
    return f"/v2/models/{MODEL}/infer", orjson.dumps({"inputs": [tensor]})


def h2load(port: int, message: bytes, in_flight: int, seconds: float, pin: str) -> Result:
    """Unary ModelInfer calls with a deadline of five seconds."""
    connections, streams = STREAMS[in_flight]
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder, "body"), Path(folder, "log")
        body.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
        out = _run(
            [
                *_pinned(pin), "h2load", "-c", str(connections), "-m", str(streams), "-D", str(max(1, round(seconds))),
                f"--warm-up-time={WARM_SECONDS * 1000:.0f}ms", "-d", str(body), "-H", "content-type: application/grpc",
                "-H", "te: trailers", "-H", "grpc-timeout: 5S", f"--log-file={log}",
                f"http://127.0.0.1:{port}/inference.GRPCInferenceService/ModelInfer",
            ]
        )  # fmt: skip
        times = sorted(int(line.split("\t")[2]) for line in log.read_text().splitlines())
    found = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored", out)
    rate = re.search(r"([\d.]+) req/s", out)
    if found is None or rate is None or int(found[2]) or int(found[3]) or not times:
        raise RuntimeError(f"h2load: {out[-800:]}")
    return Result(float(rate[1]), _at(times, 0.5) / 1e3, _at(times, 0.99) / 1e3)


def wrk(port: int, path: str, body: bytes, in_flight: int, seconds: float, pin: str) -> Result:
    """HTTP/1.1 POSTs, a connection per request in flight."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "body").write_bytes(body)
        Path(folder, "post.lua").write_text(LUA.format(body=Path(folder, "body")))
        command = [*_pinned(pin), "wrk", "-t1", f"-c{in_flight}", "--latency", "-s", f"{folder}/post.lua"]
        _run([*command, f"-d{max(1, round(WARM_SECONDS))}s", f"http://127.0.0.1:{port}{path}"])
        out = _run([*command, f"-d{max(1, round(seconds))}s", f"http://127.0.0.1:{port}{path}"])
    rate, p50, p99 = (
        re.search(pattern, out, re.MULTILINE)
        for pattern in (r"^Requests/sec:\s+([\d.]+)", r"^\s+50%\s+(\S+)$", r"^\s+99%\s+(\S+)$")
    )
    if rate is None or p50 is None or p99 is None or "Non-2xx" in out or "Socket errors" in out:
        raise RuntimeError(f"wrk: {out[-800:]}")
    return Result(float(rate[1]), _milliseconds(p50[1]), _milliseconds(p99[1]))


def _pinned(pin: str) -> list[str]:
    return ["taskset", "-c", pin] if pin else []


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: exit code {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
    return done.stdout


def _at(ordered: list[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _milliseconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}[unit]
