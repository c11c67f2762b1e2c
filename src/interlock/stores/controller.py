"""What the controller keeps: the port and its rows. Adapters: `stores.controller_sqlite`, and a fake in tests; one contract suite holds both.

Rules of this file
- Every method that writes is one transaction: the change, its event and its outbox entry are there together or not at all.
- A write that lost a race changes nothing: `STALE_ROW` for a swap's revision, `STALE_EPOCH` for a route.
- Nothing is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from interlock.core.route import Route, Weight
from interlock.core.swap import State, Swap
from interlock.core.swap_plan import Decision, SwapReceipt
from interlock.errors import Aborted, AlreadyExists


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a version came from; empty for an artifact that was registered by hand."""

    run: str = ""
    checkpoint: str = ""
    step: int = 0
    attempt: int = 0
    checkpoint_digest: str = ""


@dataclass(frozen=True, slots=True)
class VersionRow:
    """An immutable servable artifact. `version` is empty until the store has given it a number."""

    model: str
    version: str
    digest: str
    artifact_uri: str
    size_bytes: int = 0
    origin: Origin = field(default_factory=Origin)
    metrics: Mapping[str, float] = field(default_factory=dict)
    created_at: float = 0.0
    quarantined: str = ""  # why; empty when it may serve
    actor: str = ""
    gate_failure: str = ""  # why its own gate forbids it to serve, for good; empty when it may


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """What the trainer told about a checkpoint. `name` is its resource name; `state` one of CANDIDATE, GOOD, QUARANTINED."""

    name: str
    run: str
    step: int
    attempt: int
    state: str
    digest: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class RollbackRow:
    """One rollback of a run. `document` is the trainer's own message, so that the same answer can be given again."""

    id: str
    run: str
    rule: str
    value: float
    limit: float
    from_step: int
    to_step: int
    target: str
    decided_by: str
    attempt: int = 0
    quarantined: tuple[str, ...] = ()
    affected: tuple[str, ...] = ()  # version resource names
    created_at: float = 0.0
    trace: str = ""
    document: str = ""


@dataclass(frozen=True, slots=True)
class PromotionRow:
    """A good checkpoint on its way to traffic: EXPORTING, REGISTERED (has a version), SWAPPED (has a swap), FAILED."""

    checkpoint: str
    run: str
    model: str
    state: str = "EXPORTING"
    version: str = ""
    swap: str = ""
    why: str = ""
    tries: int = 0
    created_at: float = 0.0
    trace: str = ""


@dataclass(frozen=True, slots=True)
class SwapEvent:
    """One state that a swap entered, with the row as it was then."""

    swap: Swap
    at: float


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """Something to announce once it is written: at least once, in order."""

    seq: int
    kind: str
    subject: str
    at: float
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Request:
    """A caller's idempotency key with the digest of what was asked. An empty id asks for no idempotency."""

    id: str
    verb: str
    digest: str


def reused(request: Request) -> AlreadyExists:
    """The refusal of a request id that came with another body."""
    return AlreadyExists(
        f"request_id {request.id!r} was used for something else: choose a new one",
        reason="REQUEST_ID_REUSED",
        field="change.request_id",
        metadata={"request_id": request.id},
    )


def stale_row(swap: Swap) -> Aborted:
    """The refusal of a write that was decided on an older revision of the row."""
    return Aborted(
        f"swap {swap.id!r} has moved on from revision {swap.revision}",
        reason="STALE_ROW",
        metadata={"swap": swap.id, "revision": str(swap.revision)},
    )


