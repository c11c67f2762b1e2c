"""One path for a prediction: admit, decode, run, encode, give back. Knows neither gRPC nor HTTP; a face hands it a `Call` and gets a `Reply`.

A model whose run costs less than a thread hop runs on the event loop; a slower one in a worker thread, behind a bounded queue. Which it is
was measured at warm-up and is scaled by the size of the request. A request whose deadline has passed, or whose caller has gone, is dropped
before compute. A version that batches has a lane of its own (`batching`, `turns`). An ensemble's request is a request to each of its members, on
versions that it holds from its admission to its end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from interlock.errors import InterlockError, InvalidArgument
from interlock_inference import ensembles
from interlock_inference.batching import Ran, Run, expired, queue_full
from interlock_inference.engines import Array
from interlock_inference.engines.ensemble import Plan
from interlock_inference.recorder import Recorder
from interlock_inference.slots import Handle, Registry, Slot, SlotState
from interlock_inference.turns import Turns

INLINE_SECONDS = 0.001  # two thread hops cost about 0.1 ms here; one run on the loop may delay others by at most this
QUEUE_LIMIT = 256  # waiting runs; at the inline limit that is a quarter of a second of work per thread


class Call(Protocol):
    """What a face knows of a request. `decode` is called once, after admission, with the picked slot."""

    model: str
    version: str
    request_id: str
    outputs: Sequence[str]
    deadline: float | None
    """On time.monotonic's clock."""
    priority: int
    """1 goes first; 0 means the model's default. Counts only where a model has levels and requests wait."""
    has_images: bool
    """Its inputs are encoded images: to decode them takes a thread."""

    def decode(self, slot: Slot) -> dict[str, Array]:
        """The inputs by name, checked against the slot's signature; raises InvalidArgument."""
        ...


class Reply(NamedTuple):
    """The outputs in the order of `names`, and who answered."""

    slot: Slot
    epoch: int
    names: Sequence[str]
    outputs: list[Array]
    members: Sequence[Slot] = ()
    """Of an ensemble: the slot of each step."""


@dataclass(slots=True)
class _Step:
    """A request that an ensemble makes of one of its members, on a version that is held for it."""

    model: str
    version: str
    request_id: str
    outputs: Sequence[str]
    deadline: float | None
    priority: int
    inputs: dict[str, Array]
    has_images: bool = False

    def decode(self, slot: Slot) -> dict[str, Array]:
        """They were checked when the ensemble was loaded."""
        return self.inputs


class Observer(Protocol):
    """Told of every finished request; must be cheap."""

    def finished(self, slot: Slot, seconds: float, error: InterlockError | None) -> None:
        """One request of the slot's version has ended."""
        ...

    def ran(self, slot: Slot, rows: int) -> None:
        """The version's engine has run once, for so many rows."""
        ...


