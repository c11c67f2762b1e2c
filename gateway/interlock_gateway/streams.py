"""Predictions over streams that stay open: each carries one prediction at a time, so that nobody waits behind anybody, and none pays for a call of its own.

A message on an open stream costs a third of a unary call on both sides (ADR 0009).

Rules of this file
- A stream that is not known to be between two predictions is cancelled, never used again: after a deadline, a caller that left, an error of its own.
- A stream that was kept may have ended meanwhile (its replica was restarted). A prediction that fails on a kept stream without an answer goes
  once more over a new one: what a prediction asks changes nothing.
- What a replica refuses comes as the same error as from a unary call.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from google.rpc import status_pb2
from grpc import aio

from interlock.api.oip import messages
from interlock.errors import DeadlineExceeded, Internal, Unavailable
from interlock.runtime.infer import STATUS, TRACE, InferAnswer, InferRequest
from interlock.runtime.status import from_rpc_error, from_status
from interlock_gateway import codec

KEPT_MAX = 256
"""Streams that wait for their next prediction, per replica; each costs both sides some kilobytes."""
Metadata = Sequence[tuple[str, str]]


class Streams:
    """`ModelInfer` over `ModelStreamInfer`; called like the unary method.

    Args:
        begin: opens a stream that takes serialized requests and gives serialized responses.
    """

    def __init__(self, begin: Callable[..., Any]) -> None:
        self._begin = begin
        self._kept: list[Any] = []

    async def __call__(self, request: InferRequest, *, timeout: float, metadata: Mapping[str, str]) -> InferAnswer:
        """One prediction within `timeout` seconds.

        Raises:
            InterlockError: as the replica raised it; Unavailable when it can't be reached; DeadlineExceeded.
        """
        wire = codec.to_wire(_timed(request, timeout, metadata[TRACE]))
        opening = tuple((name, value) for name, value in metadata.items() if name != TRACE)
        try:
            async with asyncio.timeout(timeout):
                stream = self._waiting()
                answer = None if stream is None else await self._ask(stream, wire)
                if answer is None:  # no stream was kept, or the one that was had ended
                    stream = self._begin(metadata=(*opening, (STATUS, "1")))
                    answer = await self._ask(stream, wire)
                    if answer is None:
                        raise await _end_of(stream)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout:g} s") from None
        return _answer(answer)

    def _waiting(self) -> Any | None:
        while self._kept:
            stream = self._kept.pop()
            if not stream.done():
                return stream
        return None

    async def _ask(self, stream: Any, wire: bytes) -> bytes | None:
        """The answer's bytes; None when the stream ended without one."""
        answer: Any = aio.EOF
        try:
            await stream.write(wire)
            answer = await stream.read()
        except (aio.AioRpcError, asyncio.InvalidStateError):
            pass  # it has ended: with what, it says itself
        finally:
            if answer is aio.EOF or len(self._kept) >= KEPT_MAX:
                stream.cancel()
            else:
                self._kept.append(stream)
        return None if answer is aio.EOF else cast(bytes, answer)


def _timed(request: InferRequest, timeout: float, traceparent: str) -> InferRequest:
    """The request with what a call of its own would carry: its deadline and its trace."""
    asked = request.parameters.get("timeout", 0)
    left = int(timeout * 1e6)
    if type(asked) is int and asked > 0:
        left = min(left, asked)
    return replace(request, parameters={**request.parameters, "timeout": left, TRACE: traceparent})


async def _end_of(stream: Any) -> Exception:
    """How a stream ended that gave no answer."""
    code, details = await stream.code(), await stream.details()
    trailing = await stream.trailing_metadata()
    error = from_rpc_error(aio.AioRpcError(code, aio.Metadata(), trailing, details))
    ended = code.name in ("OK", "CANCELLED")  # the replica stops: it took no more requests
    return (
        Unavailable("the replica is stopping; send it again", reason="DRAINING", retry_after_seconds=0.1)
        if ended
        else error
    )


def _answer(wire: bytes) -> InferAnswer:
    """The answer in a ModelStreamInferResponse; raises the error in it."""
    message, body = codec.stream_parts(wire)
    if not message:
        return codec.from_wire(body)
    failed = messages.ModelInferResponse.FromString(bytes(body))
    if STATUS not in failed.parameters:
        raise Internal(message)
    raise from_status(status_pb2.Status.FromString(base64.b64decode(failed.parameters[STATUS].string_param)))
