"""Requests that wait for one version's engine, which of them go together, and running them. No event loop and no thread of its own.

Rules of this file
- Nobody waits for company while the engine is free: what goes together is what had to wait anyway (`max_delay_ms` is 0 unless a maker says otherwise).
- A batch is of one version (a lane belongs to a slot), of one shape but for the rows, and gives the same outputs.
- The head of the queue always goes. Others join it in the queue's order, as long as rows, measured time and deadlines allow.
- What has expired is not run. A batch that fails is run once more, request by request, so that a bad one fails alone.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from bisect import insort
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import structlog

from interlock.errors import DeadlineExceeded, InterlockError, Internal, ResourceExhausted
from interlock.stores.modelspec import BatchingSpec
from interlock_inference.engines import Array, Engine, Signature

if TYPE_CHECKING:
    from interlock_inference.slots import Handle

TOLERANCE: Mapping[str, float] = {"FP64": 1e-9, "FP32": 1e-4, "FP16": 1e-2, "BF16": 2e-2}
"""How far rows run together may be from rows run alone, as a share of the output's largest element; other datatypes: not at all."""
NEW_SHARE = 0.5  # of a new measurement in the estimate
RELAX = 0.98  # per batch that an estimate kept small: a stall that was measured once must not hold for ever
_log = structlog.get_logger(__name__)


class Ran(NamedTuple):
    """What a request gets: when its run began and ended (perf_counter_ns; ended 0 means now), and its outputs.

    `batched` says that it went through a lane, where the run is counted once for all its requests.
    """

    began: int
    ended: int
    outputs: list[Array]
    batched: bool = False


@dataclass(slots=True, eq=False)
class Entry:
    """One request in a lane. Times are on time.monotonic's clock; `key` None means that it can't go with others."""

    handle: Handle
    inputs: Mapping[str, Array]
    names: Sequence[str]
    rows: int
    key: Hashable
    priority: int
    deadline: float
    patient_until: float
    answer: asyncio.Future[Ran]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the engine and its outcome per entry. `rows` is 0 when nothing was run or it failed; times in nanoseconds."""

    entries: Sequence[Entry]
    outcomes: Sequence[Ran | InterlockError]
    rows: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """What a free engine takes: a batch, those that waited too long, and whether more are left."""

    batch: Sequence[Entry]
    expired: Sequence[Entry]
    more: bool


class NotByRows(Exception):
    """The outputs do not have a row per row of input: this graph is not what its `[batching]` says."""


class Pace:
    """Measured seconds of a run by its rows, in powers of two; unmeasured sizes are taken as in proportion, which errs to the slow side."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def note(self, rows: int, seconds: float) -> None:
        """Takes in one measurement."""
        size = _size(rows)
        known = self._seconds.get(size, seconds)
        self._seconds[size] = known + NEW_SHARE * (seconds - known)

    def seconds(self, rows: int) -> float:
        """What a run of so many rows is expected to take; 0 when nothing is known."""
        size = _size(rows)
        if size in self._seconds:
            return self._seconds[size]
        sizes = list(self._seconds)  # in one step: another thread may be adding one
        nearest = max((s for s in sizes if s < size), default=None)
        if nearest is not None:
            return self._seconds[nearest] * float(2 ** (size - nearest))
        return self._seconds[min(sizes)] if sizes else 0.0

    def relax(self, rows: int) -> None:
        """Brings an estimate that kept a batch small a little down, so that it is measured again some day."""
        self._seconds[_size(rows)] = self.seconds(rows) * RELAX


def _size(rows: int) -> int:
    return (max(1, rows) - 1).bit_length()


