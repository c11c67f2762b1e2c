"""The durable log of step records: columnar chunks in SQLite, append-only, gap-free by seq. It judges nothing.

    chunks(run, seq_lo, seq_hi, step_lo, step_hi, num_records, body)

One chunk is one appended batch, its metrics as columns of doubles: a row per step would cost ten times as much. A chunk's body is a
JSON header line (number of records, metric names) and then the columns: attempts, steps, times, and for each metric its values and one
byte per record that says whether it has one, so that NaN stays a value and absence stays absence.

WAL with synchronous NORMAL: a crash of the process loses nothing that `append` returned from; a power cut may lose the last moments,
which the loop sends again from its own log.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

from interlock.core.steps import StepRecord
from interlock.errors import FailedPrecondition
from interlock.stores.sqlite import opening

CHUNK = 256
SCHEMA = """
CREATE TABLE IF NOT EXISTS chunks (
  run TEXT NOT NULL, seq_lo INTEGER NOT NULL, seq_hi INTEGER NOT NULL, step_lo INTEGER NOT NULL, step_hi INTEGER NOT NULL,
  num_records INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (run, seq_lo)
) WITHOUT ROWID
"""


def open_database(path: Path) -> sqlite3.Connection:
    """A connection in WAL mode that may be used from any thread, one at a time. Raises as `sqlite.opening`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with opening(path):
        connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10.0)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("SELECT count(*) FROM sqlite_master")
    return connection


def encode(records: Sequence[StepRecord]) -> bytes:
    """A chunk's body."""
    names = sorted({name for record in records for name in record.metrics})
    head = json.dumps({"num": len(records), "metrics": names}).encode() + b"\n"
    columns = [
        array("q", (record.attempt for record in records)).tobytes(),
        array("q", (record.step for record in records)).tobytes(),
        array("d", (record.time for record in records)).tobytes(),
    ]
    for name in names:
        columns.append(array("d", (record.metrics.get(name, 0.0) for record in records)).tobytes())
        columns.append(bytes(name in record.metrics for record in records))
    return head + b"".join(columns)


def decode(seq_lo: int, body: bytes) -> list[StepRecord]:
    """The records of a chunk."""
    end = body.index(b"\n")
    head = json.loads(body[:end])
    num, view, at = head["num"], memoryview(body), end + 1

    def column(code: str) -> Sequence[float]:
        nonlocal at
        values = array(code, bytes(view[at : at + 8 * num]))
        at += 8 * num
        return cast(Sequence[float], values.tolist())

    attempts, steps, times = column("q"), column("q"), column("d")
    metrics: list[dict[str, float]] = [{} for _ in range(num)]
    for name in head["metrics"]:
        values, present = column("d"), view[at : at + num]
        at += num
        for row, value, there in zip(metrics, values, present, strict=True):
            if there:
                row[name] = value
    return [StepRecord(int(attempts[i]), seq_lo + i, int(steps[i]), times[i], metrics[i]) for i in range(num)]


