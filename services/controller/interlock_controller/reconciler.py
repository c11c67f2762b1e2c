"""The loop that makes the world as the store says: snapshot -> decide -> persist -> command, for every running swap and every replica.

What is decided stands in `interlock.core`; here it is written down first and carried out second. Nothing in this object's memory
decides anything that a restart could not see again. One event loop, one writer: a round never waits, only commands do.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

import structlog

from interlock.core import swap_plan
from interlock.core.assignment import assign
from interlock.core.ports import Clock
from interlock.core.swap import WORKING, Ack, Admission, Event, Failure, State, Swap, record, resume
from interlock.core.swap_plan import Admit, ApplyRoute, Decision, ReplicaCommand, Snapshot, WriteReceipt
from interlock.errors import Aborted, InterlockError, NotFound
from interlock.runtime import failpoints, telemetry
from interlock.runtime.changed import Changed
from interlock.stores.controller import ControllerStore
from interlock.stores.files import ModelRepository
from interlock_controller import metrics
from interlock_controller.fleet import Fleet
from interlock_controller.watchdog import Watchdog

RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.2, 5.0
FORGET_SECONDS = 60.0
MOVES_MAX = 30  # of one swap in one round: more than any path through the table
RETRYABLE = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED"})
LOST_AGAIN = frozenset({"SLOT_UNKNOWN", "NOT_LOADED", "RELEASED", "VERSION_NOT_READY", "VERSION_ROUTED"})
"""Refusals that only say that the replica is not where it was thought to be: look again."""
_PREPARATION = ("Prepare", "Warm", "Compare", "Admit")
_log = structlog.get_logger(__name__)
Command = Admit | ReplicaCommand
Key = tuple[str, ...]


@dataclass(slots=True)
class _Running:
    task: asyncio.Task[None]
    swap: str
    kind: str


class Reconciler:
    """Drives all swaps and keeps every replica on the committed routes.

    Args:
        changed: fired after every write and by the fleet; waking it runs a round.
    """

    def __init__(
        self,
        store: ControllerStore,
        fleet: Fleet,
        repository: ModelRepository,
        clock: Clock,
        changed: Changed,
        *,
        tick_seconds: float,
    ) -> None:
        self.changed = changed
        self.token = 0
        self._store = store
        self._fleet = fleet
        self._repository = repository
        self._clock = clock
        self._tick_seconds = tick_seconds
        self._running: dict[Key, _Running] = {}
        self._failures: dict[Key, tuple[int, float]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._watchdog = Watchdog()

    def take_over(self) -> None:
        """Takes the lease and takes up what an earlier controller left. Once, before `run`."""
        self.token = self._store.take_lease()
        now = self._clock.now()
        for swap in self._store.active_swaps():
            resumed = resume(swap, now)
            if resumed is not swap:
                _log.info("swap_taken_up", swap=swap.id, state=swap.state, resumes=resumed.resumes, now=resumed.state)
                self.persist(swap, Decision(resumed))
        _log.info("lease_taken", fencing_token=self.token)

    async def run(self, stopping: asyncio.Event) -> None:
        """Rounds until `stopping`; then drops what is under way, which the next controller says again.

        When another controller has taken the lease it stops the whole process: two must not steer.
        """
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            poll = tasks.create_task(self._poll(), name="poll replicas")
            while not stopping.is_set():
                woken = self.changed.next()
                try:
                    self._round()
                except Aborted as error:
                    _log.error("lease_lost", problem=error.message)
                    stopping.set()
                    break
                await _either(woken.wait(), stopping.wait(), self._clock.sleep(self._tick_seconds))
            self._tasks = None
            for task in [poll, *(running.task for running in self._running.values())]:
                task.cancel()

    async def _poll(self) -> None:
        while True:
            await self._clock.sleep(self._tick_seconds)
            for address in self._fleet.live():
                await self._fleet.refresh(address)

    # --- one round ----------------------------------------------------------------------------------------------------------------

    def _round(self) -> None:
        try:
            self._drop_pointless()
            for swap in self._store.active_swaps():
                self._drive(swap.id)
            self._assign()
            self._forget_failures()
        except sqlite3.OperationalError as error:
            _log.error(
                "store_failed", problem=str(error)
            )  # e.g. disk full: nothing was written; the next round tries again

    def _forget_failures(self) -> None:
        now = self._clock.monotonic()
        self._failures = {k: f for k, f in self._failures.items() if now < f[1] + FORGET_SECONDS}

    def _drop_pointless(self) -> None:
        """Ends the preparation of swaps that have given up."""
        for running in self._running.values():
            if running.swap and running.kind in _PREPARATION:
                swap = self._store.swap(running.swap)
                if swap is not None and swap.state not in WORKING:
                    running.task.cancel()

    def _drive(self, swap_id: str) -> None:
        for _ in range(MOVES_MAX):
            swap = self._store.swap(swap_id)
            if swap is None or swap.terminal:
                return
            decision = swap_plan.decide(self.snapshot(swap), self._clock.now())
            if decision.swap is swap:
                for command in decision.commands:
                    self._start(command, swap)
                return
            if not self._try_persist(swap, decision):
                return

    def _try_persist(self, before: Swap, decision: Decision) -> bool:
        try:
            self.persist(before, decision)
        except InterlockError as error:
            if error.reason not in {"STALE_ROW", "STALE_EPOCH"}:
                raise
            _log.info("lost_a_race", swap=before.id, reason=error.reason)
            return False
        return True

    def _assign(self) -> None:
        routes = {route.model: route for route in self._store.routes()}
        claims: dict[str, frozenset[str]] = {}
        for swap in self._store.active_swaps():
            claims[swap.spec.model] = claims.get(swap.spec.model, frozenset()) | swap.claims
        known = set(self._store.models())
        for address in self._fleet.live():
            view = self._fleet.view(address)
            assert view is not None
            self._watchdog.look(address, view, self.token, routes)
            models = (set(routes) | set(view.slots)) & known
            for command in assign({m: view.of(address, m) for m in models}, routes, claims):
                self._start(command, None)

    def snapshot(self, swap: Swap) -> Snapshot:
        """All that one decision on a swap may look at."""
        model = swap.spec.model
        active = self._store.active_swaps(model)
        position = next((i for i, s in enumerate(active) if s.id == swap.id), len(active))
        others = [s for s in active if s.id != swap.id]
        row = self._store.version(model, swap.spec.candidate)
        return Snapshot(
            swap,
            self._store.route(model),
            self._fleet.replicas(model),
            ahead=bool(active[:position]) or any(s.state is not State.PENDING for s in others),
            yielding=any(s.state is State.PENDING for s in others),
            wanted=frozenset(v for s in others for v in s.claims),
            quarantined=bool(row and row.quarantined),
        )

    def persist(self, before: Swap, decision: Decision) -> None:
        """Writes one decision; whoever waits for changes is told afterwards. Raises Aborted when the row or route has moved."""
        after = decision.swap
        entered = after.state is not before.state
        if entered:
            failpoints.reached(f"controller.{after.state}", "before_persist", default="after_persist")
        self._store.write_swap(before, decision, self._clock.now())
        if entered:
            failpoints.reached(f"controller.{after.state}", "after_persist", default="after_persist")
        self.changed.fire()

    def tell(self, swap: Swap, event: Event, message: str, reason: str = "") -> Swap:
        """A person's event, or one found outside of the plan, with the store commands that belong to it. Raises IllegalTransition."""
        decision = swap_plan.act(self.snapshot(swap), event, self._clock.now(), message, reason)
        self.persist(swap, decision)
        return decision.swap

    # --- commands -----------------------------------------------------------------------------------------------------------------

    def _start(self, command: Command, swap: Swap | None) -> None:
        key = _key(command)
        _, not_before = self._failures.get(key, (0, 0.0))
        if self._tasks is None or key in self._running or self._clock.monotonic() < not_before:
            return
        task = self._tasks.create_task(self._carry_out(key, command, swap), name=" ".join(key))
        self._running[key] = _Running(task, swap.id if swap else "", type(command).__name__)

    async def _carry_out(self, key: Key, command: Command, swap: Swap | None) -> None:
        kind = type(command).__name__
        outcome = "ok"
        try:
            with telemetry.span(
                f"controller.{kind.lower()}", parent=swap.trace if swap else "", **_attributes(command)
            ):
                await self._execute(command, swap)
            self._failures.pop(key, None)
        except InterlockError as error:
            outcome = error.reason
            self._refused(key, command, swap, error)
        except sqlite3.OperationalError as error:
            outcome = "STORE_FAILED"
            _log.error(
                "store_failed", command=kind, problem=str(error)
            )  # the result is lost; the command is given again
            self._back_off(key)
        except asyncio.CancelledError:
            outcome = "CANCELLED"
            raise
        finally:
            metrics.COMMANDS.labels(kind, outcome).inc()
            self._running.pop(key, None)
            self.changed.fire()

    async def _execute(self, command: Command, swap: Swap | None) -> None:
        if isinstance(command, Admit):
            assert swap is not None
            self._record(swap.id, await self._admit(command))
            return
        address, view = command.replica, self._fleet.view(command.replica)
        if view is None:
            return
        model, version = (
            (command.route.model, "") if isinstance(command, ApplyRoute) else (command.model, _version(command))
        )
        row = self._store.version(model, version) if version else None
        if row is None and isinstance(command, swap_plan.Prepare):
            raise NotFound(f"model {model!r} has no version {version!r}", reason="VERSION_NOT_FOUND")
        fence = (self.token, swap.id if swap else "")
        result = await self._fleet.clients[address].execute(command, fence, row, view.instance, self._clock.now())
        if isinstance(result, Ack):
            self._fleet.acknowledged(address, model, result.epoch)
            result = replace(result, at=self._clock.now())
        else:
            await self._fleet.refresh(address)
        if swap is not None and result is not None:
            self._record(swap.id, result)

    async def _admit(self, command: Admit) -> Admission:
        row = self._store.version(command.model, command.version)
        if row is None:
            raise NotFound(f"model {command.model!r} has no version {command.version!r}", reason="VERSION_NOT_FOUND")
        size = await asyncio.to_thread(self._repository.verify, command.model, command.version, row.digest)
        return Admission(row.digest, size)

    def _record(self, swap_id: str, result: Any) -> None:
        """A command's result into the row; tried again when the row moved meanwhile."""
        for _ in range(MOVES_MAX):
            swap = self._store.swap(swap_id)
            if swap is None:
                return
            after = record(swap, result, self._clock.now())
            if after is swap or self._try_persist(
                swap, Decision(after, (WriteReceipt(after.id),) if after.terminal else ())
            ):
                return

    def _refused(self, key: Key, command: Command, swap: Swap | None, error: InterlockError) -> None:
        kind, address = type(command).__name__, getattr(command, "replica", "")
        retry = error.kind in RETRYABLE or error.reason in LOST_AGAIN
        level = _log.info if retry else _log.warning
        level(
            "command_refused",
            command=kind,
            replica=address,
            swap=swap.id if swap else "",
            reason=error.reason,
            problem=error.message,
        )
        if swap is not None and not retry:
            self._record(swap.id, Failure(kind, address, error.reason, error.message))
        self._back_off(key)

    def _back_off(self, key: Key) -> None:
        times = self._failures.get(key, (0, 0.0))[0]
        pause = min(RETRY_SECONDS_MIN * 2**times, RETRY_SECONDS_MAX)
        self._failures[key] = (times + 1, self._clock.monotonic() + pause)


def _version(command: ReplicaCommand) -> str:
    return str(getattr(command, "version", "") or getattr(command, "candidate", ""))


def _key(command: Command) -> Key:
    """One command of a kind for a version on a replica at a time, whoever asks for it."""
    if isinstance(command, ApplyRoute):
        return ("ApplyRoute", command.replica, command.route.model, str(command.route.epoch))
    if isinstance(command, Admit):
        return ("Admit", command.model, command.version)
    return (type(command).__name__, command.replica, command.model, _version(command))


def _attributes(command: Command) -> dict[str, Any]:
    if isinstance(command, ApplyRoute):
        return {
            "interlock.replica": command.replica,
            "interlock.model": command.route.model,
            "interlock.epoch": str(command.route.epoch),
        }
    replica = {} if isinstance(command, Admit) else {"interlock.replica": command.replica}
    version = command.version if isinstance(command, Admit) else _version(command)
    return replica | {"interlock.model": command.model, "interlock.version": version}


async def _either(*waits: Coroutine[Any, Any, Any]) -> None:
    """Returns when the first of the waits does; the others are cancelled and awaited."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]  # noqa: TID251  live and die inside this function
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