class Lane:
    """The queue in front of one slot's engine. `put`, `remove` and the timer belong to the event loop, `take` to any thread."""

    def __init__(self, spec: BatchingSpec) -> None:
        self.spec = spec
        self.pace = Pace()
        self.combines = True
        self.timer: asyncio.TimerHandle | None = None
        self._lock = threading.Lock()
        self._waiting: list[Entry] = []
        self._asked = False

    @property
    def num_waiting(self) -> int:
        """Requests that wait; those that run are not among them."""
        return len(self._waiting)

    @property
    def delay_seconds(self) -> float:
        """How long a request may be kept for company: longer than 0 only while no preferred number of rows (else `max_rows`) waits."""
        spec = self.spec
        if not spec.max_delay_ms:
            return 0.0
        rows = sum(entry.rows for entry in self._waiting)
        return 0.0 if rows >= min(spec.preferred_rows, default=spec.max_rows) else spec.max_delay_ms / 1e3

    def check_room(self) -> None:
        """Raises ResourceExhausted `QUEUE_FULL` when the model's own limit is reached."""
        limit = self.spec.queue_limit
        if limit and len(self._waiting) >= limit:
            raise queue_full(len(self._waiting), limit)

    def priority(self, asked: int) -> int:
        """1 is served first; 0 and what the model does not have mean its default."""
        return asked if 1 <= asked <= self.spec.priority_levels else self.spec.default_priority

    def entry(
        self, handle: Handle, inputs: Mapping[str, Array], names: Sequence[str], deadline: float | None, asked: int
    ) -> Entry:
        """A request as the lane keeps it; call on the event loop."""
        rows, key = shape_key(inputs, names)
        patience = time.monotonic() + self.spec.timeout_ms / 1e3 if self.spec.timeout_ms else math.inf
        until = math.inf if deadline is None else deadline
        answer: asyncio.Future[Ran] = asyncio.get_running_loop().create_future()
        return Entry(handle, inputs, names, rows, key, self.priority(asked), until, patience, answer)

    def put(self, entry: Entry) -> None:
        """Queues it behind those of its priority."""
        with self._lock:
            insort(self._waiting, entry, key=lambda e: e.priority)

    def ask(self) -> bool:
        """True when the caller must ask for a turn of the engine: something waits and nobody has asked yet."""
        with self._lock:
            news = bool(self._waiting) and not self._asked
            self._asked = self._asked or news
            return news

    def remove(self, entry: Entry) -> bool:
        """Takes it out; False when it was taken already."""
        with self._lock:
            if entry not in self._waiting:
                return False
            self._waiting.remove(entry)
        if not self._waiting and self.timer is not None:
            self.timer.cancel()
            self.timer = None
        return True

    def take(self, now: float) -> Turn:
        """What goes in this turn of the engine. When more is left, the caller asks for another turn."""
        with self._lock:
            expired = [e for e in self._waiting if self._is_over(e, now)]
            live = [e for e in self._waiting if e not in expired] if expired else self._waiting
            live = sorted(live, key=lambda e: e.patient_until <= now)  # timeout_action continue: behind the others
            batch, held_back = choose(live, self.spec, self.pace.seconds, now, combines=self.combines)
            if held_back:
                self.pace.relax(held_back)
            gone = set(map(id, (*batch, *expired)))
            self._waiting = [e for e in self._waiting if id(e) not in gone]
            self._asked = bool(self._waiting)
            return Turn(batch, expired, self._asked)

    def _is_over(self, entry: Entry, now: float) -> bool:
        return (
            entry.answer.done()
            or entry.deadline <= now
            or (self.spec.timeout_action == "reject" and entry.patient_until <= now)
        )

    def clear(self) -> list[Entry]:
        """Empties it: no turn will come."""
        with self._lock:
            left, self._waiting, self._asked = self._waiting, [], False
        return left


def lane_for(spec: BatchingSpec | None, signature: Signature) -> Lane | None:
    """A lane for a version that asks for batching and can have it; None means that each request runs by itself."""
    return Lane(spec) if spec is not None and spec.enabled and is_by_rows(signature) else None


