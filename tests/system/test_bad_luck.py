"""What a person does to a state folder or a running system by mistake, and what a machine does by bad luck: said precisely, survived."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import onnx_models
from rooms import environment, running, until

pytestmark = [pytest.mark.system]


def up(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`interlock up` that is expected to give up by itself."""
    return subprocess.run(
        [sys.executable, "-m", "interlock.cli", "up"], env=env, capture_output=True, text=True, timeout=40, check=False
    )


def test_one_home_has_one_supervisor(tmp_path: Path) -> None:
    """Two would take one controller's lease from each other for ever, and start every run twice."""
    with running(tmp_path / "home") as rooms:
        pids = rooms.pids()
        done = up(environment(tmp_path / "home"))
        assert done.returncode == 1
        assert f"is in use by another `interlock up` (process {rooms.process.pid})" in done.stderr
        assert "ready" not in done.stdout
        assert rooms.pids() == pids


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    with running(tmp_path / "one") as rooms:
        done = up(rooms.environment | {"INTERLOCK_HOME": str(tmp_path / "two")})
        assert done.returncode == 1
        assert "is taken by another process" in done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize("room", ["controller", "trainer"])
def test_a_damaged_database_is_said_in_one_line(tmp_path: Path, room: str) -> None:
    (tmp_path / f"{room}.db").write_bytes(b"not a database" * 1000)
    done = up(environment(tmp_path))
    assert done.returncode == 1
    assert f"{room} cannot start: error: {tmp_path / room}.db: file is not a database; restore it" in done.stderr
    assert "starting again" not in done.stdout


def test_a_database_damaged_while_running_does_not_stop_the_others(tmp_path: Path) -> None:
    with running(tmp_path) as rooms:
        gone = rooms.room("controller")
        for path in tmp_path.glob("controller.db*"):
            path.write_bytes(b"not a database" * 1000)
        gone.kill()
        log = tmp_path / "up.log"
        until(lambda: "file is not a database" in log.read_text(), "the damage is said", 30)
        assert rooms.process.poll() is None
        assert any("inference " in line and " up" in line for line in rooms.status())
        for path in tmp_path.glob("controller.db*"):
            path.unlink()
        until(lambda: any("controller " in line and " up" in line for line in rooms.status()), "mended", 30)


def test_an_unwritable_models_folder_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where a folder belongs")
    done = up(environment(tmp_path))
    assert done.returncode == 1
    assert "cannot start" in done.stderr
    assert str(tmp_path / "models") in done.stderr


def a_run(client: httpx.Client, run: str = "r1", **more: Any) -> None:
    """A PPO run that saves often."""
    body = {"run_id": run, "parameters": {"pace_ms": 5}, "save_every_steps": 50} | more
    answer = client.post("/rl/train", json=body)
    assert answer.status_code == 202, answer.text


def seqs(line: str) -> list[int]:
    """The sequence numbers in a `data:` line."""
    return [int(record["seq"]) for record in json.loads(line.removeprefix("data:"))["records"]]


