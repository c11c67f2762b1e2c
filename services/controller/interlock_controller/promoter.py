"""Good checkpoints become versions, and versions reach traffic: follows the trainer, asks `core.promotion`, and sees each yes through.

A promotion is a row: EXPORTING -> REGISTERED -> SWAPPED, or FAILED. Each step may be repeated after a crash and changes nothing the
second time: an export that exists is returned, the same bytes are the same version, the same request id is the same swap.
"""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace

import structlog

from interlock.core.ports import Clock
from interlock.core.promotion import PROMOTER, Contender, Hold, PromotionPolicy, Serving, best, judge, moved_back_by
from interlock.core.swap import Concurrency, State, SwapSpec
from interlock.errors import FailedPrecondition, InterlockError
from interlock.runtime import telemetry
from interlock.runtime.changed import Changed
from interlock.stores.controller import CheckpointRow, ControllerStore, PromotionRow, Request
from interlock_controller.registry import Registry
from interlock_controller.swaps import Swaps
from interlock_controller.trainer import TrainerClient, Update

RETRY_SECONDS = 1.0
CATCH_UP_SECONDS = 5.0
TRIES_MAX = 30
SOAK_SECONDS = (
    2.0  # nobody looks on when a trainer promotes: the candidate's answers are watched this long after the switch
)
PINNED_VERSIONS = 3  # the serving one, the one before it, and the one on its way
_RETRYABLE = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED", "RESOURCE_EXHAUSTED"})
_UNDER_WAY = frozenset({"EXPORTING", "REGISTERED"})
_log = structlog.get_logger(__name__)