def is_by_rows(signature: Signature) -> bool:
    """True when the first dimension of every tensor is free, and is the same one in all inputs and nowhere else."""
    specs = (*signature.inputs, *signature.outputs)
    if not all(spec.shape[:1] == (-1,) for spec in specs):
        return False
    symbols = [signature.symbols.get(spec.name, ()) for spec in signature.inputs]
    first = {names[0] for names in symbols if names and names[0]}
    return len(first) <= 1 and not any(first & set(names[1:]) for names in symbols)


def shape_key(inputs: Mapping[str, Array], names: Sequence[str]) -> tuple[int, Hashable]:
    """The rows of a request, and what it must share with another to go with it; None when it can't. Datatypes are the signature's."""
    rows = {array.shape[0] for array in inputs.values()}
    if len(rows) != 1 or 0 in rows:
        return max(1, *rows), None
    return rows.pop(), (tuple(names), tuple((name, inputs[name].shape[1:]) for name in sorted(inputs)))


def choose(
    waiting: Sequence[Entry], spec: BatchingSpec, seconds: Callable[[int], float], now: float, *, combines: bool = True
) -> tuple[list[Entry], int]:
    """The entries that go together, and the rows that measured time alone kept from going (0 if it did not)."""
    if not waiting:
        return [], 0
    head = waiting[0]
    chosen, rows, soonest = [head], head.rows, math.inf
    if head.deadline >= now + seconds(rows):  # a deadline that will be missed anyway holds nobody back
        soonest = head.deadline
    if head.key is None or not combines:
        return chosen, 0
    longest = max(spec.max_run_ms / 1e3, 2 * seconds(1))  # where rows cost nothing extra, two take hardly more than one
    for entry in waiting[1:]:
        if entry.key != head.key:
            continue
        total = rows + entry.rows
        if total > spec.max_rows:
            break
        expected = seconds(total)
        end = now + expected
        if expected > longest or end > soonest:
            return chosen, total
        chosen.append(entry)
        rows = total
        if entry.deadline >= end:
            soonest = min(soonest, entry.deadline)
    return _preferred(chosen, rows, spec.preferred_rows), 0


def _preferred(chosen: list[Entry], rows: int, preferred: Sequence[int]) -> list[Entry]:
    """As many as make the largest preferred number of rows that is reached; all when none is."""
    reached = max((size for size in preferred if size <= rows), default=rows)
    ends = itertools.accumulate(entry.rows for entry in chosen)
    return chosen[: max(1, sum(end <= reached for end in ends))]


def run_batch(engine: Engine, lane: Lane, entries: Sequence[Entry]) -> list[Run]:
    """Runs the entries together; each alone when there is one, or when together they fail. In a worker thread."""
    if len(entries) > 1:
        try:
            return [_together(engine, lane, entries)]
        except NotByRows as error:
            lane.combines = False
            _log.error("batching_stopped", problem=str(error), names=list(entries[0].names))
        except InterlockError as error:
            _log.warning("batch_failed", requests=len(entries), reason=error.reason, problem=error.message)
        except Exception as error:  # noqa: BLE001 - supervised edge: whatever breaks in a batch, each request still gets its own try
            _log.error("batch_crashed", requests=len(entries), exc_info=error)
    return [_alone(engine, lane, entry) for entry in entries]


def _together(engine: Engine, lane: Lane, entries: Sequence[Entry]) -> Run:
    start = time.perf_counter_ns()
    joined = join([entry.inputs for entry in entries])
    began = time.perf_counter_ns()
    outputs = engine.run(joined, entries[0].names)
    ended = time.perf_counter_ns()
    edges = [0, *itertools.accumulate(entry.rows for entry in entries)]
    check_rows(outputs, edges[-1])
    outcomes = [Ran(began, ended, [array[a:b] for array in outputs], True) for a, b in itertools.pairwise(edges)]
    lane.pace.note(edges[-1], (ended - began) / 1e9)
    return Run(entries, outcomes, edges[-1], began - start, ended - began, time.perf_counter_ns() - ended)


