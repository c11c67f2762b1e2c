"""Says what was written: log events and metrics from the store's outbox, in order, at least once, never before the write.

The cursor moves after the announcement, so a crash repeats one rather than losing it; metrics count from the process's start.
"""

from __future__ import annotations

import sqlite3

import structlog

from interlock.runtime.changed import Changed
from interlock.stores.controller import ControllerStore, OutboxEntry
from interlock_controller import metrics

_log = structlog.get_logger(__name__)


class Announcer:
    """Empties the outbox whenever something changed."""

    def __init__(self, store: ControllerStore, changed: Changed) -> None:
        self._store = store
        self._changed = changed

    async def run(self) -> None:
        """Announces until cancelled."""
        while True:
            woken = self._changed.next()
            try:
                while self.announce():
                    pass
            except sqlite3.OperationalError as error:  # e.g. disk full: said again once the cursor can be moved
                _log.error("store_failed", problem=str(error))
            await woken.wait()

    def announce(self) -> int:
        """Announces what is there; how many entries that were."""
        entries = self._store.outbox()
        for entry in entries:
            _log.info(entry.kind, subject=entry.subject, seq=entry.seq, **_facts(entry))
            self._count(entry)
        if entries:
            self._store.announced(entries[-1].seq)
            self._gauges()
        return len(entries)

    def _count(self, entry: OutboxEntry) -> None:
        match entry.kind:
            case "swap_ended":
                self._swap_ended(entry.subject)
            case "version_registered":
                metrics.VERSIONS.labels(entry.subject.split("/")[0]).inc()
            case "version_quarantined":
                metrics.QUARANTINES.labels(entry.subject.split("/")[0]).inc()
            case "rollback_recorded":
                metrics.ROLLBACKS.labels(entry.facts.get("rule", ""), entry.facts.get("decided_by", "")).inc()
            case "promotion":
                metrics.PROMOTIONS.labels(entry.facts.get("state", "")).inc()
            case _:
                pass

    def _swap_ended(self, swap_id: str) -> None:
        receipt = self._store.receipt(swap_id)
        if receipt is None:
            return
        state = receipt.state.value
        metrics.SWAPS.labels(receipt.model, state).inc()
        metrics.SWAP_SECONDS.labels(receipt.model, state).observe(receipt.ended_at - receipt.created_at)
        metrics.SWAP_FAILED_REQUESTS.labels(receipt.model).inc(receipt.failed)
        if receipt.switch_seconds:
            metrics.SWITCH_SECONDS.labels(receipt.model).observe(receipt.switch_seconds)

    def _gauges(self) -> None:
        for route in self._store.routes():
            metrics.ROUTE_EPOCH.labels(route.model).set(route.epoch)
        active = [swap.spec.model for swap in self._store.active_swaps()]
        for model in self._store.models():
            metrics.ACTIVE_SWAPS.labels(model).set(active.count(model))


def _facts(entry: OutboxEntry) -> dict[str, str]:
    return {("swap_" + k if k in {"event", "level", "seq", "subject"} else k): v for k, v in entry.facts.items()}
