"""What a swap does next: `decide(snapshot, now)` gives at most one move and the commands that the state lacks. Pure, level-triggered.

How a shell uses it, over and over, on every change it hears of and on every tick:

1. snapshot: the row, the route, the replicas as they answered last;
2. `decide`; when the row changed, persist it together with every *store command* (CommitRoute, RevertRoute, Quarantine,
   WriteReceipt) in one transaction; if the route's compare-and-set is refused, nothing is persisted and the next snapshot shows why;
3. carry out the *replica commands*, all idempotent, at most one of a kind per replica at a time; hand results to `core.swap.record`;
4. go on at 1. After a crash the same decision falls out of the same row.

Rules of this file
- The candidate is routed only while every live replica holds it warmed up; a replica that is gone holds nobody up, one that comes
  back is brought up to the route by `core.assignment`.
- A version that a route names, or that another swap claims, is never released.
- Draining and releasing are never a reason to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from interlock.core.route import Route, Weight, all_to
from interlock.core.swap import (
    BEFORE_SWITCH,
    CLEANED,
    COMMITS,
    RESUMES_MAX,
    REVERTIBLE,
    TERMINAL,
    Comparison,
    Event,
    Figures,
    OnCrash,
    State,
    Strategy,
    Swap,
    move,
)

ACK_GRACE_SECONDS = 0.5
"""How long a replica that is seen to route the epoch may take to say so itself: its answer carries what was in flight."""
ANALYSIS_REQUESTS_MIN = 20
"""Below this many answers an error rate says nothing: INCONCLUSIVE."""


class SlotState(StrEnum):
    """A replica's own words for one loaded version."""

    INITIALIZING = "initializing"
    WARMING_UP = "warming_up"
    READY = "ready"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


_WARM = frozenset({SlotState.READY, SlotState.SERVING, SlotState.DRAINING})
_LOADED = _WARM | {SlotState.WARMING_UP}


@dataclass(frozen=True, slots=True)
class Slot:
    """One version of the model on one replica, as last seen."""

    state: SlotState
    parked: bool = False
    in_flight: int = 0
    successes: int = 0
    failures: int = 0
    latency_p50: float = 0.0
    latency_p99: float = 0.0
    refusals: int = 0

    @property
    def loaded(self) -> bool:
        return self.state in _LOADED

    @property
    def warm(self) -> bool:
        return self.state in _WARM


@dataclass(frozen=True, slots=True)
class Replica:
    """One inference process as last seen, for one model. `epoch` is the route epoch it applies, 0 for none."""

    name: str
    instance: str
    epoch: int = 0
    slots: Mapping[str, Slot] = field(default_factory=dict)

    def slot(self, version: str) -> Slot | None:
        """The slot, unless it is gone or stopped."""
        found = self.slots.get(version)
        return None if found is None or found.state is SlotState.STOPPED else found

    def warm(self, version: str) -> bool:
        found = self.slot(version)
        return found is not None and found.warm


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that one decision may look at. `replicas` are the live ones only."""

    swap: Swap
    route: Route
    replicas: tuple[Replica, ...] = ()
    ahead: bool = False
    yielding: bool = False
    wanted: frozenset[str] = frozenset()
    quarantined: bool = False


# --- commands -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admit:
    """Read and hash the candidate's artifact in the model repository."""

    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Prepare:
    """Load a version into a slot; refused unless its signature equals `compatible_with`'s."""

    replica: str
    model: str
    version: str
    compatible_with: str | None = None


@dataclass(frozen=True, slots=True)
class Warm:
    """Run warm-up inferences; makes the slot ready."""

    replica: str
    model: str
    version: str
    iterations: int


@dataclass(frozen=True, slots=True)
class Compare:
    """Run the same inputs through two versions."""

    replica: str
    model: str
    stable: str
    candidate: str
    samples: int = 0


@dataclass(frozen=True, slots=True)
class ApplyRoute:
    """Put a committed route in force on one replica."""

    replica: str
    route: Route