class Promoter:
    """One promotion per model at a time."""

    def __init__(
        self,
        store: ControllerStore,
        trainer: TrainerClient,
        registry: Registry,
        swaps: Swaps,
        clock: Clock,
        changed: Changed,
    ) -> None:
        self.policies: dict[str, PromotionPolicy] = {}
        self._store = store
        self._trainer = trainer
        self._registry = registry
        self._swaps = swaps
        self._clock = clock
        self._changed = changed
        self._held: dict[str, str] = {}
        self._known: dict[str, CheckpointRow] = {}

    # --- following the trainer --------------------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Watches the trainer, for ever. What a broken watch may have missed is read again, at once and every CATCH_UP_SECONDS."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            tasks.create_task(self._catch_up())

    async def _watch(self) -> None:
        while True:
            try:
                async for update in self._trainer.watch():
                    self.saw(update)
            except InterlockError as error:
                _log.debug("trainer_lost", trainer=self._trainer.address, reason=error.reason)
            except sqlite3.OperationalError as error:  # what was not written is caught up with
                _log.error("store_failed", problem=str(error))
            await self._clock.sleep(RETRY_SECONDS)

    async def _catch_up(self) -> None:
        up: bool | None = None
        while True:
            try:
                for update in await self._trainer.catch_up():
                    self.saw(update)
                now_up, why = True, ""
            except InterlockError as error:
                now_up, why = False, error.reason
            except sqlite3.OperationalError as error:
                now_up, why = False, f"store: {error}"
            if now_up is not up:
                _log.info("trainer_up" if now_up else "trainer_lost", trainer=self._trainer.address, why=why)
                up = now_up
            await self._clock.sleep(CATCH_UP_SECONDS if up else RETRY_SECONDS)

    def saw(self, update: Update) -> None:
        """Takes one message of the trainer in."""
        if update.policy is not None:
            self.policies[update.run] = update.policy
        else:
            self.policies.pop(update.run, None)
        row = update.checkpoint
        if row is not None and self._known.get(row.name) != row:  # the trainer says the same thing again and again
            self._store.put_checkpoint(row)
            self._known[row.name] = row
            self._changed.fire()

    # --- deciding -----------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks for what to promote on every change, for ever."""
        while True:
            woken = self._changed.next()
            try:
                again = await self.look()
            except sqlite3.OperationalError as error:  # e.g. disk full: nothing was written, so nothing was done
                _log.error("store_failed", problem=str(error))
                again = True
            if again:
                await self._clock.sleep(RETRY_SECONDS)
            else:
                await woken.wait()

    async def look(self) -> bool:
        """One pass: takes what is under way a step further, then decides on new ones. True when something waits for another try."""
        waiting = False
        for row in self._store.promotions():
            if row.state in _UNDER_WAY:
                waiting |= not await self._see_through(row)
        for run, policy in list(self.policies.items()):
            chosen = self._consider(run, policy)
            if chosen is not None:
                waiting |= not await self._see_through(chosen)
        return waiting

    def _consider(self, run: str, policy: PromotionPolicy) -> PromotionRow | None:
        rows = self._store.promotions(policy.model)
        if any(row.state in _UNDER_WAY for row in rows):
            return None
        promoted = frozenset(row.checkpoint for row in rows)
        quarantined = self._quarantined(run, policy.model)
        contenders = [contender(c) for c in self._store.checkpoints(run)]
        fresh = tuple(c for c in contenders if c.name not in promoted and not {c.name, c.digest} & quarantined)
        chosen = best(policy, fresh)
        if chosen is None:
            return None
        serving = self._serving(policy.model, rows)
        verdict = judge(policy, chosen, serving, self._clock.now(), promoted=promoted, quarantined=quarantined)
        if isinstance(verdict, Hold):
            self._say(verdict)
            return None
        _log.info("promoting", checkpoint=chosen.name, model=policy.model, why=verdict.why)
        with telemetry.span("controller.promote", checkpoint=chosen.name):
            trace = telemetry.current_traceparent()
        row = PromotionRow(chosen.name, run, policy.model, why=verdict.why, created_at=self._clock.now(), trace=trace)
        self._store.put_promotion(row)
        return row

    def _say(self, hold: Hold) -> None:
        if self._held.get(hold.checkpoint) != hold.why:
            self._held = {hold.checkpoint: hold.why}
            _log.info("not_promoted", checkpoint=hold.checkpoint, why=hold.why)

    def _quarantined(self, run: str, model: str) -> frozenset[str]:
        """Names and digests of checkpoints that must not be promoted: flagged by a rollback, or behind a forbidden version."""
        flagged = {name for row in self._store.rollbacks(run) for name in row.quarantined}
        behind = {v.origin.checkpoint for v in self._store.versions(model) if v.quarantined and v.origin.checkpoint}
        return frozenset(flagged | behind)

    def _serving(self, model: str, rows: list[PromotionRow]) -> Serving | None:
        """The bar: the version on its way if one is, else the one that serves; None when nothing is and nothing does."""
        active = [
            s
            for s in self._store.active_swaps(model)
            if s.state not in {State.KEEP_WARM, State.REVERTING, State.ABORTING}
        ]
        version = active[-1].spec.candidate if active else self._store.route(model).heaviest()
        row = self._store.version(model, version) if version else None
        if row is None:
            return None
        done = [r.created_at for r in rows if r.state == "SWAPPED"]
        return Serving(row.version, row.metrics, max(done, default=0.0), self._moved_back_by(model))

    def _moved_back_by(self, model: str) -> str:
        newest = self._store.completed_swaps(model, limit=1)
        if not newest or not newest[0].stable:
            return ""
        left = max(newest[0].stable, key=lambda weight: weight.weight).version
        row = self._store.version(model, left)
        forbidden = row is None or bool(row.quarantined)
        return moved_back_by(left, newest[0].spec.candidate, newest[0].actor, forbidden=forbidden)

    # --- seeing it through ------------------------------------------------------------------------------------------------------------

    async def _see_through(self, row: PromotionRow) -> bool:
        """Takes a promotion as far as it goes now; False when it has to be tried again."""
        try:
            with telemetry.span("controller.promotion", parent=row.trace, checkpoint=row.checkpoint):
                self._refuse_fallen(row)
                if row.state == "EXPORTING":
                    row = await self._register(row)
                    self._refuse_fallen(row)
                if row.state == "REGISTERED":
                    row = self._swap(row)
        except InterlockError as error:
            return self._failed(row, error)
        await self._unpin(row)
        return True

    def _refuse_fallen(self, row: PromotionRow) -> None:
        """A rollback that undid the checkpoint while it was on its way forbids what has become of it.

        Raises:
            FailedPrecondition: `QUARANTINED`.
        """
        if row.checkpoint not in self._quarantined(row.run, row.model):
            return
        why = f"a rollback quarantined {row.checkpoint} while it was being promoted"
        if row.version:
            self._swaps.quarantine(row.model, row.version, why, PROMOTER, row.trace)
        raise FailedPrecondition(why, reason="QUARANTINED", metadata={"checkpoint": row.checkpoint})

    async def _register(self, row: PromotionRow) -> PromotionRow:
        await self._trainer.pin(row.checkpoint, True)
        exported = await self._trainer.export(row.checkpoint, row.why)
        known = next((c for c in self._store.checkpoints(row.run) if c.name == row.checkpoint), None)
        version = await self._registry.register(
            row.model,
            exported.artifact_uri,
            digest=exported.digest,
            origin=exported.origin,
            metrics={**exported.metrics, **(known.metrics if known else {})},
            actor=PROMOTER,
        )
        return self._put(replace(row, state="REGISTERED", version=version.version))

    def _swap(self, row: PromotionRow) -> PromotionRow:
        request = Request(f"promote/{row.checkpoint}", "CreateSwap", f"{row.model}/{row.version}")
        spec = SwapSpec(row.model, row.version, concurrency=Concurrency.SUPERSEDE, soak_seconds=SOAK_SECONDS)
        try:
            trace = telemetry.current_traceparent() or row.trace
            swap = self._swaps.create(spec, actor=PROMOTER, why=row.why, request=request, trace=trace)
        except InterlockError as error:
            if error.reason != "ALREADY_STABLE":
                raise
            return self._put(replace(row, state="SWAPPED", why="serves already"))
        return self._put(replace(row, state="SWAPPED", swap=swap.id))

    def _put(self, row: PromotionRow) -> PromotionRow:
        self._store.put_promotion(row)
        self._changed.fire()
        return row

    def _failed(self, row: PromotionRow, error: InterlockError) -> bool:
        current = next((r for r in self._store.promotions(row.model) if r.checkpoint == row.checkpoint), row)
        tries = current.tries + 1
        final = error.kind not in _RETRYABLE or tries >= TRIES_MAX
        _log.warning(
            "promotion_failed",
            checkpoint=row.checkpoint,
            reason=error.reason,
            problem=error.message,
            tries=tries,
            final=final,
        )
        state = "FAILED" if final else current.state
        self._store.put_promotion(
            replace(current, state=state, tries=tries, why=f"{error.reason}: {error.message}" if final else current.why)
        )
        return final

    async def _unpin(self, row: PromotionRow) -> None:
        """Lets checkpoints go whose versions are history; failing to is no harm."""
        done = [r.checkpoint for r in self._store.promotions(row.model) if r.state == "SWAPPED" and r.run == row.run]
        for checkpoint in done[-PINNED_VERSIONS - 1 : -PINNED_VERSIONS]:
            try:
                await self._trainer.pin(checkpoint, False)
            except InterlockError as error:
                _log.info("unpin_failed", checkpoint=checkpoint, reason=error.reason)


def contender(row: CheckpointRow) -> Contender:
    """A checkpoint as the promotion rule sees it."""
    return Contender(row.name, row.step, row.state == "GOOD", row.metrics, row.digest)
