"""Slots, handles, and the registry that a request is admitted by. One event loop owns all of it; nothing here waits but `drain`.

Rules of this file
- The registry's snapshot is immutable and replaced by one reference assignment: a request sees the old route or the new one, never a mix.
- A request takes a handle (slot, epoch) at admission and keeps it to its end, whatever happens to the route meanwhile.
- A slot's engine is closed after the last handle is given back, and not before.
- `TRANSITIONS` is the whole life of a slot; anything else raises IllegalTransition and changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from interlock.core.names import version_name
from interlock.core.ports import Clock
from interlock.core.route import Picker, Route
from interlock.errors import IllegalTransition, InvalidArgument, NotFound, Unavailable
from interlock.runtime.images import IMAGE
from interlock.stores.modelspec import TensorSpec
from interlock_inference.batching import Lane, lane_for
from interlock_inference.engines.ensemble import EnsembleEngine, Plan
from interlock_inference.processing import Processing
from interlock_inference.repository import Opened
from interlock_inference.stats import VersionStats
from interlock_inference.tensors import Described, check_described

RETRY_SECONDS = 0.1
FITTING_MAX = 256  # shapes of requests that are remembered per version


class SlotState(StrEnum):
    """Where a slot is in its life."""

    INITIALIZING = "initializing"
    WARMING_UP = "warming_up"
    READY = "ready"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


_S = SlotState
TRANSITIONS: Mapping[SlotState, frozenset[SlotState]] = {
    _S.INITIALIZING: frozenset({_S.WARMING_UP, _S.STOPPED}),
    _S.WARMING_UP: frozenset({_S.READY, _S.STOPPED}),
    _S.READY: frozenset({_S.SERVING, _S.DRAINING, _S.STOPPED}),
    _S.SERVING: frozenset({_S.DRAINING}),
    # back to serving: a revert during the drain; back to ready: parked for an instant return
    _S.DRAINING: frozenset({_S.SERVING, _S.READY, _S.STOPPED}),
    _S.STOPPED: frozenset(),
}
ANSWERS = frozenset({_S.READY, _S.SERVING})
"""States in which a slot takes requests: a ready one only those that name its version."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a version came from; empty and zero for an artifact registered by hand."""

    run: str = ""
    checkpoint: str = ""
    step: int = 0
    attempt: int = 0
    checkpoint_digest: str = ""


class Handle:
    """One request's hold on a slot. `abort`, when set, makes the waiting request fail at once; the work behind it still ends by itself."""

    __slots__ = ("abort", "cut", "epoch", "request_id", "slot")

    def __init__(self, slot: Slot, epoch: int, request_id: str) -> None:
        self.slot = slot
        self.epoch = epoch
        self.request_id = request_id
        self.cut = False
        self.abort: asyncio.Future[Any] | None = None

    def release(self) -> None:
        """Gives the slot back. Exactly once."""
        self.slot.give_back(self)


@dataclass(frozen=True, slots=True)
class Drained:
    """How a drain ended: requests that finished in it, and those that were cut at its deadline."""

    num_drained: int
    cut_request_ids: tuple[str, ...]
    num_cut: int


