"""The replicas as the controller sees them now: who answers, and with what state. What is seen is never stored; it is seen again.

A replica is alive from the first message of its watch until that stream breaks. Its traffic figures are read on every tick.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import structlog

from interlock.core.ports import Clock
from interlock.core.swap_plan import Replica
from interlock.errors import InterlockError
from interlock.runtime.changed import Changed
from interlock_controller import metrics
from interlock_controller.replicas import ReplicaClient, View

RECONNECT_SECONDS_MIN, RECONNECT_SECONDS_MAX = 0.1, 1.0
_log = structlog.get_logger(__name__)


class Fleet:
    """Follows every configured replica.

    Args:
        changed: fired on every message of any replica, and when one goes away.
    """

    def __init__(self, clients: Mapping[str, ReplicaClient], clock: Clock, changed: Changed) -> None:
        self.clients = clients
        self._clock = clock
        self._changed = changed
        self._views: dict[str, View] = {}

    def live(self) -> tuple[str, ...]:
        """Addresses of the replicas that answer, in the configured order."""
        return tuple(address for address in self.clients if address in self._views)

    def view(self, address: str) -> View | None:
        """The last state of a live replica."""
        return self._views.get(address)

    def replicas(self, model: str) -> tuple[Replica, ...]:
        """The live replicas' views of one model."""
        return tuple(self._views[address].of(address, model) for address in self.live())

    async def follow(self) -> None:
        """Watches all replicas; does not end by itself."""
        async with asyncio.TaskGroup() as tasks:
            for client in self.clients.values():
                tasks.create_task(self._follow(client), name=f"follow {client.address}")

    async def _follow(self, client: ReplicaClient) -> None:
        pause = RECONNECT_SECONDS_MIN
        while True:
            try:
                async for view in client.watch():
                    pause = RECONNECT_SECONDS_MIN
                    self._saw(client.address, view)
            except InterlockError as error:
                self._lost(client.address, error.reason)
            else:
                self._lost(client.address, "the stream ended")
            await self._clock.sleep(pause)
            pause = min(pause * 2, RECONNECT_SECONDS_MAX)

    def _saw(self, address: str, view: View) -> None:
        known = self._views.get(address)
        self._views[address] = view
        if known is None or known.instance != view.instance:
            _log.info("replica_up", replica=address, instance=view.instance, epochs=dict(view.epochs))
            metrics.REPLICAS_UP.set(len(self._views))
        self._changed.fire()

    def _lost(self, address: str, why: str) -> None:
        if self._views.pop(address, None) is not None:
            _log.warning("replica_lost", replica=address, why=why)
            metrics.REPLICAS_UP.set(len(self._views))
            self._changed.fire()

    async def refresh(self, address: str) -> None:
        """Reads a replica's state now. A replica that does not answer keeps its last view; the watch says when it is gone."""
        try:
            view = await self.clients[address].state()
        except InterlockError as error:
            _log.debug("replica_silent", replica=address, reason=error.reason)
            return
        if address in self._views:
            self._views[address] = view

    def acknowledged(self, address: str, model: str, epoch: int) -> None:
        """Notes a route that the replica has just said it applies."""
        view = self._views.get(address)
        if view is not None and view.epochs.get(model, 0) < epoch:
            self._views[address] = replace(view, epochs={**view.epochs, model: epoch})
