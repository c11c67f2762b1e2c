"""What a controller may do with this replica: prepare, warm, compare, apply a route, drain, park, release. No gRPC here.

Rules of this file
- Every command may come twice, late, or from a controller that has lost its lease: the fence refuses the last, the rest is idempotent.
- A load belongs to the replica, not to the call that asked for it: a caller that goes away neither stops nor repeats it.
- A route is written down before it comes into force; after a crash the replica loads and serves it again by itself.
- Nothing here can take the serving version away but a route that names another one.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, TypeVar

import structlog

from interlock.core.ports import Clock
from interlock.core.route import Route, admit, stale_epoch
from interlock.errors import AlreadyExists, FailedPrecondition, InterlockError, Internal, NotFound, Unavailable
from interlock.runtime.changed import Changed
from interlock.stores import golden
from interlock_inference import batching, compare, ensembles, repository
from interlock_inference.assignment import Assigned, AssignedModel, Assignment, AssignmentFile
from interlock_inference.compare import Comparison
from interlock_inference.engines import Array, made_up_inputs
from interlock_inference.engines.ensemble import EnsembleEngine
from interlock_inference.loads.isolated import IsolatedEngine
from interlock_inference.loads.loader import Loader
from interlock_inference.loads.pace import Hold, Told
from interlock_inference.metrics import LoadMetrics
from interlock_inference.recorder import Recorder
from interlock_inference.repository import Opened
from interlock_inference.slots import Drained, Origin, Registry, Slot, SlotState, Warmup

COMPARE_SAMPLES = 64
MADE_UP_ROWS = 8
HOPS = 5  # tries, of which the fastest counts
HOLD_SECONDS = 0.1  # between two looks at whether a load that waits for its next attempt is still wanted
REVIVE_SECONDS = (
    0.0,
    1.0,
    2.0,
    4.0,
    8.0,
    15.0,
    30.0,
)  # before each try to bring a lost child back; the last for all that follow
_ROUTABLE = frozenset({SlotState.READY, SlotState.SERVING, SlotState.DRAINING})
_LOADED = _ROUTABLE | {SlotState.WARMING_UP}
_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A version to load."""

    model: str
    version: str
    artifact_uri: str
    digest: str = ""
    compatible_with: tuple[str, str] | None = None
    origin: Origin = field(default_factory=Origin)


@dataclass(slots=True, eq=False)
class Load:
    """A load under way, or just ended. `hold` pauses or ends it."""

    slot: Slot
    hold: Hold = field(default_factory=Hold)
    percent: float = 0.0
    message: str = "queued"
    error: InterlockError | None = None
    done: bool = False


@dataclass(frozen=True, slots=True)
class Applied:
    """The route in force, how long it took to get there, and what was in flight on the versions that left it."""

    assigned: AssignedModel
    switch_seconds: float
    num_in_flight: int


