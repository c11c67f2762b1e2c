"""Traffic at a steady rate, HTTP and gRPC mixed, and what came of it: the other side of a swap's promise. No terminal, no swaps.

Open loop: request n is due at n / rate whether or not the earlier ones were answered, and its latency counts from when it was due, so a
server that stalls can't hide the requests that it kept from being sent. `rate` None instead keeps a fixed number of requests in flight.

    load = Load([GrpcTarget("127.0.0.1:8001", "policy", inputs), HttpTarget("127.0.0.1:8000", "policy", inputs)], rate=1000)
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run(stopping))
        ...
        with load.marked("swap 2"):
            await swap()
        stopping.set()
    print(load.report().table())
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import orjson
from grpc import aio

from interlock.api.oip import messages, rpc
from interlock.errors import BY_KIND, InterlockError, Internal, Unavailable
from interlock.runtime.access import KEY_HEADER
from interlock.runtime.arrays import datatype_of, encode_raw
from interlock.runtime.status import from_rpc_error

IN_FLIGHT_MAX = (
    512  # open loop: beyond this a server has stopped answering, and what is due waits its turn, on the clock
)
TIMEOUT_SECONDS = 10.0
IDLE_SECONDS = 2.0  # servers close a kept-alive connection after some seconds (uvicorn: 5); sending into that moment would not be their failure
SETTLE_SECONDS = 1.0
"""How long after a mark's end still counts as during it: the tail of a swap is felt a little later."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished request.

    Attributes:
        due: seconds from the start of the load until it was to be sent.
        seconds: from when it was due to its answer.
        version: the version that answered; empty if none did.
        error: reason and message; empty for success.
    """

    due: float
    seconds: float
    protocol: str
    version: str
    error: str = ""


class Sender(Protocol):
    """An open connection (or several) to one face of the service."""

    protocol: str

    async def send(self, request_id: str) -> str:
        """Sends one request; the version that answered. Raises InterlockError."""
        ...


class Target(Protocol):
    """Somewhere to send requests."""

    def open(self, connections: int) -> Any:
        """An async context manager that gives a `Sender`."""
        ...


@dataclass(frozen=True)
class GrpcTarget(Target):
    """A replica's Open Inference Protocol listener. `inputs` are arrays by name, the same for each request."""

    address: str
    model: str
    inputs: Mapping[str, Any]
    key: str = ""

    @asynccontextmanager
    async def open(self, connections: int) -> AsyncIterator[Sender]:
        """One channel; gRPC multiplexes."""
        async with aio.insecure_channel(self.address) as channel:
            yield _GrpcSender(rpc.Stub(channel), self)


class _GrpcSender:
    protocol = "grpc"

    def __init__(self, stub: rpc.Stub, target: GrpcTarget) -> None:
        self._infer = stub.ModelInfer
        self._metadata = ((KEY_HEADER, target.key),) if target.key else ()
        self._request = messages.ModelInferRequest(model_name=target.model)
        for name, value in target.inputs.items():
            array = np.asarray(value)
            datatype = datatype_of(array)
            self._request.inputs.add(name=name, datatype=datatype, shape=array.shape)
            self._request.raw_input_contents.append(encode_raw(array, datatype))

    async def send(self, request_id: str) -> str:
        request = messages.ModelInferRequest()
        request.CopyFrom(self._request)
        request.id = request_id
        try:
            response = await self._infer(request, timeout=TIMEOUT_SECONDS, metadata=self._metadata)
        except aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return response.model_version


@dataclass(frozen=True)
class HttpTarget(Target):
    """The gateway's Open Inference Protocol endpoint over HTTP/1.1, JSON."""

    address: str
    model: str
    inputs: Mapping[str, Any]
    key: str = ""

    @asynccontextmanager
    async def open(self, connections: int) -> AsyncIterator[Sender]:
        """As many kept-alive connections as are in use at once."""
        sender = _HttpSender(self)
        try:
            yield sender
        finally:
            await sender.close()


