"""Response streams of handlers: every one a generator, whichever of gRPC's two forms it was written in, and one that ends when the process stops."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

_END: Any = object()
Behaviour = Callable[..., Any]


def yielding(behaviour: Behaviour) -> Behaviour:
    """A streaming handler as a generator function, also where it is a coroutine that writes its messages itself."""
    if not inspect.iscoroutinefunction(behaviour):
        return behaviour
    return lambda request, context: written(behaviour, request, context)


class _Writer:
    """A call's context whose `write` hands the message to a stream instead of the wire."""

    def __init__(self, context: Any, messages: asyncio.Queue[Any]) -> None:
        self._context = context
        self._messages = messages

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        """Returns when there is room for one more."""
        await self._messages.put(message)


async def written(behaviour: Callable[..., Awaitable[None]], request: Any, context: Any) -> AsyncIterator[Any]:
    """What a handler writes by itself, as a stream. Ending it then never cuts a write on the wire in two, which gRPC answers with an error."""
    messages: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)  # one: the handler is as fast as its reader

    async def handle() -> None:
        await behaviour(request, _Writer(context, messages))
        await messages.put(_END)

    handling = asyncio.ensure_future(handle())  # noqa: TID251  lives and dies inside this generator
    try:
        while True:
            taking = asyncio.ensure_future(messages.get())  # noqa: TID251  as above
            try:
                await asyncio.wait({taking, handling}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                taking.cancel()  # of no effect on one that has its message
            if not taking.done() or taking.cancelled():
                handling.result()  # the handler failed: its error is the stream's
                return
            if taking.result() is _END:
                return
            yield taking.result()
    finally:
        handling.cancel()
        await asyncio.wait({handling})


async def until(stream: AsyncIterator[Any], stopping: asyncio.Event) -> AsyncIterator[Any]:
    """Yields from `stream` until it ends or `stopping` is set."""
    stopped = asyncio.ensure_future(stopping.wait())  # noqa: TID251  lives and dies inside this generator
    try:
        while True:
            following = asyncio.ensure_future(anext(stream, _END))  # noqa: TID251  as above
            try:
                await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not following.done():
                    following.cancel()
                    await asyncio.wait({following})
            if following.cancelled() or (message := following.result()) is _END:
                return
            yield message
    finally:
        stopped.cancel()
        if hasattr(stream, "aclose"):
            await stream.aclose()


async def reading(stream: AsyncIterator[Any], stopping: asyncio.Event) -> AsyncIterator[Any]:
    """As `until`, for a handler that reads its requests in its own task: nothing is made per message."""
    reader = asyncio.current_task()
    assert reader is not None, "read by a handler"
    waits = ended = False

    def end(_: asyncio.Task[Any]) -> None:
        nonlocal ended
        if waits:
            ended = True
            reader.cancel()

    stopped = asyncio.ensure_future(stopping.wait())  # noqa: TID251  lives and dies inside this generator
    stopped.add_done_callback(end)
    try:
        while not stopping.is_set():
            waits = True
            try:
                message = await anext(stream, _END)
            except asyncio.CancelledError:
                if not ended or reader.uncancel():
                    raise
                return
            finally:
                waits = False
            if message is _END:
                return
            yield message
    finally:
        stopped.cancel()
