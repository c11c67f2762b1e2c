"""A replica without a controller: a folder of models decides what is served, by the same commands that a controller would give.

Rules of this file
- One owner: while a folder owns the replica, a controller's commands are refused (`STANDALONE`).
- A version replaces what serves only when it was loaded, warmed and compared with it; whatever fails before leaves what serves untouched.
- watch: of every model the newest version that works, in numeric order; what is unfinished or still changing is left alone.
- explicit: nothing is served but what RepositoryModelLoad asks for.
- A version whose files were changed in place is another version: it gets the first digits of its digest behind its name.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import structlog

from interlock.core.ports import Clock
from interlock.core.route import Route, all_to
from interlock.errors import FailedPrecondition, InterlockError, NotFound
from interlock.runtime.settings import InferenceSettings
from interlock.stores import artifacts
from interlock_inference.assignment import Assignment, AssignmentFile
from interlock_inference.folder import Found, Stamp, look
from interlock_inference.replica import Replica, Wanted
from interlock_inference.slots import Registry, SlotState

DIGEST_DIGITS = 8
AGAIN_SECONDS = 5.0
"""The shortest time after which a refusal that may pass is put to the test again."""
START_SECONDS = 30.0
"""How long the first look waits for folders that are still changing before the replica calls itself ready."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Refused:
    """Why a version of these files does not serve, and when it is worth another try (on the monotonic clock)."""

    stamp: Stamp
    why: str
    again_at: float


class NoFile(AssignmentFile):
    """Remembers nothing: the folder itself says what to serve after a crash."""

    def __init__(self) -> None:
        """Without a path."""

    def read(self) -> Assignment:
        """Nothing."""
        return Assignment()

    def write(self, assignment: Assignment) -> None:
        """Nowhere."""


