"""What the rooms need from the world, as Protocols; adapters stand in `interlock.stores` and in the rooms, fakes in tests.

Every port is as small as its users allow. Adapters pass one contract suite each (tests/contract), fakes included.
"""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Time as an argument, so that a 30 s drain takes milliseconds in a test."""

    def now(self) -> float:
        """Seconds since the Unix epoch, UTC. Used for what is stored and shown."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back. Used for what is measured inside one process."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Returns after `seconds`; cancellable."""
        ...
