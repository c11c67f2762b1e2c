"""Calls to other rooms: one channel per address, a deadline on every call, retries only where they are safe, our errors instead of gRPC's.

The only retry loop between rooms stands here. It tries again on UNAVAILABLE alone, on methods whose contract says idempotent, with
exponential back-off, and never past the caller's deadline.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from grpc import aio
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential_jitter,
)

from interlock.runtime.access import ACTOR_HEADER, KEY_HEADER
from interlock.runtime.status import RETRYABLE, translated, translated_stream
from interlock.runtime.telemetry import current_traceparent

_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # a restarted room is seen within a second
    ("grpc.enable_retries", 0),  # one retry loop in the chain, and it is ours
    ("grpc.keepalive_time_ms", 30_000),
)


def open_channel(address: str) -> aio.Channel:
    """A plaintext channel to `host:port`; connects when it is first used. The caller closes it."""
    return aio.insecure_channel(address, options=_OPTIONS)


class Caller:
    """Makes calls with this room's key and the current trace.

    Args:
        key: the API key to send; empty sends none.
    """

    def __init__(self, key: str = "") -> None:
        self.key = key

    def metadata(self, actor: str = "", extra: Mapping[str, str] | None = None) -> tuple[tuple[str, str], ...]:
        """What goes with a call: key, traceparent, on whose behalf."""
        pairs = {KEY_HEADER: self.key, "traceparent": current_traceparent(), ACTOR_HEADER: actor, **(extra or {})}
        return tuple((name, value) for name, value in pairs.items() if value)

    async def unary(
        self, method: Any, request: Any, *, timeout: float, idempotent: bool = False, actor: str = ""
    ) -> Any:
        """One request, one response, within `timeout` seconds in all.

        Args:
            idempotent: the method's contract says so; tries again on UNAVAILABLE, at most 3 times in all.

        Raises:
            InterlockError: the class that the other room raised, or Unavailable / DeadlineExceeded.
        """
        if not idempotent:
            return await translated(method(request, timeout=timeout, metadata=self.metadata(actor)))
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(RETRYABLE),
            stop=stop_after_attempt(3) | stop_after_delay(timeout),  # REQUIREMENTS R2: 3 tries
            wait=wait_exponential_jitter(multiplier=0.1, max=1.0),
            reraise=True,
        )
        async for attempt in attempts:
            with attempt:
                return await translated(method(request, timeout=timeout, metadata=self.metadata(actor)))
        raise AssertionError("tenacity re-raises")

    async def stream(
        self, method: Any, request: Any, *, timeout: float | None = None, actor: str = ""
    ) -> AsyncIterator[Any]:
        """One request, a stream of responses; `timeout` None for a watch, which has no deadline.

        Raises:
            InterlockError: as `unary`.
        """
        call = method(request, timeout=timeout, metadata=self.metadata(actor))
        try:
            async for message in translated_stream(call):
                yield message
        finally:
            call.cancel()
