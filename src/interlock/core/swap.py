"""A swap: the row, its states and every legal move, as data. What to do next stands in `core.swap_plan`; nothing here looks at a replica.

Rules of this file
- One row, one explicit state, one owner. A move that TABLE does not hold raises `IllegalTransition` and changes nothing.
- Before the switch the route is untouched and every failure ends in ABORTING. The moves in COMMITS write the route *in the same
  transaction as the row*, so a swap in SWITCHING or later has switched, and there is no moment in between.
- After the switch every failure ends in REVERTING, and entering REVERTING is the compare-and-set back; it never asks the candidate.
- Timers are absolute times in the row. Anything that a crash may lose is observed again, never remembered elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from interlock.core.names import check_id
from interlock.core.route import Weight
from interlock.errors import Aborted, IllegalTransition, InvalidArgument, ResourceExhausted


class State(StrEnum):
    """Where a swap is. `-ING` and the gates are on the way, past participles are the end."""

    PENDING = "PENDING"
    ADMITTING = "ADMITTING"
    LOADING = "LOADING"
    WARMING = "WARMING"
    VERIFYING = "VERIFYING"
    GATED = "GATED"
    SWITCHING = "SWITCHING"
    CANARY = "CANARY"
    SOAKING = "SOAKING"
    DRAINING = "DRAINING"
    KEEP_WARM = "KEEP_WARM"
    COMPLETED = "COMPLETED"
    REVERTING = "REVERTING"
    REVERTED = "REVERTED"
    ABORTING = "ABORTING"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    REJECTED = "REJECTED"
    SUPERSEDED = "SUPERSEDED"


class Event(StrEnum):
    """What can happen to a swap: found true by `core.swap_plan`, or said by a person."""

    START = "START"  # its turn has come: the route was read, stable is known
    ADMITTED = "ADMITTED"
    LOADED = "LOADED"
    WARMED = "WARMED"
    HOLD = "HOLD"  # a person must look: approval was asked for, or the comparison could not say
    PASS = "PASS"  # noqa: S105  the comparison passed and nobody needs to look
    APPROVE = "APPROVE"
    REJECT = "REJECT"
    STEP = "STEP"  # the next canary share
    FULL = "FULL"  # everything to the candidate
    SOAKED = "SOAKED"
    DRAINED = "DRAINED"
    RELEASED = "RELEASED"
    RETURNED = "RETURNED"
    FAIL = "FAIL"
    ABORT = "ABORT"
    PROMOTE = "PROMOTE"
    SUPERSEDE = "SUPERSEDE"
    CLEANED_FAILED = "CLEANED_FAILED"
    CLEANED_CANCELLED = "CLEANED_CANCELLED"
    CLEANED_REJECTED = "CLEANED_REJECTED"
    CLEANED_SUPERSEDED = "CLEANED_SUPERSEDED"


_PREPARING = (State.ADMITTING, State.LOADING, State.WARMING, State.VERIFYING, State.GATED)
_SWITCHED = (State.SWITCHING, State.CANARY, State.SOAKING)

TABLE: Mapping[tuple[State, Event], State] = MappingProxyType(
    {
        (State.PENDING, Event.START): State.ADMITTING,
        (State.PENDING, Event.FAIL): State.REJECTED,
        (State.PENDING, Event.ABORT): State.CANCELLED,
        (State.PENDING, Event.SUPERSEDE): State.SUPERSEDED,
        (State.ADMITTING, Event.ADMITTED): State.LOADING,
        (State.LOADING, Event.LOADED): State.WARMING,
        (State.WARMING, Event.WARMED): State.VERIFYING,
        (State.VERIFYING, Event.HOLD): State.GATED,
        (State.VERIFYING, Event.PASS): State.SWITCHING,
        (State.GATED, Event.APPROVE): State.SWITCHING,
        (State.GATED, Event.REJECT): State.ABORTING,
        **{
            (state, event): State.ABORTING
            for state in _PREPARING
            for event in (Event.FAIL, Event.ABORT, Event.SUPERSEDE)
        },
        (State.SWITCHING, Event.STEP): State.CANARY,
        (State.SWITCHING, Event.FULL): State.SOAKING,
        (State.CANARY, Event.STEP): State.CANARY,
        (State.CANARY, Event.FULL): State.SOAKING,
        (State.CANARY, Event.PROMOTE): State.SOAKING,
        (State.SOAKING, Event.PROMOTE): State.DRAINING,
        (State.SOAKING, Event.SOAKED): State.DRAINING,
        **{(state, event): State.REVERTING for state in _SWITCHED for event in (Event.FAIL, Event.ABORT)},
        (State.DRAINING, Event.DRAINED): State.KEEP_WARM,
        (State.KEEP_WARM, Event.RELEASED): State.COMPLETED,
        (State.REVERTING, Event.RETURNED): State.REVERTED,
        (State.ABORTING, Event.CLEANED_FAILED): State.FAILED,
        (State.ABORTING, Event.CLEANED_CANCELLED): State.CANCELLED,
        (State.ABORTING, Event.CLEANED_REJECTED): State.REJECTED,
        (State.ABORTING, Event.CLEANED_SUPERSEDED): State.SUPERSEDED,
    }
)

COMMITS = frozenset(
    {
        (State.VERIFYING, Event.PASS),
        (State.GATED, Event.APPROVE),
        (State.CANARY, Event.STEP),
        (State.CANARY, Event.FULL),
    }
    | {(State.CANARY, Event.PROMOTE)}
    | {(state, event) for state in _SWITCHED for event in (Event.FAIL, Event.ABORT)}
)
"""The moves that write the route in the row's own transaction. (SWITCHING to CANARY or SOAKING only waits for acknowledgements.)"""

