"""The swap table: what must hold of the whole table, and of any sequence of events thrown at a row."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core.swap import (
    BEFORE_SWITCH,
    COMMITS,
    REVERTIBLE,
    TABLE,
    TERMINAL,
    WORKING,
    CompareLimits,
    Event,
    State,
    Strategy,
    Swap,
    SwapSpec,
    approve,
    check_spec,
    move,
    pause,
    unpause,
)
from interlock.core.swap_plan import Comparison, compare_verdict, progress
from interlock.errors import IllegalTransition, InvalidArgument

SPEC = SwapSpec("policy", "2")


def _reachable(start: State) -> set[State]:
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        for (source, _), target in TABLE.items():
            if source is state and target not in seen:
                seen.add(target)
                todo.append(target)
    return seen


def test_every_state_is_reached_and_every_state_can_end() -> None:
    assert _reachable(State.PENDING) == set(State)
    assert all(_reachable(state) & TERMINAL for state in State)
    assert not any(source in TERMINAL for source, _ in TABLE)


def test_before_the_switch_every_failure_ends_in_aborting_and_no_such_move_writes_the_route() -> None:
    for state in WORKING:
        for event in (Event.FAIL, Event.ABORT, Event.SUPERSEDE):
            assert TABLE[state, event] is State.ABORTING
            assert (state, event) not in COMMITS
    assert _reachable(State.ABORTING) & {State.SWITCHING, State.CANARY, State.SOAKING, State.REVERTING} == set()


def test_after_the_switch_every_failure_ends_in_reverting_and_that_move_writes_the_route() -> None:
    for state in REVERTIBLE:
        for event in (Event.FAIL, Event.ABORT):
            assert TABLE[state, event] is State.REVERTING
            assert (state, event) in COMMITS


def test_the_only_ways_over_the_switch_are_commits() -> None:
    crossing = {move for move, target in TABLE.items() if move[0] in BEFORE_SWITCH and target is State.SWITCHING}
    assert crossing == {(State.VERIFYING, Event.PASS), (State.GATED, Event.APPROVE)}
    assert crossing <= COMMITS
    assert {target for m, target in TABLE.items() if m[0] in BEFORE_SWITCH} & REVERTIBLE == {State.SWITCHING}


@settings(max_examples=200)
@given(st.lists(st.sampled_from(list(Event)), max_size=40))
def test_an_illegal_event_raises_and_changes_nothing(events: list[Event]) -> None:
    swap = Swap("s1", SPEC, created_at=0.0)
    for now, event in enumerate(events):
        legal = (swap.state, event) in TABLE
        try:
            moved = move(swap, event, float(now))
        except IllegalTransition as refusal:
            moved = swap
            said = refusal.metadata
        else:
            said = {}
        assert (moved is swap) == (not legal)
        assert not said or said == {"swap": "s1", "state": swap.state.value, "event": event.value}
        assert moved.revision == swap.revision + legal
        assert (moved.ended_at is not None) == moved.terminal
        assert (moved.outcome is not None) <= (moved.state is State.ABORTING or moved.terminal)
        swap = moved


def test_the_gate_takes_one_approval_and_only_there() -> None:
    swap = Swap("s1", SPEC, created_at=0.0)
    with pytest.raises(IllegalTransition):
        approve(swap, "ana")
    gated = Swap("s1", SPEC, created_at=0.0, state=State.GATED)
    approved = approve(gated, "ana")
    assert approved.approved_by == "ana"
    assert approve(approved, "ben") is approved


def test_held_time_does_not_count() -> None:
    soaking = Swap("s1", SPEC, created_at=0.0, state=State.SOAKING, deadline=100.0)
    assert unpause(pause(soaking, 40.0), 70.0).deadline == 130.0
    assert unpause(soaking, 70.0) is soaking


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"candidate": "../2"}, "spec.candidate_version"),
        ({"drain_seconds": -1.0}, "spec.drain_seconds"),
        ({"prepare_seconds": float("nan")}, "spec.prepare_seconds"),
        ({"warmup_iterations": 0}, "spec.warmup_iterations"),
        ({"error_rate_max": 1.5}, "spec.error_rate_max"),
        ({"compare": CompareLimits(abs_error_max=float("nan"))}, "spec.compare_limits.abs_error_max"),
        ({"compare": CompareLimits(top1_agreement_min=1.5)}, "spec.compare_limits.top1_agreement_min"),
        ({"strategy": Strategy.CANARY}, "spec.canary_percents"),
        ({"canary_percents": (10,)}, "spec.canary_percents"),
        ({"strategy": Strategy.CANARY, "canary_percents": (50, 10)}, "spec.canary_percents"),
        ({"strategy": Strategy.CANARY, "canary_percents": (10, 100)}, "spec.canary_percents"),
    ],
)
def test_a_wrong_spec_names_the_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_spec(SwapSpec(**{"model": "policy", "candidate": "2", **change}))  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("limits", "figures", "verdict"),
    [
        (CompareLimits(), {}, "PASS"),
        (CompareLimits(), {"nonfinite": 1}, "TRIP"),
        (CompareLimits(abs_error_max=0.1), {"max_abs_error": 0.2}, "TRIP"),
        (CompareLimits(abs_error_max=0.1), {"max_abs_error": float("nan")}, "TRIP"),
        (CompareLimits(rel_error_max=0.1), {"max_rel_error": 0.1}, "PASS"),
        (CompareLimits(top1_agreement_min=0.99), {"top1_agreement": 0.98}, "TRIP"),
        (CompareLimits(samples_min=100), {}, "INCONCLUSIVE"),
    ],
)
def test_a_comparison_has_three_verdicts(limits: CompareLimits, figures: dict[str, float], verdict: str) -> None:
    compared = Comparison("r1", "r1#1", 32, **figures)  # type: ignore[arg-type]
    swap = Swap("s1", SwapSpec("policy", "2", compare=limits), created_at=0.0, comparisons=(compared,))
    assert compare_verdict(swap)[0] == verdict


def test_progress_is_on_the_source_documents_scale() -> None:
    # seed 001: load 10, warm-up 30-80, switch 80-90, clean-up 90-100
    rising = [
        State.PENDING,
        State.ADMITTING,
        State.LOADING,
        State.WARMING,
        State.VERIFYING,
        State.GATED,
        State.SWITCHING,
    ]
    rising += [State.CANARY, State.SOAKING, State.DRAINING, State.KEEP_WARM, State.COMPLETED]
    values = [progress(Swap("s1", SPEC, created_at=0.0, state=state)) for state in rising]
    assert values == sorted(values)
    assert values[2:4] == [10, 30]
    assert values[-1] == 100
    assert progress(Swap("s1", SPEC, created_at=0.0, state=State.FAILED)) == 0