@dataclass(frozen=True, slots=True)
class Drain:
    """Wait until no request holds the version; cut what is left after `seconds`."""

    replica: str
    model: str
    version: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Park:
    """Keep a drained version loaded, out of the route."""

    replica: str
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Release:
    """Unload a version that no route names."""

    replica: str
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class CommitRoute:
    """Compare-and-set of the route, in the row's transaction."""

    model: str
    expected_epoch: int
    weights: tuple[Weight, ...]


@dataclass(frozen=True, slots=True)
class RevertRoute:
    """Compare-and-set of the route back to what was there before the swap, in the row's transaction."""

    model: str
    expected_epoch: int
    weights: tuple[Weight, ...]


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Forbid the version's digest, in the row's transaction."""

    model: str
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class WriteReceipt:
    """Write the receipt of an ended swap, in the row's transaction."""

    swap: str


ReplicaCommand = Prepare | Warm | Compare | ApplyRoute | Drain | Park | Release
StoreCommand = CommitRoute | RevertRoute | Quarantine | WriteReceipt
Command = Admit | ReplicaCommand | StoreCommand


@dataclass(frozen=True, slots=True)
class Decision:
    """The row after at most one move, what must be written with it, and what must be done once it is written."""

    swap: Swap
    store: tuple[StoreCommand, ...] = ()
    commands: tuple[Admit | ReplicaCommand, ...] = ()


# --- moves with what belongs to them ----------------------------------------------------------------------------------------------


def act(snapshot: Snapshot, event: Event, now: float, message: str = "", reason: str = "") -> Decision:
    """One move, together with its store commands. People's events (APPROVE, ABORT, ...) come in through here as well.

    Raises:
        IllegalTransition: the state does not take the event; nothing changed.
    """
    before = snapshot.swap
    moved = move(before, event, now, message, **({"reason": reason} if reason else {}))
    moved = _measured(moved, snapshot, now)
    store: list[StoreCommand] = []
    if (before.state, event) in COMMITS:
        moved, store = _route_write(moved, snapshot, event)
    if moved.state is State.REVERTING:
        store.append(
            Quarantine(moved.spec.model, moved.spec.candidate, f"{moved.id}: {moved.reason or event}: {message}")
        )
    if moved.terminal:
        store.append(WriteReceipt(moved.id))
    return Decision(moved, tuple(store))


def _route_write(moved: Swap, snapshot: Snapshot, event: Event) -> tuple[Swap, list[StoreCommand]]:
    """The compare-and-set of this move. A revert whose route was changed by somebody else since leaves that change alone."""
    model = moved.spec.model
    if moved.state is State.REVERTING:
        if snapshot.route.epoch != moved.epoch:
            return moved, []
        return replace(moved, epoch=moved.epoch + 1), [RevertRoute(model, moved.epoch, moved.stable)]
    expected = moved.epoch or moved.base_epoch
    step = moved.step + 1 if event is Event.STEP else moved.step
    canary = moved.state is not State.SOAKING and moved.spec.strategy is Strategy.CANARY
    weights = _canary_weights(moved, step) if canary else all_to(moved.spec.candidate)
    return replace(moved, epoch=expected + 1, step=step), [CommitRoute(model, expected, weights)]


def _canary_weights(swap: Swap, step: int) -> tuple[Weight, ...]:
    share = swap.spec.canary_percents[step]
    stable = swap.stable_version
    if stable is None or stable == swap.spec.candidate:
        return all_to(swap.spec.candidate)
    return (Weight(stable, 100 - share), Weight(swap.spec.candidate, share))