TERMINAL = frozenset({State.COMPLETED, State.REVERTED, State.FAILED, State.CANCELLED, State.REJECTED, State.SUPERSEDED})
BEFORE_SWITCH = frozenset({State.PENDING, *_PREPARING})
AFTER_SWITCH = frozenset({*_SWITCHED, State.DRAINING, State.KEEP_WARM, State.COMPLETED})
REVERTIBLE = frozenset(_SWITCHED)
WORKING = frozenset(_PREPARING)

_OUTCOME = {
    Event.FAIL: State.FAILED,
    Event.ABORT: State.CANCELLED,
    Event.REJECT: State.REJECTED,
    Event.SUPERSEDE: State.SUPERSEDED,
}
CLEANED: Mapping[State, Event] = MappingProxyType(
    {
        State.FAILED: Event.CLEANED_FAILED,
        State.CANCELLED: Event.CLEANED_CANCELLED,
        State.REJECTED: Event.CLEANED_REJECTED,
        State.SUPERSEDED: Event.CLEANED_SUPERSEDED,
    }
)


class Strategy(StrEnum):
    """How traffic moves."""

    BLUE_GREEN = "BLUE_GREEN"
    CANARY = "CANARY"


class Concurrency(StrEnum):
    """What a new swap does when one of its model is running."""

    REJECT = "REJECT"
    QUEUE = "QUEUE"
    SUPERSEDE = "SUPERSEDE"


class OnCrash(StrEnum):
    """What a swap does when its controller comes back."""

    RESUME = "RESUME"
    REVERT = "REVERT"


@dataclass(frozen=True, slots=True)
class CompareLimits:
    """Limits of the comparison before the switch; None is not checked. Outputs must be finite in any case."""

    abs_error_max: float | None = None
    rel_error_max: float | None = None
    top1_agreement_min: float | None = None
    samples_min: int = 0


WARMUP_ITERATIONS = 5  # seeds 000, 001: five warm-up inferences
DRAIN_SECONDS = 30.0  # seed 000: requests on the old version may take this long
SWITCH_SECONDS = 30.0
DRAIN_GRACE_SECONDS = 5.0
RESUMES_MAX = 20


@dataclass(frozen=True, slots=True)
class SwapSpec:
    """What is asked: immutable from the first moment on. Seconds are wall-clock."""

    model: str
    candidate: str
    strategy: Strategy = Strategy.BLUE_GREEN
    concurrency: Concurrency = Concurrency.REJECT
    warmup_iterations: int = WARMUP_ITERATIONS
    compare: CompareLimits = field(default_factory=CompareLimits)
    compare_samples: int = 0
    prepare_seconds: float = 300.0
    drain_seconds: float = DRAIN_SECONDS
    soak_seconds: float = 0.0
    keep_warm_seconds: float = 0.0
    approval_required: bool = False
    approval_seconds: float = 3600.0
    canary_percents: tuple[int, ...] = ()
    canary_step_seconds: float = 60.0
    error_rate_max: float = 0.01
    force: bool = False
    fast_track: bool = False  # the candidate has a COMPLETED receipt: no comparison, no gate
    on_crash: OnCrash = OnCrash.RESUME


