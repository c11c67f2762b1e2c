"""The trainer's gRPC face: protobuf in, values inside, protobuf out. Decides nothing.

Each servicer stands in a module of its own; `add_all` puts them on a room.
"""

from __future__ import annotations

from interlock.api.trainer.v1 import (
    checkpoint_service_pb2_grpc,
    loop_service_pb2_grpc,
    metrics_service_pb2_grpc,
    run_service_pb2_grpc,
)
from interlock.runtime.access import Keys
from interlock.runtime.lifecycle import GrpcRoom
from interlock.stores.trainer import TrainerStore
from interlock_trainer.children import Children
from interlock_trainer.runs import Runs
from interlock_trainer.servicers.checkpoints import CheckpointServicer
from interlock_trainer.servicers.loop import LoopServicer
from interlock_trainer.servicers.metrics import MetricsServicer
from interlock_trainer.servicers.run import RunServicer
from interlock_trainer.session import Spawn

PACKAGE = "interlock.api.trainer.v1"
SERVICES = ("RunService", "MetricsService", "CheckpointService", "LoopService")


def add_all(room: GrpcRoom, runs: Runs, children: Children, store: TrainerStore, keys: Keys, spawn: Spawn) -> None:
    """Adds the four services to the room and describes them."""
    run_service_pb2_grpc.add_RunServiceServicer_to_server(RunServicer(runs, children, store, keys, spawn), room.server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(MetricsServicer(runs, store), room.server)
    checkpoint_service_pb2_grpc.add_CheckpointServiceServicer_to_server(CheckpointServicer(runs, keys), room.server)
    loop_service_pb2_grpc.add_LoopServiceServicer_to_server(LoopServicer(runs), room.server)
    room.describe([f"{PACKAGE}.{name}" for name in SERVICES])
