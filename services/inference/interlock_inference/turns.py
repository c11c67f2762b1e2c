"""Turns of the engine: carries requests from the event loop through their slot's lane into a worker thread, and their answers back.

Each lane has at most one turn asked for, so that everything that comes before the turn begins goes in it. The thread comes back to the
loop once per run, not once per request. What goes together is decided in `batching`.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from interlock.errors import InterlockError, Unavailable
from interlock_inference.batching import Entry, Lane, Ran, Run, expired, run_batch
from interlock_inference.engines import Array
from interlock_inference.slots import RETRY_SECONDS, Handle, Slot


class Turns:
    """Lanes of all slots over one pool of threads, or a slot's own. `ran` is told, on the loop, of every run before its callers get their answers."""

    def __init__(self, pool: ThreadPoolExecutor, ran: Callable[[Slot, Run], None]) -> None:
        self._pool = pool
        self._ran = ran
        self.num_held = 0
        """Requests that wait in a lane or run."""

    async def answer(
        self, handle: Handle, inputs: Mapping[str, Array], names: Sequence[str], deadline: float | None, priority: int
    ) -> Ran:
        """Waits for the request's outputs. Owns the handle: it is given back when no thread can touch the engine for it any more.

        Cancel-safe: a request that still waits leaves the queue; one that runs ends by itself.
        """
        lane = _lane(handle.slot)
        entry = lane.entry(handle, inputs, names, deadline, priority)
        handle.abort = entry.answer
        self.num_held += 1
        lane.put(entry)
        try:
            self._come(handle.slot, lane, entry)
            return await entry.answer
        finally:
            if lane.remove(entry):
                self._let_go(entry)

    def _come(self, slot: Slot, lane: Lane, entry: Entry) -> None:
        """Asks for a turn at once, or after the model's own delay when it has one and the request has the time."""
        delay = lane.delay_seconds
        if not delay or entry.deadline - time.monotonic() < 2 * delay:
            self._ask(slot)
        elif lane.timer is None:
            lane.timer = asyncio.get_running_loop().call_later(delay, self._ask, slot)

    def _ask(self, slot: Slot) -> None:
        lane = _lane(slot)
        if lane.timer is not None:
            lane.timer.cancel()
            lane.timer = None
        if lane.ask():
            self._submit(asyncio.get_running_loop(), slot)

    def _submit(self, loop: asyncio.AbstractEventLoop, slot: Slot) -> None:
        def ended(job: Future[None]) -> None:
            if job.cancelled():
                _post(loop, self._abandon, slot)

        (slot.threads or self._pool).submit(self._turn, loop, slot).add_done_callback(ended)

    def _turn(self, loop: asyncio.AbstractEventLoop, slot: Slot) -> None:
        """In a worker thread: takes what waits now, and runs it."""
        lane = _lane(slot)
        turn = lane.take(time.monotonic())
        if turn.expired:
            _post(loop, self._settle, slot, [Run((entry,), (expired(),)) for entry in turn.expired])
        if turn.more:
            try:
                self._submit(loop, slot)  # behind the turns of other slots
            except RuntimeError:  # the pool is closing
                _post(loop, self._abandon, slot)
        if turn.batch:
            assert slot.opened is not None, "a held slot keeps its engine"
            _post(loop, self._settle, slot, run_batch(slot.opened.engine, lane, turn.batch))

    def _settle(self, slot: Slot, runs: Sequence[Run]) -> None:
        """On the loop: counts the runs, gives the handles back, and wakes the callers that are still there."""
        for run in runs:
            if run.rows:
                self._ran(slot, run)
            for entry, outcome in zip(run.entries, run.outcomes, strict=True):
                self._let_go(entry)
                if entry.answer.done():
                    continue
                if isinstance(outcome, InterlockError):
                    entry.answer.set_exception(outcome)
                else:
                    entry.answer.set_result(outcome)

    def _abandon(self, slot: Slot) -> None:
        for entry in _lane(slot).clear():
            self._let_go(entry)
            if not entry.answer.done():
                entry.answer.set_exception(_stopping())

    def _let_go(self, entry: Entry) -> None:
        self.num_held -= 1
        entry.handle.release()


def _lane(slot: Slot) -> Lane:
    assert slot.lane is not None, "asked only of slots that batch"
    return slot.lane


def _post(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: Any) -> None:
    with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
        loop.call_soon_threadsafe(functools.partial(call, *args))


def _stopping() -> Unavailable:
    return Unavailable("the replica is stopping; send it again", reason="DRAINING", retry_after_seconds=RETRY_SECONDS)