def check_spec(spec: SwapSpec) -> SwapSpec:
    """Returns the spec if it can be carried out.

    Raises:
        InvalidArgument: `INVALID_SPEC`, naming the field.
    """
    check_id(spec.model, "spec.model")
    check_id(spec.candidate, "spec.candidate_version")
    for name in ("prepare_seconds", "drain_seconds", "soak_seconds", "keep_warm_seconds", "approval_seconds"):
        value = getattr(spec, name)
        _require(0 <= value <= 7 * 86400, name, f"{value} is not between 0 and {7 * 86400} seconds")
    _require(
        1 <= spec.warmup_iterations <= 1000, "warmup_iterations", f"{spec.warmup_iterations} is not between 1 and 1000"
    )
    _require(0 <= spec.error_rate_max <= 1, "error_rate_max", f"{spec.error_rate_max} is not between 0 and 1")
    _check_limits(spec.compare)
    steps = spec.canary_percents
    if spec.strategy is Strategy.CANARY:
        _require(bool(steps), "canary_percents", "a canary needs at least one share, e.g. [5, 25, 50]")
    else:
        _require(not steps, "canary_percents", f"only strategy CANARY takes shares, not {spec.strategy}")
    _require(all(1 <= p <= 99 for p in steps), "canary_percents", f"{list(steps)}: each share lies between 1 and 99")
    _require(list(steps) == sorted(set(steps)), "canary_percents", f"{list(steps)} does not rise from step to step")
    return spec


def _check_limits(limits: CompareLimits) -> None:
    for name in ("abs_error_max", "rel_error_max", "top1_agreement_min"):
        value = getattr(limits, name)
        high = 1.0 if name == "top1_agreement_min" else float("inf")
        _require(
            value is None or 0 <= value <= high, f"compare_limits.{name}", f"{value} is not between 0 and {high:g}"
        )


def _require(holds: bool, field_name: str, why: str) -> None:
    if not holds:
        raise InvalidArgument(f"spec.{field_name}: {why}", reason="INVALID_SPEC", field=f"spec.{field_name}")


@dataclass(frozen=True, slots=True)
class Admission:
    """The candidate's artifact was read and hashed: it is what was registered."""

    digest: str
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Warm-up inferences of the candidate on one replica process."""

    replica: str
    instance: str
    iterations: int
    first_ms: float = 0.0
    median_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far the candidate's answers are from the stable version's, on one replica process.

    `ensemble` names the one in which the largest difference was seen; empty: in the versions' own answers.
    """

    replica: str
    instance: str
    samples: int
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    top1_agreement: float = 1.0
    nonfinite: int = 0
    ensemble: str = ""


@dataclass(frozen=True, slots=True)
class Ack:
    """One replica process routes the given epoch."""

    replica: str
    instance: str
    epoch: int
    in_flight: int = 0
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Drained:
    """One version of one replica process holds no request any more; `cut` did not finish in time."""

    replica: str
    instance: str
    version: str
    drained: int = 0
    cut: int = 0
    cut_request_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """A command failed in a way that trying again will not mend."""

    command: str
    replica: str
    reason: str
    message: str
    epoch: int = 0


Result = Admission | WarmUp | Comparison | Ack | Drained | Failure


