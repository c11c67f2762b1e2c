"""The example a newcomer copies: it runs as shown, is guarded and rolls back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rooms import running, until

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.system
def test_digits_is_rolled_back_and_recovers(tmp_path: Path) -> None:
    environment = {**os.environ, "INTERLOCK_HOME": str(tmp_path), "INTERLOCK_TRAINER_PORT": "1"}
    command = [sys.executable, str(ROOT / "examples/digits.py"), "--steps", "700", "--fault-at", "420"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"done: step 700, attempt (\d+), accuracy ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) == 2, "exactly one rollback"
    assert float(found[2]) > 0.9
    assert "rule=loss" in done.stdout or "rule=gradient-norm" in done.stdout or "rule=accuracy" in done.stdout


@pytest.mark.system
def test_digits_is_promoted_and_served_like_a_built_in_recipe(tmp_path: Path) -> None:
    """Somebody's own loop against running rooms: a known-good checkpoint becomes a version and answers, a fault is rolled back."""
    with running(tmp_path / "home") as rooms, rooms.http() as http:
        command = [
            sys.executable,
            str(ROOT / "examples/digits.py"),
            "--steps",
            "2500",
            "--fault-at",
            "620",
            "--pace-ms",
            "5",
        ]
        loop = subprocess.Popen(
            command, env=rooms.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            image = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [2, 64], "data": [0.5] * 128}]}

            def served() -> Any:
                answer = http.post("/v2/models/digits/infer", json=image)
                return answer if answer.status_code == 200 else None

            answer = until(served, "digits served", 90)
            (logits,) = answer.json()["outputs"]
            assert (logits["name"], logits["shape"]) == ("logits", [2, 10])
            first = answer.headers["interlock-step"]
            run = until(lambda: _run(http, lambda run: run["rollback_count"] >= 1), "the fault rolled back", 60)
            assert run["attempt"] == 2
            version = until(lambda: _newer(served(), first), "a better checkpoint promoted", 60)
            assert int(version.headers["interlock-step"]) > int(first)
            output, _ = loop.communicate(timeout=60)
            assert loop.returncode == 0, output
            assert "done: step 2500, attempt 2" in output
            until(lambda: _run(http, lambda run: run["state"] == "STATE_COMPLETED"), "the run's end")
        finally:
            loop.kill()


def _run(http: Any, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    run = http.get("/runs/digits").json()
    return run if condition(run) else None


def _newer(answer: Any, step: str) -> Any:
    return answer if answer is not None and answer.headers["interlock-step"] != step else None
