"""Retention by example: the documented numbers, and the mistakes others made."""

from __future__ import annotations

import pytest

from interlock.core.recovery import CheckpointState
from interlock.core.retention import InUse, Kept, RetentionPolicy, expired, plan
from interlock.errors import InvalidArgument

GOOD, CANDIDATE, QUARANTINED = CheckpointState.GOOD, CheckpointState.CANDIDATE, CheckpointState.QUARANTINED


def test_the_last_five_stay() -> None:
    """Ops plan: at most 5 checkpoints are kept, the oldest are deleted by themselves."""
    items = [Kept(f"c{seq}", seq, GOOD) for seq in range(500, 4001, 500)]
    assert expired(items, RetentionPolicy(keep_best=0)) == ("c500", "c1000", "c1500")


def test_order_is_numeric_not_by_spelling() -> None:
    items = [Kept(f"c{seq}", seq, GOOD) for seq in (10000, 9900, 9800)]
    assert expired(items, RetentionPolicy(keep_last=1, keep_best=0)) == ("c9800", "c9900")


def test_every_reason_is_given() -> None:
    items = [Kept("a", 1, GOOD, metric=9.0, pinned=True), Kept("b", 2, GOOD, metric=1.0), Kept("c", 3, CANDIDATE)]
    reasons = plan(items, RetentionPolicy(keep_last=1), InUse(serving=frozenset({"a"}), in_flight=frozenset({"c"})))
    assert reasons == {
        "a": ("best by reward", "pinned", "serving"),
        "b": ("youngest known-good",),
        "c": ("last 1", "in flight"),
    }


def test_a_known_good_one_survives_any_number_of_candidates() -> None:
    items = [Kept("good", 1, GOOD), *[Kept(f"c{seq}", seq, CANDIDATE) for seq in range(2, 12)]]
    assert "good" not in expired(items, RetentionPolicy(keep_last=2))


def test_quarantined_ones_do_not_push_sound_ones_out() -> None:
    items = [Kept("old", 1, CANDIDATE), *[Kept(f"q{seq}", seq, QUARANTINED) for seq in range(2, 9)]]
    assert expired(items, RetentionPolicy(keep_last=1)) == tuple(f"q{seq}" for seq in range(2, 8))


def test_keeping_none_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="keep_last: must be at least 1, got 0"):
        RetentionPolicy(keep_last=0)
