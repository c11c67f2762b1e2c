"""The invariants that can be checked from here at no cost, on every look at a replica. It stops nothing: it counts and says so, once each.

Numbers are those of the reliability research: 1 at most one route epoch is current, 2 it never goes back, 5 no route to a released
version, 8 an old fencing token never changes a replica.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from interlock.core.route import Route
from interlock_controller import metrics
from interlock_controller.replicas import View

_log = structlog.get_logger(__name__)


class Watchdog:
    """Remembers the last epoch seen per model, and what it has said already."""

    def __init__(self) -> None:
        self._epochs: dict[str, int] = {}
        self._said: set[tuple[str, ...]] = set()

    def look(self, address: str, view: View, token: int, routes: Mapping[str, Route]) -> None:
        """Compares one replica's state with the record."""
        for model, route in routes.items():
            if route.epoch < self._epochs.get(model, 0):
                self._broken("2_epoch_went_back", model, f"{self._epochs[model]} -> {route.epoch}")
            self._epochs[model] = max(route.epoch, self._epochs.get(model, 0))
        if view.token > token:
            self._broken("8_replica_obeys_another_controller", address, f"token {view.token}, this one has {token}")
        for model, epoch in view.epochs.items():
            route = routes.get(model, Route(model, 0))
            if epoch > route.epoch:
                self._broken(
                    "1_replica_is_ahead_of_the_record", address, f"{model}: epoch {epoch}, on record {route.epoch}"
                )
            lacking = (
                [v for v in route.versions() if v not in view.slots.get(model, {})] if epoch == route.epoch else []
            )
            if lacking:
                self._broken("5_route_to_a_released_version", address, f"{model} epoch {epoch}: {', '.join(lacking)}")

    def _broken(self, invariant: str, where: str, what: str) -> None:
        if (invariant, where, what) not in self._said:
            self._said.add((invariant, where, what))
            metrics.INVARIANTS.labels(invariant).inc()
            _log.error("invariant_broken", invariant=invariant, where=where, what=what)