def _alone(engine: Engine, lane: Lane, entry: Entry) -> Run:
    if entry.answer.done() or entry.deadline <= time.monotonic():  # gone, or late, while the others had their turn
        return Run((entry,), (expired(),))
    began = time.perf_counter_ns()
    try:
        outputs = engine.run(entry.inputs, entry.names)
    except InterlockError as error:
        return Run((entry,), (error,))
    except Exception as error:  # noqa: BLE001 - supervised edge: its caller gets an answer and the slot its handle back
        _log.error("run_crashed", exc_info=error)
        return Run((entry,), (Internal("the engine failed on this request", reason="ENGINE_FAULT"),))
    ended = time.perf_counter_ns()
    lane.pace.note(entry.rows, (ended - began) / 1e9)
    return Run((entry,), (Ran(began, ended, outputs, True),), entry.rows, 0, ended - began, 0)


def join(requests: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The rows of several requests, one below the other."""
    return {name: np.concatenate([inputs[name] for inputs in requests]) for name in requests[0]}


def check_rows(outputs: Sequence[Array], rows: int) -> None:
    """Raises NotByRows."""
    for array in outputs:
        if array.shape[:1] != (rows,):
            raise NotByRows(f"an output has shape {list(array.shape)} for {rows} rows of input")


def differs_together(engine: Engine, lane: Lane, samples: Sequence[Mapping[str, Array]]) -> str:
    """Runs samples alone and together; says how the answers differ beyond `TOLERANCE`, empty when they don't. Teaches the lane its pace."""
    names = [spec.name for spec in engine.signature.outputs]
    keys = [shape_key(inputs, names) for inputs in samples]
    fitting = [s for s, (_, key) in zip(samples, keys, strict=True) if key is not None and key == keys[0][1]]
    if not fitting:
        return ""
    chosen = [*fitting, fitting[0]]  # two at least
    apart = [_timed(engine, lane, inputs, names) for inputs in chosen]
    rows = sum(shape_key(inputs, names)[0] for inputs in chosen)
    try:
        together = _timed(engine, lane, join(chosen), names)
        check_rows(together, rows)
    except (InterlockError, NotByRows) as error:
        return f"{len(chosen)} requests together: {error}"
    for spec, whole, *parts in zip(engine.signature.outputs, together, *apart, strict=True):
        expected = np.concatenate(parts)
        if expected.shape != whole.shape or not _close(expected, whole, spec.datatype):
            return f"output {spec.name!r} is another one when {rows} rows run together"
    return ""


def _timed(engine: Engine, lane: Lane, inputs: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
    start = time.perf_counter()
    outputs = engine.run(inputs, names)
    lane.pace.note(shape_key(inputs, names)[0], time.perf_counter() - start)
    return outputs


def _close(expected: Array, actual: Array, datatype: str) -> bool:
    if datatype not in TOLERANCE:
        return bool(np.array_equal(expected, actual))
    left, right = _as_floats(expected, datatype), _as_floats(actual, datatype)
    finite = left[np.isfinite(left)]
    largest = float(np.abs(finite).max()) if finite.size else 0.0
    return bool(np.allclose(right, left, rtol=0.0, atol=TOLERANCE[datatype] * largest, equal_nan=True))


def _as_floats(array: Array, datatype: str) -> Array:
    if datatype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def expired() -> DeadlineExceeded:
    """The refusal of work whose time is over."""
    return DeadlineExceeded("the deadline passed before the model ran", reason="DEADLINE_EXPIRED")


def queue_full(num_waiting: int, limit: int) -> ResourceExhausted:
    """The refusal of one more."""
    return ResourceExhausted(
        f"{num_waiting} requests wait for the engine already",
        reason="QUEUE_FULL",
        retry_after_seconds=0.1,
        metadata={"queue_limit": str(limit)},
    )
