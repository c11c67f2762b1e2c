"""One replica without a listener: the data plane and its commands over real ONNX models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

import onnx_models
from interlock.core.pacing import PacingPolicy
from interlock.core.route import Route, Weight
from interlock.errors import InterlockError
from interlock.runtime.clock import SystemClock
from interlock.stores.remote import RemoteArtifacts, RemoteOptions
from interlock_inference.assignment import AssignmentFile
from interlock_inference.dataplane import DataPlane
from interlock_inference.engines import Array, EngineOptions
from interlock_inference.loads.history import LoadHistory
from interlock_inference.loads.loader import Loader, LoadPolicy
from interlock_inference.loads.pace import Pacer
from interlock_inference.metrics import LoadMetrics
from interlock_inference.recorder import Recorder
from interlock_inference.replica import Replica, Wanted
from interlock_inference.slots import Registry, Slot

PACING = PacingPolicy()


class Nobody:
    """Observes nothing."""

    def finished(self, slot: Slot, seconds: float, error: InterlockError | None) -> None:
        """Ignored."""

    def ran(self, slot: Slot, rows: int) -> None:
        """Ignored."""


@dataclass
class Call:
    """A request with its inputs at hand."""

    inputs: dict[str, Array]
    model: str = "policy"
    version: str = ""
    request_id: str = ""
    outputs: Sequence[str] = ()
    deadline: float | None = None
    priority: int = 0
    has_images: bool = False
    decoded: list[str] = field(default_factory=list)

    def decode(self, slot: Slot) -> dict[str, Array]:
        self.decoded.append(slot.version)
        return self.inputs


@dataclass
class World:
    """One replica without a listener."""

    home: Path
    registry: Registry
    plane: DataPlane
    replica: Replica
    recorder: Recorder
    metrics: CollectorRegistry

    def artifact(self, version: str, body: bytes | None = None, **more: Any) -> str:
        folder = self.home / "models" / "policy" / version
        onnx_models.write_version(folder, body or onnx_models.constant(float(version)), **more)
        return str(folder)

    async def load(self, version: str, body: bytes | None = None, **more: Any) -> Slot:
        async for _ in self.replica.prepare(Wanted("policy", version, self.artifact(version, body, **more))):
            pass
        slot, _ = await self.replica.warm("policy", version, 0)
        return slot

    async def route(self, epoch: int, *versions: str, token: int = 1) -> None:
        weights = tuple(Weight(version, 1) for version in versions)
        await self.replica.apply_route(token, Route("policy", epoch, weights), versions[0] if versions else "", 0.0)


def a_call(rows: int = 1, **more: object) -> Call:
    return Call({"x": np.ones((rows, 4), np.float32)}, **more)  # type: ignore[arg-type]


def a_loader(
    home: Path, registry: Registry, tasks: asyncio.TaskGroup, pacing: PacingPolicy = PACING, **policy: Any
) -> Loader:
    """A replica's loader; without `tries=True` it loads in this process, which costs a test nothing."""
    fetched = RemoteArtifacts(home / "cache", RemoteOptions())
    made = LoadPolicy(**{"options": EngineOptions(), "tries": False, "again_seconds": 0.1, **policy})
    clock = SystemClock()
    pacer = Pacer(registry, clock, pacing)
    return Loader(made, registry, LoadHistory(home / "loads.json"), pacer, tasks, lambda place, version: None, fetched)


@asynccontextmanager
async def dataplane_world(
    home: Path,
    file: AssignmentFile | None = None,
    engines: EngineOptions | None = None,
    *,
    pacing: PacingPolicy = PACING,
    loads: Mapping[str, Any] = MappingProxyType({}),
    **options: int,
) -> AsyncIterator[World]:
    registry, recorder, metrics = Registry(), Recorder(), CollectorRegistry()
    plane = DataPlane(registry, recorder, Nobody(), **options)
    async with asyncio.TaskGroup() as tasks:
        file = file or AssignmentFile(home / "replica.json")
        loader = a_loader(home, registry, tasks, pacing, options=engines or EngineOptions(), **loads)
        counted = LoadMetrics(metrics)
        replica = Replica(
            registry, recorder, file, SystemClock(), tasks, loader=loader, counted=counted, warmup_iterations=5
        )
        try:
            yield World(home, registry, plane, replica, recorder, metrics)
        finally:
            await asyncio.to_thread(plane.close)
            replica.close()
            registry.close()
