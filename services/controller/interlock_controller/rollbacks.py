"""Rollbacks of runs: decided on what the trainer proposes and what is on record here, recorded once, and followed through to traffic.

A checkpoint that falls takes its descendants and their versions with it: those are forbidden, and traffic leaves those that serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog

from interlock.core import lineage
from interlock.core.lineage import CheckpointNode
from interlock.core.ports import Clock
from interlock.core.swap import Swap
from interlock.errors import InterlockError
from interlock.runtime.changed import Changed
from interlock.stores.controller import CheckpointRow, ControllerStore, RollbackRow
from interlock_controller.swaps import Swaps

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a run goes back to; no checkpoint means that it is paused for a person."""

    checkpoint: str
    step: int
    why: str = ""


def confirm_target(
    proposed: Target, onset_step: int, checkpoints: Sequence[CheckpointRow], fallen: frozenset[str]
) -> Target:
    """The proposed target if this side knows nothing against it, else the youngest sound good one not after the onset. Pure."""
    sound = {c.name: c for c in checkpoints if c.state == "GOOD" and c.name not in fallen}
    if not proposed.checkpoint or proposed.checkpoint in sound:
        return proposed
    earlier = [c for c in sound.values() if c.step <= (onset_step or proposed.step)]
    if not earlier:
        return Target("", 0, f"{proposed.checkpoint} is quarantined here and no older good checkpoint is left")
    chosen = max(earlier, key=lambda c: (c.step, c.attempt))
    return Target(chosen.name, chosen.step, f"{proposed.checkpoint} is quarantined here")


class Rollbacks:
    """Records rollbacks and draws their consequences for versions."""

    def __init__(self, store: ControllerStore, swaps: Swaps, clock: Clock, changed: Changed) -> None:
        self._store = store
        self._swaps = swaps
        self._clock = clock
        self._changed = changed

    def known(self, rollback_id: str) -> RollbackRow | None:
        """What is on record under an id."""
        return self._store.rollback(rollback_id)

    def decide(
        self, proposed: RollbackRow, onset_step: int, checkpoints: Sequence[CheckpointRow]
    ) -> tuple[RollbackRow, str]:
        """The target that holds, with a reason where it is not the proposed one. Nothing is written."""
        known = {row.name: row for row in self._store.checkpoints(proposed.run)}
        for row in checkpoints:
            if known.get(row.name) != row:  # a write is a disk sync, and the trainer waits for two seconds at most
                self._store.put_checkpoint(row)
        fallen = frozenset(name for row in self._store.rollbacks(proposed.run) for name in row.quarantined) | {
            v.origin.checkpoint
            for m in self._store.models()
            for v in self._store.versions(m)
            if v.quarantined and v.origin.checkpoint
        }
        target = confirm_target(Target(proposed.target, proposed.to_step), onset_step, checkpoints, fallen - {""})
        return replace(proposed, target=target.checkpoint, to_step=target.step), target.why

    def put(self, row: RollbackRow, actor: str) -> tuple[RollbackRow, list[Swap]]:
        """Records a rollback once and forbids every version that descends from what it quarantined."""
        fallen = self._fallen(row)
        versions = [(m, v) for m, v in fallen.versions]
        affected = tuple(f"models/{m}/versions/{v}" for m, v in versions)
        stored = self._store.put_rollback(
            replace(row, affected=affected, created_at=row.created_at or self._clock.now())
        )
        swaps = []
        for model, version in versions:
            known = self._store.version(model, version)
            if known is not None and not known.quarantined:
                swaps += self._forbid(model, version, stored, actor)
        self._changed.fire()
        return stored, swaps

    def _fallen(self, row: RollbackRow) -> lineage.Condemned:
        nodes = {node.name: node for node in self._nodes(row.run)}
        versions = [node for model in self._store.models() for node in self._swaps.nodes(model)]
        return lineage.condemn(nodes, versions, row.quarantined)

    def _nodes(self, run: str) -> list[CheckpointNode]:
        """The run's checkpoints with their parents: the one before it in its attempt, or the target of the rollback that began it."""
        rows = sorted(self._store.checkpoints(run), key=lambda c: (c.attempt, c.step))
        starts = {r.attempt: r.target for r in self._store.rollbacks(run) if r.attempt}
        nodes: list[CheckpointNode] = []
        for row in rows:
            before = nodes[-1].name if nodes and nodes[-1].attempt == row.attempt else starts.get(row.attempt, "")
            nodes.append(CheckpointNode(row.name, run, row.step, row.attempt, before))
        return nodes

    def _forbid(self, model: str, version: str, row: RollbackRow, actor: str) -> list[Swap]:
        why = f"descends from a checkpoint that rollback {row.id} quarantined ({row.rule})"
        try:
            _, swap = self._swaps.quarantine(model, version, why, actor, row.trace)
        except InterlockError as error:
            _log.error("cannot_forbid", model=model, version=version, reason=error.reason, problem=error.message)
            return []
        return [swap] if swap is not None else []
