"""The way of one load: is there room, does a child try it first, does it stay there, else is it built here. One load at a time.

Rules of this file
- While something serves, no file is given to an engine of this process before a child has loaded and run it.
- Nothing is loaded that was measured not to fit; what was never measured is guessed from its size and bounded while it is measured.
- A version of `isolate_bytes` or more stays in its child, and so does one whose engine is `HEAVY`.
- At a cold start there is nothing to protect and a start to be fast: small versions are loaded directly, unless the last one died of it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from interlock.errors import FailedPrecondition, InterlockError
from interlock.stores import artifacts, modelspec, remote
from interlock.stores.modelspec import ModelSpec
from interlock.stores.remote import RemoteArtifacts
from interlock_inference import repository
from interlock_inference.engines import EngineOptions
from interlock_inference.loads import memory
from interlock_inference.loads.history import LoadHistory
from interlock_inference.loads.isolated import IsolatedEngine
from interlock_inference.loads.memory import Need
from interlock_inference.loads.pace import Hold, Pacer, Told
from interlock_inference.loads.process import PROGRAM, Child, Order, Report
from interlock_inference.processing import build as build_processing
from interlock_inference.repository import Glance, Opened, Progress
from interlock_inference.slots import ANSWERS, Registry, Slot

LOADER_NICENESS = 10  # a load must not hurt the tail of what serves
HEAVY = frozenset({"torch"})
"""Engines whose library is not for the serving process: importing torch costs it a second of its interpreter and 150 MB."""
AGAIN_SECONDS_MAX = 10.0  # REQUIREMENTS R2: retries after 2 to 10 s
ADDRESS_SLACK_BYTES = 512 << 20  # address space that nobody touches: thread stacks, allocator arenas


@dataclass(frozen=True, slots=True)
class LoadPolicy:
    """How this replica loads.

    Attributes:
        isolate_bytes: from this size of its files on, a version stays in a child; 0: never.
        tries: a child tries what is to be loaded while something serves.
        limit_bytes: of the replica and its children together; 0 for none. `reserve_bytes` stay free in any case.
        channels: runs at once of a version in a child.
        attempts: of a load that fails for a reason that may pass; `again_seconds` before the second, twice as long before each next one.
    """

    options: EngineOptions
    isolate_bytes: int = 64 << 20
    tries: bool = True
    timeout_seconds: float = 300.0
    limit_bytes: int = 0
    reserve_bytes: int = 0
    channels: int = 2
    attempts: int = 3
    again_seconds: float = 2.0
    program: Sequence[str] = PROGRAM


class Loader:
    """Loads versions for one replica. On the event loop, but for what its threads do."""

    def __init__(
        self,
        policy: LoadPolicy,
        registry: Registry,
        history: LoadHistory,
        pacer: Pacer,
        tasks: asyncio.TaskGroup,
        failpoint: Callable[[str, str], None],
        fetched: RemoteArtifacts,
    ) -> None:
        self._remote = fetched
        self._policy = policy
        self._registry = registry
        self._history = history
        self._pacer = pacer
        self._tasks = tasks
        self._failpoint = failpoint
        self._turn = asyncio.Lock()
        self._here = ThreadPoolExecutor(1, "load", initializer=_be_nice)
        self._beside = ThreadPoolExecutor(1, "try")  # not nice: its children would inherit that

    def close(self) -> None:
        """Ends the threads after what they do now."""
        self._here.shutdown(wait=False, cancel_futures=True)
        self._beside.shutdown(wait=False, cancel_futures=True)

    async def open(self, slot: Slot, digest: str, hold: Hold, progress: Progress, told: Told) -> Opened:
        """Loads a version.

        Raises:
            ResourceExhausted: `DOES_NOT_FIT`, `LOAD_STARVED`.
            FailedPrecondition: `LOAD_CRASHED`.
            InterlockError: see `repository.open_artifact`; and what ended the hold.
        """
        loop = asyncio.get_running_loop()
        async with self._turn:
            hold.check()
            path = await loop.run_in_executor(self._beside, self._local, slot.artifact_uri, digest, hold)
            seen = await loop.run_in_executor(self._beside, repository.glance, path)
            peak_bytes = self._history.peak_bytes.get(digest or seen.digest)
            need = memory.guess(seen.size_bytes) if peak_bytes is None else Need(peak_bytes, measured=True)
            stays, here = self._stays(seen), self._here if self._num_threads(seen) == 1 else self._beside
            is_ensemble = seen.spec is not None and seen.spec.engine == "ensemble"  # nothing of it reaches an engine
            if is_ensemble or (not stays and not self._is_tried(slot)):
                await loop.run_in_executor(self._beside, self._check_room, path, need)
                await loop.run_in_executor(self._beside, self._history.doubt, slot.name)
                return await loop.run_in_executor(here, self._open_here, slot, path, digest, hold, progress)
            async with self._paced(hold, told):
                await loop.run_in_executor(self._beside, self._check_room, path, need)
                order = await loop.run_in_executor(self._beside, self._order, slot.version, path, digest, seen)
                child, report = await loop.run_in_executor(self._beside, self._try, order, hold, progress)
                await loop.run_in_executor(self._beside, self._history.note, report.digest, report.peak_bytes)
                if stays:
                    return await loop.run_in_executor(self._beside, _kept, child, report, path, order.channels - 1)
                await loop.run_in_executor(self._beside, child.close)
                need = Need(report.peak_bytes, measured=True)
                await loop.run_in_executor(self._beside, self._check_room, path, need)
                return await loop.run_in_executor(
                    self._here, self._open_here, slot, path, report.digest, hold, progress
                )

    def again_in(self, attempt: int, error: InterlockError) -> float | None:
        """Seconds after which a load may be tried again that has failed so often; None when it may not. What will always fail says no time."""
        if error.retry_after_seconds is None or attempt >= self._policy.attempts:
            return None
        return min(self._policy.again_seconds * 2.0 ** (attempt - 1), AGAIN_SECONDS_MAX)

    async def revive(self, slot: Slot, engine: IsolatedEngine) -> None:
        """Loads the version of a lost child into a new one; raises as `open`. Paced by nothing: the version serves nobody now."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            path = await loop.run_in_executor(self._beside, self._local, slot.artifact_uri, slot.digest, Hold())
            seen = await loop.run_in_executor(self._beside, repository.glance, path)
            order = replace(self._order(slot.version, path, slot.digest, seen), idle=False)  # its callers wait
            child, _ = await loop.run_in_executor(self._beside, self._try, order, Hold(), _silent)
            engine.adopt(child)

    def _local(self, uri: str, digest: str, hold: Hold) -> Path:
        """Where the artifact lies on this machine; in a thread, for it may have to be fetched."""
        return self._remote.fetch(uri, digest, hold.step) if remote.is_remote(uri) else repository.parse_uri(uri)

    def _stays(self, seen: Glance) -> bool:
        large = seen.size_bytes >= self._policy.isolate_bytes
        return bool(self._policy.isolate_bytes) and (large or (seen.spec is not None and seen.spec.engine in HEAVY))

    def _num_threads(self, seen: Glance) -> int:
        """Of a session of this version. A niced thread makes nice threads, and they stay so for ever."""
        own = seen.spec.engine_options if seen.spec is not None else {}
        return max(self._policy.options.threads(own.get(name)) for name in ("intra_op_threads", "inter_op_threads"))

    def _is_tried(self, slot: Slot) -> bool:
        if self._history.is_doubtful(slot.name):
            return True
        return self._policy.tries and self._serves()

    def _serves(self) -> bool:
        return any(slot.state in ANSWERS for slot in self._registry.all_slots())

    @asynccontextmanager
    async def _paced(self, hold: Hold, told: Told) -> AsyncIterator[None]:
        """Under the eyes of the pacer, where there is traffic that could be hurt."""
        if not self._pacer.is_needed():
            yield
            return
        watching = self._tasks.create_task(self._pacer.watch(hold, told))
        try:
            await told.ready.wait()
            yield
        finally:
            watching.cancel()
            hold.resume()

    def _order(self, version: str, path: Path, digest: str, seen: Glance) -> Order:
        policy = self._policy
        free = max(0, self._room().available_bytes - policy.reserve_bytes)
        return Order(
            version=version,
            path=str(path),
            digest=digest,
            options=policy.options,
            memory_bytes=free + seen.size_bytes + ADDRESS_SLACK_BYTES,
            cpu_seconds=int(policy.timeout_seconds),
            idle=self._serves() and (self._num_threads(seen) == 1 or not self._stays(seen)),
            channels=max(policy.channels, seen.spec.instances + 1 if seen.spec is not None else 0),
        )

    def _try(self, order: Order, hold: Hold, progress: Progress) -> tuple[Child, Report]:
        """In a thread."""
        child = Child(order, self._policy.program)
        hold.attach(child)
        try:
            return child, child.report(self._policy.timeout_seconds, progress)
        except BaseException:
            hold.detach()
            child.close()
            hold.check()  # what ended it says more than how it died
            raise
        finally:
            hold.detach()

    def _open_here(self, slot: Slot, path: Path, digest: str, hold: Hold, progress: Progress) -> Opened:
        """In the loading thread."""
        hold.step()
        self._failpoint("inference.load", slot.version)
        try:
            return repository.open_artifact(path, digest, self._policy.options, progress)
        finally:
            self._history.survived(slot.name)

    def _room(self) -> memory.Room:
        return memory.room(self._policy.limit_bytes, psutil.Process().memory_info().rss + self.kept_bytes)

    @property
    def kept_bytes(self) -> int:
        """What the children hold that stay."""
        opened = [slot.opened for slot in self._registry.all_slots() if slot.opened is not None]
        return sum(each.memory_bytes for each in opened if isinstance(each.engine, IsolatedEngine))

    def _check_room(self, path: Path, need: Need) -> None:
        held = {slot.name: slot.opened.memory_bytes for slot in self._registry.all_slots() if slot.opened is not None}
        memory.check(str(path), need, self._room(), self._policy.reserve_bytes, held)