class DataPlane:
    """Runs requests against the registry's slots."""

    def __init__(
        self,
        registry: Registry,
        recorder: Recorder,
        observer: Observer,
        *,
        num_threads: int = 1,
        queue_limit: int = QUEUE_LIMIT,
    ) -> None:
        self._registry = registry
        self._recorder = recorder
        self._observer = observer
        self._queue_limit = queue_limit
        self._num_queued = 0
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="infer")
        self._turns = Turns(self._pool, self._count_batch)

    @property
    def num_queued(self) -> int:
        """Requests that wait for or occupy a worker thread."""
        return self._num_queued + self._turns.num_held

    def close(self) -> None:
        """Ends the worker threads after what they run now."""
        for slot in self._registry.all_slots():
            slot.end_threads(wait=True)
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def infer(self, call: Call) -> Reply:
        """Answers one request; raises as `begin`."""
        begun = self.begin(call)
        return begun if isinstance(begun, Reply) else await begun

    def begin(self, call: Call) -> Reply | Coroutine[Any, Any, Reply]:
        """Answers a request at once when its run is short, else returns what to await, which must be started: it holds the version.

        Raises:
            NotFound, Unavailable: see `Registry.admit`.
            InvalidArgument: `INVALID_TENSOR`.
            DeadlineExceeded: `DEADLINE_EXPIRED`, before compute.
            ResourceExhausted: `QUEUE_FULL`.
            Internal: `ENGINE_FAULT`.
        """
        return self._begin(call, self._registry.admit(call.model, call.version, call.request_id))

    def _begin(self, call: Call, handle: Handle) -> Reply | Coroutine[Any, Any, Reply]:
        """Owns the handle from here on."""
        start = time.perf_counter_ns()
        slot = handle.slot
        try:
            if call.has_images:
                self._check_room(slot)
                return self._seen(call, handle, start)
            inputs = call.decode(slot)
            names = _wanted(call, slot)
            _check_deadline(call.deadline)
            decoded = time.perf_counter_ns()
            if slot.plan is not None:
                return self._ensemble(call, handle, slot.plan, inputs, names, (start, decoded))
            if not self._is_short(slot, inputs):
                self._check_room(slot)
                return self._later(call, handle, inputs, names, (start, decoded))
            outputs = _run_whole(slot, inputs, names)
        except InterlockError as error:
            handle.release()
            self._count_failure(slot, start, error)
            raise
        except BaseException:
            handle.release()
            raise
        ended = time.perf_counter_ns()
        handle.release()
        self._count(slot, inputs, Ran(decoded, 0, outputs), (start, decoded, ended))
        return Reply(slot, handle.epoch, names, outputs)

    async def _seen(self, call: Call, handle: Handle, start: int) -> Reply:
        """Decodes images in a worker thread, then goes on as any request."""
        self._num_queued += 1
        try:
            waiting = asyncio.wrap_future(self._pool.submit(call.decode, handle.slot))
            try:
                inputs = await waiting
            finally:
                waiting.cancel()
                self._num_queued -= 1
            names = _wanted(call, handle.slot)
            _check_deadline(call.deadline)
            marks, plan = (start, time.perf_counter_ns()), handle.slot.plan
            if plan is not None:
                rest = self._ensemble(call, handle, plan, inputs, names, marks)
            else:
                rest = self._later(call, handle, inputs, names, marks)
        except InterlockError as error:
            handle.release()
            self._count_failure(handle.slot, start, error)
            raise
        except BaseException:
            handle.release()
            raise
        return rest if isinstance(rest, Reply) else await rest

    async def _later(
        self, call: Call, handle: Handle, inputs: dict[str, Array], names: Sequence[str], marks: tuple[int, int]
    ) -> Reply:
        slot, (start, decoded) = handle.slot, marks
        engine_names = slot.processing.engine_names(names) if slot.processing is not None else names
        try:
            if slot.lane is None:
                ran = await self._in_thread(handle, inputs, engine_names, call.deadline)
            else:
                ran = await self._turns.answer(handle, inputs, engine_names, call.deadline, call.priority)
            outputs = ran.outputs
            if slot.processing is not None:
                outputs = slot.processing.finish(names, engine_names, outputs)
        except InterlockError as error:
            self._count_failure(slot, start, error)
            raise
        self._count(slot, inputs, ran, (start, decoded, time.perf_counter_ns()))
        return Reply(slot, handle.epoch, names, outputs)

    # --- ensembles ---

    def _ensemble(
        self,
        call: Call,
        handle: Handle,
        plan: Plan,
        inputs: dict[str, Array],
        names: Sequence[str],
        marks: tuple[int, int],
    ) -> Reply | Coroutine[Any, Any, Reply]:
        """Takes hold of one version of each member, now: whatever is swapped later, this request is answered by these."""
        slots, tensors = ensembles.members(plan, self._registry.snapshot), dict(inputs)
        if self._is_short(handle.slot, inputs) and self._all_now(call, plan, slots, tensors):
            outputs = _finished(handle.slot, tensors, names)
            handle.release()
            return self._ended(handle, inputs, names, outputs, marks, slots)
        holds = [handle, *(slot.take(handle.epoch, call.request_id) for slot in dict.fromkeys(slots))]
        return self._held(call, holds, self._steps(call, plan, slots, tensors), inputs, names, marks, slots)

    def _all_now(self, call: Call, plan: Plan, slots: Sequence[Slot], tensors: dict[str, Array]) -> bool:
        """Runs steps on the event loop as long as they are short; False when one is not, and with it the rest, is left."""
        for number in (n for level in plan.levels for n in level):
            asked = _asked(call, plan, number, slots[number], tensors)
            if not self._is_short(slots[number], asked.inputs):
                return False
            try:
                reply = self._begin(asked, slots[number].take(0, call.request_id))
            except InterlockError as error:
                raise ensembles.in_step(error, number, slots[number]) from error
            assert isinstance(reply, Reply), "a short run is answered at once"
            tensors.update(zip(plan.steps[number].outputs.values(), reply.outputs, strict=True))
        return True

    def _ended(
        self,
        handle: Handle,
        inputs: dict[str, Array],
        names: Sequence[str],
        outputs: list[Array],
        marks: tuple[int, int],
        slots: Sequence[Slot],
    ) -> Reply:
        """Counts an ensemble's request and answers it."""
        (start, decoded), ended = marks, time.perf_counter_ns()
        self._count(handle.slot, inputs, Ran(decoded, ended, outputs), (start, decoded, ended))
        return Reply(handle.slot, handle.epoch, names, outputs, slots)

    async def _held(
        self,
        call: Call,
        holds: Sequence[Handle],
        steps: Coroutine[Any, Any, Mapping[str, Array]],
        inputs: dict[str, Array],
        names: Sequence[str],
        marks: tuple[int, int],
        slots: Sequence[Slot],
    ) -> Reply:
        handle = holds[0]
        handle.abort = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.TaskGroup() as group:
                running = group.create_task(steps)
                await asyncio.wait((running, handle.abort), return_when=asyncio.FIRST_COMPLETED)
                running.cancel()
            if handle.abort.done():
                handle.abort.result()
            outputs = _finished(handle.slot, running.result(), names)
        except (InterlockError, BaseExceptionGroup) as failed:
            error = _first(failed)
            self._count_failure(handle.slot, marks[0], error)
            raise error from None
        finally:
            handle.abort.cancel()
            for hold in holds:
                hold.release()
        return self._ended(handle, inputs, names, outputs, marks, slots)

    async def _steps(
        self, call: Call, plan: Plan, slots: Sequence[Slot], tensors: dict[str, Array]
    ) -> Mapping[str, Array]:
        """All tensors of one request, but for those that are there; the steps of a level run side by side, each as a request to its member."""
        for whole in plan.levels:
            level = [number for number in whole if not tensors.keys() >= set(plan.steps[number].outputs.values())]
            if len(level) == 1:
                await self._step(call, plan, level[0], slots[level[0]], tensors)
                continue
            try:
                async with asyncio.TaskGroup() as group:
                    for number in level:
                        group.create_task(self._step(call, plan, number, slots[number], tensors))
            except BaseExceptionGroup as failed:
                raise _first(failed) from None
        return tensors

    async def _step(self, call: Call, plan: Plan, number: int, slot: Slot, tensors: dict[str, Array]) -> None:
        asked = _asked(call, plan, number, slot, tensors)
        try:
            begun = self._begin(asked, slot.take(0, call.request_id))
            reply = begun if isinstance(begun, Reply) else await begun
        except InterlockError as error:
            raise ensembles.in_step(error, number, slot) from error
        tensors.update(zip(plan.steps[number].outputs.values(), reply.outputs, strict=True))

    def _is_short(self, slot: Slot, inputs: Mapping[str, Array]) -> bool:
        warmup = slot.warmup
        if warmup is None or slot.apart:  # the loop waits for no other process
            return False
        elements = 0
        for array in inputs.values():
            elements += array.size
        # behind the loop no queue forms, so a version that batches leaves it as soon as a hop costs less than the run
        limit = INLINE_SECONDS if slot.lane is None else warmup.hop_seconds
        return warmup.best_seconds * max(1.0, elements / warmup.best_elements) < limit

    def _check_room(self, slot: Slot) -> None:
        if self.num_queued >= self._queue_limit:
            raise queue_full(self.num_queued, self._queue_limit)
        if slot.lane is not None:
            slot.lane.check_room()

    async def _in_thread(
        self, handle: Handle, inputs: dict[str, Array], names: Sequence[str], deadline: float | None
    ) -> Ran:
        """Owns the handle from here on: it is given back when the thread has let go of the engine, also when the caller is long gone."""
        loop = asyncio.get_running_loop()
        self._num_queued += 1
        job = (handle.slot.threads or self._pool).submit(_run_late, handle.slot, inputs, names, deadline)
        job.add_done_callback(lambda done: self._hand_back(loop, handle, done))
        handle.abort = loop.create_future()
        waiting = asyncio.wrap_future(job)
        try:
            await asyncio.wait((waiting, handle.abort), return_when=asyncio.FIRST_COMPLETED)
            if handle.abort.done():
                handle.abort.result()
            return waiting.result()
        finally:
            waiting.cancel()  # takes the run out of the queue if it has not begun; one that has ends by itself
            handle.abort.cancel()

    def _hand_back(self, loop: asyncio.AbstractEventLoop, handle: Handle, _: Future[Ran]) -> None:
        def on_loop() -> None:
            self._num_queued -= 1
            handle.release()

        if not loop.is_closed():
            loop.call_soon_threadsafe(on_loop)

    def _count(self, slot: Slot, inputs: dict[str, Array], ran: Ran, marks: tuple[int, int, int]) -> None:
        start, decoded, ended = marks
        stats, infer_ns = slot.stats, (ran.ended or ended) - ran.began
        first = next(iter(inputs.values()))
        rows = first.shape[0] if first.ndim else 1
        if not ran.batched:
            stats.ran(rows, infer_ns)
            self._observer.ran(slot, rows)
        stats.answered(rows, ended - start, ran.began - decoded, decoded - start, infer_ns)
        self._recorder.offer(slot.model, inputs)
        self._observer.finished(slot, (ended - start) / 1e9, None)

    def _count_batch(self, slot: Slot, run: Run) -> None:
        if slot.state is SlotState.STOPPED:
            return  # cut and released meanwhile: its series are gone, and shall not come back
        slot.stats.ran(run.rows, run.infer_ns, run.input_ns, run.output_ns)
        self._observer.ran(slot, run.rows)

    def _count_failure(self, slot: Slot, start: int, error: InterlockError) -> None:
        nanoseconds = time.perf_counter_ns() - start
        if error.reason == "INPUT_REFUSED":
            slot.stats.refused += 1
        elif not isinstance(error, InvalidArgument):
            slot.stats.failure.add(nanoseconds)
        self._observer.finished(slot, nanoseconds / 1e9, error)


