"""From `interlock up` on a cold machine state to the first answered prediction, and what each room weighs. Prints a table; `--json` all of it.

    python bench/cold_start.py --runs 5             all rooms, first answer over HTTP through the gateway
    python bench/cold_start.py --runs 5 --replica   the inference process alone, first answer over gRPC

Each run starts all rooms with a state folder that already holds a served version, as after a restart of the machine, and asks the gateway
over HTTP until it answers. Peak memory is the resident set of each room's process when the answer came.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import psutil
from onnx import TensorProto, helper, numpy_helper

from interlock.api.oip import messages, rpc

ROOMS = ("inference", "controller", "trainer", "gateway")
PORTS = ("INFERENCE", "INFERENCE_METRICS", "TRAINER", "TRAINER_METRICS", "CONTROLLER", "CONTROLLER_METRICS", "GATEWAY")
BODY = json.dumps({"instances": [[0.0] * 16]}).encode()


def model() -> bytes:
    """A 16-64-64-8 MLP."""
    random, nodes, weights, name = np.random.default_rng(0), [], [], "x"
    for layer, (rows, columns) in enumerate(((16, 64), (64, 64), (64, 8))):
        weights.append(numpy_helper.from_array(random.standard_normal((rows, columns)).astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{layer}"], [f"h{layer}" if layer < 2 else "y"]))
        name = f"h{layer}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        weights,
    )
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    )


def environment(home: Path) -> dict[str, str]:
    """Free ports and the state folder."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    found = {f"INTERLOCK_{name}_PORT": str(s.getsockname()[1]) for name, s in zip(PORTS, sockets, strict=True)}
    for s in sockets:
        s.close()
    return {**os.environ, **found, "INTERLOCK_HOME": str(home)}


def post(env: dict[str, str], path: str, body: bytes) -> bool:
    """True when the gateway answers 200."""
    url = f"http://127.0.0.1:{env['INTERLOCK_GATEWAY_PORT']}{path}"
    request = urllib.request.Request(url, data=body, headers={"content-type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def run(env: dict[str, str], prepare: bytes | None = None) -> tuple[float, dict[str, float]]:
    """(seconds to the first answer, resident MiB by room) of one start."""
    start = time.perf_counter()
    log = Path(env["INTERLOCK_HOME"]) / "up.log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "interlock.cli", "up"], env=env, stdout=out, stderr=out)
    try:
        if prepare:
            while not post(env, "/reload", prepare):
                time.sleep(0.1)
        while not post(env, "/predict", BODY):
            if process.poll() is not None or time.perf_counter() - start > 60:
                sys.exit(f"no answer: {log.read_text()}")
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        memory = {}
        for child in psutil.Process(process.pid).children(recursive=True):
            room = next((room for room in ROOMS if f"interlock_{room}" in child.cmdline()), None)
            if room:
                memory[room] = child.memory_info().rss / 2**20
        return seconds, memory
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def predict(channel: grpc.Channel) -> None:
    """One prediction over gRPC, or RpcError."""
    tensor = messages.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 16])
    request = messages.ModelInferRequest(model_name="mlp", inputs=[tensor], raw_input_contents=[bytes(64)])
    method = f"/{rpc.SERVICE_NAME}/ModelInfer"
    call = channel.unary_unary(
        method, messages.ModelInferRequest.SerializeToString, messages.ModelInferResponse.FromString
    )
    call(request, timeout=5)


def assign(home: Path, port: str) -> None:
    """The state of a replica that serves the model, as it writes it itself."""
    version = {"artifact_uri": str(home / "model.onnx"), "digest": "", "origin": {}}
    route = {"epoch": 1, "weights": {"1": 1}, "stable_version": "", "updated_at": 0.0, "versions": {"1": version}}
    body = {"format": 1, "fencing_token": 1, "models": {"mlp": route}}
    (home / f"replica-{port}.json").write_text(json.dumps(body))


def run_replica(env: dict[str, str]) -> tuple[float, dict[str, float]]:
    """The same for the inference process alone."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "interlock_inference"], env=env, stdout=subprocess.DEVNULL)
    try:
        while True:
            with (
                contextlib.suppress(grpc.RpcError),
                grpc.insecure_channel(f"127.0.0.1:{env['INTERLOCK_INFERENCE_PORT']}") as channel,
            ):
                predict(channel)
                break
            if process.poll() is not None or time.perf_counter() - start > 60:
                sys.exit("the replica gave no answer")
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        return seconds, {"inference": psutil.Process(process.pid).memory_info().rss / 2**20}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def main() -> None:
    """Prints medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--replica", action="store_true", help="the inference process alone")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="interlock-cold-"))
    (home / "model.onnx").write_bytes(model())
    env = environment(home)
    if arguments.replica:
        assign(home, env["INTERLOCK_INFERENCE_PORT"])
        rows = [run_replica(env) for _ in range(arguments.runs)]
    else:
        run(env, json.dumps({"model": "mlp", "model_path": str(home / "model.onnx")}).encode())
        rows = [run(env) for _ in range(arguments.runs)]
    shutil.rmtree(home, ignore_errors=True)
    seconds = sorted(row[0] for row in rows)
    memory = {room: statistics.median(row[1][room] for row in rows) for room in ROOMS if room in rows[0][1]}
    if arguments.json:
        print(json.dumps({"seconds": seconds, "memory_mib": memory}, indent=1))
        return
    print(
        f"{'interlock_inference' if arguments.replica else 'interlock up'} -> first answered prediction: median {statistics.median(seconds):.2f} s (min {seconds[0]:.2f}, max {seconds[-1]:.2f}, {len(seconds)} runs)"
    )
    for room, mib in memory.items():
        print(f"{room:<12} {mib:6.0f} MiB resident")


if __name__ == "__main__":
    main()
