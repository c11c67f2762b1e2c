"""The simulator tested: each of these broken cores must be caught, or a green simulation says nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import swapworld
from interlock.core import assignment, swap_plan
from interlock.core.swap import Event, State
from interlock.core.swap_plan import Decision, Quarantine, Snapshot
from property.test_simulator import run

SEEDS = 300
Patch = Callable[[pytest.MonkeyPatch], None]


def _in_state(state: State, change: Callable[[Snapshot], Snapshot]) -> Patch:
    """The plan of one state looks at a changed snapshot."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        honest = swap_plan._PLAN[state]
        broken = {**swap_plan._PLAN, state: lambda snapshot, now: honest(change(snapshot), now)}
        monkeypatch.setattr(swap_plan, "_PLAN", broken)

    return patch


def _no_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = swap_plan._route_write

    def broken(moved: Any, snapshot: Snapshot, event: Event) -> Any:
        return (moved, []) if moved.state is State.REVERTING else honest(moved, snapshot, event)

    monkeypatch.setattr(swap_plan, "_route_write", broken)


def _quarantines_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_plan, "Quarantine", lambda model, _version, reason: Quarantine(model, "0", reason))


def _believes_everybody_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_plan, "_routed", lambda _snapshot: True)


def _never_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_plan, "_expired", lambda snapshot, _now: Decision(snapshot.swap))
    monkeypatch.setattr(swap_plan, "_preparation", lambda *_: ())


def _ignores_who_meddled(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = swap_plan.decide

    def broken(snapshot: Snapshot, now: float) -> Decision:
        swap = snapshot.swap
        known = swap.epoch or swap.base_epoch
        return honest(replace(snapshot, route=replace(snapshot.route, epoch=known)) if known else snapshot, now)

    monkeypatch.setattr(swapworld, "decide", broken)


def _forgets_receipts(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = swap_plan.act

    def broken(snapshot: Snapshot, event: Event, now: float, message: str = "", reason: str = "") -> Decision:
        decision = honest(snapshot, event, now, message, reason)
        return replace(decision, store=()) if decision.swap.state is State.SUPERSEDED else decision

    monkeypatch.setattr(swapworld, "act", broken)


def _releases_what_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapworld, "assign", lambda views, routes, _claims: assignment.assign(views, routes, {}))


MUTANTS: dict[str, Patch] = {
    "two swaps run at once": _in_state(State.PENDING, lambda s: replace(s, ahead=False)),
    "goes back without writing the route": _no_way_back,
    "forbids another version than the reverted one": _quarantines_another,
    "takes every replica's acknowledgement for granted": _believes_everybody_routes,
    "switches without preparation": _never_expires,
    "does not see that the route was changed by hand": _ignores_who_meddled,
    "ends a superseded swap without a receipt": _forgets_receipts,
    "releases versions that a swap still needs": _releases_what_is_claimed,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_core_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    completed = 0
    for seed in range(SEEDS):
        try:
            world = run(seed)
        except AssertionError:
            return
        completed += sum(s.state is State.COMPLETED for s in world.store.swaps.values())
    # Some mutants harm no invariant but the point of it all: that swaps get there. An honest core completes more than one a world.
    assert completed < SEEDS / 2, f"{SEEDS} worlds with this mutant and nothing was noticed"