def _asked(call: Call, plan: Plan, number: int, slot: Slot, tensors: Mapping[str, Array]) -> _Step:
    """What an ensemble's step asks of its member."""
    step = plan.steps[number]
    given = {name: tensors[called] for name, called in step.inputs.items()}
    return _Step(step.model, slot.version, call.request_id, list(step.outputs), call.deadline, call.priority, given)


def _finished(slot: Slot, tensors: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
    """The outputs asked for, out of an ensemble's tensors, with what the version does behind them."""
    if slot.processing is None:
        return [tensors[name] for name in names]
    engine_names = slot.processing.engine_names(names)
    return slot.processing.finish(names, engine_names, [tensors[name] for name in engine_names])


def _first(failed: BaseException) -> InterlockError:
    """The first error of ours; what failed or was cancelled beside it followed from it."""
    while isinstance(failed, BaseExceptionGroup):
        failed = (failed.subgroup(InterlockError) or failed).exceptions[0]
    if not isinstance(failed, InterlockError):
        raise failed
    return failed


def _wanted(call: Call, slot: Slot) -> Sequence[str]:
    outputs = call.outputs
    if not outputs:
        labels = slot.processing.specs if call.has_images and slot.processing is not None else None
        return tuple(labels) if labels else slot.output_names
    for index, name in enumerate(outputs):
        if name not in slot.output_specs:
            raise InvalidArgument(
                f"outputs[{index}].name: unknown output {name[:80]!r}; the model gives {', '.join(slot.output_names)}",
                reason="INVALID_TENSOR",
                field=f"outputs[{index}].name",
                metadata={"output": name[:80]},
            )
    if len(set(outputs)) < len(outputs):
        raise InvalidArgument("outputs: an output is asked for twice", reason="INVALID_TENSOR", field="outputs")
    return outputs


def _check_deadline(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise expired()


def run_now(slot: Slot, inputs: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
    """Runs a held slot's engine in this thread."""
    assert slot.opened is not None, "a held slot keeps its engine"
    return slot.opened.engine.run(inputs, names)


def _run_whole(slot: Slot, inputs: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
    """Runs a held slot's engine in this thread, and what the version does behind it."""
    if slot.processing is None:
        return run_now(slot, inputs, names)
    engine_names = slot.processing.engine_names(names)
    return slot.processing.finish(names, engine_names, run_now(slot, inputs, engine_names))


def _run_late(slot: Slot, inputs: Mapping[str, Array], names: Sequence[str], deadline: float | None) -> Ran:
    """In a worker thread."""
    _check_deadline(deadline)
    began = time.perf_counter_ns()
    outputs = run_now(slot, inputs, names)
    return Ran(began, time.perf_counter_ns(), outputs)
