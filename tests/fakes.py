"""Fakes that more than one test folder uses."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class FakeClock:
    """A clock that jumps: `sleep` returns once the time was moved past it, or at once when `auto` is set.

    With `auto`, sleeping moves the time itself, so a 30 s drain takes no time at all.
    """

    def __init__(self, now: float = 1_700_000_000.0, *, auto: bool = True) -> None:
        self._now = now
        self._auto = auto
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        if self._auto:
            self._now += seconds
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, next(self._order), future))
        await future

    def advance(self, seconds: float) -> None:
        """Moves the time and wakes whoever slept up to it."""
        self._now += seconds
        while self._sleepers and self._sleepers[0][0] <= self._now:
            _, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)
