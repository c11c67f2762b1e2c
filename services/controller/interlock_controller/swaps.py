"""What people and other rooms may ask of swaps, versions and routes. Each verb checks, writes, and wakes the reconciler."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from interlock.core import lineage
from interlock.core import swap as core
from interlock.core.lineage import VersionNode
from interlock.core.ports import Clock
from interlock.core.route import Route, Weight, check_weights
from interlock.core.swap import Concurrency, Event, State, Swap, SwapSpec, check_spec, legal, superseded_by
from interlock.core.swap_plan import Decision, SwapReceipt, act
from interlock.errors import Aborted, FailedPrecondition, InterlockError, NotFound
from interlock.runtime import failpoints
from interlock.stores.controller import ControllerStore, Request, VersionRow
from interlock_controller.reconciler import Reconciler

HISTORY = 100
_log = structlog.get_logger(__name__)
_ENDED_BY = {
    Event.ABORT: {State.ABORTING, State.CANCELLED, State.REVERTING, State.REVERTED},
    Event.REJECT: {State.ABORTING, State.REJECTED},
    Event.PROMOTE: {State.SOAKING, State.DRAINING, State.KEEP_WARM, State.COMPLETED},
}
"""Where a swap is after such an event: asking again there changes nothing and is no error."""


class Swaps:
    """The verbs on swaps, routes and quarantine."""

    def __init__(self, store: ControllerStore, reconciler: Reconciler, clock: Clock) -> None:
        self._store = store
        self._reconciler = reconciler
        self._clock = clock

    # --- reading ------------------------------------------------------------------------------------------------------------------

    def get(self, swap_id: str) -> Swap:
        """One swap. Raises NotFound `SWAP_NOT_FOUND`."""
        swap = self._store.swap(swap_id)
        if swap is None:
            raise NotFound(
                f"there is no swap {swap_id!r}", reason="SWAP_NOT_FOUND", field="name", metadata={"swap": swap_id}
            )
        return swap

    def receipt(self, swap_id: str) -> SwapReceipt:
        """The receipt of an ended swap. Raises NotFound, FailedPrecondition `SWAP_RUNNING`."""
        swap = self.get(swap_id)
        found = self._store.receipt(swap_id)
        if found is None:
            raise FailedPrecondition(
                f"swap {swap_id!r} is {swap.state}; it has a receipt once it has ended",
                reason="SWAP_RUNNING",
                metadata={"swap": swap_id, "state": swap.state.value},
            )
        return found

    def version(self, model: str, version: str, field: str = "version") -> VersionRow:
        """One version. Raises NotFound `MODEL_NOT_FOUND`, `VERSION_NOT_FOUND`."""
        self.check_model(model, field)
        row = self._store.version(model, version)
        if row is None:
            raise NotFound(
                f"model {model!r} has no version {version!r}",
                reason="VERSION_NOT_FOUND",
                field=field,
                metadata={"model": model, "version": version},
            )
        return row

    def check_model(self, model: str, field: str = "model") -> None:
        """Passes a model that has versions. Raises NotFound `MODEL_NOT_FOUND`."""
        if model not in self._store.models():
            raise NotFound(
                f"there is no model {model!r}; register a version of it first",
                reason="MODEL_NOT_FOUND",
                field=field,
                metadata={"model": model},
            )

    def active(self, model: str) -> Swap | None:
        """The swap of a model that runs now, if one does."""
        return next(iter(self._store.active_swaps(model)), None)

    # --- swaps --------------------------------------------------------------------------------------------------------------------

    def check(self, spec: SwapSpec) -> tuple[Swap, ...]:
        """What creating the swap would end; nothing changes.

        Raises:
            InvalidArgument, NotFound, FailedPrecondition (`QUARANTINED`, `GATE_FAILED`, `ALREADY_STABLE`), Aborted, ResourceExhausted: as `create`.
        """
        check_spec(spec)
        row = self.version(spec.model, spec.candidate, "spec.candidate_version")
        if row.quarantined and not spec.force:
            raise FailedPrecondition(
                f"version {spec.candidate!r} of {spec.model!r} is quarantined: {row.quarantined}; force moves to it all the same",
                reason="QUARANTINED",
                field="spec.candidate_version",
                metadata={"model": spec.model, "version": spec.candidate},
            )
        _check_gate(row, "spec.candidate_version")
        active = tuple(self._store.active_swaps(spec.model))
        if not active and self._store.route(spec.model).versions() == (spec.candidate,):
            raise FailedPrecondition(
                f"version {spec.candidate!r} of {spec.model!r} serves already",
                reason="ALREADY_STABLE",
                field="spec.candidate_version",
                metadata={"model": spec.model, "version": spec.candidate},
            )
        return superseded_by(spec, active)

    def create(
        self, spec: SwapSpec, *, actor: str = "", why: str = "", request: Request | None = None, trace: str = ""
    ) -> Swap:
        """Records a swap and starts it; the earlier one when the request was seen before.

        Raises:
            as `check`, and AlreadyExists `REQUEST_ID_REUSED`.
        """
        if request is not None and (known := self._store.answered(request)) is not None:
            return self.get(known)
        ends = self.check(spec)
        now = self._clock.now()
        swap = Swap(
            _swap_id(now),
            replace(spec, fast_track=spec.fast_track and spec.candidate in self._store.proven(spec.model)),
            now,
            changed_at=now,
            actor=actor,
            why=why,
            request_id=request.id if request else "",
            trace=trace,
        )
        ended = tuple(
            (other, act(self._reconciler.snapshot(other), Event.SUPERSEDE, now, f"by swap {swap.id}", "SUPERSEDED"))
            for other in ends
        )
        failpoints.reached(f"controller.{State.PENDING}", "before_persist", default="after_persist")
        created = self._store.create_swap(swap, request, ended)
        failpoints.reached(f"controller.{State.PENDING}", "after_persist", default="after_persist")
        self._reconciler.changed.fire()
        return created

    def tell(self, swap_id: str, event: Event, message: str) -> Swap:
        """ABORT, REJECT or PROMOTE; no error where the event has had its effect already. Raises IllegalTransition."""
        swap = self.get(swap_id)
        if not legal(swap, event) and swap.state in _ENDED_BY.get(event, ()):
            return swap
        return self._reconciler.tell(swap, event, message, event.value if event is not Event.PROMOTE else "")

    def approve(self, swap_id: str, actor: str) -> Swap:
        """Lets a gated swap go on. Raises IllegalTransition."""
        return self._steer(swap_id, lambda swap: core.approve(swap, actor))

    def pause(self, swap_id: str) -> Swap:
        """Holds a swap. Raises IllegalTransition."""
        return self._steer(swap_id, lambda swap: core.pause(swap, self._clock.now()))

    def resume(self, swap_id: str) -> Swap:
        """Lets a held swap go on."""
        return self._steer(swap_id, lambda swap: core.unpause(swap, self._clock.now()))

    def _steer(self, swap_id: str, change: core.Steer) -> Swap:
        swap = self.get(swap_id)
        after = change(swap)
        if after is not swap:
            self._reconciler.persist(swap, Decision(after))
        return after

    # --- going back ---------------------------------------------------------------------------------------------------------------

    def earlier(self, model: str, left: str) -> str | None:
        """The version that served last before `left`, among those that may serve."""
        done = self._store.completed_swaps(model, limit=HISTORY)
        served = [v for s in done for v in (s.spec.candidate, s.stable_version) if v]
        order = list(dict.fromkeys(served))
        behind = order[order.index(left) + 1 :] if left in order else order
        return lineage.refuge(self.nodes(model), left, behind) or lineage.refuge(self.nodes(model), left, order)

    def nodes(self, model: str) -> list[VersionNode]:
        """A model's versions as the lineage sees them."""
        proven = self._store.proven(model)
        return [
            VersionNode(model, v.version, v.digest, v.origin.checkpoint, bool(v.quarantined), v.version in proven)
            for v in self._store.versions(model)
        ]

    def roll_back(
        self, model: str, version: str, *, actor: str, why: str, request: Request | None, trace: str, quarantine: bool
    ) -> Swap:
        """Moves a model back to an earlier version: by reverting a swap that still can, else by a swap on the fast track.

        Raises:
            NotFound: `MODEL_NOT_FOUND`, `VERSION_NOT_FOUND`.
            FailedPrecondition: `NO_EARLIER_VERSION`, `QUARANTINED`, `ALREADY_STABLE`.
        """
        if request is not None and (known := self._store.answered(request)) is not None:
            return self.get(known)
        self.check_model(model)
        current = self._store.route(model).heaviest()
        running = self.active(model)
        if running is not None and running.state in core.REVERTIBLE and version in ("", running.stable_version):
            reverted = self.tell(running.id, Event.ABORT, f"rolled back by {actor}: {why}")
            if request is not None:
                self._store.remember(request, reverted.id)
            return reverted
        target = version or (self.earlier(model, current) if current else None)
        if target is None:
            raise FailedPrecondition(
                f"model {model!r} has no earlier version that may serve",
                reason="NO_EARLIER_VERSION",
                metadata={"model": model},
            )
        spec = SwapSpec(model, target, concurrency=Concurrency.SUPERSEDE, fast_track=True)
        swap = self.create(spec, actor=actor, why=why or "rollback", request=request, trace=trace)
        if quarantine and current is not None and current != target:
            self._store.set_quarantine(model, current, f"rolled back: {why}", actor, self._clock.now())
        return swap

    def quarantine(
        self, model: str, version: str, reason: str, actor: str, trace: str = ""
    ) -> tuple[VersionRow, Swap | None]:
        """Forbids a version; traffic leaves it. The swap that moves it is None when nothing has to move, or nothing else may serve."""
        self.version(model, version)
        row = self._store.set_quarantine(model, version, reason or "forbidden", actor, self._clock.now())
        self._reconciler.changed.fire()
        return row, self._flee(model, version, reason, actor, trace)

    def allow(self, model: str, version: str, actor: str) -> VersionRow:
        """Lifts a quarantine."""
        self.version(model, version)
        return self._store.set_quarantine(model, version, "", actor, self._clock.now())

    def _flee(self, model: str, version: str, reason: str, actor: str, trace: str) -> Swap | None:
        for swap in self._store.active_swaps(model):
            if swap.spec.candidate == version and not swap.spec.force and legal(swap, Event.FAIL):
                return self._reconciler.tell(
                    swap, Event.FAIL, f"version {version} was forbidden: {reason}", "QUARANTINED"
                )
        if version not in self._store.route(model).versions():
            return None
        target = self.earlier(model, version)
        if target is None:
            _log.error("nowhere_to_go", model=model, version=version, reason=reason)
            return None
        spec = SwapSpec(model, target, concurrency=Concurrency.SUPERSEDE, fast_track=True)
        try:
            return self.create(spec, actor=actor, why=f"version {version} was forbidden: {reason}", trace=trace)
        except InterlockError as error:
            _log.error("cannot_leave_version", model=model, version=version, reason=error.reason, problem=error.message)
            return None

    # --- routes -------------------------------------------------------------------------------------------------------------------

    def set_route(self, model: str, expected_epoch: int, weights: Sequence[Weight], actor: str) -> Route:
        """A route by hand: an A/B split, or nothing at all.

        Raises:
            NotFound: `MODEL_NOT_FOUND`, `VERSION_NOT_FOUND`.
            InvalidArgument: `INVALID_WEIGHTS`.
            Aborted: `SWAP_IN_PROGRESS`, `STALE_EPOCH`.
            FailedPrecondition: `QUARANTINED`, `GATE_FAILED`.
        """
        self.check_model(model)
        for i, weight in enumerate(check_weights(weights)):
            row = self.version(model, weight.version, f"weights[{i}].version")
            if row.quarantined:
                raise FailedPrecondition(
                    f"version {weight.version!r} is quarantined: {row.quarantined}",
                    reason="QUARANTINED",
                    field=f"weights[{i}].version",
                )
            _check_gate(row, f"weights[{i}].version")
        running = next((s for s in self._store.active_swaps(model) if s.state is not State.KEEP_WARM), None)
        if running is not None:
            raise Aborted(
                f"model {model!r}: swap {running.id!r} is {running.state}; abort it or wait for its end",
                reason="SWAP_IN_PROGRESS",
                metadata={"model": model, "swap": running.id},
            )
        route = self._store.set_route(model, expected_epoch, tuple(weights), actor, self._clock.now())
        self._reconciler.changed.fire()
        return route


def _swap_id(now: float) -> str:
    return f"s-{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"


def _check_gate(row: VersionRow, field: str) -> None:
    """Nothing forces a version past its own gate: whoever wants it makes it again with another limit."""
    if row.gate_failure:
        raise FailedPrecondition(
            f"version {row.version!r} of {row.model!r} must not serve: {row.gate_failure}",
            reason="GATE_FAILED",
            field=field,
            metadata={"model": row.model, "version": row.version, "gate": row.gate_failure},
        )
