"""LoopService: the line to training loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from interlock.api.trainer.v1 import loop_service_pb2 as pb
from interlock.api.trainer.v1 import loop_service_pb2_grpc as pb_grpc
from interlock.errors import InvalidArgument
from interlock.training import terms, wire
from interlock_trainer.runs import Runs
from interlock_trainer.session import Line, Session


class LoopServicer(pb_grpc.LoopServiceServicer):
    """One stream per loop."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    async def Attach(  # type: ignore[override]  # grpc.aio takes a coroutine that writes to the context as well
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Any
    ) -> None:
        """Takes reports until the loop says goodbye or the line breaks; orders and acknowledgements go the other way."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("report") != "hello":
            raise InvalidArgument("the first message of a loop is hello", reason="HELLO_MISSING", field="hello")
        hello = wire.hello_value(first.hello)
        session = self._runs.hello(hello)
        line = session.connect(hello)
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(_write(line, context))
                try:
                    await _read(session, line, request_iterator)
                finally:
                    line.queue.put_nowait(None)
                await writer
        finally:
            session.disconnect(line)


async def _write(line: Line, context: Any) -> None:
    while (message := await line.queue.get()) is not None:
        try:
            await context.write(message)
        except Exception:  # noqa: BLE001 - the line broke; the reader ends by it too, and the loop connects again
            return


async def _read(session: Session, line: Line, requests: AsyncIterator[pb.AttachRequest]) -> None:
    async for request in requests:
        if not session.is_current(line):
            return
        _take(session, request)
        if request.WhichOneof("report") == "goodbye":
            return


def _take(session: Session, request: pb.AttachRequest) -> None:
    match request.WhichOneof("report"):
        case "steps":
            session.take_steps([wire.record_value(record) for record in request.steps.records])
        case "checkpoint_begun":
            begun = request.checkpoint_begun
            session.take(terms.Begun(wire.checkpoint_value(begun.checkpoint), begun.initial))
        case "checkpoint_saved":
            session.take(terms.Saved(wire.checkpoint_value(request.checkpoint_saved.checkpoint)))
        case "checkpoint_changed":
            changed = request.checkpoint_changed
            session.take(terms.Changed(wire.checkpoint_value(changed.checkpoint), changed.deleted))
        case "order_result":
            session.take_result(wire.result_value(request.order_result))
        case "rollback":
            session.take_rollback(wire.rollback_value(request.rollback))
        case "goodbye":
            session.take_goodbye(request.goodbye.error)
        case _:
            pass
