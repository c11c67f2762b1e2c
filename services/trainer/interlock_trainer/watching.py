"""Who watches runs: bounded queues that a slow watcher can never grow. A watcher that falls behind loses changes, never the last state."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from interlock.stores.trainer import RollbackRow
from interlock.training.terms import CheckpointInfo

BOUND = 1000  # changes a watcher may lag behind; a run makes a handful a second


@dataclass(frozen=True, slots=True)
class Change:
    """Something happened to a run; at most one of checkpoint and rollback is set."""

    run: str
    checkpoint: CheckpointInfo | None = None
    rollback: RollbackRow | None = None


@dataclass(eq=False, slots=True)
class Watcher:
    """One subscription. `lost` counts the changes that did not fit."""

    run: str
    queue: asyncio.Queue[Change] = field(default_factory=lambda: asyncio.Queue(BOUND))
    lost: int = 0


class Hub:
    """Hands every change to everybody who watches."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()

    @contextmanager
    def watch(self, run: str) -> Iterator[Watcher]:
        """A subscription to one run, or to all with an empty id, while the block lasts."""
        watcher = Watcher(run)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def announce(self, change: Change) -> None:
        """Tells everybody; never waits. Only after what it tells of was persisted."""
        for watcher in self._watchers:
            if watcher.run not in ("", change.run):
                continue
            while True:
                try:
                    watcher.queue.put_nowait(change)
                    break
                except asyncio.QueueFull:
                    watcher.queue.get_nowait()
                    watcher.lost += 1
