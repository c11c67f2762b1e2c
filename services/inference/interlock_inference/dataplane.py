"""One path for a prediction: admit, decode, run, encode, give back. Knows neither gRPC nor HTTP; a face hands it a `Call` and gets a `Reply`.

A model whose run costs less than a thread hop runs on the event loop; a slower one in a worker thread, behind a bounded queue. Which it is
was measured at warm-up and is scaled by the size of the request. A request whose deadline has passed, or whose caller has gone, is dropped
before compute.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from interlock.errors import DeadlineExceeded, InterlockError, InvalidArgument, ResourceExhausted
from interlock_inference.engines import Array
from interlock_inference.recorder import Recorder
from interlock_inference.slots import Handle, Registry, Slot

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

    def decode(self, slot: Slot) -> dict[str, Array]:
        """The inputs by name, checked against the slot's signature; raises InvalidArgument."""
        ...


@dataclass(frozen=True, slots=True)
class Reply:
    """The outputs in the order of `names`, and who answered."""

    slot: Slot
    epoch: int
    names: Sequence[str]
    outputs: list[Array]


class Observer(Protocol):
    """Told of every finished request; must be cheap."""

    def finished(self, slot: Slot, seconds: float, error: InterlockError | None) -> None:
        """One request of the slot's version has ended."""
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

    @property
    def num_queued(self) -> int:
        """Runs that wait for or occupy a worker thread."""
        return self._num_queued

    def close(self) -> None:
        """Ends the worker threads after what they run now."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def infer(self, call: Call) -> Reply:
        """Answers one request.

        Raises:
            NotFound, Unavailable: see `Registry.admit`.
            InvalidArgument: `INVALID_TENSOR`.
            DeadlineExceeded: `DEADLINE_EXPIRED`, before compute.
            ResourceExhausted: `QUEUE_FULL`.
            Internal: `ENGINE_FAULT`.
        """
        start = time.perf_counter_ns()
        handle = self._registry.admit(call.model, call.version, call.request_id)
        slot, mine, failure = handle.slot, True, None
        try:
            inputs = call.decode(slot)
            names = _wanted(call.outputs, slot)
            _check_deadline(call.deadline)
            decoded = time.perf_counter_ns()
            if self._is_short(slot, inputs):
                began = decoded
                outputs = run_now(slot, inputs, names)
            else:
                mine = False
                began, outputs = await self._in_thread(handle, inputs, names, call.deadline)
            ended = time.perf_counter_ns()
        except InterlockError as error:
            failure = error
            raise
        finally:
            if mine:
                handle.release()
            if failure is not None:
                self._count_failure(slot, start, failure)
        self._count(slot, inputs, (start, decoded, began, ended))
        return Reply(slot, handle.epoch, names, outputs)

    def _is_short(self, slot: Slot, inputs: Mapping[str, Array]) -> bool:
        warmup = slot.warmup
        if warmup is None:
            return False
        elements = sum(array.size for array in inputs.values())
        return warmup.best_seconds * max(1.0, elements / warmup.best_elements) < INLINE_SECONDS

    async def _in_thread(
        self, handle: Handle, inputs: dict[str, Array], names: Sequence[str], deadline: float | None
    ) -> tuple[int, list[Array]]:
        """Owns the handle from here on: it is given back when the thread has let go of the engine, also when the caller is long gone."""
        loop = asyncio.get_running_loop()
        if self._num_queued >= self._queue_limit:
            handle.release()
            raise ResourceExhausted(
                f"{self._num_queued} requests wait for the engine already",
                reason="QUEUE_FULL",
                retry_after_seconds=0.1,
                metadata={"queue_limit": str(self._queue_limit)},
            )
        self._num_queued += 1
        job = self._pool.submit(_run_late, handle.slot, inputs, names, deadline)
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

    def _hand_back(self, loop: asyncio.AbstractEventLoop, handle: Handle, _: Future[tuple[int, list[Array]]]) -> None:
        def on_loop() -> None:
            self._num_queued -= 1
            handle.release()

        if not loop.is_closed():
            loop.call_soon_threadsafe(on_loop)

    def _count(self, slot: Slot, inputs: dict[str, Array], marks: tuple[int, int, int, int]) -> None:
        start, decoded, began, ended = marks
        stats = slot.stats
        stats.success.add(ended - start)
        stats.queue.add(began - decoded)
        stats.compute_input.add(decoded - start)
        stats.compute_infer.add(ended - began)
        first = next(iter(inputs.values()))
        stats.num_rows += first.shape[0] if first.ndim else 1
        stats.last_at_ms = int(time.time_ns() // 1_000_000)
        seconds = (ended - start) / 1e9
        stats.latencies_seconds.append(seconds)
        self._recorder.offer(slot.model, inputs)
        self._observer.finished(slot, seconds, None)

    def _count_failure(self, slot: Slot, start: int, error: InterlockError) -> None:
        nanoseconds = time.perf_counter_ns() - start
        if isinstance(error, InvalidArgument):
            slot.stats.refused += 1
        else:
            slot.stats.failure.add(nanoseconds)
        self._observer.finished(slot, nanoseconds / 1e9, error)


def _wanted(outputs: Sequence[str], slot: Slot) -> Sequence[str]:
    if not outputs:
        return slot.output_names
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
        raise DeadlineExceeded("the deadline passed before the model ran", reason="DEADLINE_EXPIRED")


def run_now(slot: Slot, inputs: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
    """Runs a held slot's engine in this thread."""
    assert slot.opened is not None, "a held slot keeps its engine"
    return slot.opened.engine.run(inputs, names)


def _run_late(
    slot: Slot, inputs: Mapping[str, Array], names: Sequence[str], deadline: float | None
) -> tuple[int, list[Array]]:
    """In a worker thread: when the run began, and its outputs."""
    _check_deadline(deadline)
    return time.perf_counter_ns(), run_now(slot, inputs, names)