class StepLog:
    """Step records of any number of runs in one database."""

    def __init__(self, connection: sqlite3.Connection, lock: threading.RLock | None = None) -> None:
        self._connection = connection
        self._lock = lock or threading.RLock()
        with self._lock:
            connection.execute(SCHEMA)

    def head(self, run: str) -> int:
        """The highest seq stored; 0 when there is none."""
        return self._stored_head(run)

    def _stored_head(self, run: str) -> int:
        with self._lock:
            row = self._connection.execute(
                "SELECT seq_hi FROM chunks WHERE run = ? ORDER BY seq_lo DESC LIMIT 1", (run,)
            ).fetchone()
        return int(row[0]) if row else 0

    def append(self, run: str, records: Sequence[StepRecord]) -> list[StepRecord]:
        """Stores what is new and returns it; records that are stored already are passed over.

        Raises:
            FailedPrecondition: `SEQ_GAP`: the first new record does not follow the head.
        """
        with self._lock:
            head = self._stored_head(run)
            fresh = [record for record in records if record.seq > head]
            if not fresh:
                return []
            expected = range(head + 1, head + 1 + len(fresh))
            if any(record.seq != seq for record, seq in zip(fresh, expected, strict=True)):
                raise FailedPrecondition(
                    f"run {run}: seq {fresh[0].seq}..{fresh[-1].seq} does not follow {head} without a gap",
                    reason="SEQ_GAP",
                    metadata={"run": run, "head": str(head), "first": str(fresh[0].seq)},
                )
            steps = [record.step for record in fresh]
            row = (run, fresh[0].seq, fresh[-1].seq, min(steps), max(steps), len(fresh), encode(fresh))
            self._connection.execute("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        return fresh

    def read(self, run: str, from_seq: int = 1, limit: int = 1000) -> list[StepRecord]:
        """At most `limit` records from `from_seq` on, in order."""
        found: list[StepRecord] = []
        with self._lock, closing(self._connection.cursor()) as rows:
            rows.execute(
                "SELECT seq_lo, body FROM chunks WHERE run = ? AND seq_lo >= "
                "(SELECT coalesce(max(seq_lo), 0) FROM chunks WHERE run = ? AND seq_lo <= ?) ORDER BY seq_lo",
                (run, run, from_seq),
            )
            for seq_lo, body in rows:  # chunk by chunk: no more are decoded than are wanted
                found += (record for record in decode(seq_lo, body) if record.seq >= from_seq)
                if len(found) >= limit:
                    break
        return found[:limit]

    def by_step(self, run: str, from_step: int, to_step: int) -> Iterator[StepRecord]:
        """Every record of every attempt with a step in the inclusive range, in order of seq."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT seq_lo FROM chunks WHERE run = ? AND step_hi >= ? AND step_lo <= ? ORDER BY seq_lo",
                (run, from_step, to_step),
            ).fetchall()
        for (seq_lo,) in rows:
            with self._lock:
                body = self._connection.execute(
                    "SELECT body FROM chunks WHERE run = ? AND seq_lo = ?", (run, seq_lo)
                ).fetchone()[0]
            yield from (record for record in decode(seq_lo, body) if from_step <= record.step <= to_step)


class LocalLog(StepLog):
    """A loop's own log of its one run. What the disk refuses stays in memory, can be read, and is written first when the disk is back.

    Attributes:
        begins_after: a seq that the trainer has stored; a log that was lost or cut goes on after it.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        self._waiting: list[StepRecord] = []
        self.begins_after = 0

    @property
    def num_waiting(self) -> int:
        """Records that are not on disk yet."""
        return len(self._waiting)

    def _stored_head(self, run: str) -> int:
        return max(super()._stored_head(run), self.begins_after)

    def head(self, run: str) -> int:
        """The highest seq stored or waiting."""
        with self._lock:
            return self._waiting[-1].seq if self._waiting else self._stored_head(run)

    def append(self, run: str, records: Sequence[StepRecord]) -> list[StepRecord]:
        """Stores what is waiting, then these.

        Raises:
            sqlite3.Error: the disk refuses; the records wait.
        """
        with self._lock:
            self._waiting += records
            stored: list[StepRecord] = []
            while self._waiting:
                stored += super().append(run, self._waiting[:CHUNK])
                del self._waiting[:CHUNK]
            return stored

    def read(self, run: str, from_seq: int = 1, limit: int = 1000) -> list[StepRecord]:
        """As the log's, and then what is waiting."""
        with self._lock:
            found = super().read(run, from_seq, limit)
            after = found[-1].seq + 1 if found else from_seq
            return (found + [record for record in self._waiting if record.seq >= after])[:limit]


def live_line(records: Iterable[StepRecord]) -> list[StepRecord]:
    """Only what no rollback undid: of the records of one step, the youngest attempt's; an attempt cuts off what it went behind."""
    line: list[StepRecord] = []
    for record in records:
        while line and line[-1].attempt < record.attempt and line[-1].step >= record.step:
            line.pop()
        line.append(record)
    return line
