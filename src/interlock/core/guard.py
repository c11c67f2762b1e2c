"""The guard: judges every step of a run by a policy that is data. Pure; not the one who acts (that is `core.recovery`).

Rules of the file:

- `observe` gets the policy, the state so far and one step record; it returns new state and one verdict.
- A verdict is PASS, TRIP or INCONCLUSIVE. INCONCLUSIVE says why: a rule that applies is still warming up, or no rule could be judged.
- A rule whose metric has never been seen in the run does not apply, unless the rule is `required`.
- NaN and infinity trip whatever the policy says: a policy without a `nonfinite` rule gets one.
- A point that hit a rule never enters that rule's reference window, so a fault cannot teach the guard that it is normal.
- `onset_step` is the first hit among the `out_of` readings that made the rule trip: where to suspect the fault began.
- After a rollback the state is the one that was true at the checkpoint, with the hit counters cleared (`rewound`).

Statistics (`value` is the metric, `median` and `MAD` are those of the last `window` clean points):

    nonfinite           NaN or infinity; metric "*" looks at every metric of the record
    absolute            value > limit, or value < limit with direction "below"
    ratio_to_reference  value / reference >= limit; the reference is the value at the last checkpoint; not judged unless it is positive
    drop_fraction       (reference - value) / |reference| >= limit; not judged when the reference is zero
    robust_z            (value - median) / max(1.4826 * MAD, scale_floor, relative_floor * |median|) > limit; sign by direction
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from interlock.core.fields import refuse
from interlock.core.steps import NONFINITE_GRADIENTS, StepRecord

EVERY_METRIC = "*"
MAD_TO_SIGMA = 1.4826  # makes the median absolute deviation of normal data estimate its standard deviation
NO_HIT = -1


class Statistic(StrEnum):
    """How a rule turns a metric into one number; see the module's table."""

    NONFINITE = "nonfinite"
    ABSOLUTE = "absolute"
    RATIO_TO_REFERENCE = "ratio_to_reference"
    DROP_FRACTION = "drop_fraction"
    ROBUST_Z = "robust_z"


class Direction(StrEnum):
    """On which side of the limit the bad values lie."""

    ABOVE = "above"
    BELOW = "below"


class Severity(StrEnum):
    """WARNING is only recorded; CRITICAL acts outside a cool-down; FATAL acts always."""

    WARNING = "warning"
    CRITICAL = "critical"
    FATAL = "fatal"


class Action(StrEnum):
    """What a trip asks for."""

    RECORD = "record"
    ROLL_BACK = "roll_back"
    PAUSE = "pause"
    STOP = "stop"


class Mode(StrEnum):
    """OBSERVE judges and records, and never touches the run."""

    OBSERVE = "observe"
    ACT = "act"


class Outcome(StrEnum):
    """The three values of a verdict."""

    PASS = "pass"  # noqa: S105 - a verdict, no password
    TRIP = "trip"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class Rule:
    """One condition over one metric. `hits` of the last `out_of` readings beyond the limit make it trip."""

    name: str
    metric: str
    statistic: Statistic
    limit: float = 0.0
    direction: Direction = Direction.ABOVE
    hits: int = 1
    out_of: int = 1
    window: int = 40
    warm_up: int = 20
    scale_floor: float = 1e-9
    relative_floor: float = 0.1
    required: bool = False
    severity: Severity = Severity.CRITICAL
    action: Action = Action.ROLL_BACK

    def __post_init__(self) -> None:
        if not self.name or not self.metric:
            raise refuse("name" if not self.name else "metric", "must not be empty")
        if not 1 <= self.hits <= self.out_of:
            raise refuse("hits", f"must be between 1 and out_of ({self.out_of}), got {self.hits}")
        if not 2 <= self.warm_up <= self.window:
            raise refuse("warm_up", f"must be between 2 and window ({self.window}), got {self.warm_up}")
        if self.scale_floor <= 0:
            raise refuse("scale_floor", f"must be positive, got {self.scale_floor}")
        if self.relative_floor < 0:
            raise refuse("relative_floor", f"must not be negative, got {self.relative_floor}")
        if self.metric == EVERY_METRIC and self.statistic is not Statistic.NONFINITE:
            raise refuse("metric", f"'*' goes with statistic nonfinite only, got {self.statistic.value}")
        if self.statistic is Statistic.ROBUST_Z and self.limit <= 0:
            raise refuse("limit", f"must be positive for robust_z, got {self.limit}")
        if not math.isfinite(self.limit):
            raise refuse("limit", f"must be finite, got {self.limit}")


NONFINITE_RULE = Rule("nonfinite", EVERY_METRIC, Statistic.NONFINITE, severity=Severity.FATAL)


