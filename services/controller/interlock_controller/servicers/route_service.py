"""RouteService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from interlock.api.controller.v1 import route_service_pb2 as pb
from interlock.api.controller.v1 import route_service_pb2_grpc as rpc
from interlock.core import names
from interlock.runtime.access import Keys, actor_of
from interlock.runtime.changed import Changed
from interlock.stores.controller import ControllerStore
from interlock_controller import convert
from interlock_controller.swaps import Swaps


class RouteServicer(rpc.RouteServiceServicer):
    """Reads, sets and streams routes."""

    def __init__(self, swaps: Swaps, store: ControllerStore, changed: Changed, keys: Keys) -> None:
        self._swaps = swaps
        self._store = store
        self._changed = changed
        self._keys = keys

    async def GetRoute(self, request: pb.GetRouteRequest, _context: Any) -> pb.GetRouteResponse:
        """The current route; epoch 0 for a model that has versions and never served."""
        model = names.parse_model(request.model)
        self._swaps.check_model(model)
        return pb.GetRouteResponse(route=convert.route_message(self._store.route(model)))

    async def SetRoute(self, request: pb.SetRouteRequest, context: Any) -> pb.SetRouteResponse:
        """The compare-and-set by hand."""
        model = names.parse_model(request.model)
        key = convert.request_of(request, "SetRoute")
        if key is None or self._store.answered(key) is None:
            weights = convert.weights_of(model, request.weights)
            actor = request.change.actor or actor_of(context, self._keys)
            self._swaps.set_route(model, request.expected_epoch, weights, actor)
            if key is not None:
                self._store.remember(key, model)
        return pb.SetRouteResponse(route=convert.route_message(self._store.route(model)))

    async def WatchRoutes(self, request: pb.WatchRoutesRequest, _context: Any) -> AsyncIterator[pb.WatchRoutesResponse]:
        """All routes at once, then each change."""
        only = names.parse_model(request.model) if request.model else ""
        sent: dict[str, int] = {}
        while True:
            woken = self._changed.next()
            for route in self._store.routes():
                if only in ("", route.model) and sent.get(route.model) != route.epoch:
                    sent[route.model] = route.epoch
                    yield pb.WatchRoutesResponse(route=convert.route_message(route))
            await woken.wait()
