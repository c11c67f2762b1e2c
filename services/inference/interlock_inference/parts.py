"""What a replica is made of, put together in order and taken down in order: the same for the process of its own and for the inline form. No listener."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from interlock.core.pacing import PacingPolicy
from interlock.runtime import channels, failpoints
from interlock.runtime.access import Keys
from interlock.runtime.clock import SystemClock
from interlock.runtime.settings import InferenceSettings, Settings
from interlock.stores.remote import RemoteArtifacts
from interlock_inference.assignment import AssignmentFile
from interlock_inference.bridge import ControllerAdmin
from interlock_inference.dataplane import DataPlane
from interlock_inference.engines import EngineOptions, onnx
from interlock_inference.loads.history import LoadHistory
from interlock_inference.loads.loader import Loader, LoadPolicy
from interlock_inference.loads.pace import Pacer
from interlock_inference.metrics import LoadMetrics, RequestMetrics, StateMetrics
from interlock_inference.recorder import Recorder
from interlock_inference.replica import Replica
from interlock_inference.servicers.oip import OipServicer
from interlock_inference.servicers.runtime import RuntimeServicer
from interlock_inference.slots import Registry
from interlock_inference.standalone import NoFile, Standalone

CHILDREN = sys.platform == "linux"
"""Loading children need packet sockets, memory files and scheduling classes that only Linux has; elsewhere everything is loaded here."""


@dataclass(frozen=True, slots=True)
class Parts:
    """One replica. `tasks` outlives every call and ends with the replica."""

    registry: Registry
    plane: DataPlane
    replica: Replica
    oip: OipServicer
    commands: RuntimeServicer
    metrics: CollectorRegistry
    tasks: asyncio.TaskGroup
    standalone: Standalone | None

    async def start(self) -> None:
        """Serves what is to be served: what lies in the folder, or what a controller said before the process ended."""
        await (self.replica.restore() if self.standalone is None else self.standalone.run())

    def probe(self, stopping: asyncio.Event) -> Callable[[], tuple[bool, dict[str, Any]]]:
        """What `/health` says of it."""

        def probe() -> tuple[bool, dict[str, Any]]:
            ready = self.replica.is_ready() and not stopping.is_set()
            models = {
                model: {"epoch": routed.route.epoch, "versions": {w.version: w.weight for w in routed.route.weights}}
                for model, routed in self.registry.snapshot.routes.items()
            }
            return ready, {"status": "ready" if ready else "not_ready", "models": models}

        return probe


@asynccontextmanager
async def assembled(config: Settings, keys: Keys, stopping: asyncio.Event) -> AsyncIterator[Parts]:
    """A replica without a listener, until the block ends; what it served before is not restored yet."""
    clock, own = SystemClock(), config.inference
    registry, recorder, metrics = Registry(), Recorder(own.recorded_requests), CollectorRegistry()
    counted = RequestMetrics(metrics)
    plane = DataPlane(registry, recorder, counted, num_threads=_worker_threads(own.intra_op_threads))
    metrics.register(StateMetrics(registry, lambda: plane.num_queued))
    options = onnx.check_options(
        EngineOptions(tuple(own.providers), own.intra_op_threads, own.max_intra_op_threads, tuple(own.torch_modules))
    )
    file = NoFile() if own.standalone else AssignmentFile(config.home / f"replica-{own.port}.json")
    history = LoadHistory(config.home / f"loads-{own.port}.json")
    fetched = RemoteArtifacts(
        config.home / "cache" / f"replica-{own.port}",
        config.artifacts.remote(),
        lambda: {slot.opened.path for slot in registry.all_slots() if slot.opened is not None},
    )
    async with AsyncExitStack() as stack:
        stack.callback(registry.close)
        stack.callback(plane.close)
        channel = await stack.enter_async_context(channels.open_channel(config.controller_address))
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        pacer = Pacer(registry, clock, _pacing(own))
        replica = Replica(
            registry,
            recorder,
            file,
            clock,
            tasks,
            loader=Loader(_loading(own, options), registry, history, pacer, tasks, failpoints.reached, fetched),
            counted=LoadMetrics(metrics),
            warmup_iterations=own.warmup_iterations,
            failpoint=failpoints.reached,
            released=counted.forget,
        )
        stack.callback(replica.close)
        standalone = Standalone(replica, registry, own, clock, tasks) if own.standalone else None
        admin = standalone or ControllerAdmin(channel, channels.Caller(keys.internal_key()), config.home / "models")
        oip = OipServicer(plane, registry, replica, admin, stopping)
        owner = f"the folder {own.repository or 'inference.models'}" if standalone else ""
        commands = RuntimeServicer(replica, uuid.uuid4().hex[:12], clock.now(), owner)
        yield Parts(registry, plane, replica, oip, commands, metrics, tasks, standalone)


def _worker_threads(intra_op_threads: int) -> int:
    """As many runs at once as the cores allow, one core being left to the event loop."""
    return max(1, len(os.sched_getaffinity(0)) // intra_op_threads - 1)


def _loading(own: InferenceSettings, options: EngineOptions) -> LoadPolicy:
    return LoadPolicy(
        options=options,
        isolate_bytes=own.isolate_mb << 20 if CHILDREN else 0,
        tries=own.try_loads and CHILDREN,
        timeout_seconds=own.load_timeout_seconds,
        attempts=own.load_attempts,
        limit_bytes=own.memory_limit_mb << 20,
        reserve_bytes=own.memory_reserve_mb << 20,
        channels=_worker_threads(own.intra_op_threads) + 1,  # and one for warm-up and comparison
    )


def _pacing(own: InferenceSettings) -> PacingPolicy:
    return PacingPolicy(
        factor=own.load_p99_factor,
        floor_seconds=own.load_p99_floor_ms / 1e3,
        pause_seconds_max=own.load_pause_max_seconds,
        gives_up=own.load_when_starved == "give_up",
    )
