"""When a known-good checkpoint becomes a version. Not how: exporting, registering and swapping are the shell's.

Rules of this file
- Only GOOD checkpoints are promoted, each at most once, none whose digest or own name is quarantined.
- The first one of a model is promoted whatever its metric; a later one must beat what serves by `min_improvement`.
- NaN beats nothing and is beaten by nothing: a checkpoint without the metric waits.
- A person who moved traffic back, without forbidding what was left, is not overruled: promotions wait until a person moves it forward again.
- A verdict says why in words; the same inputs give the same verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from interlock.core.names import check_id
from interlock.core.retention import Better
from interlock.errors import InvalidArgument

PROMOTER = "promotion"
"""The actor of swaps that were made by this rule."""


@dataclass(frozen=True, slots=True)
class PromotionPolicy:
    """How the good checkpoints of a run reach the traffic of a model."""

    model: str
    metric: str = "reward"
    better: Better = Better.HIGHER
    min_improvement: float = 0.0
    min_interval_seconds: float = 0.0


def check_policy(policy: PromotionPolicy, where: str = "promotion") -> PromotionPolicy:
    """Returns the policy if it can be followed; `where` is how the caller's field for it is called.

    Raises:
        InvalidArgument: `INVALID_POLICY`, naming the field.
    """
    check_id(policy.model, f"{where}.model")
    for field, holds, why in (
        ("metric", bool(policy.metric), "is empty; name the metric that must improve, e.g. reward"),
        (
            "min_improvement",
            isfinite(policy.min_improvement) and policy.min_improvement >= 0,
            "must be a finite number, 0 or more",
        ),
        (
            "min_interval",
            isfinite(policy.min_interval_seconds) and policy.min_interval_seconds >= 0,
            "must be 0 s or more",
        ),
    ):
        if not holds:
            raise InvalidArgument(f"{where}.{field} {why}", reason="INVALID_POLICY", field=f"{where}.{field}")
    return policy


@dataclass(frozen=True, slots=True)
class Contender:
    """A checkpoint as the trainer tells of it. `name` is its resource name."""

    name: str
    step: int
    good: bool
    metrics: Mapping[str, float]
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Serving:
    """What serves now, or is on its way to: the bar to beat."""

    version: str
    metrics: Mapping[str, float]
    promoted_at: float
    moved_back_by: str = ""


def moved_back_by(left: str | None, reached: str, actor: str, *, forbidden: bool) -> str:
    """Who moved a model back from version `left` to the older version `reached`; empty for a move forward, or one that names its cause.

    Args:
        left: the version that served before; None for the first.
        actor: who made the swap; the promoter itself does not count.
        forbidden: `left` is quarantined, so that what was wrong with it is known and the next one may come.
    """
    if left is None or forbidden or actor == PROMOTER or not (left.isdigit() and reached.isdigit()):
        return ""
    return (actor or "somebody") if int(reached) < int(left) else ""


@dataclass(frozen=True, slots=True)
class Promote:
    """The checkpoint becomes the next version."""

    checkpoint: str
    why: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Not now. `final` tells that this checkpoint will not be looked at again."""

    checkpoint: str
    why: str
    final: bool = False


def judge(
    policy: PromotionPolicy,
    contender: Contender,
    serving: Serving | None,
    now: float,
    *,
    promoted: frozenset[str] = frozenset(),
    quarantined: frozenset[str] = frozenset(),
) -> Promote | Hold:
    """The verdict on one checkpoint. `promoted` and `quarantined` hold checkpoint names and digests."""
    name = contender.name
    if name in promoted:
        return Hold(name, "promoted already", final=True)
    if {name, contender.digest} & quarantined:
        return Hold(name, "quarantined", final=True)
    if not contender.good:
        return Hold(name, "not confirmed as good yet")
    value = contender.metrics.get(policy.metric)
    if value is None or not isfinite(value):
        return Hold(name, f"has no finite {policy.metric}")
    if serving is None:
        return Promote(name, f"first version: {policy.metric} {value:g} at step {contender.step}")
    if serving.moved_back_by:
        who = serving.moved_back_by
        return Hold(
            name,
            f"{who} moved {policy.model} back to version {serving.version}; a swap to a newer version by hand lets promotions go on",
        )
    wait = serving.promoted_at + policy.min_interval_seconds - now
    if wait > 0:
        return Hold(
            name,
            f"the last promotion was {policy.min_interval_seconds - wait:.0f} s ago, less than {policy.min_interval_seconds:g} s",
        )
    return _compare(policy, contender, value, serving)


def _compare(policy: PromotionPolicy, contender: Contender, value: float, serving: Serving) -> Promote | Hold:
    bar = serving.metrics.get(policy.metric)
    if bar is None or not isfinite(bar):
        return Promote(contender.name, f"version {serving.version} has no {policy.metric} to beat")
    gain = value - bar if policy.better is Better.HIGHER else bar - value
    said = f"{policy.metric} {value:g} at step {contender.step} against {bar:g} of version {serving.version}"
    if gain > 0 and gain >= policy.min_improvement:
        return Promote(contender.name, said)
    return Hold(contender.name, f"{said}: better by {gain:g}, wanted {policy.min_improvement:g}")


def best(policy: PromotionPolicy, contenders: tuple[Contender, ...]) -> Contender | None:
    """The good contender with the best metric (the youngest of equals); None when there is none."""
    fit = [c for c in contenders if c.good and isfinite(c.metrics.get(policy.metric, float("nan")))]
    sign = 1 if policy.better is Better.HIGHER else -1
    return max(fit, key=lambda c: (sign * c.metrics[policy.metric], c.step), default=None)