class ControllerStore(Protocol):
    """Everything durable of the controller. Synchronous: one call is a few rows."""

    def take_lease(self) -> int:
        """A fencing token above every earlier one; take it once per start."""
        ...

    # versions
    def models(self) -> list[str]:
        """Every model that has a version, by name."""
        ...

    def versions(self, model: str) -> list[VersionRow]:
        """A model's versions, newest first."""
        ...

    def version(self, model: str, version: str) -> VersionRow | None: ...

    def add_version(self, row: VersionRow, request: Request | None = None) -> VersionRow:
        """Adds the row under its number, or the model's next one; the existing row when the model has its digest already."""
        ...

    def set_quarantine(self, model: str, version: str, reason: str, actor: str, at: float) -> VersionRow:
        """Forbids a version and its digest with `reason`, or allows both again with an empty one. Raises NotFound."""
        ...

    def quarantined_digests(self) -> frozenset[str]: ...

    # routes
    def route(self, model: str) -> Route:
        """The current route; epoch 0 and no weights for a model that never had one."""
        ...

    def routes(self) -> list[Route]: ...

    def set_route(self, model: str, expected_epoch: int, weights: tuple[Weight, ...], actor: str, at: float) -> Route:
        """The compare-and-set outside of a swap. Raises Aborted `STALE_EPOCH`."""
        ...

    # swaps
    def create_swap(self, swap: Swap, request: Request | None, ended: tuple[tuple[Swap, Decision], ...] = ()) -> Swap:
        """Records a swap and, in the same transaction, what it ends; the earlier swap when the request was seen before."""
        ...

    def write_swap(self, before: Swap, decision: Decision, at: float) -> None:
        """Persists one decision with its store commands. Raises Aborted `STALE_ROW` or `STALE_EPOCH`; then nothing changed."""
        ...

    def swap(self, swap_id: str) -> Swap | None: ...

    def swaps(self, model: str = "", *, limit: int = 100, before: str = "") -> list[Swap]:
        """Newest first, older than the swap `before` when it is given."""
        ...

    def active_swaps(self, model: str = "") -> list[Swap]:
        """Those that have not ended, oldest first."""
        ...

    def completed_swaps(self, model: str, *, limit: int = 100) -> list[Swap]:
        """Those that completed, newest first."""
        ...

    def proven(self, model: str) -> frozenset[str]:
        """Every version that has completed a swap."""
        ...

    def swap_events(self, swap_id: str, after_revision: int = 0) -> list[SwapEvent]: ...

    def receipt(self, swap_id: str) -> SwapReceipt | None: ...

    # lineage
    def put_checkpoint(self, row: CheckpointRow) -> None: ...

    def checkpoints(self, run: str) -> list[CheckpointRow]:
        """By step, oldest first."""
        ...

    def put_rollback(self, row: RollbackRow) -> RollbackRow:
        """Records a rollback; the earlier record when its id is known (only `decided_by` and the target may be completed)."""
        ...

    def rollback(self, rollback_id: str) -> RollbackRow | None: ...

    def rollbacks(self, run: str = "") -> list[RollbackRow]:
        """Newest first."""
        ...

    # promotions
    def put_promotion(self, row: PromotionRow) -> None: ...

    def promotions(self, model: str = "") -> list[PromotionRow]:
        """Oldest first."""
        ...

    # requests and announcements
    def answered(self, request: Request) -> str | None:
        """What an earlier request with this id led to. Raises AlreadyExists `REQUEST_ID_REUSED` for another body."""
        ...

    def remember(self, request: Request, answer: str) -> None: ...

    def outbox(self, limit: int = 100) -> list[OutboxEntry]:
        """What has not been announced yet, in order."""
        ...

    def announced(self, seq: int) -> None:
        """Everything up to `seq` was announced."""
        ...

    def close(self) -> None: ...


def facts_of(swap: Swap) -> dict[str, str]:
    """What is announced about a swap's change."""
    facts = {
        "model": swap.spec.model,
        "candidate": swap.spec.candidate,
        "state": swap.state.value,
        "message": swap.message,
    }
    if swap.state in {State.SWITCHING, State.REVERTING}:
        facts["epoch"] = str(swap.epoch)
    return facts | ({"reason": swap.reason} if swap.reason else {}) | ({"trace": swap.trace} if swap.trace else {})