@dataclass(frozen=True, slots=True)
class GuardPolicy:
    """Versioned data: what is judged, and whether a trip acts. Rule names are unique."""

    name: str
    version: int = 1
    mode: Mode = Mode.ACT
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rules]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise refuse(f"rules[{index}].name", f"{name!r} is used twice")
        if not any(rule.statistic is Statistic.NONFINITE and rule.metric == EVERY_METRIC for rule in self.rules):
            object.__setattr__(self, "rules", (NONFINITE_RULE, *self.rules))


@dataclass(frozen=True, slots=True)
class Trip:
    """Which rule tripped, on what, and where the fault seems to have begun.

    `value` and `limit` are in the metric's own unit, so that a person can compare them; `score` is the rule's statistic.
    """

    rule: str
    metric: str
    value: float
    score: float
    limit: float
    step: int
    seq: int
    onset_step: int
    severity: Severity
    action: Action


@dataclass(frozen=True, slots=True)
class Verdict:
    """The guard's answer for one step."""

    outcome: Outcome
    trip: Trip | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class GuardState:
    """All that the guard remembers; plain data, goes into checkpoints.

    Attributes:
        windows: rule name -> its clean points, oldest first.
        recent: rule name -> the last `out_of` readings: the step of a hit, or -1.
        references: metric -> its value at the last checkpoint.
    """

    windows: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    recent: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    references: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What one rule made of one record: judged (with a hit or not), or the reason why not."""

    metric: str = ""
    value: float = 0.0
    score: float = 0.0
    limit: float = 0.0
    hit: bool = False
    not_judged: str = ""


# One object each for the usual case: a step is judged in the process of the loop, and making a dozen dataclasses took most of that time.
_QUIET = _Reading(EVERY_METRIC)  # judged, no hit
_ABSENT = _Reading(not_judged="the rule does not apply")
_PASS = Verdict(Outcome.PASS)


def observe(policy: GuardPolicy, state: GuardState, record: StepRecord) -> tuple[GuardState, Verdict]:
    """Judges one step. Calling it again with the same arguments gives the same answer."""
    windows, recent = dict(state.windows), dict(state.recent)
    trips: list[Trip] = []
    waiting: list[str] = []
    num_judged = 0
    for rule in policy.rules:
        reading = _read(rule, state, record)
        if reading is _ABSENT:
            continue
        if rule.statistic is Statistic.ROBUST_Z and not reading.hit and reading.metric:
            windows[rule.name] = (*windows.get(rule.name, ()), record.metrics[rule.metric])[-rule.window :]
        if reading.not_judged:
            waiting.append(reading.not_judged)
            continue
        num_judged += bool(reading.metric)
        marks = (*recent.get(rule.name, ()), record.step if reading.hit else NO_HIT)[-rule.out_of :]
        recent[rule.name] = marks
        if reading.hit and sum(mark != NO_HIT for mark in marks) >= rule.hits:
            trips.append(_trip(rule, reading, record, marks))
    return GuardState(windows, recent, state.references), _verdict(trips, waiting, num_judged)


def _verdict(trips: list[Trip], waiting: list[str], num_judged: int) -> Verdict:
    if trips:
        order = list(Severity)
        return Verdict(Outcome.TRIP, max(trips, key=lambda trip: order.index(trip.severity)))
    if waiting:
        return Verdict(Outcome.INCONCLUSIVE, why="; ".join(waiting))
    if not num_judged:
        return Verdict(Outcome.INCONCLUSIVE, why="no rule of the policy could be judged on this record")
    return _PASS


def _trip(rule: Rule, reading: _Reading, record: StepRecord, marks: tuple[int, ...]) -> Trip:
    return Trip(
        rule=rule.name,
        metric=reading.metric,
        value=reading.value,
        score=reading.score,
        limit=reading.limit,
        step=record.step,
        seq=record.seq,
        onset_step=next(mark for mark in marks if mark != NO_HIT),
        severity=rule.severity,
        action=rule.action,
    )


def _read(rule: Rule, state: GuardState, record: StepRecord) -> _Reading:
    if rule.metric == EVERY_METRIC:
        return _read_every(record)
    value = record.metrics.get(rule.metric)
    if value is None:
        return _Reading(not_judged=f"{rule.name}: metric {rule.metric} is missing") if rule.required else _ABSENT
    if not math.isfinite(value):
        return _Reading(rule.metric, value, value, rule.limit, hit=True)
    if rule.statistic is Statistic.ROBUST_Z:
        return _read_robust(rule, state.windows.get(rule.name, ()), value)
    if rule.statistic is Statistic.NONFINITE:
        return _QUIET
    if rule.statistic is Statistic.ABSOLUTE:
        hit = _sign(rule) * value > _sign(rule) * rule.limit
        return _Reading(rule.metric, value, value, rule.limit, hit=True) if hit else _QUIET
    return _read_reference(rule, state.references.get(rule.metric), value)


def _read_every(record: StepRecord) -> _Reading:
    if all(map(math.isfinite, record.metrics.values())):
        return _QUIET if record.metrics else _Reading()
    metric = min(name for name, value in record.metrics.items() if not math.isfinite(value))
    return _Reading(metric, record.metrics[metric], record.metrics[metric], hit=True)


def _read_robust(rule: Rule, window: tuple[float, ...], value: float) -> _Reading:
    if len(window) < rule.warm_up:
        why = f"{rule.name}: warming up, {len(window)} of {rule.warm_up} points"
        return _Reading(rule.metric, value, not_judged=why)
    middle = _median(window)
    distance = _sign(rule) * (value - middle)
    floor = max(rule.scale_floor, rule.relative_floor * abs(middle))
    if distance <= rule.limit * floor:  # a larger scale makes the score smaller: no deviation is needed
        return _QUIET
    scale = max(MAD_TO_SIGMA * _median([abs(point - middle) for point in window]), floor)
    score = distance / scale
    return _Reading(rule.metric, value, score, middle + _sign(rule) * rule.limit * scale, hit=score > rule.limit)


def _read_reference(rule: Rule, reference: float | None, value: float) -> _Reading:
    if reference is None:
        return _Reading(not_judged=f"{rule.name}: no checkpoint yet to take a reference from")
    ratio = rule.statistic is Statistic.RATIO_TO_REFERENCE
    if reference == 0 or (ratio and reference < 0):
        return _ABSENT
    score = value / reference if ratio else (reference - value) / abs(reference)
    limit = rule.limit * reference if ratio else reference - rule.limit * abs(reference)
    return _Reading(rule.metric, value, score, limit, hit=score >= rule.limit)


def _median(values: Sequence[float]) -> float:
    """`statistics.median` without its checks, at half the cost; there is at least one value."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _sign(rule: Rule) -> int:
    return 1 if rule.direction is Direction.ABOVE else -1


