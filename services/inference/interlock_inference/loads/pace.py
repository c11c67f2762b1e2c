"""Holds a load up while what serves is slow. The rule is `core.pacing`; here are its figures and its hands.

The figure is what a caller feels in this process: the p99 of the last second's requests, from admission to outputs, of the worst routed
version, and on top the p99 of the event loop's own lateness, which no request's time contains.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterable

from interlock.core.pacing import Pacing, PacingPolicy, Verdict, begin, judge
from interlock.core.ports import Clock
from interlock.errors import InterlockError, ResourceExhausted
from interlock_inference.loads.process import Child
from interlock_inference.slots import Registry, Slot, SlotState
from interlock_inference.stats import percentile

WINDOW_SECONDS = 1.0
TICK_SECONDS = 0.01
JUDGE_TICKS = 10
BEFORE_TICKS = 30  # of lateness, to know how late the loop is without the load
RETRY_SECONDS = 5.0


class Hold:
    """One load's handle: pauses its child, or its next step in this process; or ends it. For any thread."""

    def __init__(self) -> None:
        self._go = threading.Event()
        self._go.set()
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._error: InterlockError | None = None

    def attach(self, child: Child) -> None:
        """The child that loads for it; stopped at once when the load is on hold, killed when it has been ended."""
        with self._lock:
            self._child = child
            if self._error is not None:
                child.kill()
            elif not self._go.is_set():
                child.pause()

    def detach(self) -> None:
        """The child's part is over."""
        with self._lock:
            self._child = None

    def pause(self) -> None:
        """Until `resume`."""
        with self._lock:
            self._go.clear()
            if self._child is not None:
                self._child.pause()

    def resume(self) -> None:
        """Goes on."""
        with self._lock:
            self._go.set()
            if self._child is not None:
                self._child.resume()

    def end(self, error: InterlockError) -> None:
        """The load is not wanted any more: it fails with `error`, soon."""
        with self._lock:
            self._error = error
            self._go.set()
            if self._child is not None:
                self._child.kill()

    def step(self) -> None:
        """Between two steps of a load in this process: waits while it is on hold. Raises what ended it."""
        self._go.wait()
        self.check()

    def check(self) -> None:
        """Raises what ended the load."""
        if self._error is not None:
            raise self._error


class _Marks:
    """How many requests a version had answered, over the last second: so many of its newest latencies are looked at."""

    def __init__(self) -> None:
        self._counts: dict[Slot, deque[tuple[float, int]]] = {}

    def recent(self, slot: Slot, now: float) -> list[float]:
        marks = self._counts.setdefault(slot, deque())
        count = slot.stats.success.count
        marks.append((now, count))
        while len(marks) > 1 and marks[0][0] < now - WINDOW_SECONDS:
            marks.popleft()
        answered = count - marks[0][1]
        return list(slot.stats.latencies_seconds)[-answered:] if answered else []


class Pacer:
    """Paces one load after the other."""

    def __init__(self, registry: Registry, clock: Clock, policy: PacingPolicy) -> None:
        self._registry = registry
        self._clock = clock
        self._policy = policy

    def is_needed(self) -> bool:
        """True when enough requests were served lately that a load could hurt."""
        return bool(self._policy.factor) and self._before() is not None

    async def watch(self, hold: Hold, told: Told) -> None:
        """Judges the load until cancelled. Measures the loop's own lateness first: let this begin a moment before the load."""
        late: deque[float] = deque(maxlen=int(WINDOW_SECONDS / TICK_SECONDS))
        for _ in range(BEFORE_TICKS):
            late.append(await self._tick())
        before = self._before()
        usual = percentile(late, 0.99) if before is not None else 0.0
        state, marks = begin(self._policy, (before or 0.0) + usual, self._clock.monotonic()), _Marks()
        told.ready.set()
        while True:
            for _ in range(JUDGE_TICKS):
                late.append(await self._tick())
            now = self._clock.monotonic()
            p99 = self._now(marks, now)
            figure = None if p99 is None else p99 + percentile(late, 0.99)
            following, verdict = judge(state, figure, now)
            self._apply(hold, state, following, verdict, figure, told)
            state = following

    async def _tick(self) -> float:
        """Seconds that the loop was late."""
        start = self._clock.monotonic()
        await self._clock.sleep(TICK_SECONDS)
        return max(0.0, self._clock.monotonic() - start - TICK_SECONDS)

    def _serving(self) -> Iterable[Slot]:
        return (slot for slot in self._registry.all_slots() if slot.state is SlotState.SERVING)

    def _worst(self, windows: Iterable[list[float]]) -> float | None:
        figures = [percentile(window, 0.99) for window in windows if len(window) >= self._policy.samples_min]
        return max(figures, default=None)

    def _before(self) -> float | None:
        return self._worst(list(slot.stats.latencies_seconds) for slot in self._serving())

    def _now(self, marks: _Marks, now: float) -> float | None:
        return self._worst([marks.recent(slot, now) for slot in self._serving()])

    def _apply(
        self, hold: Hold, before: Pacing, after: Pacing, verdict: Verdict, p99: float | None, told: Told
    ) -> None:
        if verdict is Verdict.GIVE_UP:
            hold.end(_starved(after))
        elif after.paused_at is not None and before.paused_at is None:
            hold.pause()
            told.paused(f"paused: p99 {(p99 or 0) * 1e3:.1f} ms over {after.limit_seconds * 1e3:.1f} ms")
        elif after.paused_at is None and before.paused_at is not None:
            hold.resume()
            told.resumed(after.paused_seconds - before.paused_seconds)


class Told:
    """What a load's owner is told of its pacing; `ready` is set when the pacing has begun."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()

    def paused(self, message: str) -> None:
        """The load was stopped, and why."""

    def resumed(self, seconds: float) -> None:
        """It goes on after a pause of so long."""


def _starved(state: Pacing) -> ResourceExhausted:
    return ResourceExhausted(
        f"the load was paused for {state.paused_seconds:.1f} s in all because what serves had a p99 over "
        f"{state.limit_seconds * 1e3:.1f} ms, and was given up; it can be tried again when there is less traffic",
        reason="LOAD_STARVED",
        retry_after_seconds=RETRY_SECONDS,
        metadata={"paused_seconds": f"{state.paused_seconds:.1f}", "limit_ms": f"{state.limit_seconds * 1e3:.1f}"},
    )