@dataclass(frozen=True, slots=True)
class Warmup:
    """How the warm-up went.

    Attributes:
        best_seconds: the fastest run, and `best_elements` the input elements it had: what a run costs when nothing else disturbs.
        hop_seconds: the fastest way from the event loop into a thread and back.
    """

    iterations: int
    num_recorded: int
    first_ms: float
    median_ms: float
    best_seconds: float
    best_elements: int
    hop_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class Slot:
    """One loaded version; `name` is `models/{model}/versions/{version}`. `opened` is None before the load ended and after the slot stopped.

    `lane` is the queue in which its requests find together; None for a version that does not batch. `threads` run it, and nothing else, when its
    model.toml says `instances`; `plan` is an ensemble's; `apart` says that it lives in another process; one engine serves them all, for all engines may be run by several threads.
    """

    model: str
    version: str
    artifact_uri: str
    origin: Origin
    digest: str = ""
    state: SlotState = SlotState.INITIALIZING
    opened: Opened | None = None
    warmup: Warmup | None = None
    error: str = ""
    parked: bool = False
    stats: VersionStats = field(default_factory=VersionStats)
    handles: set[Handle] = field(default_factory=set)
    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    output_names: tuple[str, ...] = ()
    output_specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    lane: Lane | None = None
    processing: Processing | None = None
    threads: ThreadPoolExecutor | None = None
    plan: Plan | None = None
    apart: bool = False
    name: str = field(init=False)
    _empty: asyncio.Event = field(default_factory=asyncio.Event)
    _fitting: set[tuple[Described, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.name = version_name(self.model, self.version)

    @property
    def in_flight(self) -> int:
        """Requests that hold the slot now."""
        return len(self.handles)

    @property
    def step(self) -> int:
        """The training step the version came from; 0 when unknown."""
        if self.origin.step or self.opened is None or self.opened.spec is None:
            return self.origin.step
        return self.opened.spec.step

    def move(self, to: SlotState) -> None:
        """Changes the state; staying is not a change.

        Raises:
            IllegalTransition: the table has no such arrow.
        """
        if to is self.state:
            return
        if to not in TRANSITIONS[self.state]:
            raise IllegalTransition(
                f"{self.name} is {self.state} and can't become {to}",
                metadata={"version": self.name, "state": self.state, "to": to},
            )
        self.state = to
        if to is SlotState.STOPPED:
            self._close_when_empty()

    def loaded(self, opened: Opened) -> None:
        """Takes the engine and waits for its warm-up."""
        signature = opened.engine.signature
        self.opened, self.digest, self.apart = opened, opened.digest, opened.num_apart > 0
        self.specs = {spec.name: spec for spec in signature.inputs}
        self.output_specs = {spec.name: spec for spec in signature.outputs}
        self.output_names = tuple(self.output_specs)
        self.processing = opened.processing
        if opened.processing is not None:
            self.output_specs = {**self.output_specs, **opened.processing.specs}
        self.lane = lane_for(opened.spec.batching if opened.spec is not None else None, signature)
        instances = (opened.spec.instances if opened.spec is not None else 0) or opened.num_apart
        self.threads = ThreadPoolExecutor(instances, f"infer-{self.name}") if instances else None
        self.plan = opened.engine.plan if isinstance(opened.engine, EnsembleEngine) else None
        self.move(SlotState.WARMING_UP)

    def check(self, described: tuple[Described, ...]) -> None:
        """Holds a request's tensors to the signature; what fitted once is not looked at again. Raises InvalidArgument `INVALID_TENSOR`."""
        if described in self._fitting:
            return
        assert self.opened is not None, "a held slot keeps its engine"
        if any(tensor.name == IMAGE and tensor.name not in self.specs for tensor in described):
            raise no_images(self.name)
        check_described(described, self.opened.engine.signature, self.specs)
        if len(self._fitting) < FITTING_MAX:
            self._fitting.add(described)

    def fail(self, reason: str) -> None:
        """Ends a load or a warm-up that went wrong."""
        self.error = reason
        self.move(SlotState.STOPPED)

    def take(self, epoch: int, request_id: str) -> Handle:
        """A handle for one request."""
        handle = Handle(self, epoch, request_id)
        self.handles.add(handle)
        return handle

    def give_back(self, handle: Handle) -> None:
        """Ends one hold; closes a stopped slot's engine with the last."""
        self.handles.remove(handle)
        if not self.handles:
            self._empty.set()
            if self.state is SlotState.STOPPED:
                self._close_when_empty()

    def _close_when_empty(self) -> None:
        if not self.handles and self.opened is not None:
            opened, self.opened = self.opened, None
            opened.engine.close()
            self.end_threads()

    def end_threads(self, *, wait: bool = False) -> None:
        """Lets its own threads go, after what they run now. Idempotent."""
        if self.threads is not None:
            self.threads.shutdown(wait=wait, cancel_futures=True)

    async def drain(self, clock: Clock, timeout_seconds: float) -> Drained:
        """Waits until nobody holds the slot, at most `timeout_seconds`; then cuts what is left, unless the slot was routed again meanwhile.

        A cut request is answered UNAVAILABLE at once; its engine run ends by itself, and only then may the engine be closed.
        """
        at_start = len(self.handles)
        if self.handles:
            await self._until_empty(clock, timeout_seconds)
        if self.state is not SlotState.DRAINING:
            return Drained(at_start - min(at_start, len(self.handles)), (), 0)  # routed again meanwhile: a revert
        left = [handle for handle in self.handles if not handle.cut]
        for handle in left:
            handle.cut = True
            if handle.abort is not None and not handle.abort.done():
                handle.abort.set_exception(_drained_away(self.name))
        return Drained(max(0, at_start - len(left)), tuple(handle.request_id for handle in left[:100]), len(left))

    async def _until_empty(self, clock: Clock, timeout_seconds: float) -> None:
        self._empty.clear()
        async with asyncio.TaskGroup() as group:
            timer = group.create_task(clock.sleep(timeout_seconds))
            waiter = group.create_task(self._empty.wait())
            await asyncio.wait((timer, waiter), return_when=asyncio.FIRST_COMPLETED)
            timer.cancel()
            waiter.cancel()


def _drained_away(name: str) -> Unavailable:
    return Unavailable(
        f"{name} was drained before this request ended; send it again",
        reason="DRAINING",
        retry_after_seconds=RETRY_SECONDS,
    )


def no_images(name: str) -> InvalidArgument:
    """The refusal of an encoded image by a version that takes none."""
    return InvalidArgument(
        f"{IMAGE}: {name} takes no images: its model.toml has no [preprocess]", reason="NO_IMAGES", field=IMAGE
    )


class ModelRoute:
    """A route as the data plane uses it: the split, the picker, and the slots it names. Never changed once made."""

    __slots__ = ("picker", "route", "slots")

    def __init__(self, route: Route, slots: Mapping[str, Slot]) -> None:
        self.route = route
        self.picker = Picker(route.weights)
        self.slots = {version: slots[version] for version in route.versions()}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything admission may look at."""

    routes: Mapping[str, ModelRoute] = field(default_factory=lambda: MappingProxyType({}))
    slots: Mapping[str, Mapping[str, Slot]] = field(default_factory=lambda: MappingProxyType({}))


class Registry:
    """Admits requests by the current snapshot. Writers replace the snapshot; readers never see it half made."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()

    def admit(self, model: str, version: str, request_id: str) -> Handle:
        """A handle on the version that the route picks, or on the one named.

        Raises:
            NotFound: `MODEL_NOT_FOUND`, `VERSION_NOT_FOUND`.
            Unavailable: `MODEL_NOT_READY`, `DRAINING`; worth trying again.
        """
        snapshot = self.snapshot
        current = snapshot.routes.get(model)
        if version:
            return self._named(snapshot, model, version).take(current.route.epoch if current else 0, request_id)
        picked = current.picker.pick() if current is not None else None
        if current is None or picked is None:
            raise self._not_routed(snapshot, model)
        return current.slots[picked].take(current.route.epoch, request_id)

    def _named(self, snapshot: Snapshot, model: str, version: str) -> Slot:
        slot = self.find(model, version, snapshot)
        if slot.state is SlotState.DRAINING:
            raise Unavailable(
                f"{slot.name} is draining; name no version to follow the route",
                reason="DRAINING",
                retry_after_seconds=RETRY_SECONDS,
            )
        if slot.state not in ANSWERS:
            raise Unavailable(
                f"{slot.name} is {slot.state}",
                reason="MODEL_NOT_READY",
                retry_after_seconds=RETRY_SECONDS,
                metadata={"state": slot.state},
            )
        return slot

    def _not_routed(self, snapshot: Snapshot, model: str) -> NotFound | Unavailable:
        if model not in snapshot.slots and model not in snapshot.routes:
            return model_not_found(model)
        return Unavailable(
            f"model {model!r} is loaded and no version of it is routed",
            reason="MODEL_NOT_READY",
            retry_after_seconds=RETRY_SECONDS,
        )

    def find(self, model: str, version: str, snapshot: Snapshot | None = None) -> Slot:
        """The slot of a version, in whatever state. Raises NotFound."""
        slots = (snapshot or self.snapshot).slots.get(model)
        if slots is None:
            raise model_not_found(model)
        if version not in slots:
            raise NotFound(
                f"model {model!r} has no version {version[:80]!r} loaded here; loaded: {', '.join(slots)}",
                reason="VERSION_NOT_FOUND",
                metadata={"model": model, "version": version[:80]},
            )
        return slots[version]

    def all_slots(self) -> list[Slot]:
        """Every slot, in the order of loading per model."""
        return [slot for slots in self.snapshot.slots.values() for slot in slots.values()]

    def close(self) -> None:
        """Closes the engines of all slots that nobody holds; the process is about to end."""
        for slot in self.all_slots():
            if slot.opened is not None and not slot.handles:
                opened, slot.opened = slot.opened, None
                opened.engine.close()

    def put(self, slot: Slot) -> None:
        """Adds or replaces the slot of a version."""
        slots = {model: dict(versions) for model, versions in self.snapshot.slots.items()}
        slots.setdefault(slot.model, {})[slot.version] = slot
        self.snapshot = replace(self.snapshot, slots=_frozen(slots))

    def drop(self, slot: Slot) -> None:
        """Forgets a slot, and the model with its last one unless a route still names the model."""
        slots = {
            model: {v: s for v, s in versions.items() if s is not slot}
            for model, versions in self.snapshot.slots.items()
        }
        self.snapshot = replace(
            self.snapshot, slots=_frozen({model: versions for model, versions in slots.items() if versions})
        )

    def switch(self, route: Route) -> list[Slot]:
        """Puts a route in force, by one reference assignment; returns the slots that left it.

        Every version of the route must have a slot that answers or drains: the caller checked.
        """
        before = self.snapshot.routes.get(route.model)
        made = ModelRoute(route, self.snapshot.slots.get(route.model, {}))
        for slot in made.slots.values():
            slot.move(SlotState.SERVING)
            slot.parked = False
        self.snapshot = replace(self.snapshot, routes=MappingProxyType({**self.snapshot.routes, route.model: made}))
        left = [slot for version, slot in before.slots.items() if version not in made.slots] if before else []
        for slot in left:
            slot.move(SlotState.DRAINING)
        return left


def _frozen(slots: Mapping[str, Mapping[str, Slot]]) -> Mapping[str, Mapping[str, Slot]]:
    return MappingProxyType({model: MappingProxyType(dict(versions)) for model, versions in slots.items()})


def model_not_found(model: str) -> NotFound:
    """The refusal of a model that this replica does not have."""
    return NotFound(
        f"model {model[:80]!r} is not loaded on this replica", reason="MODEL_NOT_FOUND", metadata={"model": model[:80]}
    )