class _HttpSender:
    """Just enough of HTTP/1.1 for one kind of request: a general client would cost more than the server that it measures."""

    protocol = "http"

    def __init__(self, target: HttpTarget) -> None:
        self._host, _, port = target.address.rpartition(":")
        self._port = int(port)
        self._path = f"/v2/models/{target.model}/infer"
        self._key = f"{KEY_HEADER}: {target.key}\r\n" if target.key else ""
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []
        arrays = {name: np.asarray(value) for name, value in target.inputs.items()}
        self._inputs = [
            {"name": name, "datatype": datatype_of(a), "shape": list(a.shape), "data": a.ravel().tolist()}
            for name, a in arrays.items()
        ]

    async def send(self, request_id: str) -> str:
        body = orjson.dumps({"id": request_id, "inputs": self._inputs})
        head = (
            f"POST {self._path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\ncontent-type: application/json\r\n"
            f"{self._key}content-length: {len(body)}\r\n\r\n"
        )
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                status, answer = await self._exchange(head.encode() + body)
        except (OSError, EOFError, TimeoutError) as error:
            raise Unavailable(f"{type(error).__name__}: {error}", reason="CONNECTION") from None
        document = orjson.loads(answer)
        if status != 200:
            raise _http_error(status, document)
        return str(document["model_version"])

    async def _exchange(self, payload: bytes) -> tuple[int, bytes]:
        reader, writer = await self._connection()
        try:
            writer.write(payload)
            head = await reader.readuntil(b"\r\n\r\n")
            answer = await reader.readexactly(_content_length(head))
        except BaseException:
            writer.close()
            raise
        if b"connection: close" in head.lower():
            writer.close()
        else:
            self._idle.append((reader, writer, time.perf_counter()))
        return int(head[9:12]), answer

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The one used last, if a server can't have closed it by now; else a new one."""
        while self._idle:
            reader, writer, since = self._idle.pop()
            if not reader.at_eof() and time.perf_counter() - since < IDLE_SECONDS:
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)

    async def close(self) -> None:
        for _, writer, _ in self._idle:
            writer.close()
            await writer.wait_closed()


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise EOFError("an answer without content-length")


def _http_error(status: int, document: Any) -> InterlockError:
    details = document.get("status", document) if isinstance(document, dict) else {}
    reason = details.get("reason", "") if isinstance(details, dict) else ""
    kind = {
        400: "INVALID_ARGUMENT",
        404: "NOT_FOUND",
        409: "ABORTED",
        429: "RESOURCE_EXHAUSTED",
        503: "UNAVAILABLE",
        504: "DEADLINE_EXCEEDED",
    }
    return BY_KIND.get(kind.get(status, ""), Internal)(
        f"HTTP {status}: {str(document)[:300]}", reason=reason or f"HTTP_{status}"
    )


@dataclass(frozen=True, slots=True)
class Figures:
    """One window of traffic."""

    count: int
    failed: int
    p50_ms: float
    p99_ms: float
    max_ms: float


def figures(samples: Sequence[Sample]) -> Figures:
    """Nearest-rank percentiles over those that were answered; zeros for none."""
    times = sorted(s.seconds * 1e3 for s in samples if not s.error)
    failed = sum(1 for s in samples if s.error)
    if not times:
        return Figures(len(samples), failed, 0.0, 0.0, 0.0)
    at = [times[min(len(times) - 1, int(share * len(times)))] for share in (0.5, 0.99)]
    return Figures(len(samples), failed, round(at[0], 3), round(at[1], 3), round(times[-1], 3))


