"""The step log: gap-free, duplicate-free, exact, whoever appends and reads in whatever pieces."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.steps import StepRecord
from interlock.errors import FailedPrecondition
from interlock.stores.steplog import LocalLog, StepLog, decode, encode, live_line, open_database

METRICS = st.dictionaries(st.sampled_from(["loss", "kl", "reward", "grad norm"]), st.floats(allow_nan=True))


@pytest.fixture
def log(tmp_path: Path) -> StepLog:
    return StepLog(open_database(tmp_path / "deep/steps.db"))


def records(first: int, last: int, attempt: int = 1, back: int = 0) -> list[StepRecord]:
    return [StepRecord(attempt, seq, seq - back, float(seq), {"loss": 1.0 / seq}) for seq in range(first, last + 1)]


@given(st.lists(METRICS, min_size=1, max_size=20))
def test_a_chunk_is_read_back_exactly(rows: list[dict[str, float]]) -> None:
    written = [StepRecord(1, 10 + i, i, i * 0.1, row) for i, row in enumerate(rows)]
    for record, again in zip(written, decode(10, encode(written)), strict=True):
        assert (record.attempt, record.seq, record.step, record.time) == (
            again.attempt,
            again.seq,
            again.step,
            again.time,
        )
        assert set(record.metrics) == set(again.metrics)
        for name, value in record.metrics.items():
            assert again.metrics[name] == value or (math.isnan(value) and math.isnan(again.metrics[name]))


def test_duplicates_are_passed_over_and_gaps_refused(log: StepLog) -> None:
    assert len(log.append("r", records(1, 5))) == 5
    assert [record.seq for record in log.append("r", records(3, 8))] == [6, 7, 8]
    assert log.append("r", records(1, 8)) == []
    with pytest.raises(FailedPrecondition, match=r"seq 10\.\.11 does not follow 8 without a gap"):
        log.append("r", records(10, 11))
    assert log.head("r") == 8
    assert log.head("other") == 0


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 200), st.integers(1, 300))
def test_reading_from_any_seq_equals_slicing(sizes: list[int], start: int, limit: int) -> None:
    log = StepLog(sqlite3.connect(":memory:", isolation_level=None))
    everything: list[StepRecord] = []
    for size in sizes:
        batch = records(len(everything) + 1, len(everything) + size)
        log.append("r", batch)
        everything += batch
    assert log.read("r", start, limit) == everything[start - 1 : start - 1 + limit]


def test_the_live_line_leaves_out_what_a_rollback_undid(log: StepLog) -> None:
    log.append("r", records(1, 10))
    log.append("r", records(11, 18, attempt=2, back=6))  # steps 5..12 again
    line = live_line(log.read("r"))
    assert [(record.step, record.attempt) for record in line] == [(step, 1 if step < 5 else 2) for step in range(1, 13)]
    assert [record.seq for record in log.by_step("r", 5, 6)] == [5, 6, 11, 12]


def test_it_survives_being_opened_again(tmp_path: Path) -> None:
    first = open_database(tmp_path / "s.db")
    StepLog(first).append("r", records(1, 3))
    first.close()
    assert StepLog(open_database(tmp_path / "s.db")).read("r") == records(1, 3)


def test_what_a_full_disk_refuses_is_read_from_memory_and_stored_later(tmp_path: Path) -> None:
    connection = open_database(tmp_path / "steps.db")
    log = LocalLog(connection)
    log.append("r", records(1, 10))
    full = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={full}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        log.append("r", records(11, 600))
    with pytest.raises(sqlite3.OperationalError, match="full"):
        log.append("r", records(601, 610))
    assert log.num_waiting == 600
    assert log.head("r") == 610
    assert log.read("r", 5, 1000) == records(5, 610)
    assert log.read("r", 300, 20) == records(300, 319)
    connection.execute("PRAGMA max_page_count=100000")
    assert log.append("r", []) == records(11, 610)
    assert log.num_waiting == 0
    assert StepLog(open_database(tmp_path / "steps.db")).read("r", 1, 1000) == records(1, 610)


def test_a_lost_local_log_goes_on_after_what_the_trainer_has(tmp_path: Path) -> None:
    log = LocalLog(open_database(tmp_path / "steps.db"))
    log.begins_after = 500
    assert log.head("r") == 500
    log.append("r", records(501, 503))
    assert log.read("r", 501) == records(501, 503)
