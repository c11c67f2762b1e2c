"""The guard's rules one by one: statistics, windows, hysteresis, verdicts, and policies as data."""

from __future__ import annotations

import math

import pytest

from interlock.core import guard
from interlock.core.fields import parse, plain
from interlock.core.guard import Direction, GuardPolicy, GuardState, Rule, Statistic, mark_reference, observe
from interlock.core.policy import RunPolicy, guard_policy, run_policy
from interlock.core.steps import StepRecord
from interlock.errors import InvalidArgument


def record(step: int, **metrics: float) -> StepRecord:
    return StepRecord(1, step, step, 0.0, metrics)


def feed(policy: guard.GuardPolicy, *rows: dict[str, float]) -> list[guard.Verdict]:
    state, verdicts = guard.GuardState(), []
    for step, row in enumerate(rows, start=1):
        state, verdict = guard.observe(policy, state, record(step, **row))
        verdicts.append(verdict)
    return verdicts


def one(statistic: guard.Statistic, limit: float, **more: object) -> guard.GuardPolicy:
    return guard.GuardPolicy("p", rules=(guard.Rule("r", "m", statistic, limit, **more),))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_trip_whatever_the_policy_says(value: float) -> None:
    (verdict,) = feed(guard.GuardPolicy("empty"), {"x": value})
    assert verdict.trip is not None
    assert (verdict.trip.rule, verdict.trip.severity) == ("nonfinite", guard.Severity.FATAL)


def test_a_limit_itself_is_still_allowed_for_absolute_rules() -> None:
    policy = one(guard.Statistic.ABSOLUTE, 0.03)
    assert [verdict.outcome for verdict in feed(policy, {"m": 0.03}, {"m": 0.0300001})] == ["pass", "trip"]


def test_m_of_n_needs_m_hits_and_names_the_first_as_onset() -> None:
    policy = one(guard.Statistic.ABSOLUTE, 1.0, hits=2, out_of=3)
    verdicts = feed(policy, {"m": 2}, {"m": 0}, {"m": 0}, {"m": 2}, {"m": 0}, {"m": 2})
    assert [verdict.outcome for verdict in verdicts] == ["pass"] * 5 + ["trip"]
    assert verdicts[-1].trip is not None
    assert verdicts[-1].trip.onset_step == 4


def test_outliers_stay_out_of_the_window() -> None:
    policy = one(guard.Statistic.ROBUST_Z, 5.0, window=10, warm_up=5, hits=3, out_of=3)
    state = guard.GuardState()
    for step, value in enumerate([1.0, 1.1, 0.9, 1.0, 1.05, 50.0, 60.0]):
        state, _ = guard.observe(policy, state, record(step, m=value))
    assert max(state.windows["r"]) == 1.1


def test_warming_up_is_inconclusive_and_says_so() -> None:
    policy = one(guard.Statistic.ROBUST_Z, 5.0, window=10, warm_up=3)
    verdicts = feed(policy, *[{"m": 1.0}] * 4)
    assert [verdict.outcome for verdict in verdicts] == ["inconclusive"] * 3 + ["pass"]
    assert verdicts[2].why == "r: warming up, 2 of 3 points"


def test_a_missing_metric_matters_only_to_a_required_rule() -> None:
    assert feed(one(guard.Statistic.ABSOLUTE, 1.0), {"x": 0})[0].outcome == "pass"
    verdict = feed(one(guard.Statistic.ABSOLUTE, 1.0, required=True), {"x": 0})[0]
    assert (verdict.outcome, verdict.why) == ("inconclusive", "r: metric m is missing")


def test_an_empty_record_is_inconclusive() -> None:
    assert feed(guard.ROBUST, {})[0].outcome == "inconclusive"


def test_a_negative_reference_is_not_judged_by_ratio() -> None:
    policy = one(guard.Statistic.RATIO_TO_REFERENCE, 2.0)
    state = guard.mark_reference(guard.GuardState(), record(1, m=-0.5))
    assert guard.observe(policy, state, record(2, m=-5.0))[1].outcome == "pass"


def test_rewound_keeps_the_windows_and_clears_the_hits() -> None:
    policy = one(guard.Statistic.ABSOLUTE, 1.0, hits=2, out_of=3)
    state, _ = guard.observe(policy, guard.GuardState(windows={"r": (1.0,)}), record(1, m=2))
    assert guard.rewound(state) == guard.GuardState(windows={"r": (1.0,)})
    assert guard.rewound(None) == guard.GuardState()