class Standalone:
    """Serves what lies in a folder; `servicers.oip.Admin` for clients that ask.

    Args:
        tasks: versions that were replaced are drained in it.
    """

    def __init__(
        self, replica: Replica, registry: Registry, settings: InferenceSettings, clock: Clock, tasks: asyncio.TaskGroup
    ) -> None:
        self._replica = replica
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._tasks = tasks
        self._root = Path(settings.repository) if settings.repository else None
        self._lock = asyncio.Lock()  # one model is changed at a time
        self._since: dict[tuple[str, str], tuple[Stamp, float]] = {}
        self._failed: dict[tuple[str, str], _Refused] = {}
        self._served: dict[str, tuple[str, Stamp]] = {}

    async def run(self) -> None:
        """Serves what lies there, says that the replica is ready, and goes on watching. Ends when it is cancelled; explicit: at once."""
        if self._settings.repository_mode == "watch":
            deadline = self._clock.monotonic() + START_SECONDS
            while await self.step() and self._clock.monotonic() < deadline:
                await self._clock.sleep(self._settings.repository_settle_seconds)
        await self._replica.restore()
        while self._settings.repository_mode == "watch":
            await self._clock.sleep(self._settings.repository_poll_seconds)
            await self.step()

    async def step(self) -> bool:
        """One look, and what follows from it. True when a model that serves nothing has a version that is still changing."""
        found = await self._look()
        if found is None:
            return False
        waiting = False
        async with self._lock:
            for model, versions in groupby(found, key=lambda f: f.model):
                waiting = await self._follow(model, list(versions)) or waiting
            for model in self._served.keys() - {f.model for f in found}:
                await self._unload(model)
        return waiting

    async def _look(self) -> list[Found] | None:
        """None when the folder can't be read: a file system that is gone for a moment takes nothing out of service."""
        try:
            return await asyncio.to_thread(look, self._root, self._settings.models)
        except OSError as error:
            _log.warning("repository_unreadable", path=str(self._root), problem=str(error))
            return None

    async def _follow(self, model: str, newest_first: Iterable[Found]) -> bool:
        changing = False
        for found in newest_first:
            if self._served.get(model) == (found.version, found.stamp):
                return False
            if found.problem or self._is_refused(found):
                continue
            if not self._is_settled(found):
                changing = True
                continue
            try:
                await self._serve(found)
            except InterlockError as error:
                self._refuse(found, error)
                changing = changing or error.reason == "ENSEMBLE_MEMBER_MISSING"  # its members may be served after it
            else:
                return False
        return changing and model not in self._served

    def _refuse(self, found: Found, error: InterlockError) -> None:
        """Remembers why, until its files change; what may be different in a moment (memory, a member) is tried again then."""
        wait = math.inf if error.retry_after_seconds is None else max(error.retry_after_seconds, AGAIN_SECONDS)
        if error.reason == "ENSEMBLE_MEMBER_MISSING":
            wait = 0.0
        again_at = self._clock.monotonic() + wait
        self._failed[found.model, found.version] = _Refused(found.stamp, f"{error.reason}: {error.message}", again_at)
        _log.warning("version_refused", model=found.model, version=found.version, reason=error.reason, problem=error.message)  # fmt: skip

    def _is_refused(self, found: Found) -> bool:
        refused = self._failed.get((found.model, found.version))
        return refused is not None and refused.stamp == found.stamp and self._clock.monotonic() < refused.again_at

    def _is_settled(self, found: Found) -> bool:
        """True when nothing of it has changed for a while: by our own looks, or by the age of its newest file."""
        key, now, settle = (
            (found.model, found.version),
            self._clock.monotonic(),
            self._settings.repository_settle_seconds,
        )
        stamp, since = self._since.get(key, ((), now))
        if stamp != found.stamp:
            since = now
            self._since[key] = (found.stamp, now)
        return now - since >= settle or self._clock.now() - found.changed_at >= settle

    async def _serve(self, found: Found) -> None:
        """Load, warm, compare, switch; the version that served is drained and released behind the caller's back."""
        model, stable = found.model, self._stable(found.model)
        digest = await asyncio.to_thread(_digest, found.path)
        version = self._free_name(found, digest)
        if version is None:  # only its times changed
            self._served[model] = (found.version, found.stamp)
            return
        compatible = (model, stable) if stable else None
        try:
            async for _ in self._replica.prepare(Wanted(model, version, str(found.path), digest, compatible)):
                pass
            await self._replica.warm(model, version, 0)
            if stable is not None:
                await self._compare(model, stable, version)
            await self._route(model, version)
        except InterlockError:
            await self._replica.release(model, version)
            raise
        self._served[model] = (found.version, found.stamp)
        if stable is not None:
            self._tasks.create_task(self._retire(model, stable))

    def _stable(self, model: str) -> str | None:
        routed = self._registry.snapshot.routes.get(model)
        return routed.route.heaviest() if routed else None

    def _free_name(self, found: Found, digest: str) -> str | None:
        """The name to load it under; None when these very bytes are what serves."""
        slots = self._registry.snapshot.slots.get(found.model, {})
        stable = slots.get(self._stable(found.model) or "")
        if stable is not None and stable.digest == digest:
            return None
        slot = slots.get(found.version)
        if slot is None or slot.state is SlotState.STOPPED:
            return found.version
        return f"{found.version}-{digest.removeprefix('blake3:')[:DIGEST_DIGITS]}"

    async def _compare(self, model: str, stable: str, version: str) -> None:
        seen, _ = await self._replica.compare(model, stable, version, 0)
        if seen.num_nonfinite:
            raise FailedPrecondition(
                f"models/{model}/versions/{version} answers NaN or infinity {seen.num_nonfinite} times where {stable} does not",
                reason="COMPARE_FAILED",
                metadata={"nonfinite": str(seen.num_nonfinite), "stable": stable},
            )

    async def _route(self, model: str, version: str | None) -> None:
        routed = self._registry.snapshot.routes.get(model)
        route = Route(model, routed.route.epoch + 1 if routed else 1, all_to(version))
        name = f"models/{model}/versions/{version}" if version else ""
        await self._replica.apply_route(self._replica.fencing_token, route, name, self._clock.now())

    async def _retire(self, model: str, version: str) -> None:
        try:
            await self._replica.drain(model, version, self._settings.drain_seconds)
            await self._replica.release(model, version)
        except InterlockError as error:  # routed again meanwhile: then it shall stay
            _log.info("not_retired", model=model, version=version, reason=error.reason)

    async def _unload(self, model: str) -> None:
        stable = self._stable(model)
        self._served.pop(model, None)
        if stable is not None:
            await self._route(model, None)
            self._tasks.create_task(self._retire(model, stable))

    # --- what clients ask for ---

    def versions(self) -> Mapping[tuple[str, str], str]:
        """Every version that lies there, with why it is not served. Blocking."""
        try:
            found = look(self._root, self._settings.models)
        except OSError:
            found = []
        return {(f.model, f.version): f.problem or self._reason(f) for f in found}

    def _reason(self, found: Found) -> str:
        refused = self._failed.get((found.model, found.version))
        return refused.why if refused is not None and refused.stamp == found.stamp else "not loaded"

    async def load(self, model: str, version: str) -> None:
        """Serves a version of the folder; `version` empty: the newest that can be tried.

        Raises:
            FailedPrecondition: `WATCHED`; whatever the version is refused for, and then what serves stays.
            NotFound: `VERSION_NOT_FOUND`, `MODEL_NOT_FOUND`.
        """
        self._check_explicit()
        found = [f for f in await self._look() or () if f.model == model]
        if not found:
            raise NotFound(
                f"model {model!r} does not lie in {self._root or 'inference.models'}",
                reason="MODEL_NOT_FOUND",
                field="model_name",
            )
        chosen = next((f for f in found if f.version == version if version), None) or next(
            (f for f in found if not f.problem and not version), None
        )
        if chosen is None or chosen.problem:
            known = ", ".join(f.version for f in found)
            raise NotFound(
                f"model {model!r} has no version {version or 'that is finished'} there ({chosen.problem if chosen else f'there are {known}'})",
                reason="VERSION_NOT_FOUND",
                field="parameters.version",
            )
        async with self._lock:
            try:
                await self._serve(chosen)
            except InterlockError as error:
                self._refuse(chosen, error)
                raise

    async def unload(self, model: str) -> None:
        """Takes a model out of service. Raises FailedPrecondition `WATCHED`, NotFound `MODEL_NOT_FOUND`."""
        self._check_explicit()
        async with self._lock:
            if self._stable(model) is None:
                raise NotFound(f"model {model!r} is not served", reason="MODEL_NOT_FOUND", field="model_name")
            await self._unload(model)

    def _check_explicit(self) -> None:
        if self._settings.repository_mode != "explicit":
            raise FailedPrecondition(
                "inference.repository_mode is watch: the folder decides; put a newer version in, take one out, or set explicit",
                reason="WATCHED",
                metadata={"repository": str(self._root or "")},
            )


def _digest(path: Path) -> str:
    """The digest that the version will have, from its manifest or the bare file's bytes. Raises FailedPrecondition `INVALID_ARTIFACT`."""
    try:
        if path.is_dir():
            return artifacts.read_manifest(path).digest
        size_bytes, digest = artifacts.hash_file(path)
    except (InterlockError, OSError) as error:
        raise FailedPrecondition(str(error), reason="INVALID_ARTIFACT", field="artifact_uri") from error
    return artifacts.Manifest((artifacts.FileEntry("model.onnx", size_bytes, digest),)).digest