def decide(snapshot: Snapshot, now: float) -> Decision:
    """The next move, if any, or else the commands that the state lacks. A held or ended swap decides nothing."""
    swap = snapshot.swap
    if swap.terminal or swap.paused_at is not None:
        return Decision(swap)
    if swap.state in REVERTIBLE and _gives_up(swap):
        return act(snapshot, Event.FAIL, now, "the controller restarted", "CONTROLLER_RESTARTED")
    if swap.state in REVERTIBLE and snapshot.route.epoch != swap.epoch:
        return act(
            snapshot, Event.FAIL, now, f"somebody else moved the route to epoch {snapshot.route.epoch}", "ROUTE_CHANGED"
        )
    if swap.state in BEFORE_SWITCH and swap.state is not State.PENDING:
        if snapshot.route.epoch != swap.base_epoch:
            return act(
                snapshot,
                Event.FAIL,
                now,
                f"the route moved to epoch {snapshot.route.epoch} under the swap",
                "ROUTE_CHANGED",
            )
        if swap.deadline is not None and now >= swap.deadline:
            return _expired(snapshot, now)
    return _PLAN[swap.state](snapshot, now)


def _gives_up(swap: Swap) -> bool:
    return swap.resumes > RESUMES_MAX or (swap.resumes > 0 and swap.spec.on_crash is OnCrash.REVERT)


def _expired(snapshot: Snapshot, now: float) -> Decision:
    swap = snapshot.swap
    if swap.state is State.GATED:
        return act(snapshot, Event.REJECT, now, "nobody approved in time", "APPROVAL_EXPIRED")
    lacking = "" if snapshot.replicas else "; no replica is up"
    return act(
        snapshot,
        Event.FAIL,
        now,
        f"{swap.state} did not finish in {swap.spec.prepare_seconds:g} s{lacking}",
        "PREPARE_TIMEOUT",
    )


# --- one function per state -------------------------------------------------------------------------------------------------------


def _pending(snapshot: Snapshot, now: float) -> Decision:
    swap, route = snapshot.swap, snapshot.route
    if snapshot.quarantined and not swap.spec.force:
        return act(snapshot, Event.FAIL, now, f"version {swap.spec.candidate!r} is quarantined", "QUARANTINED")
    if snapshot.ahead:
        return Decision(swap)
    if route.versions() == (swap.spec.candidate,):
        return act(snapshot, Event.FAIL, now, f"version {swap.spec.candidate!r} serves already", "ALREADY_STABLE")
    started = act(
        snapshot, Event.START, now, f"from {', '.join(route.versions()) or 'nothing'} at epoch {route.epoch}"
    ).swap
    return Decision(replace(started, stable=route.weights, base_epoch=route.epoch))


def _admitting(snapshot: Snapshot, now: float) -> Decision:
    swap = snapshot.swap
    if swap.admission is None:
        return Decision(swap, commands=(Admit(swap.spec.model, swap.spec.candidate),))
    return act(snapshot, Event.ADMITTED, now, f"artifact verified, {swap.admission.digest[:19]}")


def _loading(snapshot: Snapshot, now: float) -> Decision:
    lacking = _preparation(snapshot, State.LOADING)
    if lacking or not snapshot.replicas:
        return Decision(snapshot.swap, commands=lacking)
    return act(snapshot, Event.LOADED, now, f"loaded on {len(snapshot.replicas)} replica(s)")


def _warming(snapshot: Snapshot, now: float) -> Decision:
    lacking = _preparation(snapshot, State.WARMING)
    if lacking or not snapshot.replicas:
        return Decision(snapshot.swap, commands=lacking)
    return act(
        snapshot, Event.WARMED, now, f"{snapshot.swap.spec.warmup_iterations} warm-up inferences on each replica"
    )


def _verifying(snapshot: Snapshot, now: float) -> Decision:
    swap = snapshot.swap
    lacking = _preparation(snapshot, State.VERIFYING)
    if lacking or not snapshot.replicas:
        return Decision(swap, commands=lacking)
    verdict, why = compare_verdict(swap)
    noted = replace(snapshot, swap=_verdict(swap, f"compare: {verdict} ({why})"))
    if verdict == "TRIP":
        return act(noted, Event.FAIL, now, why, "COMPARISON_FAILED")
    if swap.spec.fast_track or (verdict == "PASS" and not swap.spec.approval_required):
        return act(noted, Event.PASS, now, why)
    return act(noted, Event.HOLD, now, "waits for approval" if verdict == "PASS" else f"waits for a person: {why}")