class Replica:
    """The slots and routes of one inference process, as a controller sees them.

    Args:
        tasks: loads run in it; it must outlive every call.
    """

    def __init__(
        self,
        registry: Registry,
        recorder: Recorder,
        file: AssignmentFile,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        *,
        loader: Loader,
        counted: LoadMetrics,
        warmup_iterations: int,
        failpoint: Callable[[str, str], None] = lambda place, version: None,
        released: Callable[[Slot], None] = lambda _: None,
    ) -> None:
        self.changed = Changed()
        self._registry = registry
        self._recorder = recorder
        self._file = file
        self._clock = clock
        self._tasks = tasks
        self._loader = loader
        self._counted = counted
        self._warmup_iterations = warmup_iterations
        self._failpoint = failpoint
        self._released = released
        self._assignment = file.read()
        self._restored = False
        self._closing = False
        self._lock = asyncio.Lock()  # one change of routes and slots at a time
        self._loads: dict[tuple[str, str], Load] = {}
        self._bench = ThreadPoolExecutor(1, "warm")

    @property
    def fencing_token(self) -> int:
        """The highest token seen."""
        return self._assignment.fencing_token

    @property
    def kept_bytes(self) -> int:
        """Memory of the processes in which large versions stay."""
        return self._loader.kept_bytes

    def slots(self) -> list[Slot]:
        """Every slot, failed ones included until they are released or tried again."""
        return self._registry.all_slots()

    def routes(self) -> list[AssignedModel]:
        """The routes in force."""
        in_force = self._registry.snapshot.routes
        return [assigned for model, assigned in self._assignment.models.items() if model in in_force]

    def is_ready(self) -> bool:
        """True when every model that was assigned is routed here."""
        return self._restored and self._assignment.models.keys() <= self._registry.snapshot.routes.keys()

    def close(self) -> None:
        """Ends what loads, and the threads after what they do now."""
        self._closing = True
        for load in self._loads.values():
            load.hold.end(_stopping())
        self._loader.close()
        self._bench.shutdown(wait=False, cancel_futures=True)

    # --- fence and assignment ---

    async def obey(self, token: int) -> None:
        """Lets a command with this fencing token pass, and remembers the token.

        Raises:
            Aborted: `STALE_CONTROLLER`.
        """
        admit("", epoch=0, token=token, seen_epoch=0, seen_token=self.fencing_token)
        if token > self.fencing_token:
            await self._undisturbed(self._note_token(token))

    async def _note_token(self, token: int) -> None:
        async with self._lock:
            if token > self.fencing_token:
                await self._remember(replace(self._assignment, fencing_token=token))

    async def _remember(self, assignment: Assignment) -> None:
        """With the lock held, in a task that nobody cancels: two writers, or a writer and a reader of a half-taken step, must not meet."""
        assert self._lock.locked()
        await asyncio.to_thread(self._file.write, assignment)
        self._assignment = assignment

    async def _undisturbed(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs `work` to its end even when the caller is cancelled half-way; its error, if any, is the caller's."""
        ended: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                result = await work
            except Exception as error:  # noqa: BLE001 - handed to the caller; in the task group it would end the process
                if not ended.done():
                    ended.set_exception(error)
            else:
                if not ended.done():
                    ended.set_result(result)

        self._tasks.create_task(run())
        return await ended

    async def restore(self) -> None:
        """Loads, warms and routes what was assigned before the process ended. A version that fails is left out; nothing is raised for it."""
        left = list(self._assignment.models)
        for last in (False, True):  # an ensemble can be loaded when its members are
            left = [model for model in left if not await self._is_restored(model, last=last)]
        self._restored = True
        self.changed.fire()

    async def _is_restored(self, model: str, *, last: bool) -> bool:
        """Tries it; False when another try may go better, which there is unless this is the last."""
        assigned = self._assignment.models[model]
        try:
            await self._restore_model(model, assigned)
        except InterlockError as error:
            if error.reason == "ENSEMBLE_MEMBER_MISSING" and not last:
                return False
            _log.error(
                "restore_failed", model=model, epoch=assigned.route.epoch, reason=error.reason, problem=error.message
            )
        return True

    async def _restore_model(self, model: str, assigned: AssignedModel) -> None:
        for version, each in assigned.versions.items():
            async for _ in self.prepare(Wanted(model, version, each.artifact_uri, each.digest, None, each.origin)):
                pass
            await self.warm(model, version, 0)
        async with self._lock:
            current = self._registry.snapshot.routes.get(model)
            if current is None or current.route.epoch < assigned.route.epoch:
                self._assigned(assigned.route)  # a controller may have released one of them meanwhile
                self._switch(assigned.route)
        _log.info("restored", model=model, epoch=assigned.route.epoch, versions=list(assigned.versions))

    # --- load ---

    async def prepare(self, wanted: Wanted) -> AsyncIterator[Load]:
        """Loads a version; yields its progress, the last time when it is loaded.

        Raises:
            AlreadyExists: `VERSION_CONFLICT`: loaded already, from other bytes.
            NotFound, FailedPrecondition, InvalidArgument, ResourceExhausted: see `repository.open_artifact`.
        """
        load = self._loads.get((wanted.model, wanted.version))
        if load is None or load.slot.state is SlotState.STOPPED:
            load = self._begin(wanted)
        elif wanted.digest and load.slot.digest and load.slot.digest != wanted.digest:
            raise AlreadyExists(
                f"{load.slot.name} is loaded with {load.slot.digest}, asked for {wanted.digest}; release it first",
                reason="VERSION_CONFLICT",
                field="digest",
                metadata={"digest": load.slot.digest, "expected": wanted.digest},
            )
        while True:
            changed, done = self.changed.next(), load.done  # before the yield: the load goes on meanwhile
            if load.error is not None:
                raise load.error
            yield load
            if done:
                return
            await changed.wait()

    def _begin(self, wanted: Wanted) -> Load:
        uri = repository.absolute(wanted.artifact_uri)
        slot = Slot(wanted.model, wanted.version, uri, wanted.origin, wanted.digest)
        load = self._loads[wanted.model, wanted.version] = Load(slot)
        self._registry.put(slot)
        self._tasks.create_task(self._load(load, wanted))
        return load

    async def _load(self, load: Load, wanted: Wanted) -> None:
        loop = asyncio.get_running_loop()

        def progress(percent: float, message: str) -> None:
            loop.call_soon_threadsafe(self._progress, load, percent, message)

        try:
            opened = await self._opened(load, wanted, progress)
            self._take(load, opened, wanted)
        except InterlockError as error:
            self._load_failed(load, error)
        except Exception as error:  # noqa: BLE001 - supervised edge: whatever a file does to the loader, the replica goes on serving
            _log.error("load_crashed", version=load.slot.name, exc_info=error)
            self._load_failed(load, Internal(f"loading {load.slot.name} failed unexpectedly", reason="LOAD_CRASHED"))
        finally:
            load.done = True
            self._counted.ended(load.slot.model, load.error)
            self.changed.fire()

    async def _opened(self, load: Load, wanted: Wanted, progress: repository.Progress) -> Opened:
        """Tries again, a few times and later each time, what may be otherwise in a moment: memory, a store far away, a child that hung."""
        for attempt in itertools.count(1):
            try:
                return await self._loader.open(load.slot, wanted.digest, load.hold, progress, _Pauses(self, load))
            except InterlockError as error:
                delay = self._loader.again_in(attempt, error)
                if delay is None:
                    raise error if attempt == 1 else _after(attempt, error) from None
                _log.info("load_again", version=load.slot.name, attempt=attempt, seconds=delay, reason=error.reason)
                self._progress(load, 0.0, f"attempt {attempt} failed: {error.reason}; again in {delay:g} s")
            for _ in range(math.ceil(delay / HOLD_SECONDS)):
                await self._clock.sleep(HOLD_SECONDS)
                load.hold.check()
        raise AssertionError("counts for ever")

    def _progress(self, load: Load, percent: float, message: str) -> None:
        load.percent, load.message = percent, message
        self.changed.fire()

    def note(self, load: Load, message: str, paused_seconds: float = 0.0) -> None:
        """Shows a pause of a load, or its end."""
        load.message = message
        self._counted.paused(load.slot.model, paused_seconds)
        self.changed.fire()

    def _take(self, load: Load, opened: Opened, wanted: Wanted) -> None:
        slot = load.slot
        try:
            if slot.state is SlotState.STOPPED:
                raise _released(slot)
            if wanted.compatible_with is not None:
                self._check_compatible(opened, wanted.compatible_with)
            if isinstance(opened.engine, EnsembleEngine) and opened.spec is not None:
                ensembles.check_fits(opened.spec, opened.engine.plan, self._registry.snapshot)
        except InterlockError:
            opened.engine.close()
            raise
        slot.loaded(opened)
        if isinstance(opened.engine, IsolatedEngine):
            self._watch(slot, opened.engine)
        load.percent, load.message = 100.0, "loaded"
        _log.info(
            "loaded",
            version=slot.name,
            digest=slot.digest,
            memory_bytes=opened.memory_bytes,
            providers=opened.engine.providers,
            batching=slot.lane is not None,
            process=opened.engine.pid if isinstance(opened.engine, IsolatedEngine) else 0,
        )

    def _watch(self, slot: Slot, engine: IsolatedEngine) -> None:
        """Brings the version back when its child ends."""

        def lost() -> None:
            engine.close()
            _log.error("engine_lost", version=slot.name, process=engine.pid)
            self._tasks.create_task(self._revive(slot, engine))

        engine.watch(lost)

    async def _revive(self, slot: Slot, engine: IsolatedEngine) -> None:
        for attempt in itertools.count():
            await self._clock.sleep(REVIVE_SECONDS[min(attempt, len(REVIVE_SECONDS) - 1)])
            if slot.opened is None or self._closing:
                return
            try:
                await self._loader.revive(slot, engine)
            except (InterlockError, OSError) as error:
                _log.error("engine_still_lost", version=slot.name, attempt=attempt + 1, problem=str(error))
                continue
            break
        self._counted.revived(slot.model)
        if slot.opened is None:
            engine.close()
            return
        self._watch(slot, engine)
        self.changed.fire()
        _log.info("engine_revived", version=slot.name, process=engine.pid)

    def _check_compatible(self, opened: Opened, with_: tuple[str, str]) -> None:
        stable = self._registry.find(*with_)
        if stable.opened is not None:
            repository.check_compatible(stable.opened.engine.signature, opened.engine.signature, stable.name)

    def _load_failed(self, load: Load, error: InterlockError) -> None:
        load.error = error
        if load.slot.state is not SlotState.STOPPED:
            load.slot.fail(repository.describe(error))
        _log.warning("load_failed", version=load.slot.name, reason=error.reason, problem=error.message)

    # --- warm and compare ---

    async def warm(self, model: str, version: str, iterations: int) -> tuple[Slot, Warmup]:
        """Runs warm-up inferences on recorded requests, the golden set, or made-up inputs, and makes the slot ready.

        Raises:
            NotFound: `SLOT_UNKNOWN`.
            FailedPrecondition: `WARMUP_FAILED`, `NOT_LOADED`.
        """
        slot = self._known(model, version)
        if slot.warmup is not None and slot.state is not SlotState.WARMING_UP:
            return slot, slot.warmup
        samples, num_recorded = self._samples([slot], 8, await self._golden(slot))
        work = [samples[i % len(samples)] for i in range(iterations or self._warmup_iterations)]
        try:
            run, held = ensembles.runner(slot, self._registry.snapshot)
            timings = await self._held(held, lambda: self._run_warm(slot, run, work, samples))
        except InterlockError as error:
            slot.fail(f"WARMUP_FAILED: {error.message}")
            self.changed.fire()
            raise FailedPrecondition(
                f"{slot.name}: warm-up failed: {error.message} (a model that needs real inputs brings a {golden.GOLDEN_FILE})",
                reason="WARMUP_FAILED",
                metadata={"cause": error.reason},
            ) from error
        best = min(range(len(timings)), key=timings.__getitem__)
        slot.warmup = Warmup(
            iterations=len(timings),
            num_recorded=min(num_recorded, len(timings)),
            first_ms=timings[0] * 1e3,
            median_ms=median(timings[1:] or timings) * 1e3,
            best_seconds=timings[best],
            best_elements=max(1, sum(array.size for array in work[best].values())),
            hop_seconds=await self._hop_seconds() if slot.lane is not None else 0.0,
        )
        if slot.state is SlotState.WARMING_UP:
            slot.move(SlotState.READY)
        self.changed.fire()
        _log.info("warmed", version=slot.name, iterations=len(timings), median_ms=round(slot.warmup.median_ms, 3))
        return slot, slot.warmup

    async def _hop_seconds(self) -> float:
        """What the way into a thread and back costs at its best."""
        loop, timings = asyncio.get_running_loop(), []
        for _ in range(HOPS):
            start = time.perf_counter()
            await loop.run_in_executor(self._bench, _nothing)
            timings.append(time.perf_counter() - start)
        return min(timings)

    def _run_warm(
        self,
        slot: Slot,
        run: ensembles.Runner,
        work: Sequence[Mapping[str, Array]],
        samples: Sequence[Mapping[str, Array]],
    ) -> list[float]:
        """Seconds of each run. A version that batches must also give the same answers when samples run together."""
        timings = []
        for inputs in work:
            self._failpoint("inference.warm", slot.version)
            start = time.perf_counter()
            run(inputs, slot.output_names)
            timings.append(time.perf_counter() - start)
        if slot.lane is not None and slot.opened is not None:
            difference = batching.differs_together(slot.opened.engine, slot.lane, samples)
            if difference:
                raise FailedPrecondition(f"model.toml says [batching], and {difference}; take it out")
        return timings

    async def compare(self, model: str, stable: str, candidate: str, limit: int) -> tuple[Comparison, int]:
        """Runs recorded requests and the candidate's golden set through both, or made-up inputs when there are neither.

        Returns:
            What was seen, and how many of the inputs were recorded requests.

        Raises:
            NotFound: `SLOT_UNKNOWN`.
            FailedPrecondition: `NOT_LOADED`, `INVALID_ARTIFACT` for a golden set that can't be read, `MEMBER_OF_ENSEMBLE`; `ENSEMBLE_BROKEN` when
                an ensemble that answers here does not answer with the candidate in its member's place.
        """
        ensembles.check_not_needed(model, stable, self._registry)
        left, right = self._known(model, stable), self._known(model, candidate)
        chosen = await self._golden(left, right)
        samples, num_recorded = self._samples([left, right], limit or COMPARE_SAMPLES, chosen)

        seen = await self._compared((left, None), (right, None), samples)
        for slot, _ in list(ensembles.using(model, self._registry)):
            seen.merge(slot.name, await self._compare_ensemble(slot, left, right, limit or COMPARE_SAMPLES))
        return seen, num_recorded

    async def _compare_ensemble(self, slot: Slot, stable: Slot, candidate: Slot, limit: int) -> Comparison:
        """An ensemble's answers with the one and with the other in a member's place, on its own recorded requests and golden set."""
        samples, _ = self._samples([slot], limit, await self._golden(slot))
        try:
            return await self._compared((slot, stable), (slot, candidate), samples)
        except InterlockError as error:
            raise FailedPrecondition(
                f"{slot.name} does not answer with {candidate.name} in the place of {stable.name}: {error.message}",
                reason="ENSEMBLE_BROKEN",
                metadata={"ensemble": slot.name, "cause": error.reason},
            ) from error

    async def _compared(
        self, left: tuple[Slot, Slot | None], right: tuple[Slot, Slot | None], samples: Sequence[Mapping[str, Array]]
    ) -> Comparison:
        """Each side is a slot, and for an ensemble what stands in its member's place."""
        snapshot = self._registry.snapshot
        (run_left, held), (run_right, more) = (ensembles.runner(slot, snapshot, other) for slot, other in (left, right))
        names = left[0].output_names

        def through(run: ensembles.Runner) -> compare.Run:
            return lambda inputs: dict(zip(names, run(inputs, names), strict=True))

        both = dict.fromkeys((*held, *more))
        return await self._held(both, lambda: compare.compare(through(run_left), through(run_right), samples))

    async def _golden(self, *slots: Slot) -> list[Mapping[str, Array]]:
        """The last slot's golden inputs, as far as they fit all slots."""
        opened = slots[-1].opened
        assert opened is not None, "a loaded slot has its engine"
        samples = await asyncio.to_thread(golden.read, opened.path)
        return [inputs for inputs in samples.values() if all(_fits(slot, inputs) for slot in slots)]

    def _samples(
        self, slots: Sequence[Slot], limit: int, golden_inputs: Sequence[Mapping[str, Array]]
    ) -> tuple[list[Mapping[str, Array]], int]:
        """Recorded inputs that fit every slot, then golden ones; made-up ones when there are neither."""
        recorded = [
            inputs
            for inputs in self._recorder.samples(slots[-1].model, limit)
            if all(_fits(slot, inputs) for slot in slots)
        ]
        if recorded or golden_inputs:
            return [*recorded, *golden_inputs], len(recorded)
        opened = slots[-1].opened
        assert opened is not None, "a loaded slot has its engine"
        signature = opened.engine.signature
        return [made_up_inputs(signature, rows, seed) for rows in (1, MADE_UP_ROWS) for seed in range(min(4, limit))], 0

    def _known(self, model: str, version: str) -> Slot:
        try:
            slot = self._registry.find(model, version)
        except NotFound as error:
            raise NotFound(error.message, reason="SLOT_UNKNOWN", metadata=error.metadata) from None
        if slot.state not in _LOADED:
            raise FailedPrecondition(
                f"{slot.name} is {slot.state}: {slot.error or 'load it first'}",
                reason="NOT_LOADED",
                metadata={"state": slot.state},
            )
        return slot

    async def _held(self, slots: Iterable[Slot], work: Callable[[], _T]) -> _T:
        """Runs `work` in a thread with a hold on the slots until the thread is done with them, whatever becomes of the caller."""
        loop = asyncio.get_running_loop()
        handles = [slot.take(0, "runtime") for slot in slots]

        def give_back() -> None:
            for handle in handles:
                handle.release()

        job = self._bench.submit(work)
        job.add_done_callback(lambda _: None if loop.is_closed() else loop.call_soon_threadsafe(give_back))
        return await asyncio.wrap_future(job)

    # --- route ---

    async def apply_route(self, token: int, route: Route, stable_version: str, updated_at: float) -> Applied:
        """Puts a route in force: written down first, then one reference assignment.

        Raises:
            Aborted: `STALE_CONTROLLER`, `STALE_EPOCH` (also for the same epoch with other weights).
            FailedPrecondition: `VERSION_NOT_READY`.
        """
        return await self._undisturbed(self._apply(token, route, stable_version, updated_at))

    async def _apply(self, token: int, route: Route, stable_version: str, updated_at: float) -> Applied:
        start = self._clock.monotonic()
        async with self._lock:
            known = self._assignment.models.get(route.model)
            news = admit(
                route.model,
                epoch=route.epoch,
                token=token,
                seen_epoch=known.route.epoch if known else 0,
                seen_token=self.fencing_token,
            )
            if not news and known is not None and known.route != route:
                raise stale_epoch(route.model, known.route.epoch, route.epoch)
            if token > self.fencing_token:
                await self._remember(replace(self._assignment, fencing_token=token))
            in_force = self._registry.snapshot.routes.get(route.model)
            if not news and known is not None and in_force is not None and in_force.route == route:
                return Applied(known, 0.0, 0)
            assigned = AssignedModel(route, stable_version, updated_at, self._assigned(route))
            models = {**self._assignment.models, route.model: assigned}
            await self._remember(Assignment(token, models))
            self._failpoint("inference.switch", ",".join(route.versions()))
            left = self._switch(route)
        seconds = self._clock.monotonic() - start
        num_in_flight = sum(slot.in_flight for slot in left)
        _log.info(
            "route_applied",
            model=route.model,
            epoch=route.epoch,
            versions=route.versions(),
            seconds=round(seconds, 6),
            in_flight=num_in_flight,
        )
        return Applied(assigned, seconds, num_in_flight)

    def _assigned(self, route: Route) -> dict[str, Assigned]:
        slots = self._registry.snapshot.slots.get(route.model, {})
        for version in route.versions():
            state = slots[version].state if version in slots else None
            if state not in _ROUTABLE:
                raise FailedPrecondition(
                    f"models/{route.model}/versions/{version} is {state or 'not loaded'}: prepare and warm it before routing to it",
                    reason="VERSION_NOT_READY",
                    field="route.weights",
                    metadata={"version": version, "state": str(state or "absent")},
                )
        return {v: Assigned(slots[v].artifact_uri, slots[v].digest, slots[v].origin) for v in route.versions()}

    def _switch(self, route: Route) -> list[Slot]:
        left = self._registry.switch(route)
        self.changed.fire()
        return left

    # --- drain, park, release ---

    async def drain(self, model: str, version: str, timeout_seconds: float) -> Drained:
        """Takes no new request for the version, waits for those it has, cuts what is left. An unknown version is drained already.

        Raises:
            FailedPrecondition: `VERSION_ROUTED`.
        """
        slot = self._unrouted(model, version)
        if slot is None or slot.state not in (SlotState.READY, SlotState.DRAINING):
            return Drained(0, (), 0)
        ensembles.check_not_needed(model, version, self._registry)
        slot.move(SlotState.DRAINING)
        self.changed.fire()
        self._failpoint("inference.drain", version)
        drained = await slot.drain(self._clock, timeout_seconds)
        self.changed.fire()
        _log.info("drained", version=slot.name, num_drained=drained.num_drained, num_cut=drained.num_cut)
        return drained

    def park(self, model: str, version: str) -> Slot:
        """Keeps an unrouted version loaded.

        Raises:
            NotFound: `SLOT_UNKNOWN`.
            FailedPrecondition: `VERSION_ROUTED`, `NOT_LOADED`.
        """
        self._unrouted(model, version)
        slot = self._known(model, version)
        slot.move(SlotState.READY)
        slot.parked = True
        self.changed.fire()
        return slot

    async def release(self, model: str, version: str) -> bool:
        """Unloads an unrouted version; its engine is closed when nothing holds it any more. False when it was not loaded.

        Raises:
            FailedPrecondition: `VERSION_ROUTED`.
        """
        async with self._lock:  # not between the check of a route and its coming into force
            slot = self._unrouted(model, version)
            if slot is None:
                return False
            ensembles.check_not_needed(model, version, self._registry)
            slot.move(SlotState.STOPPED)
            self._registry.drop(slot)
            load = self._loads.pop((model, version), None)
            if load is not None and not load.done:
                load.hold.end(_released(slot))
        self._released(slot)
        self.changed.fire()
        _log.info("released", version=slot.name)
        return True

    def _unrouted(self, model: str, version: str) -> Slot | None:
        slot = self._registry.snapshot.slots.get(model, {}).get(version)
        if slot is not None and slot.state is SlotState.SERVING:
            raise FailedPrecondition(
                f"{slot.name} is routed; apply a route without it first",
                reason="VERSION_ROUTED",
                metadata={"version": slot.name},
            )
        return slot


def _fits(slot: Slot, inputs: Mapping[str, Array]) -> bool:
    if inputs.keys() != slot.specs.keys():
        return False
    specs = ((slot.specs[name], array) for name, array in inputs.items())
    return all(
        len(spec.shape) == array.ndim and all(w in (-1, h) for w, h in zip(spec.shape, array.shape, strict=True))
        for spec, array in specs
    )


def _nothing() -> None:
    """What a hop carries."""


def _after(attempts: int, error: InterlockError) -> InterlockError:
    """The last refusal, saying how often it was tried."""
    return type(error)(
        f"{error.message} (tried {attempts} times)",
        reason=error.reason,
        field=error.field,
        retry_after_seconds=error.retry_after_seconds,
        metadata={**error.metadata, "attempts": str(attempts)},
    )


def _released(slot: Slot) -> FailedPrecondition:
    return FailedPrecondition(f"{slot.name} was released while it was loading", reason="RELEASED")


def _stopping() -> Unavailable:
    return Unavailable("the replica is stopping", reason="DRAINING")


class _Pauses(Told):
    """Shows a load's pauses in its progress, and counts them."""

    def __init__(self, replica: Replica, load: Load) -> None:
        super().__init__()
        self._replica = replica
        self._load = load
        self._before = ""

    def paused(self, message: str) -> None:
        """See `Told`."""
        self._before = self._load.message
        self._replica.note(self._load, message)

    def resumed(self, seconds: float) -> None:
        """See `Told`."""
        self._replica.note(self._load, self._before, paused_seconds=seconds)