def mark_reference(state: GuardState, record: StepRecord) -> GuardState:
    """The state after a checkpoint was begun at `record`: its finite metrics become the reference of the ratio rules."""
    finite = {name: value for name, value in record.metrics.items() if math.isfinite(value)}
    return replace(state, references={**state.references, **finite})


def rewound(at_checkpoint: GuardState | None) -> GuardState:
    """The state after a rollback: what was true at the checkpoint, hit counters cleared; empty when nothing was kept."""
    return replace(at_checkpoint, recent={}) if at_checkpoint else GuardState()


def _robust(name: str, metric: str, limit: float, direction: Direction = Direction.ABOVE, **scale: float) -> Rule:
    return Rule(name, metric, Statistic.ROBUST_Z, limit, direction, hits=2, out_of=3, **scale)  # type: ignore[arg-type]  # scale holds the two floors only


CLASSIC = GuardPolicy(
    "classic",
    rules=(
        NONFINITE_RULE,
        Rule("nonfinite-gradients", NONFINITE_GRADIENTS, Statistic.ABSOLUTE, 0.0, severity=Severity.FATAL),
        Rule("kl", "kl", Statistic.ABSOLUTE, 0.03),  # ops plan, rollback triggers
        Rule("loss", "loss", Statistic.RATIO_TO_REFERENCE, 2.0),  # ops plan: the loss doubles
        Rule("reward", "reward", Statistic.DROP_FRACTION, 0.3),  # ops plan: the reward drops by 30 %
    ),
)
"""The operations plan's own triggers. Measured to misfire on healthy PPO runs: docs/guard-backtest.md."""

ROBUST = GuardPolicy(
    "robust",
    rules=(
        NONFINITE_RULE,
        Rule("nonfinite-gradients", NONFINITE_GRADIENTS, Statistic.ABSOLUTE, 0.0, severity=Severity.FATAL),
        _robust("kl", "kl", 8.0, scale_floor=0.005),
        _robust("loss", "loss", 12.0, scale_floor=0.05),
        _robust("value-loss", "value_loss", 12.0, scale_floor=0.05),
        _robust("reward", "reward", 6.0, Direction.BELOW, scale_floor=0.01),
        _robust("entropy", "entropy", 8.0, Direction.BELOW, scale_floor=0.01),
        _robust("accuracy", "accuracy", 6.0, Direction.BELOW, scale_floor=0.01),
        _robust("gradient-norm", "gradient_norm", 12.0, scale_floor=0.05),
    ),
)
"""The default: median/MAD z-scores over the last 40 clean points, 2 of 3; NaN and infinity at once."""

BUILT_IN: Mapping[str, GuardPolicy] = {policy.name: policy for policy in (CLASSIC, ROBUST)}