@dataclass(slots=True)
class Mark:
    """A stretch of time with a name, in seconds from the start of the load; `end` None while it lasts."""

    name: str
    start: float
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a load. `errors` counts failures by their reason; `versions` counts answers by version."""

    seconds: float
    count: int
    failed: int
    rate: float
    windows: Mapping[str, Figures]
    protocols: Mapping[str, Figures]
    marks: Sequence[Mapping[str, Any]]
    versions: Mapping[str, int]
    errors: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def table(self) -> str:
        """The same for a person, as text."""
        lines = [f"{self.count} requests in {self.seconds:.1f} s ({self.rate:.0f}/s), {self.failed} failed"]
        lines.append(f"{'':24}{'requests':>10}{'failed':>8}{'p50 ms':>10}{'p99 ms':>10}{'max ms':>10}")
        rows = [*self.windows.items(), *self.protocols.items(), *((str(m["name"]), m["figures"]) for m in self.marks)]
        for name, f in rows:
            lines.append(f"{name:24}{f.count:>10}{f.failed:>8}{f.p50_ms:>10.2f}{f.p99_ms:>10.2f}{f.max_ms:>10.2f}")
        lines += [f"error {reason}: {count}" for reason, count in self.errors.items()]
        return "\n".join(lines)


@dataclass(slots=True)
class Load:
    """Requests to several targets in turn.

    Args:
        rate: requests per second over all targets; None keeps `concurrency` in flight instead.
    """

    targets: Sequence[Target]
    rate: float | None = 1000.0
    concurrency: int = 16
    samples: list[Sample] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    num_failed: int = 0
    _started: float = 0.0
    _next_id: int = 0

    @property
    def elapsed(self) -> float:
        """Seconds since the load began."""
        return time.perf_counter() - self._started if self._started else 0.0

    @contextmanager
    def marked(self, name: str) -> Iterator[Mark]:
        """Names a stretch of time, for the report's before, during and after."""
        mark = Mark(name, self.elapsed)
        self.marks.append(mark)
        try:
            yield mark
        finally:
            mark.end = self.elapsed

    async def run(self, stopping: asyncio.Event) -> None:
        """Sends until `stopping`, then waits for what is in flight. A failed request is a sample, not an exception."""
        async with AsyncExitStack() as stack:
            senders = [await stack.enter_async_context(target.open(self.concurrency)) for target in self.targets]
            self._started = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                if self.rate is None:
                    for n in range(self.concurrency):
                        group.create_task(self._closed_loop(senders[n % len(senders)], stopping))
                else:
                    await self._open_loop(group, senders, self.rate, stopping)

    async def _closed_loop(self, sender: Sender, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            await self._one(sender, self.elapsed)

    async def _open_loop(
        self, group: asyncio.TaskGroup, senders: Sequence[Sender], rate: float, stopping: asyncio.Event
    ) -> None:
        places = asyncio.Semaphore(IN_FLIGHT_MAX)
        number = 0

        async def one(sender: Sender, due: float) -> None:
            try:
                await self._one(sender, due)
            finally:
                places.release()

        while not stopping.is_set():
            due = number / rate
            ahead = due - self.elapsed
            if ahead > 0:
                await asyncio.sleep(ahead)
            await places.acquire()
            group.create_task(one(senders[number % len(senders)], due))
            number += 1

    async def _one(self, sender: Sender, due: float) -> None:
        self._next_id += 1
        version = error = ""
        try:
            version = await sender.send(f"load-{self._next_id}")
        except InterlockError as failure:
            error = f"{failure.reason}: {failure.message}"
            self.num_failed += 1
        self.samples.append(Sample(due, self.elapsed - due, sender.protocol, version, error))

    def report(self) -> Report:
        """Figures of everything so far."""
        samples = list(self.samples)
        seconds = max((s.due + s.seconds for s in samples), default=0.0)
        spans = [(m.name, m.start, (m.end if m.end is not None else seconds) + SETTLE_SECONDS) for m in self.marks]
        protocols = sorted({s.protocol for s in samples})
        return Report(
            seconds=round(seconds, 3),
            count=len(samples),
            failed=sum(1 for s in samples if s.error),
            rate=round(len(samples) / seconds, 1) if seconds else 0.0,
            windows=_windows(samples, spans),
            protocols={p: figures([s for s in samples if s.protocol == p]) for p in protocols},
            marks=[
                {
                    "name": m.name,
                    "start": round(m.start, 3),
                    "end": m.end and round(m.end, 3),
                    "figures": figures(_within(samples, start, end)),
                }
                for m, (_, start, end) in zip(self.marks, spans, strict=True)
            ],
            versions=dict(Counter(s.version for s in samples if s.version)),
            errors=dict(Counter(s.error.split(":", 1)[0] for s in samples if s.error)),
        )


def _within(samples: Sequence[Sample], start: float, end: float) -> list[Sample]:
    """Those that were in flight at some time of the span."""
    return [s for s in samples if s.due <= end and s.due + s.seconds >= start]


def _windows(samples: Sequence[Sample], spans: Sequence[tuple[str, float, float]]) -> dict[str, Figures]:
    """Before the first mark, during any, after the last; `all` when nothing was marked."""
    if not spans:
        return {"all": figures(samples)}
    during = {id(s) for _, start, end in spans for s in _within(samples, start, end)}
    first, last = min(start for _, start, _ in spans), max(end for _, _, end in spans)
    rest = [s for s in samples if id(s) not in during]
    return {
        "before": figures([s for s in rest if s.due < first]),
        "during": figures([s for s in samples if id(s) in during]),
        "between": figures([s for s in rest if first <= s.due <= last]),
        "after": figures([s for s in rest if s.due > last]),
    }


def dumps(report: Report) -> str:
    """The report as indented JSON."""
    return json.dumps(report.as_dict(), indent=1)
