"""The loop's end of saving: one copy into reused memory, then a thread that waits for the writer. At most one save is in flight.

The loop waits for that copy, and for nothing else; a save that finds the writer busy is either left out (cadence) or waits (an order).
`on_done` is called in the thread with the manifest, or with the error that stopped the save; a failed save never deletes anything and
never stops training.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from interlock.stores.artifacts import Manifest
from interlock.stores.checkpoints import CheckpointStore
from interlock.training.capture import Snapshot, Staged, Staging

OnDone = Callable[[str, Manifest | None, Exception | None], None]


class Writer(Protocol):
    """Turns a staged state into a durable checkpoint."""

    def write(self, checkpoint: str, staged: Staged, state: Any, metadata: Mapping[str, Any]) -> Manifest:
        """Blocks until it is durable; raises what stopped it."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class WriterHere:
    """Writes in the thread that calls: for runs that are judged and saved in step with their loop."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store

    def write(self, checkpoint: str, staged: Staged, state: Any, metadata: Mapping[str, Any]) -> Manifest:
        """See `CheckpointStore.write`."""
        return self._store.write(checkpoint, staged.slots, staged.data, state, metadata)

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True, slots=True)
class _Job:
    checkpoint: str
    staged: Staged
    state: Any
    metadata: Mapping[str, Any]


class Saver:
    """Stages in the caller's thread, waits for the writer in its own."""

    def __init__(self, writer: Writer, on_done: OnDone) -> None:
        self._writer = writer
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

    def prepare(self, size: int) -> None:
        """Makes room for states of `size` bytes, in the background."""
        self._staging.prepare(size)

    def save(self, checkpoint: str, snapshot: Snapshot, metadata: Mapping[str, Any]) -> None:
        """Copies the snapshot and hands it to the writer; waits first if one is in flight. After it the tensors may change.

        Raises:
            OSError: there is no memory for the copy.
        """
        self._idle.wait()
        staged = self._staging.fill(snapshot)
        self._idle.clear()
        self._jobs.put(_Job(checkpoint, staged, snapshot.state, metadata))

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Waits for the save in flight; False when the time ran out."""
        return self._idle.wait(timeout_seconds)

    def close(self, timeout_seconds: float = 60.0) -> None:
        """Finishes what is in flight and ends thread and writer."""
        self._idle.wait(timeout_seconds)
        self._jobs.put(None)
        self._thread.join(timeout_seconds)
        self._staging.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            manifest, failure = None, None
            try:
                manifest = self._writer.write(job.checkpoint, job.staged, job.state, job.metadata)
            except Exception as error:  # noqa: BLE001 - a supervised edge: whatever the disk does, training goes on
                failure = error
            try:
                self._on_done(job.checkpoint, manifest, failure)
            finally:
                self._idle.set()
        self._writer.close()