def _gated(snapshot: Snapshot, now: float) -> Decision:
    swap = snapshot.swap
    lacking = _preparation(snapshot, State.VERIFYING)
    if lacking or not snapshot.replicas or not swap.approved_by:
        return Decision(swap, commands=lacking)
    return act(snapshot, Event.APPROVE, now, f"approved by {swap.approved_by}")


def _preparation(snapshot: Snapshot, up_to: State) -> tuple[ReplicaCommand, ...]:
    """The first thing that each live replica lacks on the way to `up_to`."""
    lacking = (_lacks(snapshot.swap, replica, up_to) for replica in snapshot.replicas)
    return tuple(command for command in lacking if command is not None)


def _lacks(swap: Swap, replica: Replica, up_to: State) -> ReplicaCommand | None:
    spec, slot = swap.spec, replica.slot(swap.spec.candidate)
    stable = swap.stable_version
    compatible = (
        stable if stable is not None and replica.slot(stable) is not None and stable != spec.candidate else None
    )
    if slot is None or not slot.loaded:
        return Prepare(replica.name, spec.model, spec.candidate, compatible)
    if up_to is State.LOADING:
        return None
    known = {(w.replica, w.instance) for w in swap.warm_ups}
    if not slot.warm or ((replica.name, replica.instance) not in known and up_to is State.WARMING):
        return Warm(replica.name, spec.model, spec.candidate, spec.warmup_iterations)
    compared = {(c.replica, c.instance) for c in swap.comparisons}
    if (
        up_to is not State.VERIFYING
        or spec.fast_track
        or compatible is None
        or (replica.name, replica.instance) in compared
    ):
        return None
    if not replica.warm(compatible):
        return None
    return Compare(replica.name, spec.model, compatible, spec.candidate, spec.compare_samples)


def _switching(snapshot: Snapshot, now: float) -> Decision:
    swap = snapshot.swap
    if not _routed(snapshot):
        return _wait_for_route(snapshot, now)
    if not _acknowledged(snapshot) and now < swap.changed_at + ACK_GRACE_SECONDS:
        return Decision(swap)
    if swap.spec.strategy is Strategy.CANARY and len(snapshot.route.weights) > 1:
        return act(snapshot, Event.STEP, now, f"{swap.spec.canary_percents[0]} % to the candidate")
    return act(snapshot, Event.FULL, now, f"epoch {swap.epoch} in force on {len(snapshot.replicas)} replica(s)")


def _routed(snapshot: Snapshot) -> bool:
    return bool(snapshot.replicas) and all(r.epoch >= snapshot.route.epoch for r in snapshot.replicas)


def _acknowledged(snapshot: Snapshot) -> bool:
    said = {(ack.replica, ack.instance) for ack in snapshot.swap.acks if ack.epoch == snapshot.swap.epoch}
    return all((r.name, r.instance) in said for r in snapshot.replicas)


def _wait_for_route(snapshot: Snapshot, now: float) -> Decision:
    swap = snapshot.swap
    if swap.deadline is not None and now >= swap.deadline:
        late = ", ".join(r.name for r in snapshot.replicas if r.epoch < snapshot.route.epoch) or "no replica is up"
        return act(
            snapshot, Event.FAIL, now, f"epoch {swap.epoch} is not in force everywhere: {late}", "SWITCH_TIMEOUT"
        )
    return Decision(swap, commands=_apply(snapshot))


def _apply(snapshot: Snapshot) -> tuple[ReplicaCommand, ...]:
    """The route for every replica that is behind and can serve it."""
    route = snapshot.route
    behind = (r for r in snapshot.replicas if r.epoch < route.epoch)
    return tuple(ApplyRoute(r.name, route) for r in behind if all(r.warm(v) for v in route.versions()))


