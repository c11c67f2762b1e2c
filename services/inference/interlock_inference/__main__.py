"""The inference process: `python -m interlock_inference`. The whole service in one place, made from its parts and taken down in order."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from interlock.api.inference.v1 import (
    runtime_service_pb2,
    runtime_service_pb2_grpc,
    text_service_pb2,
    text_service_pb2_grpc,
)
from interlock.api.oip import rpc
from interlock.runtime import channels, failpoints, lifecycle, logging, settings
from interlock.runtime.access import Keys
from interlock.runtime.clock import SystemClock
from interlock.runtime.metrics import metrics_server
from interlock.runtime.settings import Settings
from interlock.runtime.telemetry import telemetry
from interlock_inference import audit, health
from interlock_inference.assignment import AssignmentFile
from interlock_inference.bridge import ControllerAdmin
from interlock_inference.dataplane import DataPlane
from interlock_inference.engines.onnx import OnnxOptions
from interlock_inference.metrics import RequestMetrics, StateMetrics
from interlock_inference.recorder import Recorder
from interlock_inference.replica import Replica
from interlock_inference.servicers.oip import OipServicer
from interlock_inference.servicers.runtime import RuntimeServicer
from interlock_inference.servicers.text import TextServicer
from interlock_inference.slots import Registry

SERVICES = (
    rpc.SERVICE_NAME,
    runtime_service_pb2.DESCRIPTOR.services_by_name["RuntimeService"].full_name,
    text_service_pb2.DESCRIPTOR.services_by_name["TextService"].full_name,
)
_log = structlog.get_logger(__name__)


def _ignore(port: int, metrics_port: int) -> None:
    pass


async def serve(config: Settings, stopping: asyncio.Event, started: Callable[[int, int], None] = _ignore) -> None:
    """Runs one replica until `stopping`; `started` is told the gRPC port and the metrics port."""
    clock, own, keys = SystemClock(), config.inference, Keys(config.home)
    registry, recorder, metrics = Registry(), Recorder(own.recorded_requests), CollectorRegistry()
    counted = RequestMetrics(metrics)
    plane = DataPlane(registry, recorder, counted, num_threads=_worker_threads(own.intra_op_threads))
    metrics.register(StateMetrics(registry, lambda: plane.num_queued))
    options = OnnxOptions(tuple(own.providers), own.intra_op_threads)
    file = AssignmentFile(config.home / f"replica-{own.port}.json")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(telemetry("inference", config.otlp_endpoint))
        stack.callback(plane.close)
        channel = await stack.enter_async_context(channels.open_channel(config.controller_address))
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        replica = Replica(
            registry,
            recorder,
            file,
            clock,
            tasks,
            options=options,
            warmup_iterations=own.warmup_iterations,
            failpoint=failpoints.reached,
            released=counted.forget,
        )
        stack.callback(replica.close)
        admin = ControllerAdmin(channel, channels.Caller(keys.internal_key()))
        room = lifecycle.GrpcRoom(stopping, keys, max_message_mb=own.max_message_mb)
        rpc.add_servicer(OipServicer(plane, registry, replica, admin, config.home / "models", stopping), room.server)
        commands = RuntimeServicer(replica, uuid.uuid4().hex[:12], clock.now())
        runtime_service_pb2_grpc.add_RuntimeServiceServicer_to_server(commands, room.server)
        text_service_pb2_grpc.add_TextServiceServicer_to_server(TextServicer(), room.server)
        room.describe(SERVICES, rpc.chained_pool())
        port = await room.start(config.host, own.port)
        publishing = tasks.create_task(health.publish(room, registry, replica))
        stack.callback(publishing.cancel)
        probe = _probe(registry, replica, stopping)
        metrics_port = stack.enter_context(metrics_server(config.host, own.metrics_port, probe, metrics))
        _log.info("listening", address=f"{config.host}:{port}", metrics_port=metrics_port, keys_required=keys.required)
        started(port, metrics_port)
        restoring = tasks.create_task(replica.restore())
        await room.run(probe_interval_seconds=config.probe_interval_seconds, drain_seconds=own.drain_seconds)
        restoring.cancel()
    _log.info("stopped")


def _worker_threads(intra_op_threads: int) -> int:
    """As many runs at once as the cores allow, one core being left to the event loop."""
    return max(1, len(os.sched_getaffinity(0)) // intra_op_threads - 1)


def _probe(registry: Registry, replica: Replica, stopping: asyncio.Event) -> Callable[[], tuple[bool, dict[str, Any]]]:
    def probe() -> tuple[bool, dict[str, Any]]:
        ready = replica.is_ready() and not stopping.is_set()
        models = {
            model: {"epoch": routed.route.epoch, "versions": {w.version: w.weight for w in routed.route.weights}}
            for model, routed in registry.snapshot.routes.items()
        }
        return ready, {"status": "ready" if ready else "not_ready", "models": models}

    return probe


async def main() -> None:
    """Reads the settings, then serves until a signal."""
    config = settings.load()
    logging.configure("inference", config.log_level, config.log_format)
    settings.refuse_exposed(config)
    audit.install()
    with lifecycle.stopping_on_signals() as stopping:
        await serve(config, stopping)


if __name__ == "__main__":
    raise SystemExit(lifecycle.run(main))
