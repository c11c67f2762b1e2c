"""Serving through all rooms as processes: reload, version, rollback, bad artifacts, and what a killed room does to callers."""

from __future__ import annotations

import getpass
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import onnx_models
from interlock.client.load import GrpcTarget, HttpTarget, Load
from rooms import Rooms, in_background, running, until

pytestmark = [pytest.mark.system]
MODEL = "policy"
ROW = {"model": MODEL, "instances": [[0.0, 0.0, 0.0, 0.0]]}


def onnx_file(folder: Path, value: float, **more: Any) -> str:
    """A model that answers `value` for any input of 4 numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model-{value}.onnx"
    path.write_bytes(onnx_models.constant(value, **more))
    return str(path)


def reload(http: httpx.Client, path: str, **more: Any) -> httpx.Response:
    return http.post("/reload", json={"model": MODEL, "model_path": path, **more})


def answer(http: httpx.Client) -> float:
    response = http.post("/predict", json=ROW)
    assert response.status_code == 200, response.text
    value: float = response.json()["outputs"]["y"][0][0]
    return value


@contextmanager
def traffic(rooms: Rooms, rate: float | None) -> Iterator[Load]:
    """HTTP and gRPC predictions from another thread, until the block ends."""
    inputs = {"x": np.zeros((1, 4), np.float32)}
    load = Load(
        [
            GrpcTarget(f"127.0.0.1:{rooms.port('INFERENCE')}", MODEL, inputs),
            HttpTarget(f"127.0.0.1:{rooms.port('GATEWAY')}", MODEL, inputs),
        ],
        rate=rate,
    )
    with in_background(load):
        yield load


def test_reload_version_and_rollback(tmp_path: Path) -> None:
    """REQUIREMENTS S3, S7: reload by path, confirm by /version, go back by one command."""
    with running(tmp_path / "home") as rooms, rooms.http() as http:
        assert http.get("/health/ready").status_code == 503
        first = reload(http, onnx_file(tmp_path, 1.0))
        assert (first.status_code, first.json()["success"], first.json()["state"]) == (200, True, "completed"), (
            first.text
        )
        assert (answer(http), http.get("/version").json()["version"]) == (1.0, "1")
        assert reload(http, onnx_file(tmp_path, 2.0)).status_code == 200
        assert (answer(http), http.get("/version").json()["version"]) == (2.0, "2")
        again = reload(http, onnx_file(tmp_path, 2.0))
        assert (again.status_code, again.json()["success"], again.json()["swap"]) == (200, True, None)
        status = http.get(f"/health/llm/reload/{MODEL}").json()
        assert (status["state"], status["progress_percent"], status["error"]) == ("completed", 100.0, None)
        assert set(status) == {"model", "state", "progress_percent", "message", "started_at", "completed_at", "error"}
        assert http.get("/health/llm/reload/nobody").json()["state"] == "idle"
        back = http.post("/admin/model/rollback", json={"model": MODEL})
        assert back.status_code == 200, back.text
        assert (answer(http), http.get("/version").json()["version"]) == (1.0, "1")
        assert "policy" in rooms.cli("status").stdout
        explained = rooms.cli("model", "explain", MODEL).stdout
        assert "version 1" in explained
        receipt = json.loads(rooms.cli("swap", "receipt", last_swap(rooms), "--json").stdout)
        assert (receipt["state"], str(receipt["failed_count"])) == ("COMPLETED", "0")
        rooms.cli("swap", "create", MODEL, "2", "--reason", "drill")
        by_hand = json.loads(rooms.cli("swap", "receipt", last_swap(rooms), "--json").stdout)
        assert (by_hand["actor"], by_hand["reason"]) == (getpass.getuser(), "drill")


def last_swap(rooms: Rooms) -> str:
    swaps = json.loads(rooms.cli("swap", "list", "--json").stdout)
    return str(swaps[0]["name"].rsplit("/", 1)[-1])


def bad_artifacts(tmp_path: Path) -> dict[str, tuple[str, set[str]]]:
    """What is wrong -> (path, reasons that may be given)."""
    corrupt = tmp_path / "corrupt.onnx"
    corrupt.write_bytes(b"this is not a model")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(onnx_models.constant(3.0)[:-20])
    folder = tmp_path / "flipped"
    onnx_models.write_version(folder, onnx_models.constant(4.0))
    body = bytearray((folder / "model.onnx").read_bytes())
    body[len(body) // 2] ^= 1
    (folder / "model.onnx").write_bytes(bytes(body))
    return {
        "missing path": (str(tmp_path / "nothing.onnx"), {"ARTIFACT_MISSING"}),
        "corrupt ONNX": (str(corrupt), {"INVALID_ARTIFACT"}),
        "truncated ONNX": (str(cut), {"INVALID_ARTIFACT"}),
        "bit flipped": (str(folder), {"DIGEST_MISMATCH"}),
        "other signature": (onnx_file(tmp_path, 5.0, columns=7), {"SIGNATURE_MISMATCH"}),
        "other input name": (onnx_file(tmp_path, 6.0, input_name="q"), {"SIGNATURE_MISMATCH"}),
    }


def test_bad_artifacts_are_refused_and_the_served_version_is_untouched(tmp_path: Path) -> None:
    with running(tmp_path / "home") as rooms, rooms.http() as http:
        assert reload(http, onnx_file(tmp_path, 1.0)).status_code == 200
        for name, (path, reasons) in bad_artifacts(tmp_path).items():
            refused = reload(http, path)
            problem = refused.json()
            assert refused.status_code in {400, 404, 412, 500}, f"{name}: {problem}"
            assert problem["reason"] in reasons, f"{name}: {problem}"
            assert (answer(http), http.get("/version").json()["version"]) == (1.0, "1"), name
        unknown = http.post("/reload", json={"model": MODEL, "version": "99"})
        assert (unknown.status_code, unknown.json()["reason"]) == (404, "VERSION_NOT_FOUND")
        assert reload(http, onnx_file(tmp_path, 2.0)).status_code == 200
        assert answer(http) == 2.0


def test_swaps_under_load_fail_nothing(tmp_path: Path) -> None:
    """1,000 requests a second, HTTP and gRPC mixed, with swaps in the middle: 0 failed, and no answer of a version that did not serve."""
    with running(tmp_path / "home") as rooms, rooms.http() as http:
        assert reload(http, onnx_file(tmp_path, 1.0)).status_code == 200
        with traffic(rooms, rate=1000.0) as load:
            until(lambda: len(load.samples) > 200, "traffic")
            for value in (2.0, 3.0, 4.0, 5.0):
                with load.marked(f"swap to {value}"):
                    assert reload(http, onnx_file(tmp_path, value)).status_code == 200
            until(lambda: load.elapsed > 8, "traffic after the swaps")
        report = load.report()
        print(report.table())
        assert report.failed == 0, report.errors
        assert set(report.versions) == {"1", "2", "3", "4", "5"}
        assert report.count > 2000
        for receipt in json.loads(rooms.cli("swap", "list", "--json").stdout):
            assert receipt["state"] == "COMPLETED"


@pytest.mark.parametrize("room", ["controller", "trainer"])
def test_a_killed_room_costs_no_prediction(tmp_path: Path, room: str) -> None:
    with running(tmp_path / "home") as rooms, rooms.http() as http:
        assert reload(http, onnx_file(tmp_path, 1.0)).status_code == 200
        with traffic(rooms, rate=200.0) as load:
            until(lambda: len(load.samples) > 50, "traffic")
            gone = rooms.kill(room)
            rooms.until_back(room, gone)
            assert reload(http, onnx_file(tmp_path, 2.0)).status_code == 200
        assert load.report().failed == 0, load.report().errors
        assert (answer(http), http.get("/version").json()["version"]) == (2.0, "2")


def test_a_killed_replica_comes_back_with_what_it_served(tmp_path: Path) -> None:
    with running(tmp_path / "home") as rooms, rooms.http() as http:
        assert reload(http, onnx_file(tmp_path, 1.0)).status_code == 200
        assert reload(http, onnx_file(tmp_path, 2.0)).status_code == 200
        gone = rooms.kill("inference")
        refused = http.post("/predict", json=ROW)
        assert refused.status_code in {200, 503, 504}, refused.text
        rooms.until_back("inference", gone)
        until(lambda: http.post("/predict", json=ROW).status_code == 200, "the replica answers again")
        assert answer(http) == 2.0
        assert reload(http, onnx_file(tmp_path, 3.0)).status_code == 200
        assert answer(http) == 3.0


def test_admin_by_reflection_without_protos(tmp_path: Path) -> None:
    """`grpcurl` for admin reloads: what it does is reflection plus a call, and `buf curl` does the same."""
    buf = shutil.which("buf") or str(Path(sys.executable).parent / "buf")
    if not Path(buf).exists():
        pytest.skip("buf is not installed: pip install buf-bin")

    def curl(port: int, *arguments: str) -> str:
        done = subprocess.run(
            [buf, "curl", "--http2-prior-knowledge", "--protocol", "grpc", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with running(tmp_path / "home") as rooms, rooms.http() as http:
        assert reload(http, onnx_file(tmp_path, 1.0)).status_code == 200
        assert reload(http, onnx_file(tmp_path, 2.0)).status_code == 200
        for name, service in (
            ("INFERENCE", "inference.GRPCInferenceService"),
            ("CONTROLLER", "interlock.api.controller.v1.SwapService"),
            ("TRAINER", "interlock.api.trainer.v1.RunService"),
        ):
            assert service in curl(rooms.port(name), "--list-methods", f"http://127.0.0.1:{rooms.port(name)}")
        base = f"http://127.0.0.1:{rooms.port('INFERENCE')}"
        assert "FP32" in curl(
            rooms.port("INFERENCE"), "-d", '{"name": "policy"}', f"{base}/inference.GRPCInferenceService/ModelMetadata"
        )
        body = json.dumps({"spec": {"candidate_version": "models/policy/versions/1"}, "change": {"reason": "drill"}})
        url = f"http://127.0.0.1:{rooms.port('CONTROLLER')}/interlock.api.controller.v1.SwapService/CreateSwap"
        assert "swaps/" in curl(rooms.port("CONTROLLER"), "-d", body, url)
        until(lambda: answer(http) == 1.0, "the swap back to version 1")