def _canary(snapshot: Snapshot, now: float) -> Decision:
    swap = snapshot.swap
    verdict, why = error_verdict(snapshot)
    if verdict == "TRIP":
        return _condemn(snapshot, now, why)
    if not _routed(snapshot):
        return Decision(swap, commands=_apply(snapshot))
    if swap.deadline is not None and now < swap.deadline:
        return Decision(swap)
    noted = replace(
        snapshot, swap=_verdict(swap, f"canary {swap.spec.canary_percents[swap.step]} %: {verdict} ({why})")
    )
    if swap.step + 1 < len(swap.spec.canary_percents):
        return act(noted, Event.STEP, now, f"{swap.spec.canary_percents[swap.step + 1]} % to the candidate")
    return act(noted, Event.FULL, now, "everything to the candidate")


def _condemn(snapshot: Snapshot, now: float, why: str) -> Decision:
    noted = replace(snapshot, swap=_verdict(snapshot.swap, f"errors: TRIP ({why})"))
    return act(noted, Event.FAIL, now, why, "ERROR_RATE")


def _soaking(snapshot: Snapshot, now: float) -> Decision:
    swap = snapshot.swap
    verdict, why = error_verdict(snapshot)
    if verdict == "TRIP":
        return _condemn(snapshot, now, why)
    if not _routed(snapshot):
        return Decision(swap, commands=_apply(snapshot))
    if swap.deadline is not None and now < swap.deadline:
        return Decision(swap)
    noted = replace(snapshot, swap=_verdict(swap, f"soak: {verdict} ({why})"))
    return act(noted, Event.SOAKED, now, f"watched for {swap.spec.soak_seconds:g} s")


def _draining(snapshot: Snapshot, now: float) -> Decision:
    swap = snapshot.swap
    lacking = _drains(snapshot, _leaving(snapshot), swap.spec.drain_seconds)
    if lacking and (swap.deadline is None or now < swap.deadline):
        return Decision(swap, commands=lacking)
    done = sum(d.drained for d in swap.drains)
    cut = sum(d.cut for d in swap.drains)
    why = f"{len(lacking)} drain(s) did not answer in time" if lacking else f"{done} finished, {cut} cut"
    return act(snapshot, Event.DRAINED, now, why)


def _leaving(snapshot: Snapshot) -> tuple[str, ...]:
    """What served before the swap and is out of the route now."""
    return tuple(w.version for w in snapshot.swap.stable if w.version not in snapshot.route.versions())


def _drains(snapshot: Snapshot, versions: tuple[str, ...], seconds: float) -> tuple[ReplicaCommand, ...]:
    swap = snapshot.swap
    known = {(d.replica, d.instance, d.version) for d in swap.drains}
    return tuple(
        Drain(r.name, swap.spec.model, version, seconds)
        for r in snapshot.replicas
        for version in versions
        if r.slot(version) is not None
        and r.epoch >= snapshot.route.epoch
        and (r.name, r.instance, version) not in known
    )


def _keep_warm(snapshot: Snapshot, now: float) -> Decision:
    swap = snapshot.swap
    leaving = _leaving(snapshot)
    if swap.deadline is not None and now < swap.deadline and not snapshot.yielding:
        return Decision(swap, commands=_parks(snapshot, leaving))
    lacking = _releases(snapshot, leaving)
    if lacking:
        return Decision(swap, commands=lacking)
    return act(snapshot, Event.RELEASED, now, f"version {swap.spec.candidate} serves at epoch {swap.epoch}")


def _parks(snapshot: Snapshot, versions: tuple[str, ...]) -> tuple[ReplicaCommand, ...]:
    return tuple(
        Park(r.name, snapshot.swap.spec.model, version)
        for r in snapshot.replicas
        for version in versions
        if (slot := r.slot(version)) is not None and not slot.parked and r.epoch >= snapshot.route.epoch
    )


