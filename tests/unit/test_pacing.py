"""The rule that holds a load up: docs/serving.md, Loads, 4."""

import math

import pytest

from interlock.core.pacing import RESUME_SHARE, Pacing, PacingPolicy, Verdict, begin, judge

POLICY = PacingPolicy(factor=2.0, floor_seconds=0.01, calm_seconds=0.5, slice_seconds=0.2, pause_seconds_max=3.0)


def told(state: Pacing, *figures: tuple[float, float | None]) -> tuple[Pacing, list[Verdict]]:
    """The verdicts on (time, p99) in turn."""
    verdicts = []
    for now, p99 in figures:
        state, verdict = judge(state, p99, now)
        verdicts.append(verdict)
    return state, verdicts


def test_the_limit_is_twice_what_it_was_and_never_below_the_floor() -> None:
    assert begin(POLICY, 0.02, 0.0).limit_seconds == 0.04
    assert begin(POLICY, 0.001, 0.0).limit_seconds == 0.01
    assert begin(POLICY, None, 0.0).limit_seconds == 0.01
    assert begin(PacingPolicy(factor=0), 0.02, 0.0).limit_seconds == math.inf
    with pytest.raises(ValueError, match="factor"):
        PacingPolicy(factor=0.5)


def test_it_pauses_above_the_limit_and_goes_on_when_it_was_calm_for_a_while() -> None:
    state, verdicts = told(begin(POLICY, 0.02, 0.0), (0.3, 0.039), (0.4, 0.041), (0.5, 0.02), (0.9, 0.02), (1.0, 0.02))
    assert verdicts == [Verdict.GO, Verdict.WAIT, Verdict.WAIT, Verdict.WAIT, Verdict.GO]
    assert state.paused_seconds == pytest.approx(0.6)


def test_between_the_two_limits_it_stays_as_it_is() -> None:
    between = 0.04 * (RESUME_SHARE + 1) / 2
    state = begin(POLICY, 0.02, 0.0)
    assert told(state, (0.3, between))[1] == [Verdict.GO]
    paused, _ = judge(state, 0.05, 0.3)
    assert told(paused, (0.5, 0.01), (0.9, between), (1.2, 0.01), (1.6, 0.01))[1] == [Verdict.WAIT] * 4


def test_too_few_requests_say_nothing() -> None:
    state = begin(POLICY, 0.02, 0.0)
    assert told(state, (0.3, None))[1] == [Verdict.GO]
    paused, _ = judge(state, 0.05, 0.3)
    assert told(paused, (0.4, None), (0.9, None))[1] == [Verdict.WAIT, Verdict.GO]


def test_it_runs_a_while_before_it_is_judged() -> None:
    assert told(begin(POLICY, 0.02, 0.0), (0.1, 9.0), (0.2, 9.0))[1] == [Verdict.GO, Verdict.WAIT]


@pytest.mark.parametrize(("gives_up", "last"), [(False, Verdict.GO), (True, Verdict.GIVE_UP)])
def test_pauses_are_bounded_in_all(gives_up: bool, last: Verdict) -> None:
    policy = PacingPolicy(factor=2.0, floor_seconds=0.01, slice_seconds=0.0, pause_seconds_max=3.0, gives_up=gives_up)
    state, verdicts = told(begin(policy, 0.02, 0.0), *((now / 10, 9.0) for now in range(31)))
    assert verdicts[:-1] == [Verdict.WAIT] * 30
    assert verdicts[-1] is last
    assert state.paused_seconds == pytest.approx(3.0)
    if not gives_up:
        assert told(state, (9.0, 9.0))[1] == [Verdict.GO], "it is not paused again"
