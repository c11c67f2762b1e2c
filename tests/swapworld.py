"""A small world for swaps: a store, replicas, a controller's shell and a clock, all synchronous and in memory. Shared by the golden
histories (one thing at a time, traced) and by the simulator (everything at once, with faults by seed). Not a test itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from interlock.core.assignment import assign
from interlock.core.route import Picker, Route, admit, change
from interlock.core.swap import (
    Ack,
    Admission,
    Comparison,
    Drained,
    Event,
    Failure,
    State,
    Swap,
    SwapSpec,
    WarmUp,
    record,
    resume,
    superseded_by,
)
from interlock.core.swap_plan import (
    Admit,
    ApplyRoute,
    CommitRoute,
    Compare,
    Decision,
    Drain,
    Park,
    Prepare,
    Quarantine,
    Release,
    Replica,
    ReplicaCommand,
    RevertRoute,
    Slot,
    SlotState,
    Snapshot,
    SwapReceipt,
    Warm,
    WriteReceipt,
    act,
    decide,
    receipt,
)
from interlock.errors import Aborted, FailedPrecondition, InterlockError, NotFound, Unavailable

MODEL = "policy"


class StoreDown(Exception):
    """The transaction failed; `done` says whether it had been committed all the same (the caller cannot know)."""


@dataclass
class Store:
    """What survives a crash. One transaction is one call of `write`."""

    swaps: dict[str, Swap] = field(default_factory=dict)
    route: Route = field(default_factory=lambda: Route(MODEL, 0))
    receipts: dict[str, SwapReceipt] = field(default_factory=dict)
    quarantined: set[str] = field(default_factory=set)
    events: list[tuple[str, int, State]] = field(default_factory=list)
    token: int = 0
    fault: Callable[[], str] = lambda: ""

    def write(self, before: Swap | None, decision: Decision) -> None:
        fault = self.fault()
        if fault == "before":
            raise StoreDown
        swap = decision.swap
        if before is not None and self.swaps[swap.id].revision != before.revision:
            raise Aborted("the row changed", reason="STALE_ROW")
        route, receipts, quarantined = self.route, dict(self.receipts), set(self.quarantined)
        for command in decision.store:
            match command:
                case CommitRoute() | RevertRoute():
                    route = change(route, command.expected_epoch, command.weights)
                case Quarantine():
                    quarantined.add(command.version)
                case WriteReceipt():
                    receipts[command.swap] = receipt(swap)
        self.route, self.receipts, self.quarantined = route, receipts, quarantined
        if before is None or before.state != swap.state:
            self.events.append((swap.id, swap.revision, swap.state))
        self.swaps[swap.id] = swap
        if fault == "after":
            raise StoreDown

    def active(self) -> list[Swap]:
        return [s for s in self.swaps.values() if not s.terminal]


@dataclass
class FakeReplica:
    """One inference process: slots, a route, a fence. `refuse` makes the next matching command fail, `stubborn` every one."""

    name: str
    instance: int = 1
    up: bool = True
    slots: dict[str, Slot] = field(default_factory=dict)
    route: Route = field(default_factory=lambda: Route(MODEL, 0))
    token: int = 0
    refuse: dict[str, tuple[str, str]] = field(default_factory=dict)
    stubborn: set[str] = field(default_factory=set)
    nonfinite: int = 0
    cut: int = 0
    served: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    picker: Picker = field(default_factory=lambda: Picker(()))

    def view(self) -> Replica:
        return Replica(self.name, f"{self.name}#{self.instance}", self.route.epoch, dict(self.slots))

    def restart(self) -> None:
        """A new process: it loads its last assignment by itself and starts with the highest token it had stored."""
        self.instance += 1
        self.up = True
        self.slots = {v: Slot(SlotState.SERVING) for v in self.route.versions()}

    def request(self) -> None:
        """One prediction: it must find its version warm."""
        version = self.picker.pick()
        if version is None:
            return
        slot = self.slots.get(version)
        if slot is None or not slot.warm:
            self.failed += 1
            return
        self.served[version] += 1
        self.slots[version] = replace(slot, successes=slot.successes + 1)

    def execute(self, command: ReplicaCommand, token: int, now: float) -> WarmUp | Comparison | Ack | Drained | None:
        if not self.up:
            raise Unavailable(f"{self.name} is down")
        if token < self.token:
            raise Aborted("stale token", reason="STALE_CONTROLLER")
        self.token = token
        kind = type(command).__name__
        if kind in self.refuse:
            reason, message = self.refuse[kind] if kind in self.stubborn else self.refuse.pop(kind)
            raise FailedPrecondition(message, reason=reason)
        verb = getattr(self, f"_{kind.lower()}")
        done: WarmUp | Comparison | Ack | Drained | None = verb(command, now)
        return done

    def _prepare(self, command: Prepare, _now: float) -> None:
        if self.slots.get(command.version, Slot(SlotState.STOPPED)).state is SlotState.STOPPED:
            self.slots[command.version] = Slot(SlotState.WARMING_UP)

    def _compare(self, _command: Compare, _now: float) -> Comparison:
        return Comparison(self.name, self.view().instance, 32, 0.25, 0.1, 0.9, self.nonfinite)

    def _park(self, command: Park, _now: float) -> None:
        if command.version in self.slots:
            self.slots[command.version] = replace(self.slots[command.version], parked=True)

    def _warm(self, command: Warm, _now: float) -> WarmUp:
        slot = self.slots.get(command.version)
        if slot is None or not slot.loaded:
            raise NotFound("no such slot", reason="SLOT_UNKNOWN")
        if slot.state is SlotState.WARMING_UP:
            self.slots[command.version] = replace(slot, state=SlotState.READY)
        return WarmUp(self.name, self.view().instance, command.iterations, 2.0, 0.5)

    def _applyroute(self, command: ApplyRoute, now: float) -> Ack:
        news = admit(
            MODEL, epoch=command.route.epoch, token=self.token, seen_epoch=self.route.epoch, seen_token=self.token
        )
        if news:
            if not all(self.view().warm(v) for v in command.route.versions()):
                raise FailedPrecondition("a version is not ready", reason="VERSION_NOT_READY")
            self.route, self.picker = command.route, Picker(command.route.weights)
            for version, slot in self.slots.items():
                serving = version in command.route.versions()
                self.slots[version] = replace(slot, state=SlotState.SERVING if serving else slot.state, parked=False)
        return Ack(self.name, self.view().instance, self.route.epoch, in_flight=1, at=now)

    def _drain(self, command: Drain, _now: float) -> Drained:
        if command.version in self.route.versions():
            raise FailedPrecondition("it is routed", reason="VERSION_ROUTED")
        slot = self.slots.get(command.version)
        if slot is not None:
            self.slots[command.version] = replace(slot, in_flight=0, state=SlotState.READY)
        return Drained(self.name, self.view().instance, command.version, drained=1, cut=self.cut)

    def _release(self, command: Release, _now: float) -> None:
        if command.version in self.route.versions():
            raise FailedPrecondition("it is routed", reason="VERSION_ROUTED")
        self.slots.pop(command.version, None)


RETRYABLE = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "NOT_FOUND"}


@dataclass
class Controller:
    """The shell: snapshot, decide, persist, command. Its fields other than the store are lost in a crash."""

    store: Store
    replicas: dict[str, FakeReplica]
    now: Callable[[], float]
    trace: Callable[[str], None] = lambda _line: None
    admit_failure: tuple[str, str] | None = None
    token: int = 0

    def start(self) -> None:
        self.store.token += 1
        self.token = self.store.token
        for swap in self.store.active():
            resumed = resume(swap, self.now())
            if resumed is not swap:
                self._persist(swap, Decision(resumed))

    def create(self, swap_id: str, spec: SwapSpec) -> Swap:
        active = tuple(self.store.active())
        for other in superseded_by(spec, active):
            self.person(other.id, Event.SUPERSEDE, f"by {swap_id}")
        swap = Swap(swap_id, spec, created_at=self.now(), changed_at=self.now())
        self.store.write(None, Decision(swap))
        self.trace(f"{swap_id} PENDING")
        return swap

    def snapshot(self, swap: Swap) -> Snapshot:
        others = [s for s in self.store.active() if s.id != swap.id]
        ahead = [s for s in others if s.created_at <= swap.created_at and s.state is not State.PENDING]
        earlier = [s for s in others if s.state is State.PENDING and (s.created_at, s.id) < (swap.created_at, swap.id)]
        return Snapshot(
            swap,
            self.store.route,
            tuple(r.view() for r in self.replicas.values() if r.up),
            ahead=bool(ahead or earlier),
            yielding=any(s.state is State.PENDING for s in others),
            wanted=frozenset(v for s in others for v in s.claims),
            quarantined=swap.spec.candidate in self.store.quarantined,
        )

    def person(self, swap_id: str, event: Event, message: str) -> None:
        swap = self.store.swaps[swap_id]
        self._persist(swap, act(self.snapshot(swap), event, self.now(), message))

    def next(self, swap_id: str) -> Decision:
        """One decision, persisted; the commands are the caller's to carry out."""
        swap = self.store.swaps[swap_id]
        decision = decide(self.snapshot(swap), self.now())
        if decision.swap is not swap:
            self._persist(swap, decision)
        return decision

    def _persist(self, before: Swap, decision: Decision) -> None:
        self.store.write(before, decision)
        after = decision.swap
        if after.state is not before.state or after.step != before.step or after.epoch != before.epoch:
            self.trace(f"{after.id} {before.state} -> {after.state}" + (f": {after.message}" if after.message else ""))
        for command in decision.store:
            match command:
                case CommitRoute() | RevertRoute():
                    self.trace(
                        f"  {type(command).__name__} epoch {self.store.route.epoch} {_weights(self.store.route)}"
                    )
                case Quarantine():
                    self.trace(f"  Quarantine {command.version}")
                case WriteReceipt():
                    told = self.store.receipts[command.swap]
                    self.trace(
                        f"  WriteReceipt {told.state} drained {told.drained} cut {told.cut} failed {told.failed}"
                    )

    def assignments(self) -> list[ReplicaCommand]:
        claims = {MODEL: frozenset(v for s in self.store.active() for v in s.claims)}
        found: list[ReplicaCommand] = []
        for replica in self.replicas.values():
            if replica.up:
                found += assign({MODEL: replica.view()}, {MODEL: self.store.route}, claims)
        return found

    def carry_out(self, swap_id: str, command: Admit | ReplicaCommand) -> None:
        """One command with its result recorded. Transport errors are dropped: the next decision says it again."""
        self.finish(swap_id, command, self.attempt(command))

    def attempt_and_finish(self, swap_id: str, command: Admit | ReplicaCommand) -> bool:
        """Like `carry_out`; True when the replica did it, so that there may be more to do."""
        outcome = self.attempt(command)
        self.finish(swap_id, command, outcome)
        return not isinstance(outcome, InterlockError)

    def attempt(self, command: Admit | ReplicaCommand, token: int | None = None) -> object:
        """What the replica answers: a result, None for done, or the error. `token` is the sender's when it is not this controller."""
        if isinstance(command, Admit):
            if self.admit_failure:
                reason, message = self.admit_failure
                return FailedPrecondition(message, reason=reason)
            return Admission("blake3:" + "0" * 64, 1000)
        try:
            result = self.replicas[command.replica].execute(command, self.token if token is None else token, self.now())
        except InterlockError as error:
            self.trace(f"  {command.replica} {_said(command)}: {error.reason}")
            return error
        self.trace(f"  {command.replica} {_said(command)}")
        return result

    def finish(self, swap_id: str, command: Admit | ReplicaCommand, outcome: object) -> None:
        if not swap_id or outcome is None:
            return
        swap = self.store.swaps[swap_id]
        if isinstance(outcome, InterlockError):
            if outcome.kind in RETRYABLE or outcome.reason == "VERSION_ROUTED":
                return
            outcome = Failure(type(command).__name__, getattr(command, "replica", ""), outcome.reason, outcome.message)
        after = record(swap, outcome, self.now())  # type: ignore[arg-type]
        if after is not swap:
            self._persist(swap, Decision(after, (WriteReceipt(after.id),) if after.terminal else ()))


def _weights(route: Route) -> str:
    return " ".join(f"{w.version}:{w.weight}" for w in route.weights) or "nothing"


def _said(command: object) -> str:
    match command:
        case ApplyRoute():
            return f"ApplyRoute epoch {command.route.epoch} {_weights(command.route)}"
        case Compare():
            return f"Compare {command.stable} {command.candidate}"
        case Prepare() | Warm() | Drain() | Park() | Release():
            return f"{type(command).__name__} {command.version}"
        case _:
            return type(command).__name__
