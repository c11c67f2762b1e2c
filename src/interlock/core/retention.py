"""Retention: which checkpoints of a run may be deleted. Pure; who deletes does it one by one, and only after the successor is durable.

Rules of the file:

- A checkpoint is kept when any rule keeps it; `plan` gives every reason, `expired` only what is left over.
- Kept: the last `keep_last` that are not quarantined; the best `keep_best` good ones by metric; pinned ones; the youngest known-good;
  whatever serves now, served before, is the target of a rollback, or is being read or written.
- Quarantined ones are kept for a look back, `keep_quarantined` of them.
- Order is numeric, by seq: a step of 10000 is younger than one of 9900 however they are spelt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from interlock.core.fields import refuse
from interlock.core.recovery import CheckpointState


class Better(StrEnum):
    """Which end of a metric is the better one."""

    HIGHER = "higher"
    LOWER = "lower"


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """How many checkpoints of a run stay. `best_metric` empty: no best is kept."""

    keep_last: int = 5  # ops plan: at most five checkpoints
    keep_best: int = 1
    best_metric: str = "reward"
    best_is: Better = Better.HIGHER
    keep_quarantined: int = 1

    def __post_init__(self) -> None:
        for name, least in (("keep_last", 1), ("keep_best", 0), ("keep_quarantined", 0)):
            if getattr(self, name) < least:
                raise refuse(name, f"must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Kept:
    """What retention needs to know about one checkpoint; `metric` is the value of the policy's `best_metric`, if it has one."""

    checkpoint: str
    seq: int
    state: CheckpointState
    metric: float | None = None
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class InUse:
    """Checkpoints that somebody needs, by id."""

    serving: frozenset[str] = frozenset()
    previous_serving: frozenset[str] = frozenset()
    rollback_target: frozenset[str] = frozenset()
    in_flight: frozenset[str] = frozenset()


NOBODY = InUse()


def plan(checkpoints: Iterable[Kept], policy: RetentionPolicy, in_use: InUse = NOBODY) -> Mapping[str, tuple[str, ...]]:
    """Checkpoint id -> the reasons to keep it, oldest first; no reason means it may be deleted."""
    ordered = sorted(checkpoints, key=lambda item: item.seq)
    sound = [item for item in ordered if item.state is not CheckpointState.QUARANTINED]
    quarantined = [item for item in ordered if item.state is CheckpointState.QUARANTINED]
    good = [item for item in ordered if item.state is CheckpointState.GOOD]
    rules: dict[str, frozenset[str]] = {
        f"last {policy.keep_last}": _ids(sound[-policy.keep_last :]),
        f"best by {policy.best_metric}": _ids(_best(good, policy)),
        "youngest known-good": _ids(good[-1:]),
        "pinned": _ids(item for item in ordered if item.pinned),
        f"last {policy.keep_quarantined} quarantined": _ids(_tail(quarantined, policy.keep_quarantined)),
        "serving": in_use.serving,
        "served before": in_use.previous_serving,
        "rollback target": in_use.rollback_target,
        "in flight": in_use.in_flight,
    }
    return {
        item.checkpoint: tuple(reason for reason, ids in rules.items() if item.checkpoint in ids) for item in ordered
    }


def expired(checkpoints: Iterable[Kept], policy: RetentionPolicy, in_use: InUse = NOBODY) -> tuple[str, ...]:
    """The ids that may be deleted, oldest first."""
    return tuple(checkpoint for checkpoint, reasons in plan(checkpoints, policy, in_use).items() if not reasons)


def _ids(items: Iterable[Kept]) -> frozenset[str]:
    return frozenset(item.checkpoint for item in items)


def _tail(items: list[Kept], count: int) -> list[Kept]:
    return items[-count:] if count else []


def _best(good: list[Kept], policy: RetentionPolicy) -> list[Kept]:
    """The best good ones; of two equals the younger."""
    if not policy.best_metric:
        return []
    sign = 1 if policy.best_is is Better.HIGHER else -1
    measured = [item for item in good if item.metric is not None]
    ranked = sorted(measured, key=lambda item: (sign * (item.metric or 0.0), item.seq))
    return _tail(ranked, policy.keep_best)
