"""One channel over several replicas: each call goes to the one with the fewest calls in flight, and once more to another where that is safe.

Rules of this file
- A replica that can't be reached is passed over for `COOL_SECONDS`; when all are, the one that has cooled longest is asked.
- A call that was refused as UNAVAILABLE (draining, nothing ready, connection lost) is tried once more, on another replica, within its own
  deadline. A prediction changes nothing, so one that died with its replica may be run again; the calls in `ONCE` are not.
- With one replica only what it refused before starting (`DRAINING`) is tried again: there is nobody else to ask.
- Streams are placed when they begin, and stay there.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from grpc import StatusCode, aio

from interlock.core.ports import Clock
from interlock.errors import Unavailable
from interlock.runtime.channels import open_channel
from interlock.runtime.status import from_rpc_error
from interlock_gateway.streams import Streams

COOL_SECONDS = 1.0
ONCE = ("RepositoryModelLoad", "RepositoryModelUnload")
"""Calls that change something: a second one could find the first one done."""


@dataclass(slots=True, eq=False)
class Line:
    """One replica: its channel, its calls in flight, and until when it is passed over."""

    address: str
    channel: aio.Channel
    in_flight: int = 0
    cool_until: float = 0.0
    turn: int = 0


class Spread:
    """What generated stubs take for a channel."""

    def __init__(self, lines: Sequence[Line], clock: Clock) -> None:
        self.lines = lines
        self._clock = clock
        self._turns = itertools.count(1)

    def pick(self, other_than: Line | None = None) -> Line:
        """The replica to ask next; the same one again only when there is no other."""
        now = self._clock.monotonic()
        candidates = [line for line in self.lines if line is not other_than] or self.lines
        chosen = min(candidates, key=lambda line: (max(0.0, line.cool_until - now), line.in_flight, line.turn))
        chosen.turn = next(self._turns)
        return chosen

    def cool(self, line: Line) -> None:
        """It could not be reached."""
        line.cool_until = self._clock.monotonic() + COOL_SECONDS

    def unary_unary(self, path: str, **codecs: Any) -> Callable[..., Any]:
        """See `aio.Channel`; the call is a coroutine."""
        calls = {line.address: line.channel.unary_unary(path, **codecs) for line in self.lines}
        return self._asked(calls, once=path.endswith(ONCE))

    def predictions(self, path: str) -> Callable[..., Any]:
        """One request, one answer, over streams that stay open; see `streams`."""
        return self._asked({line.address: Streams(line.channel.stream_stream(path)) for line in self.lines})

    def _asked(self, calls: Mapping[str, Callable[..., Any]], *, once: bool = False) -> Callable[..., Any]:
        async def ask(request: Any, *, timeout: float | None = None, metadata: Any = None) -> Any:
            start = self._clock.monotonic()
            line = self.pick()
            try:
                return await self._on(line, calls[line.address](request, timeout=timeout, metadata=metadata))
            except (aio.AioRpcError, Unavailable) as failed:
                left = None if timeout is None else timeout - (self._clock.monotonic() - start)
                if once or not self._may_ask_again(line, failed) or (left is not None and left <= 0):
                    raise
            line = self.pick(other_than=line)
            return await self._on(line, calls[line.address](request, timeout=left, metadata=metadata))

        return ask

    async def _on(self, line: Line, call: Any) -> Any:
        line.in_flight += 1
        try:
            return await call
        finally:
            line.in_flight -= 1

    def _may_ask_again(self, line: Line, failed: aio.AioRpcError | Unavailable) -> bool:
        if isinstance(failed, aio.AioRpcError) and failed.code() is not StatusCode.UNAVAILABLE:
            return False
        reason = failed.reason if isinstance(failed, Unavailable) else from_rpc_error(failed).reason
        if reason == "UNAVAILABLE":  # nobody said anything: the connection failed
            self.cool(line)
        return len(self.lines) > 1 or reason == "DRAINING"

    def unary_stream(self, path: str, **codecs: Any) -> Callable[..., Any]:
        """See `aio.Channel`."""
        return self._placed([line.channel.unary_stream(path, **codecs) for line in self.lines])

    def stream_unary(self, path: str, **codecs: Any) -> Callable[..., Any]:
        """See `aio.Channel`."""
        return self._placed([line.channel.stream_unary(path, **codecs) for line in self.lines])

    def stream_stream(self, path: str, **codecs: Any) -> Callable[..., Any]:
        """See `aio.Channel`."""
        return self._placed([line.channel.stream_stream(path, **codecs) for line in self.lines])

    def _placed(self, calls: Sequence[Any]) -> Callable[..., Any]:
        def begin(*args: Any, **kwargs: Any) -> Any:
            return calls[self.lines.index(self.pick())](*args, **kwargs)

        return begin


@asynccontextmanager
async def spread(addresses: Sequence[str], clock: Clock) -> AsyncIterator[Spread]:
    """Channels to all addresses; they connect when first used and close with the block."""
    async with AsyncExitStack() as stack:
        yield Spread(
            [Line(address, await stack.enter_async_context(open_channel(address))) for address in addresses], clock
        )