def test_events_resume_and_do_not_hold_up_the_end(tmp_path: Path) -> None:
    ended: list[bool] = []

    def hold(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client, client.stream("GET", "/runs/r1/metrics/events") as open_:
            for _ in open_.iter_lines():
                pass
        ended.append(True)

    with running(tmp_path) as rooms, rooms.http() as client:
        a_run(client)
        first: list[int] = []
        with client.stream("GET", "/runs/r1/metrics/events") as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    first += seqs(line)
                    break
        with client.stream("GET", "/runs/r1/metrics/events", headers={"Last-Event-ID": str(first[-1])}) as stream:
            line = next(line for line in stream.iter_lines() if line.startswith("data:"))
            assert [*first, *seqs(line)] == list(range(1, seqs(line)[-1] + 1))
        for header in ("9" * 30, str(2**63)):
            answer = client.get("/runs/r1/metrics/events", headers={"Last-Event-ID": header})
            assert (answer.status_code, answer.json()["reason"]) == (400, "INVALID_REQUEST")
        for path in ("/swaps?page_size=-1", "/runs/r1/metrics/events?from_seq=-3", "/runs/r1/metrics?limit=-1"):
            assert client.get(path).status_code == 400, path
        holder = threading.Thread(target=hold, args=(rooms.url,))
        holder.start()
        time.sleep(1)  # the stream is open; a little later or earlier changes nothing
        gateway = rooms.room("gateway")
        gateway.terminate()
        holder.join(60)
        assert ended, "the open stream ended"
        assert "graceful shutdown exceeded" not in rooms.log("gateway"), "it was ended, not cut at the 30 s limit"


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own below `folder`, small enough to fill. It takes root."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Writes until nothing more fits."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def test_a_full_disk_costs_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    """Training goes on and stays guarded, the failure is said, what was saved stays, and saves work again once there is room."""
    with small_disk(tmp_path / "runs", 4), running(tmp_path) as rooms, rooms.http() as client:

        def run() -> dict[str, Any]:
            return dict(client.get("/runs/r1").json())

        def good() -> set[str]:
            listed = client.get("/runs/r1/checkpoints").json()["checkpoints"]
            return {c["name"] for c in listed if c["state"] == "STATE_GOOD"}

        a_run(client)
        before = until(good, "a good checkpoint", 40)
        fill(tmp_path / "runs" / "ballast")
        until(lambda: "SAVE_FAILED: [Errno 28]" in run()["message"], "the failure is said", 30)
        full = run()
        until(lambda: int(run()["seq"]) > int(full["seq"]) + 200, "steps still come in", 30)
        assert (run()["state"], good() & before) == ("STATE_RUNNING", before)
        assert client.post("/runs/r1/rollback").status_code == 200
        until(lambda: run()["attempt"] == 2 and run()["state"] == "STATE_RUNNING", "rolled back on a full disk", 20)
        (tmp_path / "runs" / "ballast").unlink()
        until(lambda: good() - before, "a new good checkpoint", 30)
        assert run()["message"] == ""
        steps = client.get("/runs/r1/metrics?limit=100000").json()["records"]
        assert [int(step["step"]) for step in steps] == list(range(1, len(steps) + 1)), "no step is missing"


def test_a_rollback_in_the_middle_of_a_swap_is_that_swap_going_back(tmp_path: Path) -> None:
    with running(tmp_path) as rooms, rooms.http() as client:
        for number in (1, 2):
            source = tmp_path / f"source-{number}"
            onnx_models.write_version(source, onnx_models.constant(float(number)))
            answer = client.post("/reload", json={"model": "m", "model_path": str(source)})
            assert answer.status_code == 200, answer.text
        swap = client.post("/swaps", json={"model": "m", "version": "1", "soak_seconds": 600}).json()["name"]
        until(lambda: client.get(f"/{swap}").json()["state"] == "STATE_SOAKING", "the swap soaks", 20)
        refused = client.post("/reload", json={"model": "m", "version": "2"})
        assert (refused.status_code, refused.json()["reason"]) == (409, "SWAP_IN_PROGRESS")
        answer = client.post("/admin/model/rollback", json={"model": "m"})
        assert (answer.status_code, answer.json()["success"], answer.json()["swap"]) == (200, True, swap)
        assert client.get("/version").json()["version"] == "2"


def test_everything_killed_at_once_in_a_rollback_and_a_promotion(tmp_path: Path) -> None:
    """The whole tree, by SIGKILL, with a run whose checkpoints are promoted: it starts again at once and goes on with one version."""
    with running(tmp_path) as rooms, rooms.http() as client:
        a_run(client, promote_to="policy", parameters={"pace_ms": 10})
        until(lambda: client.get("/version").json().get("version"), "a version serves", 60)
        assert client.post("/runs/r1/rollback").status_code == 200
        rooms.kill_all_and_start_again()
        run = until(lambda: serving(client, "/runs/r1"), "the run is known", 20)
        assert int(run["rollback_count"]) == 1
        until(lambda: int(client.get("/runs/r1").json()["seq"]) > int(run["seq"]) + 50, "the run goes on", 40)
        assert client.post("/predict", json={"instances": [[0.0, 0.0, 0.0, 0.0]]}).status_code == 200
        until(lambda: not client.get("/version").json()["active_swap"], "no swap is stuck", 30)
        assert len(client.get("/models").json()["models"][0]["route"]["weights"]) == 1
        steps = client.get("/runs/r1/metrics?limit=100000").json()["records"]
        assert [int(step["step"]) for step in steps] == list(range(1, len(steps) + 1)), "no step is missing"


def serving(client: httpx.Client, path: str) -> dict[str, Any]:
    """The resource, or nothing while it is not to be had."""
    try:
        answer = client.get(path)
    except httpx.HTTPError:
        return {}
    return dict(answer.json()) if answer.status_code == 200 else {}
