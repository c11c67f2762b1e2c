"""Where a version came from, and what falls with a checkpoint: version <- checkpoint <- run attempt. Pure graph questions.

Rules of this file
- A checkpoint descends from its parent: the checkpoint that its attempt was saved after, or was rolled back to.
- Quarantining a checkpoint flags every descendant checkpoint and every version of any of them; ancestors stay as they are.
- A cycle cannot be stored, but if one is read it ends the walk instead of hanging it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckpointNode:
    """A checkpoint by resource name; `parent` is empty for a run's first."""

    name: str
    run: str
    step: int
    attempt: int = 1
    parent: str = ""


@dataclass(frozen=True, slots=True)
class VersionNode:
    """A version of a model; `checkpoint` is empty for one that was registered by hand."""

    model: str
    version: str
    digest: str
    checkpoint: str = ""
    quarantined: bool = False
    proven: bool = False  # has a COMPLETED receipt


@dataclass(frozen=True, slots=True)
class Condemned:
    """What falls: checkpoint names, and versions as (model, version)."""

    checkpoints: frozenset[str]
    versions: tuple[tuple[str, str], ...]


def ancestors(checkpoints: Mapping[str, CheckpointNode], name: str) -> tuple[str, ...]:
    """The line of descent, youngest first, `name` included; ends at the first unknown parent."""
    line: list[str] = []
    while name and name not in line:
        line.append(name)
        node = checkpoints.get(name)
        name = node.parent if node else ""
    return tuple(line)


def condemn(
    checkpoints: Mapping[str, CheckpointNode], versions: Iterable[VersionNode], bad: Iterable[str]
) -> Condemned:
    """Everything that descends from the bad checkpoints, they themselves included."""
    roots = frozenset(bad)
    fallen = roots | {name for name in checkpoints if roots & set(ancestors(checkpoints, name))}
    return Condemned(fallen, tuple((v.model, v.version) for v in versions if v.checkpoint and v.checkpoint in fallen))


def younger(checkpoints: Iterable[CheckpointNode], target: CheckpointNode) -> frozenset[str]:
    """The checkpoints that a rollback to `target` leaves behind: those of its run's attempts so far with a later step."""
    return frozenset(
        c.name for c in checkpoints if c.run == target.run and c.attempt >= target.attempt and c.step > target.step
    )


def refuge(versions: Iterable[VersionNode], left: str, order: Iterable[str]) -> str | None:
    """Where traffic goes when `left` must not serve: the first sound version of `order` (newest service first), proven ones first."""
    sound = {v.version: v for v in versions if not v.quarantined and v.version != left}
    served = [version for version in order if version in sound]
    proven = [version for version in served if sound[version].proven]
    return next(iter([*proven, *served]), None)
