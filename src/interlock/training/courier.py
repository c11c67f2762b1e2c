"""The courier: a thread that takes what the loop leaves, writes it to the local log and tells the supervisor. The loop never waits for it.

The loop appends to a bounded deque (100,000 events: minutes of a fast loop; beyond it steps are counted as dropped, not stored). What is
appended for a step is a plain tuple: records are made of it here, many at once, every `FLUSH_SECONDS`. More often would take more from the
loop, which shares the interpreter; so a step is judged at most that much later (plus the judging), and an order obeyed at the next boundary.
A full disk or a supervisor that fails never stops the training: records that cannot be written wait in memory, within the same bound, and
are judged all the same.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import structlog

from interlock.core.steps import StepRecord
from interlock.stores.steplog import LocalLog
from interlock.training.terms import Event, Supervisor

_log = structlog.get_logger(__name__)
BOUND = 100_000
FLUSH_SECONDS = 0.05
_FLOAT = frozenset((float,))

RawStep = tuple[int, int, int, float, dict[str, Any]]
"""A StepRecord's fields; its metrics are floats, or one-element tensors of a device that nobody has waited for yet."""


class Courier:
    """Carries one loop's events. With `synchronous`, `flush` in the loop's own thread does all the work: for tests and short steps."""

    def __init__(self, run: str, log: LocalLog, supervisor: Supervisor, *, synchronous: bool) -> None:
        self._run = run
        self._log = log
        self._supervisor = supervisor
        self._outbox: deque[Event | RawStep] = deque()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._refused = ""
        self.num_dropped = 0
        self.synchronous = synchronous
        self._thread = (
            None if synchronous else threading.Thread(target=self._work, name="interlock-courier", daemon=True)
        )
        if self._thread:
            self._thread.start()

    def full(self) -> bool:
        """Whether the next step must be dropped; counts it."""
        if len(self._outbox) + self._log.num_waiting < BOUND:
            return False
        self.num_dropped += 1
        return True

    def put(self, event: Event | RawStep) -> None:
        """Leaves an event; costs an append."""
        self._outbox.append(event)

    def flush(self) -> None:
        """Carries everything that lies in the outbox."""
        with self._lock:
            batch = [_settled(self._outbox.popleft()) for _ in range(len(self._outbox))]
            self._store([event for event in batch if isinstance(event, StepRecord)])
            if batch:
                self._tell(batch)

    def _store(self, records: Sequence[StepRecord]) -> None:
        if not records and not self._log.num_waiting:
            return
        refused = ""
        try:
            self._log.append(self._run, records)
        except Exception as error:  # noqa: BLE001 - a full disk must not stop training
            refused = str(error)
        if refused and refused != self._refused:  # once, not twenty times a second
            _log.error("steps_not_stored", run=self._run, num_waiting=self._log.num_waiting, error=refused)
        if self._refused and not refused:
            _log.warning("steps_stored_again", run=self._run)
        self._refused = refused

    def _tell(self, batch: list[Event]) -> None:
        try:
            self._supervisor.report(batch)
        except Exception:  # noqa: BLE001 - a fault of the supervisor must not stop training
            _log.exception("supervisor_failed", run=self._run)

    def _work(self) -> None:
        while not self._closing.wait(FLUSH_SECONDS):
            self.flush()

    def close(self) -> None:
        """Carries what is left and ends the thread."""
        self._closing.set()
        if self._thread:
            self._thread.join(10)
        self.flush()


def _settled(event: Event | RawStep) -> Event:
    """The event; of a step its record, with numbers for device tensors: the wait for the device happens here, not in the loop."""
    if not isinstance(event, tuple):
        return event
    attempt, seq, step, time, metrics = event
    if not _FLOAT.issuperset(map(type, metrics.values())):
        metrics = {name: float(value) for name, value in metrics.items()}
    return StepRecord(attempt, seq, step, time, metrics)
