"""The supervisor far away: one stream to the trainer's LoopService, kept by a thread of its own. Nothing of it is felt in the loop.

What the loop reports lies in the local step log and in a list of events; the stream sends from there, so a trainer that was away gets
everything it has not acknowledged, in order, when it is back. Orders are collected for the loop's next boundary. A repeated order is
answered again by the loop, not carried out again.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import grpc
import structlog

from interlock.api.trainer.v1 import loop_service_pb2 as pb
from interlock.api.trainer.v1 import loop_service_pb2_grpc as pb_grpc
from interlock.core.steps import StepRecord
from interlock.stores.steplog import StepLog
from interlock.training import wire
from interlock.training.terms import Begun, Changed, DeleteOrder, Event, Hello, Order, Result, Saved, Start

_log = structlog.get_logger(__name__)
BATCH = 256
CLOSE_SECONDS = 5.0
BACK_OFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
KEY_HEADER = "x-api-key"


def listening(address: str) -> bool:
    """Whether anything answers at `host:port` right now."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=0.2):
            return True
    except (OSError, ValueError):
        return False


@dataclass(slots=True)
class _Session:
    """One connection: what was sent on it, and whether it is ready, over, or has said goodbye."""

    sent: int = 0
    ready: bool = False
    over: bool = False
    goodbye: bool = False


