"""What a request leaves behind: {unary, batched, stream} x {ok, cancel, deadline, error, shutdown, swap} x six instants, and 0 residue in every cell.

The instants are made, not waited for: before admission, decoded, queued behind a run that holds the engine, in compute, computed, and
while its answer is encoded. Residue is looked for in the registry's handles, the queues, the loop's tasks, the process's files, and
the heap.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

import onnx_models
from interlock.api.oip import messages, rpc
from interlock.core.route import Route, Weight
from interlock.errors import Internal
from interlock.runtime.access import Keys
from interlock.runtime.channels import open_channel
from interlock.runtime.settings import Settings
from interlock.stores.modelspec import BatchingSpec
from interlock_inference import dataplane
from interlock_inference.__main__ import listening
from interlock_inference.batching import Entry
from interlock_inference.dataplane import Reply
from interlock_inference.parts import Parts, assembled
from interlock_inference.replica import Wanted
from interlock_inference.servicers.codec import InferCall
from interlock_inference.slots import Handle, Slot

INSTANTS = ("before", "decoded", "queued", "compute", "computed", "encoding")
OUTCOMES = ("ok", "cancel", "deadline", "error", "shutdown", "swap")
KINDS = ("unary", "batched", "stream")
LEFT_BEHIND = (Handle, Entry, Reply, InferCall)
DEADLINE_SECONDS = 0.3


class Gate:
    """A version's engine, held open or shut; tells when a run has begun and when one has ended."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.platform, self.providers, self.signature = engine.platform, engine.providers, engine.signature
        self.open = threading.Event()
        self.open.set()
        self.began: Callable[[], None] = lambda: None
        self.ended: Callable[[], None] = lambda: None
        self.fails = False

    def run(self, inputs: Any, outputs: Sequence[str]) -> list[Any]:
        self.began()
        assert self.open.wait(20)
        made = self._engine.run(inputs, outputs)
        self.ended()
        if self.fails:
            raise Internal("injected", reason="ENGINE_FAULT")
        return list(made)

    def close(self) -> None:
        self._engine.close()


@dataclass
class Cell:
    """One request in one room, and what happens to it at its instant."""

    parts: Parts
    stub: rpc.Stub
    stopping: asyncio.Event
    gate: Gate
    outcome: str
    instant: str
    monkeypatch: pytest.MonkeyPatch
    call: Any = None
    happened: asyncio.Event = field(default_factory=asyncio.Event)
    started_at: float = 0.0
    after: list[asyncio.Task[None]] = field(default_factory=list)

    def happen(self) -> None:
        """On the loop, at the instant, once."""
        if self.happened.is_set():
            return
        self.happened.set()
        if self.outcome == "cancel":
            self.call.cancel()
        elif self.outcome == "deadline":
            time.sleep(max(0.0, self.started_at + DEADLINE_SECONDS + 0.02 - time.monotonic()))
        elif self.outcome == "shutdown":
            self.stopping.set()
        elif self.outcome == "swap":
            self.after.append(self.parts.tasks.create_task(self._swap()))

    async def _swap(self) -> None:
        await self.parts.replica.apply_route(1, Route("policy", 2, (Weight("2", 1),)), "2", 0.0)
        await self.parts.replica.drain("policy", "1", 5.0)
        await self.parts.replica.release("policy", "1")

    def from_thread(self) -> None:
        """The instant came in a worker thread, which waits until it is over."""
        loop, done = self.loop, threading.Event()

        def on_loop() -> None:
            self.happen()
            done.set()

        loop.call_soon_threadsafe(on_loop)
        assert done.wait(20)

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()

    def arm(self) -> None:
        """Sets the instant's trap."""
        if self.instant == "before":
            self._trap(self.parts.registry, "admit", before=True)
        elif self.instant == "decoded":
            self._trap(dataplane, "_wanted", before=False)
        elif self.instant == "encoding":
            self._trap(self.parts.oip._maker, "response", before=True)
        elif self.instant == "compute":
            self.gate.began = self.from_thread
        elif self.instant == "computed":
            self.gate.ended = self.from_thread
        if self.outcome == "error":
            self.gate.fails = self.instant in ("queued", "compute", "computed")

    def _trap(self, owner: Any, name: str, *, before: bool) -> None:
        real = getattr(owner, name)

        def trapped(*args: Any) -> Any:
            result = None if before else real(*args)
            first = not self.happened.is_set()
            self.happen()
            if first and self.outcome == "error":
                raise Internal("injected", reason="ENGINE_FAULT")
            return real(*args) if before else result

        self.monkeypatch.setattr(owner, name, trapped, raising=True)


def request() -> messages.ModelInferRequest:
    made = messages.ModelInferRequest(model_name="policy", raw_input_contents=[np.zeros((1, 4), np.float32).tobytes()])
    made.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    return made


@asynccontextmanager
async def a_room(home: Path, *, batched: bool) -> AsyncIterator[tuple[Parts, rpc.Stub, asyncio.Event]]:
    """A replica with a listener in this process, serving version 1 through a worker thread; version 2 is ready."""
    stopping = asyncio.Event()
    own = {"port": 0, "metrics_port": 0, "try_loads": False}
    config = Settings(home=home, probe_interval_seconds=0, inference=own, controller={"port": 1})  # type: ignore[arg-type]
    keys = Keys(home)
    async with assembled(config, keys, stopping) as parts, listening(config, parts, keys, stopping) as room:
        running = parts.tasks.create_task(room.run(probe_interval_seconds=0, drain_seconds=5))
        for version in ("1", "2"):
            folder = home / "models" / "policy" / version
            spec = BatchingSpec() if batched else None
            onnx_models.write_version(folder, onnx_models.constant(float(version)), batching=spec)
            async for _ in parts.replica.prepare(Wanted("policy", version, str(folder))):
                pass
            await parts.replica.warm("policy", version, 1)
        await parts.replica.apply_route(1, Route("policy", 1, (Weight("1", 1),)), "1", 0.0)
        async with open_channel(f"127.0.0.1:{room.port}") as channel:
            yield parts, rpc.Stub(channel), stopping
        stopping.set()
        await running


