"""grpc.health.v1 per model and version: `models/<m>` and `models/<m>/versions/<v>`, Check and Watch alike. Follows the replica; sets nothing itself."""

from __future__ import annotations

from typing import Any

from interlock.core.names import model_name
from interlock.runtime.lifecycle import NOT_SERVING, SERVING, GrpcRoom
from interlock_inference import ensembles
from interlock_inference.replica import Replica
from interlock_inference.slots import Registry


def wanted(registry: Registry) -> dict[str, Any]:
    """What every name should report now. Loading a candidate never takes a served model's health away; an ensemble is well when its members are."""
    snapshot = registry.snapshot
    states = {
        slot.name: SERVING if ensembles.is_ready(slot, snapshot) else NOT_SERVING for slot in registry.all_slots()
    }
    for model in snapshot.slots.keys() | snapshot.routes.keys():
        states[model_name(model)] = SERVING if ensembles.is_model_ready(model, snapshot) else NOT_SERVING
    return states


async def publish(room: GrpcRoom, registry: Registry, replica: Replica) -> None:
    """Keeps health in step with the registry until it is cancelled. A name that is gone stays, as NOT_SERVING."""
    told: dict[str, Any] = {}
    while True:
        changed = replica.changed.next()
        states = {**dict.fromkeys(told, NOT_SERVING), **wanted(registry)}
        for name, state in states.items():
            if told.get(name) != state:
                await room.health.set(name, state)
        told = states
        await changed.wait()
