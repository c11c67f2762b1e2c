"""The trainer's own database: runs and what supervises them, checkpoints, rollbacks, orders, answered requests, and the step log.

Bodies are the plain form of dataclasses (`interlock.core.fields`) as JSON; what is looked up by is a column. One connection, one lock:
the trainer writes small rows a few times a second. WAL, synchronous NORMAL: see `steplog`.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interlock.core.fields import parse, plain
from interlock.core.recovery import Rollback
from interlock.core.supervision import Supervision
from interlock.errors import AlreadyExists
from interlock.stores.steplog import StepLog, open_database

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, create_time REAL NOT NULL, body TEXT NOT NULL, supervision TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS checkpoints (run TEXT NOT NULL, checkpoint TEXT NOT NULL, seq INTEGER NOT NULL, pinned INTEGER NOT NULL DEFAULT 0,
  body TEXT NOT NULL, PRIMARY KEY (run, checkpoint));
CREATE TABLE IF NOT EXISTS rollbacks (run TEXT NOT NULL, rollback TEXT NOT NULL, create_time REAL NOT NULL, body TEXT NOT NULL,
  PRIMARY KEY (run, rollback));
CREATE TABLE IF NOT EXISTS orders (number INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, order_id TEXT NOT NULL, done INTEGER NOT NULL,
  body BLOB NOT NULL, UNIQUE (run, order_id));
CREATE TABLE IF NOT EXISTS requests (request_id TEXT PRIMARY KEY, method TEXT NOT NULL, digest TEXT NOT NULL, answer TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run beside its supervision. `parameters` and `promotion` are JSON text; `owned` when its process is the trainer's child.

    Attributes:
        state: pending, running, paused, rolling_back, detached, completed, failed.
        graceful: the loop's last end was an orderly one.
    """

    run: str
    create_time: float
    state: str = "pending"
    recipe: str = ""
    parameters: str = "{}"
    promotion: str = ""
    message: str = ""
    update_time: float = 0.0
    pid: int = 0
    owned: bool = False
    graceful: bool = True
    servable: bool = False
    checkpoint_folder: str = ""
    max_steps: int = 0
    step: int = 0
    head_seq: int = 0
    latest: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RollbackRow:
    """One rollback beside the decision: rolling_back, completed, failed or paused; `reported` once the controller knows the outcome."""

    rollback: Rollback
    state: str
    create_time: float
    complete_time: float = 0.0
    decided_by: str = "trainer"
    quarantined: tuple[str, ...] = ()
    traceparent: str = ""
    order: str = ""
    reported: bool = False


def request_digest(body: bytes) -> str:
    """What tells two requests of one id apart."""
    return hashlib.blake2b(body, digest_size=16).hexdigest()


class TrainerStore:
    """All tables of one trainer."""

    def __init__(self, path: Path) -> None:
        self._db = open_database(path)
        self._lock = threading.RLock()
        self._db.executescript(SCHEMA)
        self.steps = StepLog(self._db, self._lock)

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing of what is written inside."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _all(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _do(self, sql: str, *values: Any) -> sqlite3.Cursor:
        with self._lock:
            return self._db.execute(sql, values)

    # --- runs ---

    def put_run(self, row: RunRow, supervision: Supervision) -> None:
        """Writes a run whole."""
        body, judged = json.dumps(plain(row)), json.dumps(plain(supervision))
        self._do("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", row.run, row.create_time, body, judged)

    def runs(self) -> list[tuple[RunRow, Supervision]]:
        """Every run, oldest first."""
        rows = self._all("SELECT body, supervision FROM runs ORDER BY create_time, run")
        return [(parse(RunRow, json.loads(body)), parse(Supervision, json.loads(judged))) for body, judged in rows]

    # --- checkpoints ---

    def put_checkpoint(self, run: str, checkpoint: str, seq: int, body: Mapping[str, Any]) -> None:
        """Writes a checkpoint; a pin stays."""
        self._do(
            "INSERT INTO checkpoints (run, checkpoint, seq, body) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (run, checkpoint) DO UPDATE SET seq = excluded.seq, body = excluded.body",
            run,
            checkpoint,
            seq,
            json.dumps(body),
        )

    def pin(self, run: str, checkpoint: str, pinned: bool) -> None:
        """Pins or unpins."""
        self._do("UPDATE checkpoints SET pinned = ? WHERE run = ? AND checkpoint = ?", int(pinned), run, checkpoint)

    def drop_checkpoint(self, run: str, checkpoint: str) -> None:
        """Forgets a checkpoint that is gone from disk."""
        self._do("DELETE FROM checkpoints WHERE run = ? AND checkpoint = ?", run, checkpoint)

    def checkpoints(self, run: str) -> list[tuple[dict[str, Any], bool]]:
        """(body, pinned) of every checkpoint, oldest first."""
        rows = self._all("SELECT body, pinned FROM checkpoints WHERE run = ? ORDER BY seq, checkpoint", run)
        return [(json.loads(body), bool(pinned)) for body, pinned in rows]

    # --- rollbacks ---

    def put_rollback(self, run: str, row: RollbackRow) -> None:
        """Writes a rollback whole."""
        body = json.dumps(plain(row))
        self._do(
            "INSERT OR REPLACE INTO rollbacks VALUES (?, ?, ?, ?)", run, row.rollback.rollback, row.create_time, body
        )

    def rollbacks(self, run: str) -> list[RollbackRow]:
        """Rollbacks of a run, oldest first."""
        rows = self._all("SELECT body FROM rollbacks WHERE run = ? ORDER BY create_time, rollback", run)
        return [parse(RollbackRow, json.loads(body)) for (body,) in rows]

    # --- orders ---

    def put_order(self, run: str, order: str, body: bytes) -> None:
        """Keeps an order until its result comes."""
        self._do("INSERT OR IGNORE INTO orders (run, order_id, done, body) VALUES (?, ?, 0, ?)", run, order, body)

    def finish_order(self, run: str, order: str) -> None:
        """The order's result came."""
        self._do("UPDATE orders SET done = 1 WHERE run = ? AND order_id = ?", run, order)

    def open_orders(self, run: str) -> list[bytes]:
        """Orders without a result, oldest first."""
        return [
            bytes(body)
            for (body,) in self._all("SELECT body FROM orders WHERE run = ? AND done = 0 ORDER BY number", run)
        ]

    def num_orders(self, run: str) -> int:
        """How many orders the run has ever had: the next one's number."""
        return int(self._all("SELECT count(*) FROM orders WHERE run = ?", run)[0][0])

    # --- requests ---

    def answered(self, request_id: str, method: str, digest: str) -> str | None:
        """What an earlier request of this id was answered; None for a new one or one without an id.

        Raises:
            AlreadyExists: `REQUEST_ID_REUSED`: the id came with another body.
        """
        rows = (
            self._all("SELECT method, digest, answer FROM requests WHERE request_id = ?", request_id)
            if request_id
            else []
        )
        if not rows:
            return None
        if tuple(rows[0][:2]) != (method, digest):
            raise AlreadyExists(
                f"request_id {request_id!r} was used for another request",
                reason="REQUEST_ID_REUSED",
                field="change.request_id",
                metadata={"request_id": request_id},
            )
        return str(rows[0][2])

    def answer(self, request_id: str, method: str, digest: str, answer: str) -> None:
        """Keeps the answer to a request that has an id."""
        if request_id:
            self._do("INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?)", request_id, method, digest, answer)
