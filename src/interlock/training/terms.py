"""The words between a loop and its supervisor: what is reported up, what is ordered down. Plain values; the wire form is in `wire`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from interlock.core.policy import RunPolicy
from interlock.core.promotion import PromotionPolicy
from interlock.core.recovery import CheckpointState, Rollback
from interlock.core.steps import StepRecord


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What is known about one checkpoint beside its bytes. Size and digest are 0 and empty until it is durable."""

    checkpoint: str
    attempt: int
    step: int
    seq: int
    time: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    size_bytes: int = 0
    digest: str = ""
    state: CheckpointState = CheckpointState.CANDIDATE
    message: str = ""


@dataclass(frozen=True, slots=True)
class Hello:
    """The loop introduces itself. `starting` when it has no state yet and asks where to begin."""

    run: str
    pid: int
    attempt: int
    step: int
    seq: int
    policy: RunPolicy
    promotion: PromotionPolicy | None
    checkpoint_folder: str
    recipe: str
    servable: bool
    starting: bool


@dataclass(frozen=True, slots=True)
class Start:
    """The supervisor's answer: where to begin (None: from scratch, or from what the loop finds), and what is on record."""

    restore: Rollback | None
    attempt: int
    acknowledged_seq: int


@dataclass(frozen=True, slots=True)
class Begun:
    """A checkpoint of the state after `info.seq` is being written."""

    info: CheckpointInfo
    initial: bool = False


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is durable."""

    info: CheckpointInfo


@dataclass(frozen=True, slots=True)
class Changed:
    """A checkpoint is gone (`deleted`: expired, or a save that failed) or its bytes are damaged."""

    info: CheckpointInfo
    deleted: bool


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of an order; `error` is empty or "REASON: message"."""

    order: str
    error: str = ""
    attempt: int = 0
    step: int = 0
    checkpoint: str = ""
    artifact: str = ""
    digest: str = ""
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0


Event = StepRecord | Begun | Saved | Changed | Result
"""What goes up, in the loop's order."""


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Save now."""

    order: str
    reason: str


@dataclass(frozen=True, slots=True)
class RollBackOrder:
    """Go back."""

    order: str
    rollback: Rollback


@dataclass(frozen=True, slots=True)
class PauseOrder:
    """Wait at the boundary."""

    order: str
    reason: str


@dataclass(frozen=True, slots=True)
class ResumeOrder:
    """Go on."""

    order: str


@dataclass(frozen=True, slots=True)
class StopOrder:
    """Save and end."""

    order: str
    reason: str


@dataclass(frozen=True, slots=True)
class ExportOrder:
    """Write a servable artifact."""

    order: str
    checkpoint: str


@dataclass(frozen=True, slots=True)
class ChangeOrder:
    """Change something in the loop, for `num_steps` steps (0: for good)."""

    order: str
    name: str
    value: float
    num_steps: int


@dataclass(frozen=True, slots=True)
class DeleteOrder:
    """These checkpoints have expired."""

    order: str
    checkpoints: tuple[str, ...]


Order = SaveOrder | RollBackOrder | PauseOrder | ResumeOrder | StopOrder | ExportOrder | ChangeOrder | DeleteOrder


class Supervisor(Protocol):
    """Who judges a loop: the trainer service far away, or the same core embedded in the process."""

    def start(self, hello: Hello) -> Start | None:
        """Introduces the loop; None when nobody answered in time."""
        ...

    def report(self, events: Sequence[Event]) -> None:
        """Takes events in order. Never raises and never waits for a network."""
        ...

    def orders(self) -> list[Order]:
        """What is to be done, oldest first; each is given once. Called after every step: with nothing to be done it takes no lock."""
        ...

    def close(self, error: str) -> None:
        """The loop ends; `error` is empty when it finished. Delivers what it can within a few seconds."""
        ...


def info_metadata(info: CheckpointInfo, run: str, **more: Any) -> dict[str, Any]:
    """A manifest's metadata."""
    return {
        "run": run,
        "attempt": info.attempt,
        "step": info.step,
        "seq": info.seq,
        "created": info.time,
        "reason": info.reason,
        "metrics": dict(info.metrics),
        **more,
    }