def gated(slot: Slot) -> Gate:
    """Puts a gate before the slot's engine, and makes it slow enough to be run in a thread."""
    assert slot.opened is not None
    assert slot.warmup is not None
    gate = Gate(slot.opened.engine)
    slot.opened = replace(slot.opened, engine=gate)
    slot.warmup = replace(slot.warmup, best_seconds=1.0)
    return gate


async def ask(stub: rpc.Stub, kind: str, cell: Cell | None = None) -> str:
    """Sends one request and takes what comes; the code it ended with."""
    timeout = DEADLINE_SECONDS if cell is not None and cell.outcome == "deadline" else 20.0
    call: Any
    if kind == "stream":
        call = stub.ModelStreamInfer(timeout=timeout)
    else:
        call = stub.ModelInfer(request(), timeout=timeout)
    if cell is not None:
        cell.call, cell.started_at = call, time.monotonic()
    with contextlib.suppress(grpc.RpcError, asyncio.CancelledError, asyncio.InvalidStateError):
        if kind == "stream":
            await call.write(request())
            await call.read()
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
        else:
            await call
    with contextlib.suppress(asyncio.CancelledError):
        return str((await call.code()).name)
    return "CANCELLED"


@dataclass(frozen=True)
class Traces:
    """What a request could leave behind."""

    tasks: int
    files: int
    heap: Counter[str]

    @classmethod
    def now(cls) -> Traces:
        gc.collect()
        heap = Counter(type(thing).__name__ for thing in gc.get_objects() if type(thing) in LEFT_BEHIND)
        return cls(len(asyncio.all_tasks()), psutil.Process().num_fds(), heap)


async def residue(parts: Parts, before: Traces) -> str:
    """What is left, once it had the time to go; empty when nothing is."""
    found = ""
    for _ in range(100):
        handles = {slot.name: slot.in_flight for slot in parts.registry.all_slots() if slot.in_flight}
        lanes = [s.name for s in parts.registry.all_slots() if s.lane is not None and s.lane.num_waiting]
        now = Traces.now() if not handles and not lanes and not parts.plane.num_queued else before
        held = handles or lanes or parts.plane.num_queued
        if not held and now.tasks <= before.tasks and now.files <= before.files and now.heap <= before.heap:
            return ""
        found = f"handles {handles}, lanes {lanes}, queued {parts.plane.num_queued}, before {before}, now {now}"
        await asyncio.sleep(0.02)
    return found


async def run_cell(home: Path, kind: str, outcome: str, instant: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """One cell; the code that the caller saw."""
    async with a_room(home, batched=kind == "batched") as (parts, stub, stopping):
        gate = gated(parts.registry.find("policy", "1"))
        assert await ask(stub, kind) == "OK"
        assert not await residue(parts, Traces.now()), "the room is at rest"
        before = Traces.now()
        cell = Cell(parts, stub, stopping, gate, outcome, instant, monkeypatch)
        if instant == "queued":
            code = await queued(cell, kind)
        else:
            cell.arm()
            code = await ask(stub, kind, cell)
        assert cell.happened.is_set(), f"the instant {instant!r} was never reached: {code}"
        for task in cell.after:
            await task
        gate.began = gate.ended = lambda: None
        left = await residue(parts, before)
        assert not left, f"{kind}, {outcome}, {instant}: {left}"
        return code


async def queued(cell: Cell, kind: str) -> str:
    """Another request holds the engine while ours waits for it."""
    cell.gate.open.clear()
    holder = cell.parts.tasks.create_task(_quietly(ask(cell.stub, "unary")))
    async with asyncio.timeout(10):
        while cell.parts.plane.num_queued < 1:
            await asyncio.sleep(0.002)
        cell.arm()
        asking = cell.parts.tasks.create_task(ask(cell.stub, kind, cell))
        while cell.parts.plane.num_queued < 2:
            await asyncio.sleep(0.002)
        cell.happen()
        await asyncio.sleep(0.02)  # what happened takes effect while it waits
        cell.gate.open.set()
        await holder
        return await asking


async def _quietly(work: Any) -> None:
    await work


EXPECTED = {
    "ok": {"OK"},
    "cancel": {"CANCELLED", "OK"},
    "deadline": {"DEADLINE_EXCEEDED"},
    "error": {"INTERNAL", "OK"},  # on a stream an error is an answer
    "shutdown": {"OK", "UNAVAILABLE"},
    "swap": {"OK", "UNAVAILABLE"},
}


@pytest.fixture(autouse=True)
def only_what_comes() -> Iterator[None]:
    """Keeps what other tests have made out of the search of the heap: it takes most of a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, outcome: str) -> None:
    for instant in INSTANTS:
        with monkeypatch.context() as patched:
            code = await run_cell(tmp_path / instant, kind, outcome, instant, patched)
        assert code in EXPECTED[outcome], f"{kind}, {outcome}, {instant}: {code}"


def test_the_matrix_is_whole() -> None:
    assert len(list(itertools.product(KINDS, OUTCOMES, INSTANTS))) == 108