def _releases(snapshot: Snapshot, versions: tuple[str, ...]) -> tuple[ReplicaCommand, ...]:
    """Unloading of what no route names and no other swap wants, on replicas that route the current epoch."""
    keep = snapshot.wanted | set(snapshot.route.versions())
    return tuple(
        Release(r.name, snapshot.swap.spec.model, version)
        for r in snapshot.replicas
        for version in versions
        if version not in keep and version in r.slots and r.epoch >= snapshot.route.epoch
    )


def _reverting(snapshot: Snapshot, now: float) -> Decision:
    swap = snapshot.swap
    candidate = (swap.spec.candidate,)
    behind = any(r.epoch < snapshot.route.epoch for r in snapshot.replicas)
    if behind:
        return Decision(swap, commands=_apply(snapshot))
    leaving = tuple(v for v in candidate if v not in snapshot.route.versions())
    lacking = _drains(snapshot, leaving, swap.spec.drain_seconds) or _releases(snapshot, leaving)
    if lacking or not snapshot.replicas:
        return Decision(swap, commands=lacking)
    back = ", ".join(w.version for w in swap.stable) or "nothing"
    return act(snapshot, Event.RETURNED, now, f"back on {back} at epoch {snapshot.route.epoch}: {swap.message}")


def _aborting(snapshot: Snapshot, now: float) -> Decision:
    swap = snapshot.swap
    lacking = _releases(snapshot, (swap.spec.candidate,))
    if lacking or swap.outcome is None:
        return Decision(swap, commands=lacking)
    return act(snapshot, CLEANED[swap.outcome], now, swap.message)


_PLAN: Mapping[State, Callable[[Snapshot, float], Decision]] = MappingProxyType(
    {
        State.PENDING: _pending,
        State.ADMITTING: _admitting,
        State.LOADING: _loading,
        State.WARMING: _warming,
        State.VERIFYING: _verifying,
        State.GATED: _gated,
        State.SWITCHING: _switching,
        State.CANARY: _canary,
        State.SOAKING: _soaking,
        State.DRAINING: _draining,
        State.KEEP_WARM: _keep_warm,
        State.REVERTING: _reverting,
        State.ABORTING: _aborting,
    }
)
assert set(_PLAN) == set(State) - TERMINAL


# --- verdicts and figures -----------------------------------------------------------------------------------------------------------


def compare_verdict(swap: Swap) -> tuple[str, str]:
    """(PASS | TRIP | INCONCLUSIVE, why) over the comparisons of all replicas."""
    limits = swap.spec.compare
    if not swap.comparisons:
        return "PASS", "skipped: proven before" if swap.spec.fast_track else "nothing to compare with"
    for comparison in swap.comparisons:
        broken = _broken(comparison, limits.abs_error_max, limits.rel_error_max, limits.top1_agreement_min)
        if broken:
            where = f" in {comparison.ensemble}" if comparison.ensemble else ""
            return "TRIP", f"{broken}{where} on {comparison.replica}"
    samples = sum(c.samples for c in swap.comparisons)
    if samples < limits.samples_min:
        return "INCONCLUSIVE", f"{samples} of {limits.samples_min} samples"
    worst = max(c.max_abs_error for c in swap.comparisons)
    return (
        "PASS",
        f"{samples} samples, largest difference {worst:.3g}, top-1 {min(c.top1_agreement for c in swap.comparisons):.1%}",
    )


def _broken(c: Comparison, abs_max: float | None, rel_max: float | None, top1_min: float | None) -> str:
    if c.nonfinite:
        return f"{c.nonfinite} output values are NaN or infinite"
    if abs_max is not None and not c.max_abs_error <= abs_max:
        return f"absolute difference {c.max_abs_error:.6g} > {abs_max:g}"
    if rel_max is not None and not c.max_rel_error <= rel_max:
        return f"relative difference {c.max_rel_error:.6g} > {rel_max:g}"
    if top1_min is not None and not c.top1_agreement >= top1_min:
        return f"top-1 agreement {c.top1_agreement:.4f} < {top1_min:g}"
    return ""


