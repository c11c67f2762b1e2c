"""The real clock. The only place where the time of day is read; everything else takes a `Clock` (`interlock.core.ports`)."""

from __future__ import annotations

import asyncio
import time


class SystemClock:
    """The machine's time."""

    def now(self) -> float:
        """Seconds since the Unix epoch, UTC."""
        return time.time()  # noqa: TID251  this is the Clock that the rule asks for

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Returns after `seconds`; cancellable."""
        await asyncio.sleep(seconds)
