"""A data plane over an engine that tests can hold, that remembers what it ran, and that refuses what it is told to refuse."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import dataplane_world
from interlock.core.route import Route, Weight
from interlock.errors import InterlockError, InvalidArgument
from interlock.stores.modelspec import BatchingSpec, ModelSpec, TensorSpec
from interlock_inference.dataplane import DataPlane
from interlock_inference.engines import Array, Signature
from interlock_inference.recorder import Recorder
from interlock_inference.repository import Opened
from interlock_inference.slots import Origin, Registry, Slot, SlotState

BAD = -1.0
"""A row with this in it is refused, with everything that runs beside it."""
CRASH = -2.0
"""A row with this in it raises what no engine should raise."""


class HeldEngine:
    """y = factor * x and z = x + factor, row by row; runs wait at the gate."""

    platform = "held"
    providers = ("Held",)
    signature = Signature(
        (TensorSpec("x", "FP32", (-1, -1)),), (TensorSpec("y", "FP32", (-1, -1)), TensorSpec("z", "FP32", (-1, -1))), {}
    )

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.gate, self.begun = threading.Event(), threading.Event()
        self.runs: list[Array] = []
        self.closed = False

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        assert not self.closed, "run after close"
        x_BD = inputs["x"]
        self.runs.append(x_BD)
        self.begun.set()
        assert self.gate.wait(30)
        if (x_BD == CRASH).any():
            raise ZeroDivisionError("secret")
        if (x_BD == BAD).any():
            raise InvalidArgument("inputs: refused by the model", reason="INVALID_TENSOR", field="inputs")
        made = {"y": x_BD * np.float32(self.factor), "z": x_BD + np.float32(self.factor)}
        return [made[name] for name in outputs]

    def close(self) -> None:
        self.closed = True

    @property
    def sizes(self) -> list[int]:
        return [run.shape[0] for run in self.runs]


@dataclass
class Call(dataplane_world.Call):
    """A request with its inputs at hand."""

    model: str = "m"


@dataclass
class Counts:
    """An observer that keeps what it was told."""

    rows: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def finished(self, slot: Slot, seconds: float, error: InterlockError | None) -> None:
        self.reasons.append(error.reason if error else "")

    def ran(self, slot: Slot, rows: int) -> None:
        self.rows.append(rows)


@dataclass
class World:
    """Slots over held engines, routed one at a time."""

    spec: BatchingSpec
    registry: Registry
    plane: DataPlane
    counts: Counts
    engines: dict[str, HeldEngine] = field(default_factory=dict)
    epoch: int = 0
    instances: int = 0

    def load(self, version: str) -> Slot:
        engine = self.engines[version] = HeldEngine(float(version))
        slot = Slot("m", version, "", Origin())
        shape = ModelSpec(
            "m", engine.signature.inputs, engine.signature.outputs, batching=self.spec, instances=self.instances
        )
        slot.loaded(Opened(engine, "blake3:x", Path(), shape, 0))
        slot.move(SlotState.READY)
        self.registry.put(slot)
        return slot

    def route(self, *versions: str) -> None:
        self.epoch += 1
        self.registry.switch(Route("m", self.epoch, tuple(Weight(v, 1) for v in versions)))

    def ask(self, group: asyncio.TaskGroup, value: float, rows: int = 1, columns: int = 2, **more: Any) -> Any:
        """A task whose result is the reply, or the error as a value."""
        inputs = {"x": np.full((rows, columns), value, np.float32)}
        return group.create_task(outcome(self.plane.infer(Call(inputs, **more))))

    async def hold(self, group: asyncio.TaskGroup, version: str = "1") -> Any:
        """Occupies the engine with a request, until the gate opens."""
        task = self.ask(group, 1000.0)
        assert await asyncio.to_thread(self.engines[version].begun.wait, 30)
        return task

    def assert_clean(self) -> None:
        assert self.plane.num_queued == 0
        for slot in self.registry.all_slots():
            assert slot.in_flight == 0
            assert slot.lane is not None
            assert slot.lane.num_waiting == 0
            assert slot.lane.timer is None
            assert not slot.lane.ask()


async def outcome(awaitable: Any) -> Any:
    """A reply, or the error of ours that came instead of it."""
    try:
        return await awaitable
    except InterlockError as error:
        return error


@asynccontextmanager
async def a_world(spec: BatchingSpec, *, instances: int = 0, **options: int) -> AsyncIterator[World]:
    """With version 1 loaded and routed. Ends with nothing left behind: no handle, no entry, no timer, no task."""
    registry, counts = Registry(), Counts()
    tasks = asyncio.all_tasks()
    world = World(spec, registry, DataPlane(registry, Recorder(), counts, **options), counts, instances=instances)
    world.load("1")
    world.route("1")
    try:
        yield world
    finally:
        for engine in world.engines.values():
            engine.gate.set()
        await asyncio.to_thread(world.plane.close)
    await asyncio.sleep(0)  # the last thread's word to the loop
    world.assert_clean()
    assert asyncio.all_tasks() == tasks
