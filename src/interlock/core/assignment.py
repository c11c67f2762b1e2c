"""What one replica must hold and route, whatever happened to it: new, restarted, behind, or with leftovers. Pure, level-triggered.

Swaps bring replicas forward together; this brings each one to the committed routes by itself. Commands are the same and as
idempotent, so both may say the same thing at once.

Rules of this file
- A route is applied only when every version it names is warm on the replica.
- A slot that no route names and no running swap claims is a leftover: drained if something still holds it, then released.
"""

from __future__ import annotations

from collections.abc import Mapping

from interlock.core.route import Route
from interlock.core.swap import DRAIN_SECONDS, WARMUP_ITERATIONS
from interlock.core.swap_plan import ApplyRoute, Drain, Prepare, Release, Replica, ReplicaCommand, Warm


def assign(
    replicas: Mapping[str, Replica], routes: Mapping[str, Route], claims: Mapping[str, frozenset[str]]
) -> tuple[ReplicaCommand, ...]:
    """The commands one replica lacks. `replicas`: its view per model; `routes`, `claims` (of running swaps): per model."""
    commands: list[ReplicaCommand] = []
    for model, route in routes.items():
        commands += _towards(replicas.get(model), route) if model in replicas else ()
    for model, replica in replicas.items():
        commands += _leftovers(replica, model, routes.get(model), claims.get(model, frozenset()))
    return tuple(commands)


def _towards(replica: Replica | None, route: Route) -> tuple[ReplicaCommand, ...]:
    if replica is None or route.epoch == 0 or replica.epoch > route.epoch:
        return ()
    lacking = tuple(
        command for version in route.versions() if (command := _lacks(replica, route.model, version)) is not None
    )
    if lacking:
        return lacking
    return (ApplyRoute(replica.name, route),) if replica.epoch < route.epoch else ()


def _lacks(replica: Replica, model: str, version: str) -> Prepare | Warm | None:
    slot = replica.slot(version)
    if slot is None or not slot.loaded:
        return Prepare(replica.name, model, version)
    return None if slot.warm else Warm(replica.name, model, version, WARMUP_ITERATIONS)


def _leftovers(
    replica: Replica, model: str, route: Route | None, claimed: frozenset[str]
) -> tuple[ReplicaCommand, ...]:
    if route is not None and replica.epoch != route.epoch:
        return ()
    keep = claimed | (set(route.versions()) if route else set())
    gone = [version for version in replica.slots if version not in keep]
    return tuple(
        Drain(replica.name, model, version, DRAIN_SECONDS)
        if replica.slots[version].in_flight
        else Release(replica.name, model, version)
        for version in gone
    )