def error_verdict(snapshot: Snapshot) -> tuple[str, str]:
    """(PASS | TRIP | INCONCLUSIVE, why) on the candidate's answers since it was loaded, and on its slots.

    A refusal may be the caller's fault, and callers send the stable version the same: what counts is how much more the candidate refuses.
    """
    candidate, limit = snapshot.swap.spec.candidate, snapshot.swap.spec.error_rate_max
    slots = [r.slots[candidate] for r in snapshot.replicas if candidate in r.slots]
    if any(slot.state is SlotState.STOPPED for slot in slots):
        return "TRIP", "the candidate stopped on a replica"
    failures, refusals = sum(slot.failures for slot in slots), sum(slot.refusals for slot in slots)
    total = failures + refusals + sum(slot.successes for slot in slots)
    if total < ANALYSIS_REQUESTS_MIN:
        return "INCONCLUSIVE", f"{total} of {ANALYSIS_REQUESTS_MIN} answers"
    usual = _refusal_rate(snapshot)
    if refusals / total > usual + limit:
        return (
            "TRIP",
            f"{refusals} of {total} requests refused by the model, the stable version's share is {usual:.2%}, limit {limit:.2%} more",
        )
    rate = failures / total
    return ("TRIP" if rate > limit else "PASS"), f"{failures} of {total} answers failed, limit {limit:.2%}"


def _refusal_rate(snapshot: Snapshot) -> float:
    """The share of requests that the stable versions refused since they were loaded; 0 when there is none."""
    stable = {weight.version for weight in snapshot.swap.stable}
    slots = [slot for r in snapshot.replicas for version, slot in r.slots.items() if version in stable]
    total = sum(slot.successes + slot.failures + slot.refusals for slot in slots)
    return sum(slot.refusals for slot in slots) / total if total else 0.0


def _verdict(swap: Swap, line: str) -> Swap:
    return replace(swap, figures=replace(swap.figures, verdicts=(*swap.figures.verdicts, line)))


def _measured(moved: Swap, snapshot: Snapshot, now: float) -> Swap:
    """Takes the figures that belong to the state just entered."""
    match moved.state:
        case State.ADMITTING:
            p50, p99 = _latency(snapshot)
            taken = {"latency_p50_before": p50, "latency_p99_before": p99, "failures_before": _failures(snapshot)}
        case State.SWITCHING:
            taken = {"switched_at": now}
        case State.CANARY | State.SOAKING if not moved.figures.routed_at:
            taken = {"routed_at": max((a.at for a in moved.acks if a.epoch == moved.epoch), default=now)}
        case State.DRAINING:  # both: the candidate may not have answered yet, the stable version no longer does
            p50, p99 = _latency(snapshot, *(w.version for w in moved.stable))
            taken = {"latency_p50_during": p50, "latency_p99_during": p99}
        case State.KEEP_WARM | State.REVERTING:
            taken = {"failures_after": _failures(snapshot)}
        case State.COMPLETED:
            p50, p99 = _latency(snapshot)
            taken = {"latency_p50_after": p50, "latency_p99_after": p99}
        case _:
            return moved
    return replace(moved, figures=_take(moved.figures, taken))


def _take(figures: Figures, taken: Mapping[str, float | int]) -> Figures:
    return replace(figures, **taken)  # type: ignore[arg-type]  # every field taken is a number


def _latency(snapshot: Snapshot, *more: str) -> tuple[float, float]:
    """(p50, p99) of the slowest slot of the routed versions and of `more`."""
    versions = {*snapshot.route.versions(), *more}
    slots = [slot for r in snapshot.replicas for version, slot in r.slots.items() if version in versions]
    return max((s.latency_p50 for s in slots), default=0.0), max((s.latency_p99 for s in slots), default=0.0)


def _failures(snapshot: Snapshot) -> int:
    return sum(slot.failures for r in snapshot.replicas for slot in r.slots.values())


