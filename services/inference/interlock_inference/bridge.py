"""Repository verbs of inference clients, passed on to the controller, which owns routes and swaps. Nothing is loaded from here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from interlock.api.controller.v1 import (
    route_service_pb2,
    route_service_pb2_grpc,
    swap_service_pb2,
    swap_service_pb2_grpc,
)
from interlock.api.types.v1.types_pb2 import Change
from interlock.core.names import model_name, version_name
from interlock.errors import FailedPrecondition, NotFound, Unavailable
from interlock.runtime.channels import Caller
from interlock_inference.folder import by_number

SWAP_SECONDS = 120.0
CALL_SECONDS = 5.0
_State = swap_service_pb2.Swap.State
_DONE = frozenset({_State.STATE_COMPLETED, _State.STATE_SOAKING, _State.STATE_DRAINING, _State.STATE_KEEP_WARM})
_ENDED = frozenset(
    {_State.STATE_REVERTED, _State.STATE_FAILED, _State.STATE_CANCELLED, _State.STATE_REJECTED, _State.STATE_SUPERSEDED}
)


class ControllerAdmin:
    """`servicers.oip.Admin` by way of the controller.

    Args:
        repository: the folder of `<model>/<version>/` that the controller keeps.
    """

    def __init__(self, channel: Any, caller: Caller, repository: Path) -> None:
        self._repository = repository
        self._swaps: Any = swap_service_pb2_grpc.SwapServiceStub(channel)
        self._routes: Any = route_service_pb2_grpc.RouteServiceStub(channel)
        self._caller = caller

    def versions(self) -> Mapping[tuple[str, str], str]:
        """Every finished version. Blocking."""
        names = {(path.parent.parent.name, path.parent.name) for path in self._repository.glob("*/*/manifest.json")}
        return dict.fromkeys(names, "not loaded")

    async def load(self, model: str, version: str) -> None:
        """Starts a swap and follows it until the version serves. `version` empty: the newest there is.

        Raises:
            NotFound: `MODEL_NOT_FOUND`, when there is none.
            FailedPrecondition: `SWAP_FAILED`, with the swap's own reason; else whatever CreateSwap refuses with.
        """
        version = version or await self._newest(model)
        spec = swap_service_pb2.SwapSpec(candidate_version=version_name(model, version))
        change = Change(reason="RepositoryModelLoad")
        created = await self._caller.unary(
            self._swaps.CreateSwap, swap_service_pb2.CreateSwapRequest(change=change, spec=spec), timeout=CALL_SECONDS
        )
        watch = swap_service_pb2.WatchSwapRequest(name=created.swap.name)
        updates: Any = self._caller.stream(self._swaps.WatchSwap, watch, timeout=SWAP_SECONDS)
        async with aclosing(updates):
            async for update in updates:
                if _serves(update.swap):
                    return
        raise Unavailable(
            f"the controller stopped reporting {created.swap.name}",
            reason="SWAP_UNKNOWN_END",
            metadata={"swap": created.swap.name},
        )

    async def _newest(self, model: str) -> str:
        names = await asyncio.to_thread(self.versions)
        versions = sorted((pair for pair in names if pair[0] == model), key=by_number)
        if not versions:
            raise NotFound(
                f"model {model!r} has no version in the repository; register one with the controller",
                reason="MODEL_NOT_FOUND",
            )
        return versions[-1][1]

    async def unload(self, model: str) -> None:
        """Sets an empty route by compare-and-set."""
        name = model_name(model)
        current = await self._caller.unary(
            self._routes.GetRoute, route_service_pb2.GetRouteRequest(model=name), timeout=CALL_SECONDS, idempotent=True
        )
        change = Change(reason="RepositoryModelUnload")
        request = route_service_pb2.SetRouteRequest(change=change, model=name, expected_epoch=current.route.epoch)
        await self._caller.unary(self._routes.SetRoute, request, timeout=CALL_SECONDS)


def _serves(swap: swap_service_pb2.Swap) -> bool:
    if swap.state in _ENDED:
        raise FailedPrecondition(
            f"{swap.name} ended as {_State.Name(swap.state)}: {swap.message}",
            reason="SWAP_FAILED",
            metadata={"swap": swap.name, "cause": swap.reason},
        )
    return swap.state in _DONE