@dataclass(frozen=True, slots=True)
class Figures:
    """What the receipt will say, gathered on the way. Latencies in seconds, worst replica; 0 where nothing was measured."""

    latency_p50_before: float = 0.0
    latency_p50_during: float = 0.0
    latency_p50_after: float = 0.0
    latency_p99_before: float = 0.0
    latency_p99_during: float = 0.0
    latency_p99_after: float = 0.0
    failures_before: int = 0
    failures_after: int = 0
    switched_at: float = 0.0  # the route was committed
    routed_at: float = 0.0  # the last replica acknowledged it
    verdicts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Swap:
    """The row. `revision` grows by one with every change of it."""

    id: str
    spec: SwapSpec
    created_at: float
    state: State = State.PENDING
    changed_at: float = 0.0
    ended_at: float | None = None
    deadline: float | None = None
    revision: int = 1
    stable: tuple[Weight, ...] = ()
    base_epoch: int = 0
    epoch: int = 0
    step: int = 0
    outcome: State | None = None
    reason: str = ""
    message: str = ""
    paused_at: float | None = None
    approved_by: str = ""
    resumes: int = 0
    admission: Admission | None = None
    warm_ups: tuple[WarmUp, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    acks: tuple[Ack, ...] = ()
    drains: tuple[Drained, ...] = ()
    figures: Figures = field(default_factory=Figures)
    actor: str = ""
    why: str = ""
    request_id: str = ""
    trace: str = ""

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def stable_version(self) -> str | None:
        """The heaviest version of the route that the swap started from."""
        return max(self.stable, key=lambda w: w.weight).version if self.stable else None

    @property
    def claims(self) -> frozenset[str]:
        """Versions that must not be released behind this swap's back."""
        return frozenset() if self.terminal else frozenset({self.spec.candidate, *(w.version for w in self.stable)})


def legal(swap: Swap, event: Event) -> bool:
    """Whether the swap takes the event now."""
    return (swap.state, event) in TABLE


def move(swap: Swap, event: Event, now: float, message: str = "", **changes: Any) -> Swap:
    """The row after one legal move; `changes` are further fields of the row.

    Raises:
        IllegalTransition: the state does not take the event; nothing changed.
    """
    target = TABLE.get((swap.state, event))
    if target is None:
        raise _illegal(swap, event)
    if target is State.ABORTING:
        changes["outcome"] = _OUTCOME[event]
    moved = replace(
        swap,
        state=target,
        changed_at=now,
        revision=swap.revision + 1,
        message=message,
        ended_at=now if target in TERMINAL else None,
        paused_at=None,
        **changes,
    )
    return replace(moved, deadline=_deadline(swap, moved, now))


def _illegal(swap: Swap, event: Event) -> IllegalTransition:
    hint = {
        State.DRAINING: ": the switch is done; RollbackModel moves traffic back",
        State.KEEP_WARM: ": the switch is done; RollbackModel moves traffic back",
        State.COMPLETED: ": the swap is done; RollbackModel moves traffic back",
    }.get(swap.state, "")
    return IllegalTransition(
        f"swap {swap.id!r} is {swap.state} and does not take {event}{hint}",
        metadata={"swap": swap.id, "state": swap.state.value, "event": event.value},
    )


def _deadline(before: Swap, after: Swap, now: float) -> float | None:
    spec = after.spec
    match after.state:
        case State.ADMITTING:
            return now + spec.prepare_seconds
        case State.LOADING | State.WARMING | State.VERIFYING:
            return before.deadline
        case State.GATED:
            return now + spec.approval_seconds
        case State.SWITCHING:
            return now + SWITCH_SECONDS
        case State.CANARY:
            return now + spec.canary_step_seconds
        case State.SOAKING:
            return now + max(spec.soak_seconds, 0.0)
        case State.DRAINING:
            return now + spec.drain_seconds + DRAIN_GRACE_SECONDS
        case State.KEEP_WARM:
            return now + spec.keep_warm_seconds
        case _:
            return None


def record(swap: Swap, result: Result, now: float) -> Swap:
    """The row with a command's result; the same row when the result comes too late or says what is known.

    A failure while preparing aborts; failed routing is bounded by the deadline of SWITCHING; failed cleaning is tried again.
    """
    match result:
        case Failure():
            return _failed(swap, result, now)
        case Admission():
            return swap if swap.admission else _with(swap, admission=result)
        case WarmUp():
            return _noted(swap, "warm_ups", result, swap.warm_ups, lambda r: (r.replica, r.instance))
        case Comparison():
            return _noted(swap, "comparisons", result, swap.comparisons, lambda r: (r.replica, r.instance))
        case Ack():
            return _noted(swap, "acks", result, swap.acks, lambda r: (r.replica, r.instance, r.epoch))
        case Drained():
            return _noted(swap, "drains", result, swap.drains, lambda r: (r.replica, r.instance, r.version))


def _noted(swap: Swap, name: str, result: Any, known: tuple[Any, ...], key: Any) -> Swap:
    if swap.terminal or key(result) in {key(r) for r in known}:
        return swap
    return _with(swap, **{name: (*known, result)})


def _with(swap: Swap, **changes: Any) -> Swap:
    return replace(swap, revision=swap.revision + 1, **changes)


def _failed(swap: Swap, failure: Failure, now: float) -> Swap:
    """Before the switch a failure ends the swap. A refused ApplyRoute is tried again until the deadline of SWITCHING."""
    before = swap.state in WORKING and failure.command in {"Admit", "Prepare", "Warm", "Compare"}
    if not before:
        return swap
    where = f" on {failure.replica}" if failure.replica else ""
    return move(swap, Event.FAIL, now, f"{failure.command}{where}: {failure.message}", reason=failure.reason)


def approve(swap: Swap, actor: str) -> Swap:
    """Notes a person's approval; the swap switches once every replica is ready. Raises IllegalTransition outside of the gate."""
    if swap.approved_by and swap.state in AFTER_SWITCH:
        return swap
    if swap.state is not State.GATED:
        raise _illegal(swap, Event.APPROVE)
    return swap if swap.approved_by else _with(swap, approved_by=actor or "unknown")


def pause(swap: Swap, now: float) -> Swap:
    """Holds the swap before its next state change. Raises IllegalTransition once it is cleaning up."""
    if swap.state not in BEFORE_SWITCH | {State.CANARY, State.SOAKING}:
        raise IllegalTransition(
            f"swap {swap.id!r} is {swap.state} and cannot be held", metadata={"state": swap.state.value}
        )
    return swap if swap.paused_at is not None else _with(swap, paused_at=now)


def unpause(swap: Swap, now: float) -> Swap:
    """Lets a held swap go on; its deadline moves by the time it was held."""
    if swap.paused_at is None:
        return swap
    held = now - swap.paused_at
    return _with(swap, paused_at=None, deadline=None if swap.deadline is None else swap.deadline + held)


def resume(swap: Swap, now: float) -> Swap:
    """The row as a controller that comes back takes it up: work that was cut off gets its time anew, waiting keeps its deadline.

    A swap that saw RESUMES_MAX restarts, or asked for REVERT, ends before the switch; after it `core.swap_plan.decide` reverts it.
    """
    if swap.terminal or swap.state is State.PENDING:
        return swap
    resumes = swap.resumes + 1
    if swap.state in WORKING and (swap.spec.on_crash is OnCrash.REVERT or resumes > RESUMES_MAX):
        return move(swap, Event.FAIL, now, "the controller restarted", reason="CONTROLLER_RESTARTED", resumes=resumes)
    deadline = swap.deadline
    if swap.state in {State.ADMITTING, State.LOADING, State.WARMING, State.VERIFYING}:
        deadline = now + swap.spec.prepare_seconds
    elif swap.state is State.SWITCHING:
        deadline = now + SWITCH_SECONDS
    return _with(swap, resumes=resumes, deadline=deadline)


Steer = Callable[[Swap], Swap]
"""A person's hand on the row that is not a move: approve, pause, unpause."""


def superseded_by(spec: SwapSpec, active: tuple[Swap, ...]) -> tuple[Swap, ...]:
    """The running swaps of the model that a new one ends; it waits for the others. `active`: the model's swaps that have not ended.

    Raises:
        Aborted: `SWAP_IN_PROGRESS`, with the running swap's id, for policy REJECT.
        ResourceExhausted: `SWAP_QUEUE_FULL`: one runs and one waits already.
    """
    busy = tuple(s for s in active if s.state is not State.KEEP_WARM)
    if not busy:
        return ()
    if spec.concurrency is Concurrency.REJECT:
        raise Aborted(
            f"model {spec.model!r}: swap {busy[0].id!r} is {busy[0].state}; wait for it, or ask for QUEUE or SUPERSEDE",
            reason="SWAP_IN_PROGRESS",
            metadata={"model": spec.model, "swap": busy[0].id, "state": busy[0].state.value},
        )
    if spec.concurrency is Concurrency.SUPERSEDE:
        return tuple(s for s in busy if legal(s, Event.SUPERSEDE))
    if len(busy) > 1:
        raise ResourceExhausted(
            f"model {spec.model!r}: one swap runs and one waits; ask for SUPERSEDE to replace the waiting one",
            reason="SWAP_QUEUE_FULL",
            metadata={"model": spec.model},
            retry_after_seconds=5.0,
        )
    return ()
