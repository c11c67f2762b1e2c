"""The supervisor inside the loop's own process: the same pure core as the trainer's, with its state in one JSON file. No network.

`report` is called by the loop's courier thread, `orders` by the loop; a lock holds the two apart. The state is persisted before an order
that follows from it can be seen.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from interlock.core import recovery, retention, supervision
from interlock.core.fields import parse, plain
from interlock.core.retention import Kept
from interlock.core.steps import StepRecord
from interlock.core.supervision import Supervision
from interlock.errors import InterlockError
from interlock.stores.artifacts import write_durably
from interlock.training.terms import (
    Begun,
    Changed,
    CheckpointInfo,
    DeleteOrder,
    Event,
    Hello,
    Order,
    PauseOrder,
    Result,
    RollBackOrder,
    Saved,
    Start,
    StopOrder,
)

_log = structlog.get_logger(__name__)


class Embedded:
    """Supervises one loop. `path` is the file of its state; `infos` is what retention needs to know of each checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._orders: list[Order] = []
        self._num_orders = 0
        self._infos: dict[str, CheckpointInfo] = {}
        self._pending: dict[str, recovery.Rollback] = {}
        self._state: Supervision | None = None

    @property
    def state(self) -> Supervision:
        """What is known; for tests and for people."""
        assert self._state is not None
        return self._state

    def start(self, hello: Hello) -> Start:
        """Takes up the state of an earlier process, if there is one; the policy is always the loop's."""
        with self._lock:
            stored = self._read()
            if stored is None:
                self._state = supervision.begin(hello.run, hello.policy)
                return Start(None, 1, 0)
            state, graceful = stored
            state = replace(state, policy=hello.policy, ledger=replace(state.ledger, paused=False))
            state, commands = supervision.restarted(state, graceful=graceful)
            self._state = state
            self._persist()
            restore = next((c.rollback for c in commands if isinstance(c, recovery.RollBack)), None)
            return Start(restore, state.ledger.attempt, state.ledger.last_seq)

    def _read(self) -> tuple[Supervision, bool] | None:
        try:
            body = json.loads(self._path.read_bytes())
            self._infos = {key: parse(CheckpointInfo, value) for key, value in body["infos"].items()}
            return parse(Supervision, body["supervision"]), bool(body["graceful"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, InterlockError) as error:
            _log.warning("supervision_unreadable", path=str(self._path), error=str(error))
            return None

    def _persist(self, *, graceful: bool = False) -> None:
        body = {"supervision": plain(self.state), "infos": plain(self._infos), "graceful": graceful}
        try:
            write_durably(self._path, json.dumps(body).encode())
        except OSError as error:
            _log.error("supervision_not_persisted", path=str(self._path), error=str(error))

    def report(self, events: Sequence[Event]) -> None:
        """Moves the state by each event; persists when the ledger changed."""
        with self._lock:
            before = self.state.ledger
            orders: list[Order] = []
            for event in events:
                orders += self._move(event)
            if self.state.ledger.entries != before.entries or self.state.ledger.rollbacks != before.rollbacks or orders:
                orders += self._expire()
                self._persist()
            self._orders += orders

    def _move(self, event: Event) -> list[Order]:
        commands: tuple[recovery.Command, ...] = ()
        if isinstance(event, StepRecord):
            self._state, _, commands = supervision.observed(self.state, event)
        elif isinstance(event, Begun):
            info = event.info
            self._infos[info.checkpoint] = info
            self._state, commands = supervision.begun(
                self.state, info.checkpoint, attempt=info.attempt, step=info.step, seq=info.seq, initial=event.initial
            )
        elif isinstance(event, Saved):
            self._infos[event.info.checkpoint] = event.info
            self._state, commands = supervision.durable(self.state, event.info.checkpoint)
        elif isinstance(event, Changed):
            self._changed(event)
        elif isinstance(event, Result):
            commands = self._result(event)
        return [order for command in commands for order in self._orders_of(command)]

    def _changed(self, event: Changed) -> None:
        checkpoint = event.info.checkpoint
        if event.deleted:
            self._infos.pop(checkpoint, None)
            self._state = supervision.gone(self.state, checkpoint)
        else:
            self._state = supervision.damaged(self.state, checkpoint, event.info.message)

    def _result(self, result: Result) -> tuple[recovery.Command, ...]:
        rollback = self._pending.pop(result.order, None)
        if rollback is None or not result.error:
            return ()
        _log.error("rollback_failed", rollback=rollback.rollback, error=result.error)
        try:
            self._state, commands = supervision.requested(
                self.state,
                checkpoint="",
                actor="guard",
                reason=f"{rollback.checkpoint} failed: {result.error}",
                plan=rollback.plan,
            )
        except InterlockError as error:
            self._state = supervision.paused(self.state)
            return (recovery.Pause(str(error)),)
        return commands

    def _orders_of(self, command: recovery.Command) -> list[Order]:
        _log.info("supervision_command", run=self.state.ledger.run, command=type(command).__name__, **plain(command))
        self._num_orders += 1
        name = f"embedded-{self._num_orders}"
        if isinstance(command, recovery.RollBack):
            self._pending[name] = command.rollback
            return [RollBackOrder(name, command.rollback)]
        if isinstance(command, recovery.Pause):
            return [PauseOrder(name, command.reason)]
        if isinstance(command, recovery.Stop):
            return [StopOrder(name, command.reason)]
        return []

    def _expire(self) -> list[Order]:
        policy = self.state.policy.retention
        kept = [
            Kept(
                entry.checkpoint,
                entry.seq,
                entry.state,
                metric=self._infos[entry.checkpoint].metrics.get(policy.best_metric),
            )
            for entry in self.state.ledger.entries
            if entry.checkpoint in self._infos
        ]
        in_use = retention.InUse(
            rollback_target=frozenset(rollback.checkpoint for rollback in self._pending.values()),
            in_flight=frozenset(entry.checkpoint for entry in self.state.ledger.entries if not entry.durable),
        )
        gone = retention.expired(kept, policy, in_use)
        for checkpoint in gone:
            self._infos.pop(checkpoint, None)
            self._state = supervision.gone(self.state, checkpoint)
        self._num_orders += bool(gone)
        return [DeleteOrder(f"embedded-{self._num_orders}", gone)] if gone else []

    def orders(self) -> list[Order]:
        """What is to be done, each once."""
        if not self._orders:
            return []
        with self._lock:
            orders, self._orders = self._orders, []
        return orders

    def close(self, error: str) -> None:
        """Persists that the loop ended, and how."""
        with self._lock:
            self._persist(graceful=not error)
