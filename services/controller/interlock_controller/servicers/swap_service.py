"""SwapService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from interlock.api.controller.v1 import swap_service_pb2 as pb
from interlock.api.controller.v1 import swap_service_pb2_grpc as rpc
from interlock.core import names
from interlock.core.swap import Event, Swap
from interlock.errors import InterlockError, InvalidArgument
from interlock.runtime.access import Keys, actor_of
from interlock.runtime.changed import Changed
from interlock.runtime.telemetry import current_traceparent
from interlock.stores.controller import ControllerStore
from interlock_controller import convert
from interlock_controller.fleet import Fleet
from interlock_controller.swaps import Swaps

PAGE_SIZE, PAGE_SIZE_MAX = 100, 1000


class SwapServicer(rpc.SwapServiceServicer):
    """Creates, follows and steers swaps."""

    def __init__(self, swaps: Swaps, store: ControllerStore, fleet: Fleet, changed: Changed, keys: Keys) -> None:
        self._swaps = swaps
        self._store = store
        self._fleet = fleet
        self._changed = changed
        self._keys = keys

    def _message(self, swap: Swap) -> pb.Swap:
        return convert.swap_message(swap, self._fleet.replicas(swap.spec.model))

    def _actor(self, request: Any, context: Any) -> str:
        return (
            actor_of(context, self._keys)
            if self._keys.required
            else request.change.actor or actor_of(context, self._keys)
        )

    async def CreateSwap(self, request: pb.CreateSwapRequest, context: Any) -> pb.CreateSwapResponse:
        """Records and starts a swap."""
        swap = self._swaps.create(
            convert.spec_of(request.spec),
            actor=self._actor(request, context),
            why=request.change.reason,
            request=convert.request_of(request, "CreateSwap"),
            trace=current_traceparent(),
        )
        return pb.CreateSwapResponse(swap=self._message(swap))

    async def GetSwap(self, request: pb.GetSwapRequest, _context: Any) -> pb.GetSwapResponse:
        """Reads one."""
        return pb.GetSwapResponse(swap=self._message(self._swaps.get(names.parse_swap(request.name, "name"))))

    async def ListSwaps(self, request: pb.ListSwapsRequest, _context: Any) -> pb.ListSwapsResponse:
        """Newest first; the page token is the last swap's id."""
        model = names.parse_model(request.model) if request.model else ""
        if request.page_token and self._store.swap(request.page_token) is None:
            raise InvalidArgument(
                "page_token: is not one that an earlier answer gave", reason="INVALID_PAGE_TOKEN", field="page_token"
            )
        if request.page_size < 0:
            raise InvalidArgument("page_size: is negative", reason="INVALID_FIELD", field="page_size")
        size = min(request.page_size or PAGE_SIZE, PAGE_SIZE_MAX)
        found = self._store.swaps(model, limit=size + 1, before=request.page_token)
        page = found[:size]
        token = page[-1].id if len(found) > size else ""
        return pb.ListSwapsResponse(swaps=[self._message(s) for s in page], next_page_token=token)

    async def WatchSwap(self, request: pb.WatchSwapRequest, _context: Any) -> AsyncIterator[pb.WatchSwapResponse]:
        """Every state entered since the given revision, then the row as it is, then every change, until it has ended."""
        swap_id = names.parse_swap(request.name, "name")
        sent = request.after_revision
        while True:
            woken = self._changed.next()
            for event in self._store.swap_events(swap_id, sent):
                sent = event.swap.revision
                yield pb.WatchSwapResponse(swap=convert.swap_message(event.swap))
            swap = self._swaps.get(swap_id)
            if swap.revision > sent:
                sent = swap.revision
                yield pb.WatchSwapResponse(swap=self._message(swap))
            if swap.terminal:
                return
            await woken.wait()

    async def ApproveSwap(self, request: pb.ApproveSwapRequest, context: Any) -> pb.ApproveSwapResponse:
        """Opens the gate."""
        swap = self._swaps.approve(names.parse_swap(request.name, "name"), self._actor(request, context))
        return pb.ApproveSwapResponse(swap=self._message(swap))

    async def RejectSwap(self, request: pb.RejectSwapRequest, context: Any) -> pb.RejectSwapResponse:
        """Ends a gated swap."""
        return pb.RejectSwapResponse(swap=self._tell(request, context, Event.REJECT, "rejected"))

    async def PromoteSwap(self, request: pb.PromoteSwapRequest, context: Any) -> pb.PromoteSwapResponse:
        """Ends canary or soak early."""
        return pb.PromoteSwapResponse(swap=self._tell(request, context, Event.PROMOTE, "promoted"))

    async def AbortSwap(self, request: pb.AbortSwapRequest, context: Any) -> pb.AbortSwapResponse:
        """Stops a swap."""
        return pb.AbortSwapResponse(swap=self._tell(request, context, Event.ABORT, "aborted"))

    def _tell(self, request: Any, context: Any, event: Event, verb: str) -> pb.Swap:
        why = f": {request.change.reason}" if request.change.reason else ""
        message = f"{verb} by {self._actor(request, context)}{why}"
        return self._message(self._swaps.tell(names.parse_swap(request.name, "name"), event, message))

    async def PauseSwap(self, request: pb.PauseSwapRequest, _context: Any) -> pb.PauseSwapResponse:
        """Holds a swap before its next state change."""
        return pb.PauseSwapResponse(swap=self._message(self._swaps.pause(names.parse_swap(request.name, "name"))))

    async def ResumeSwap(self, request: pb.ResumeSwapRequest, _context: Any) -> pb.ResumeSwapResponse:
        """Lets a held swap go on."""
        return pb.ResumeSwapResponse(swap=self._message(self._swaps.resume(names.parse_swap(request.name, "name"))))

    async def ValidateSwap(self, request: pb.ValidateSwapRequest, _context: Any) -> pb.ValidateSwapResponse:
        """Says what CreateSwap would do. A specification that can never work is an error here as there; the rest is a finding."""
        spec = convert.spec_of(request.spec)
        stable = self._store.route(spec.model).heaviest()
        findings = []
        try:
            findings = [f"SUPERSEDES: swap {s.id} in {s.state}" for s in self._swaps.check(spec)]
            valid = True
        except InterlockError as error:
            if error.kind == "INVALID_ARGUMENT":
                raise
            findings, valid = [f"{error.reason}: {error.message}"], False
        if not self._fleet.live():
            findings.append("NO_REPLICA: no replica answers; the swap would wait for one")
        name = names.version_name(spec.model, stable) if stable else ""
        return pb.ValidateSwapResponse(valid=valid, findings=findings, stable_version=name)

    async def GetReceipt(self, request: pb.GetReceiptRequest, _context: Any) -> pb.GetReceiptResponse:
        """Reads the receipt of an ended swap."""
        receipt = self._swaps.receipt(names.parse_swap(request.name, "name"))
        candidate = self._store.version(receipt.model, receipt.candidate)
        stable = self._store.version(receipt.model, receipt.stable) if receipt.stable else None
        events = self._store.swap_events(receipt.swap)
        return pb.GetReceiptResponse(receipt=convert.receipt_message(receipt, candidate, stable, events))
