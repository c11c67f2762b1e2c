"""Two replicas on one machine, by one setting: the gateway spreads over them, a swap reaches both, and killing one fails no request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

import onnx_models
from interlock.client.load import HttpTarget, Load
from rooms import Rooms, in_background, running, until

pytestmark = [pytest.mark.system]
MODEL = "policy"


@contextmanager
def traffic(rooms: Rooms, rate: float) -> Iterator[Load]:
    """Predictions over HTTP from another thread, until the block ends."""
    target = HttpTarget(f"127.0.0.1:{rooms.port('GATEWAY')}", MODEL, {"x": np.zeros((1, 4), np.float32)})
    with in_background(Load([target], rate=rate)) as load:
        yield load


def reload(rooms: Rooms, path: Path) -> httpx.Response:
    with rooms.http() as http:
        return http.post("/reload", json={"model": MODEL, "model_path": str(path)})


def metrics(rooms: Rooms, number: int) -> str:
    """What a replica serves; empty while it is away."""
    try:
        return httpx.get(f"http://127.0.0.1:{rooms.port('INFERENCE_METRICS') + 10 * number}/metrics").text
    except httpx.TransportError:
        return ""


def answered(rooms: Rooms, number: int, version: str) -> float:
    """Predictions of a version by a replica."""
    wanted = f'interlock_infer_requests_total{{code="OK",model="{MODEL}",version="{version}"}}'
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics(rooms, number).splitlines() if line.startswith(wanted))


def second(rooms: Rooms) -> psutil.Process:
    """The process of the second replica."""
    port = str(rooms.port("INFERENCE") + 10)
    return next(
        child
        for child in psutil.Process(rooms.process.pid).children()
        if "interlock_inference" in child.cmdline() and child.environ()["INTERLOCK_INFERENCE_PORT"] == port
    )


def test_two_replicas(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        (tmp_path / f"{value}.onnx").write_bytes(onnx_models.constant(value))
    with running(tmp_path / "home", INFERENCE_REPLICAS="2") as rooms:
        assert "inference-2" in "".join(rooms.status())
        assert reload(rooms, tmp_path / "1.0.onnx").status_code == 200
        with traffic(rooms, 150.0) as load:
            until(lambda: answered(rooms, 0, "1") > 20 and answered(rooms, 1, "1") > 20, "both answer")
            assert reload(rooms, tmp_path / "2.0.onnx").status_code == 200
            until(lambda: answered(rooms, 0, "2") > 20 and answered(rooms, 1, "2") > 20, "both answer the new version")
            killed = second(rooms)
            killed.kill()
            killed.wait(10)
            until(lambda: answered(rooms, 1, "2") > 20, "the killed one serves again")
            assert second(rooms).pid != killed.pid
        report = load.report()
    assert report.count > 300
    assert report.failed == 0, report.table()


def test_replicas_need_ports_of_their_own() -> None:
    from interlock.runtime.settings import Settings

    settings = Settings(inference={"replicas": 3})  # type: ignore[arg-type]
    assert settings.inference_addresses == ["127.0.0.1:8001", "127.0.0.1:8011", "127.0.0.1:8021"]
    assert settings.replica_addresses == settings.inference_addresses
    elsewhere = Settings(controller={"replicas": ["10.0.0.1:8001"]})  # type: ignore[arg-type]
    assert elsewhere.replica_addresses == ["10.0.0.1:8001"]