def _kept(child: Child, report: Report, path: Path, num_apart: int) -> Opened:
    """A version that stays where it was tried; one channel is left for warm-up and comparison."""
    try:
        engine = IsolatedEngine(child, report)
        spec, memory_bytes = _spec(path, report.digest), report.steady_bytes + report.base_bytes
        processing = build_processing(path, spec, engine.signature)
        return Opened(engine, report.digest, path, spec, memory_bytes, processing, num_apart)
    except BaseException:
        child.close()
        raise


def _spec(path: Path, digest: str) -> ModelSpec | None:
    """The child read `model.toml` for its own needs; this process reads it again, and holds it to the digest that was proven."""
    if not (path / modelspec.SPEC_FILE).is_file():
        return None
    spec, manifest = modelspec.read_spec(path), artifacts.read_manifest(path)
    entries = {entry.path: entry.blake3 for entry in manifest.files}
    if (
        manifest.digest != digest
        or entries.get(modelspec.SPEC_FILE) != artifacts.hash_file(path / modelspec.SPEC_FILE)[1]
    ):
        raise FailedPrecondition(
            f"{path}: changed while it was loading",
            reason="DIGEST_MISMATCH",
            field="digest",
            metadata={"path": str(path), "digest": manifest.digest, "expected": digest},
        )
    return spec


def _silent(percent: float, message: str) -> None:
    """A revival reports its end only."""


def _be_nice() -> None:
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADER_NICENESS)
