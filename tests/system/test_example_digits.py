"""The example a newcomer copies: it runs as shown, is guarded and rolls back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
