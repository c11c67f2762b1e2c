"""The checkpoint writer: a thread that turns staged bytes into durable folders. At most one save is in flight.

The loop waits for one copy into a reused buffer, and for nothing else; a save that finds the writer busy is either left out (cadence) or
waits (an order). `on_done` is called in the writer's thread with the manifest, or with the error that stopped the save; a failed save
never deletes anything and never stops training.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from interlock.stores.artifacts import Manifest
from interlock.stores.checkpoints import CheckpointStore, TensorSlot
from interlock.training.capture import Snapshot, Staging

OnDone = Callable[[str, Manifest | None, Exception | None], None]


@dataclass(frozen=True, slots=True)
class _Job:
    checkpoint: str
    slots: list[TensorSlot]
    data: memoryview
    state: Any
    metadata: Mapping[str, Any]


class Saver:
    """Stages in the caller's thread, writes in its own."""

    def __init__(self, store: CheckpointStore, on_done: OnDone) -> None:
        self._store = store
        self._on_done = on_done
        self._staging = Staging()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._work, name="interlock-saver", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return not self._idle.is_set()

    def save(self, checkpoint: str, snapshot: Snapshot, metadata: Mapping[str, Any]) -> None:
        """Copies the snapshot and hands it to the writer; waits first if one is in flight. After it the tensors may change."""
        self._idle.wait()
        slots, data = self._staging.fill(snapshot)
        self._idle.clear()
        self._jobs.put(_Job(checkpoint, slots, data, snapshot.state, metadata))

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Waits for the save in flight; False when the time ran out."""
        return self._idle.wait(timeout_seconds)

    def close(self, timeout_seconds: float = 60.0) -> None:
        """Finishes what is in flight and ends the thread."""
        self._idle.wait(timeout_seconds)
        self._jobs.put(None)
        self._thread.join(timeout_seconds)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            manifest, failure = None, None
            try:
                manifest = self._store.write(job.checkpoint, job.slots, job.data, job.state, job.metadata)
            except Exception as error:  # noqa: BLE001 - a supervised edge: whatever the disk does, training goes on
                failure = error
            try:
                self._on_done(job.checkpoint, manifest, failure)
            finally:
                self._idle.set()
