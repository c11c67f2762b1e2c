"""The controller process: `python -m interlock_controller`. The whole service in one place, made from its parts and taken down in order."""

from __future__ import annotations

if __name__ == "__main__":
    import interlock.runtime.lean  # noqa: F401  first of all

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import structlog

from interlock.api.controller.v1 import (
    model_service_pb2_grpc,
    policy_service_pb2_grpc,
    rollback_service_pb2_grpc,
    route_service_pb2_grpc,
    swap_service_pb2_grpc,
)
from interlock.runtime import lifecycle, logging, settings
from interlock.runtime.access import Keys
from interlock.runtime.changed import Changed
from interlock.runtime.channels import Caller
from interlock.runtime.clock import SystemClock
from interlock.runtime.lifecycle import GrpcRoom
from interlock.runtime.metrics import metrics_server
from interlock.runtime.settings import Settings
from interlock.runtime.telemetry import telemetry
from interlock.stores.controller_sqlite import SqliteControllerStore
from interlock.stores.files import ModelRepository
from interlock.stores.remote import RemoteArtifacts
from interlock_controller.announcer import Announcer
from interlock_controller.fleet import Fleet
from interlock_controller.promoter import Promoter
from interlock_controller.reconciler import Reconciler
from interlock_controller.registry import Registry
from interlock_controller.replicas import ReplicaClient
from interlock_controller.rollbacks import Rollbacks
from interlock_controller.servicers.model_service import ModelServicer
from interlock_controller.servicers.policy_service import PolicyServicer
from interlock_controller.servicers.rollback_service import RollbackServicer
from interlock_controller.servicers.route_service import RouteServicer
from interlock_controller.servicers.swap_service import SwapServicer
from interlock_controller.swaps import Swaps
from interlock_controller.trainer import TrainerClient

SERVICES = tuple(
    f"interlock.api.controller.v1.{name}Service" for name in ("Swap", "Model", "Route", "Policy", "Rollback")
)
GRACE_SECONDS = 5.0
_log = structlog.get_logger(__name__)


def _ignore(port: int, metrics_port: int) -> None:
    pass


async def serve(config: Settings, stopping: asyncio.Event, started: Callable[[int, int], None] = _ignore) -> None:
    """Runs the controller until `stopping`; `started` is told the gRPC port and the metrics port."""
    clock, keys, changed, own = SystemClock(), Keys(config.home), Changed(), config.controller
    caller = Caller(keys.internal_key())
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(telemetry("controller", config.otlp_endpoint))
        store = SqliteControllerStore(config.home / "controller.db")
        stack.callback(store.close)
        repository = ModelRepository(config.home / "models")
        repository.clear_scratch()
        clients = {address: ReplicaClient(address, caller) for address in config.replica_addresses}
        trainer = TrainerClient(config.trainer_address, caller)
        stack.push_async_callback(trainer.close)
        for client in clients.values():
            stack.push_async_callback(client.close)
        fleet = Fleet(clients, clock, changed)
        reconciler = Reconciler(store, fleet, repository, clock, changed, tick_seconds=own.tick_seconds)
        fetched = RemoteArtifacts(config.home / "cache" / "controller", config.artifacts.remote())
        registry, swaps = Registry(store, repository, clock, changed, fetched), Swaps(store, reconciler, clock)
        promoter = Promoter(store, trainer, registry, swaps, clock, changed)
        rollbacks = Rollbacks(store, swaps, clock, changed)
        reconciler.take_over()
        room = GrpcRoom(stopping, keys)
        swap_service_pb2_grpc.add_SwapServiceServicer_to_server(
            SwapServicer(swaps, store, fleet, changed, keys), room.server
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(registry, swaps, store, keys), room.server
        )
        route_service_pb2_grpc.add_RouteServiceServicer_to_server(
            RouteServicer(swaps, store, changed, keys), room.server
        )
        policy_service_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyServicer(promoter), room.server)
        rollback_servicer = RollbackServicer(rollbacks, trainer, store, keys)
        rollback_service_pb2_grpc.add_RollbackServiceServicer_to_server(rollback_servicer, room.server)
        room.describe(SERVICES)
        port = await room.start(config.host, own.port)
        metrics_port = stack.enter_context(metrics_server(config.host, own.metrics_port, _probe(fleet, stopping)))
        _log.info("listening", address=f"{config.host}:{port}", metrics_port=metrics_port, keys_required=keys.required)
        started(port, metrics_port)
        async with asyncio.TaskGroup() as tasks:
            loops = [fleet.follow(), promoter.follow(), promoter.run(), Announcer(store, changed).run()]
            endless = [tasks.create_task(loop) for loop in loops]
            rounds = tasks.create_task(reconciler.run(stopping))
            await room.run(probe_interval_seconds=config.probe_interval_seconds, drain_seconds=GRACE_SECONDS)
            await rounds
            for task in endless:
                task.cancel()
    _log.info("stopped")


def _probe(fleet: Fleet, stopping: asyncio.Event) -> Callable[[], tuple[bool, dict[str, Any]]]:
    def probe() -> tuple[bool, dict[str, Any]]:
        up = not stopping.is_set()
        return up, {
            "status": "ready" if up else "not_ready",
            "replicas": list(fleet.live()),
            "configured": list(fleet.clients),
        }

    return probe


async def main() -> None:
    """Reads the settings, then serves until a signal."""
    config = settings.load()
    logging.configure("controller", config.log_level, config.log_format)
    settings.refuse_exposed(config)
    with lifecycle.stopping_on_signals() as stopping:
        await serve(config, stopping)


if __name__ == "__main__":
    raise SystemExit(lifecycle.run(main))
