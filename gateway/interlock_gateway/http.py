"""HTTP/1.1 as uvicorn speaks it, with a short way for predictions: no ASGI messages, no task where the answer is there at once, one write.

Rules of this file
- Only a plain prediction on an idle connection takes the short way; everything else goes to the ASGI application, which answers predictions too.
- A caller that hangs up cancels its prediction.
- A request that is answered before it is there in whole is read on for a moment and thrown away: to hang up at once would lose the answer.
- A request that is not there in whole after `receive_seconds` is answered 408 and the connection is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from interlock_gateway.app import Gateway, Reply

LINGER_SECONDS = 1.0
ONE_WRITE_BYTES = 1 << 16
"""A larger body is not worth copying behind its headers."""


class _NoEvent:
    """Nobody waits for messages on the short way."""

    def set(self) -> None:
        """Wakes nobody."""


class _Prediction:
    """One prediction on its connection, as uvicorn's protocol looks at it: a cycle."""

    __slots__ = (
        "disconnected",
        "headers",
        "keep_alive",
        "num_bytes",
        "parts",
        "path",
        "response_complete",
        "response_started",
        "task",
    )
    message_event = _NoEvent()

    def __init__(self, path: str, headers: dict[bytes, bytes]) -> None:
        self.path = path
        self.headers = headers
        self.parts: list[bytes] = []
        self.num_bytes = 0
        self.keep_alive = True
        self.response_started = False
        self.response_complete = False
        self.disconnected = False
        self.task: asyncio.Task[None] | None = None


class Protocol(HttpToolsProtocol):
    """One connection."""

    app: Gateway
    cycle: Any
    _predicting: _Prediction | None = None
    _receiving = False
    _reading: Any = None
    """The cycle whose body is coming in; None before its headers are there, and behind its end."""
    _lingering = False
    _timer: asyncio.TimerHandle | None = None
    _heard_at = 0.0

    # --- receiving ---

    def data_received(self, data: bytes) -> None:
        """Also watches how long a request takes to come in."""
        if self._lingering:
            return
        super().data_received(data)
        if self._receiving:
            if self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(self.app.receive_seconds, self._too_slow)
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def on_message_begin(self) -> None:
        """The scope is made in `on_headers_complete`, for requests that need one."""
        self._receiving = True
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Decides which way the request goes."""
        idle = self.cycle is None or self.cycle.response_complete
        idle = idle and not self.flow.write_paused  # the long way waits for a caller that does not read its answers
        if idle and not self.expect_100_continue and self.parser.get_method() == b"POST":
            headers = dict(self.headers)
            path = self.url.decode("latin-1")
            if self.app.is_short(path, headers) and self.parser.should_keep_alive():
                refusal = self.app.refused_unread(path, headers)
                self.cycle = self._reading = _Prediction(path, headers if refusal is None else {})
                if refusal is not None:
                    self._refuse(refusal)
                return
        url, received, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers.extend(received)
        super().on_headers_complete()
        self._reading = self.cycle

    def on_body(self, body: bytes) -> None:
        """Collects a prediction's body, up to the limit."""
        cycle = self.cycle
        if type(cycle) is not _Prediction:
            super().on_body(body)
            return
        if cycle.response_complete:
            return
        cycle.num_bytes += len(body)
        if cycle.num_bytes > self.app.max_body_bytes:
            self._refuse(self.app.too_large(cycle.path))
            return
        cycle.parts.append(body)

    def on_message_complete(self) -> None:
        """Answers a prediction, at once or when it is there."""
        self._receiving, self._reading = False, None
        cycle = self.cycle
        if type(cycle) is not _Prediction:
            super().on_message_complete()
            return
        if cycle.response_complete:
            return
        parts, cycle.parts = cycle.parts, []
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()  # they are in the body now: a large one shall not be held twice
        begun = self.app.begin(cycle.path, cycle.headers, body)
        if isinstance(begun, Reply):
            self._reply(cycle, begun)
            return
        self._predicting = cycle
        task = cycle.task = self.loop.create_task(self._later(cycle, begun))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _later(self, cycle: _Prediction, begun: Coroutine[Any, Any, Reply]) -> None:
        reply = await begun
        self._predicting = None
        if not self.transport.is_closing():
            self._reply(cycle, reply)

    # --- answering ---

    def _reply(self, cycle: _Prediction, reply: Reply) -> None:
        lines = [b"%b: %b\r\n" % pair for pair in (*self.server_state.default_headers, *reply.headers)]
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        length, body = reply.num_bytes, reply.body
        head = b"%b%bcontent-length: %d\r\n\r\n" % (STATUS_LINE[reply.status], b"".join(lines), length)
        if length <= ONE_WRITE_BYTES:
            self.transport.write(b"".join((head, body, *reply.tensors)))
        else:
            for part in (head, body, *reply.tensors):
                self.transport.write(part)
        cycle.response_started = cycle.response_complete = True
        self.on_response_complete()
        if not cycle.keep_alive and not self._lingering:
            self.transport.close()

    def _refuse(self, reply: Reply) -> None:
        """Answers before the request was read, and hangs up."""
        self.cycle.keep_alive = False
        self._reply(self.cycle, reply)

    # --- keeping alive: uvicorn starts and stops a timer per request; here one looks from time to time whether anything happened ---

    def _unset_keepalive_if_required(self) -> None:
        self._heard_at = self.loop.time()

    def on_response_complete(self) -> None:
        """As uvicorn's, but for the timer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self._heard_at = self.loop.time()
        self.flow.resume_reading()
        if self._reading is not None and self._reading.response_complete:
            self._lingering = True
            self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)
        elif self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self.timeout_keep_alive_task is None:
            self._keep_alive_for(self.timeout_keep_alive)

    def _keep_alive_for(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Closes a connection on which nothing has happened."""
        self.timeout_keep_alive_task = None
        if self.transport.is_closing() or self._receiving or not self.cycle.response_complete:
            return  # the end of what goes on starts it again
        left = self._heard_at + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._keep_alive_for(left)
        else:
            self.transport.close()

    # --- ends ---

    def _too_slow(self) -> None:
        if self.transport.is_closing() or self._lingering:
            return
        if self.flow.read_paused or self._predicting is not None:  # it is we who don't read on, or not yet
            self._timer = self.loop.call_later(self.app.receive_seconds, self._too_slow)
            return
        if self.cycle is None or self.cycle.response_complete:
            self.cycle = _Prediction("", {})  # not even its headers came
        if self.cycle.response_started:
            self.transport.close()
            return
        cycle, waiting = _Prediction(self.url.decode("latin-1"), {}), self.cycle
        cycle.keep_alive, self._reading = False, cycle
        self._reply(cycle, self.app.too_slow(cycle.path))
        waiting.disconnected = True  # the application, if it waits for the rest
        waiting.message_event.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """A prediction whose caller has gone is cancelled, behind its own start: one that never starts would keep what it holds."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        if self._predicting is not None and self._predicting.task is not None:
            self.loop.call_soon(self._predicting.task.cancel)
        super().connection_lost(exc)