def test_the_gravest_of_several_trips_is_reported() -> None:
    verdict = feed(guard.CLASSIC, {"kl": 0.5, "nonfinite_gradients": 1.0})[0]
    assert verdict.trip is not None
    assert verdict.trip.rule == "nonfinite-gradients"


@pytest.mark.parametrize("policy", guard.BUILT_IN.values(), ids=guard.BUILT_IN)
def test_built_in_policies_survive_a_round_trip(policy: guard.GuardPolicy) -> None:
    assert parse(guard.GuardPolicy, plain(policy)) == policy


def test_guard_state_survives_a_round_trip() -> None:
    state = guard.GuardState({"r": (1.0, 2.0)}, {"r": (-1, 4)}, {"loss": 0.5})
    assert parse(guard.GuardState, plain(state)) == state


@pytest.mark.parametrize(
    ("data", "field", "says"),
    [
        ("strict", "guard", "not a built-in policy; they are classic, robust"),
        ({"name": "x", "rule": []}, "guard.rule", "unknown key; known are mode, name, rules, version"),
        ({"name": 3}, "guard.name", "expected str, got 3"),
        ({}, "guard.name", "is required"),
        ({"name": "x", "mode": "watch"}, "guard.mode", "'watch' is not one of observe, act"),
        ({"name": "x", "rules": {}}, "guard.rules", "expected a list, got dict"),
        (
            {"name": "x", "rules": [{"name": "a", "metric": "m", "statistic": "z"}]},
            "guard.rules[0].statistic",
            "is not one of",
        ),
        (
            {"name": "x", "rules": [{"name": "a", "metric": "m", "statistic": "absolute", "hits": 4}]},
            "guard.rules[0].hits",
            "must be between 1 and out_of (1), got 4",
        ),
        (
            {"name": "x", "rules": [{"name": "a", "metric": "m", "statistic": "absolute", "limit": True}]},
            "guard.rules[0].limit",
            "expected float, got True",
        ),
        (
            {"name": "x", "rules": [{"name": "a", "metric": "m", "statistic": "absolute"}] * 2},
            "guard.rules[1].name",
            "used twice",
        ),
        (
            {"name": "x", "rules": [{"name": "a", "metric": "*", "statistic": "absolute"}]},
            "guard.rules[0].metric",
            "nonfinite only",
        ),
    ],
)
def test_a_bad_policy_names_the_field_and_the_fix(data: object, field: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        guard_policy(data)
    assert caught.value.field == field
    assert says in caught.value.message


def test_a_run_policy_reads_a_table_and_a_name() -> None:
    assert run_policy("classic").guard is not None
    policy = run_policy(
        {"guard": "classic", "save_every": 10, "recovery": {"confirm_after": 5, "plans": [{"lr_factor": 0.5}]}}
    )
    assert (policy.guard.name, policy.save_every, policy.recovery.confirm_after) == ("classic", 10, 5)
    assert run_policy(plain(policy)) == policy == parse(RunPolicy, plain(policy))
    with pytest.raises(InvalidArgument, match=r"recovery\.plans\[0\]\.lr_factor: must be above 0"):
        run_policy({"recovery": {"plans": [{"lr_factor": 0}]}})


@pytest.mark.parametrize(
    "statistic", [Statistic.ABSOLUTE, Statistic.ROBUST_Z, Statistic.RATIO_TO_REFERENCE, Statistic.DROP_FRACTION]
)
def test_a_trip_says_its_limit_in_the_metrics_own_unit(statistic: Statistic) -> None:
    """T4: a person compares value and limit; a score of 8 beside a KL of 0.2 would say nothing."""
    falls = statistic is Statistic.DROP_FRACTION
    rule = Rule("r", "m", statistic, 0.5 if falls else 3.0, Direction.BELOW if falls else Direction.ABOVE, warm_up=5)
    policy, state = GuardPolicy("p", rules=(rule,)), GuardState()
    for step in range(1, 11):
        record = StepRecord(seq=step, step=step, attempt=1, time=0.0, metrics={"m": 2.0 + 0.01 * (step % 3)})
        state, _ = observe(policy, state, record)
        state = mark_reference(state, record)
    for step, value in enumerate([1.9, 1.1, 0.9, 0.4] if falls else [2.1, 2.5, 5.9, 6.2, 9.0], 11):
        _, verdict = observe(policy, state, StepRecord(seq=step, step=step, attempt=1, time=0.0, metrics={"m": value}))
        if verdict.trip:
            assert (value <= verdict.trip.limit) if falls else (value >= verdict.trip.limit)
    assert verdict.trip is not None