_PROGRESS: Mapping[State, tuple[float, float]] = MappingProxyType(
    {  # seed 001: load 10, warm-up 30-80, switch 80-90, clean-up 90-100
        State.ADMITTING: (5, 10),
        State.LOADING: (10, 30),
        State.WARMING: (30, 70),
        State.VERIFYING: (70, 80),
        State.GATED: (80, 80),
        State.SWITCHING: (80, 85),
        State.CANARY: (85, 90),
        State.SOAKING: (90, 90),
        State.DRAINING: (90, 95),
        State.KEEP_WARM: (95, 99),
        State.COMPLETED: (100, 100),
    }
)


def progress(swap: Swap, replicas: tuple[Replica, ...] = ()) -> float:
    """0 to 100, on the source documents' scale; 0 for a swap that failed or goes back."""
    low, high = _PROGRESS.get(swap.state, (0.0, 0.0))
    if not replicas or low == high:
        return low
    done = sum(_part(swap, replica) for replica in replicas) / len(replicas)
    return round(low + (high - low) * done, 1)


def _part(swap: Swap, replica: Replica) -> bool:
    slot = replica.slot(swap.spec.candidate)
    match swap.state:
        case State.LOADING:
            return slot is not None and slot.loaded
        case State.WARMING:
            return slot is not None and slot.warm
        case State.VERIFYING:
            return any((c.replica, c.instance) == (replica.name, replica.instance) for c in swap.comparisons)
        case State.SWITCHING:
            return replica.epoch >= swap.epoch
        case State.DRAINING:
            return any((d.replica, d.instance) == (replica.name, replica.instance) for d in swap.drains)
        case _:
            return False


# --- the receipt --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SwapReceipt:
    """What a swap did, for whoever asks later. Latencies in seconds of the worst replica; 0 where nothing was measured."""

    swap: str
    model: str
    state: State
    stable: str | None
    candidate: str
    candidate_digest: str
    epoch_before: int
    epoch_after: int
    warmup_iterations: int
    warmup_median_ms: float
    compare_samples: int
    compare_max_abs_error: float
    compare_top1_agreement: float
    switch_seconds: float
    in_flight: int
    drained: int
    cut: int
    failed: int
    failed_request_ids: tuple[str, ...]
    figures: Figures
    actor: str
    why: str
    reason: str
    message: str
    trace: str
    created_at: float
    ended_at: float


def receipt(swap: Swap) -> SwapReceipt:
    """The receipt of an ended swap, from its row alone."""
    assert swap.terminal
    acks = [a for a in swap.acks if a.epoch == swap.base_epoch + 1]
    cut = sum(d.cut for d in swap.drains)
    failed = max(0, swap.figures.failures_after - swap.figures.failures_before) + cut
    return SwapReceipt(
        swap=swap.id,
        model=swap.spec.model,
        state=swap.state,
        stable=swap.stable_version,
        candidate=swap.spec.candidate,
        candidate_digest=swap.admission.digest if swap.admission else "",
        epoch_before=swap.base_epoch,
        epoch_after=swap.epoch or swap.base_epoch,
        warmup_iterations=sum(w.iterations for w in swap.warm_ups),
        warmup_median_ms=max((w.median_ms for w in swap.warm_ups), default=0.0),
        compare_samples=sum(c.samples for c in swap.comparisons),
        compare_max_abs_error=max((c.max_abs_error for c in swap.comparisons), default=0.0),
        compare_top1_agreement=min((c.top1_agreement for c in swap.comparisons), default=0.0),
        switch_seconds=max(0.0, swap.figures.routed_at - swap.figures.switched_at),
        in_flight=sum(a.in_flight for a in acks),
        drained=sum(d.drained for d in swap.drains),
        cut=cut,
        failed=failed,
        failed_request_ids=tuple(i for d in swap.drains for i in d.cut_request_ids)[:100],
        figures=swap.figures,
        actor=swap.actor,
        why=swap.why,
        reason=swap.reason,
        message=swap.message,
        trace=swap.trace,
        created_at=swap.created_at,
        ended_at=swap.ended_at or swap.changed_at,
    )
