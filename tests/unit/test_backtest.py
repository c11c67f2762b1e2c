"""The backtest on the recorded corpus: the table in the docs is what the code gives, and the default policy keeps its promises on it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from interlock.core import guard
from interlock.core.backtest import replay, score
from interlock.core.steps import StepRecord

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guard_backtest", ROOT / "bench/guard_backtest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_in_the_docs_is_what_the_code_gives(bench: ModuleType) -> None:
    page = (ROOT / "docs/guard-backtest.md").read_text()
    assert bench.table() in page, "run python bench/guard_backtest.py --write"


def test_robust_misfires_rarely_and_misses_nothing(bench: ModuleType) -> None:
    results = bench.scores()["robust"]
    assert sum(item.num_false for _, item in results if item.fault_step is None) <= 5
    assert all(item.lag is not None for _, item in results if item.fault_step is not None)
    sudden = [item.lag for name, item in results if name.startswith(("weights", "one NaN", "learning rate x1000"))]
    assert max(sudden) <= 3


def test_classic_misfires_again_and_again(bench: ModuleType) -> None:
    """Why it is not the default; DESIGN 6."""
    results = bench.scores()["classic"]
    assert sum(item.num_false for _, item in results if item.fault_step is None) > 50


def test_trips_in_a_cool_down_are_counted_once() -> None:
    records = [StepRecord(1, i, i, 0.0, {"kl": 0.5}) for i in range(1, 31)]
    trips = replay(guard.CLASSIC, records, save_every=100, cool_down=10)
    assert [trip.step for trip in trips] == [1, 12, 23]
    found = score(guard.CLASSIC, records, fault_step=15, save_every=100, cool_down=10)
    assert (found.num_false, found.lag) == (2, 8)
