"""docs/reference/metrics.md against what each room really serves."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from rooms import ROOT, running

pytestmark = [pytest.mark.system]
ROOMS = {
    "gateway": "GATEWAY",
    "inference": "INFERENCE_METRICS",
    "trainer": "TRAINER_METRICS",
    "controller": "CONTROLLER_METRICS",
}


def documented() -> dict[str, set[str]]:
    """Metric names by room."""
    found: dict[str, set[str]] = {}
    for section in (ROOT / "docs/reference/metrics.md").read_text().split("\n## ")[1:]:
        room, _, table = section.partition("\n")
        found[room.strip()] = set(re.findall(r"^\| `([a-z_]+)`", table, re.MULTILINE))
    return found


def served(text: str) -> set[str]:
    """Names in Prometheus text, without the client library's own."""
    names = set(re.findall(r"^# TYPE ([a-z_]+) ", text, re.MULTILINE))
    return {name for name in names if not name.startswith(("python_", "process_")) and not name.endswith("_created")}


def test_every_metric_is_documented_and_every_documented_one_is_there(tmp_path: Path) -> None:
    with running(tmp_path / "home") as rooms:
        texts = {room: httpx.get(f"http://127.0.0.1:{rooms.port(port)}/metrics").text for room, port in ROOMS.items()}
    assert {room: served(text) for room, text in texts.items()} == documented()