class Remote:
    """One loop's line to the trainer at `address`."""

    def __init__(self, address: str, steplog: StepLog, connect_seconds: float, key: str = "") -> None:
        self._steplog = steplog
        self._connect_seconds = connect_seconds
        self._key = key or os.environ.get("INTERLOCK_API_KEY", "")
        options = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000))
        self._channel = grpc.insecure_channel(address, options=options)
        self._changed = threading.Condition()
        self._hello: Hello | None = None
        self._start: Start | None = None
        self._head = 0
        self._acknowledged = 0
        self._events: deque[tuple[int, Begun | Saved | Changed | Result]] = deque()
        self._known: dict[str, list[Begun | Saved]] = {}
        self._orders: list[Order] = []
        self._goodbye: str | None = None
        self._said_goodbye = self._closed = False
        self._lost_at = time.monotonic()
        self._connected = False
        self._thread = threading.Thread(target=self._work, name="interlock-remote", daemon=True)

    # --- for the loop ---

    def start(self, hello: Hello) -> Start | None:
        """Says hello and waits for the welcome; None when it does not come within `connect_seconds`."""
        self._hello, self._head = hello, hello.seq
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._start is not None, self._connect_seconds)
            return self._start

    def report(self, events: Sequence[Event]) -> None:
        """Takes events; steps are read from the log when they are sent."""
        with self._changed:
            last = None
            for event in events:
                if isinstance(event, StepRecord):
                    self._head, last = event.seq, event
                else:
                    self._remember(event)
                    self._events.append((self._head, event))
            if last is not None:
                self._introduce(last)
            self._changed.notify_all()

    def _introduce(self, record: StepRecord) -> None:
        assert self._hello is not None
        self._hello = replace(self._hello, attempt=record.attempt, step=record.step, seq=record.seq, starting=False)

    def _remember(self, event: Begun | Saved | Changed | Result) -> None:
        """Checkpoints are told again on every new connection: the trainer may have missed them."""
        if isinstance(event, Begun | Saved):
            self._known.setdefault(event.info.checkpoint, []).append(event)
        elif isinstance(event, Changed) and event.deleted:
            self._known.pop(event.info.checkpoint, None)

    def orders(self) -> list[Order]:
        """What is to be done, each once per connection."""
        if not self._orders:
            return []
        with self._changed:
            orders, self._orders = self._orders, []
        return orders

    def close(self, error: str) -> None:
        """Says goodbye when everything was sent, or gives up after a few seconds."""
        with self._changed:
            self._goodbye = error
            self._changed.notify_all()
            if self._start is not None:
                self._changed.wait_for(lambda: self._said_goodbye, CLOSE_SECONDS)
            self._closed = True
            self._changed.notify_all()
        self._channel.close()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def away_seconds(self) -> float:
        """How long nobody has been at the other end; 0 while somebody is."""
        return 0.0 if self._connected else time.monotonic() - self._lost_at

    # --- the connection's thread ---

    def _work(self) -> None:
        failures = 0
        while not self._closed:
            session = _Session()
            try:
                self._talk(session)
                self._said_goodbye = session.goodbye  # the other end has closed the stream: it has read everything
            except (grpc.RpcError, ValueError) as error:
                if not self._closed:
                    _log.info("trainer_away", error=_short(error), failures=failures)
            failures = 0 if session.ready else failures + 1
            with self._changed:
                session.over = True
                self._connected, self._lost_at = False, time.monotonic() if session.ready else self._lost_at
                self._changed.notify_all()
                if self._said_goodbye:
                    return
                delay = BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS) - 1)]
                self._changed.wait_for(lambda: self._closed, delay)

    def _talk(self, session: _Session) -> None:
        metadata = ((KEY_HEADER, self._key),) if self._key else ()
        call = pb_grpc.LoopServiceStub(self._channel).Attach(self._requests(session), metadata=metadata)
        for response in call:
            with self._changed:
                self._take(session, response)
                self._changed.notify_all()
            if self._closed:
                call.cancel()

    def _take(self, session: _Session, response: pb.AttachResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "welcome":
            self._welcome(session, response.welcome)
        elif kind == "acknowledged":
            self._acknowledged = response.acknowledged.seq
        elif kind == "order":
            order = wire.order_value(response.order)
            if order is not None:
                self._orders.append(order)
            for checkpoint in order.checkpoints if isinstance(order, DeleteOrder) else ():
                self._known.pop(checkpoint, None)

    def _welcome(self, session: _Session, welcome: pb.Welcome) -> None:
        assert self._hello is not None
        session.sent, session.ready, self._connected = welcome.acknowledged_seq, True, True
        self._acknowledged = welcome.acknowledged_seq
        if self._start is None:
            restore = wire.rollback_value(welcome.restore) if welcome.HasField("restore") else None
            attempt = restore.attempt if restore else max(welcome.attempt, 1)
            self._head = max(self._head, welcome.acknowledged_seq)
            self._start = Start(restore, attempt, welcome.acknowledged_seq)
            self._hello = replace(self._hello, attempt=attempt, starting=False)
        else:
            told = [(event.info.seq, event) for events in self._known.values() for event in events]
            queued = {id(event) for _, event in self._events}
            self._events.extendleft(reversed([(seq, event) for seq, event in told if id(event) not in queued]))

    # --- gRPC's sender thread ---

    def _requests(self, session: _Session) -> Iterator[pb.AttachRequest]:
        assert self._hello is not None
        yield pb.AttachRequest(hello=wire.hello_message(self._hello))
        while not session.over:
            with self._changed:
                self._changed.wait_for(lambda: session.over or (session.ready and self._has_news(session)), 0.5)
                if session.over or not session.ready:
                    continue
                upto, event = self._events.popleft() if self._events else (self._head, None)
                ending = event is None and self._goodbye is not None
            yield from self._steps(session, upto)
            if event is not None:
                yield wire.event_message(self._hello.run, event)
            elif ending and session.sent >= self._head:
                session.goodbye = True
                yield pb.AttachRequest(goodbye=pb.Goodbye(error=self._goodbye or ""))
                return

    def _has_news(self, session: _Session) -> bool:
        return bool(self._events) or session.sent < self._head or self._goodbye is not None

    def _steps(self, session: _Session, upto: int) -> Iterator[pb.AttachRequest]:
        assert self._hello is not None
        while session.sent < upto and not session.over:
            records = self._steplog.read(self._hello.run, session.sent + 1, min(BATCH, upto - session.sent))
            if not records:
                return
            session.sent = records[-1].seq
            yield pb.AttachRequest(steps=wire.records_message(records))


def _short(error: Exception) -> str:
    code = getattr(error, "code", None)
    return str(code()) if callable(code) else str(error)
