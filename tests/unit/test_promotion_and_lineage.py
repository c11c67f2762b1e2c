"""When a good checkpoint is promoted, and what falls with a bad one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.lineage import (
    CheckpointNode,
    VersionNode,
    ancestors,
    condemn,
    refuge,
    younger,
)
from interlock.core.promotion import (
    Contender,
    Hold,
    Promote,
    PromotionPolicy,
    Serving,
    best,
    check_policy,
    judge,
    moved_back_by,
)
from interlock.core.retention import Better
from interlock.errors import InvalidArgument

POLICY = PromotionPolicy("policy", "reward", min_improvement=5.0, min_interval_seconds=60.0)


def _contender(reward: float = 100.0, *, good: bool = True, name: str = "runs/r/checkpoints/c2") -> Contender:
    return Contender(name, 1000, good, {"reward": reward}, "blake3:aa")


SERVING = Serving("1", {"reward": 90.0}, promoted_at=0.0)


def test_a_better_good_checkpoint_is_promoted_and_says_by_what() -> None:
    verdict = judge(POLICY, _contender(), SERVING, now=100.0)
    assert isinstance(verdict, Promote)
    assert verdict.why == "reward 100 at step 1000 against 90 of version 1"


@pytest.mark.parametrize(
    ("left", "reached", "actor", "forbidden", "who"),
    [
        ("3", "1", "ops", False, "ops"),
        ("3", "1", "", False, "somebody"),
        ("10", "9", "ops", False, "ops"),
        ("3", "1", "ops", True, ""),
        ("1", "3", "ops", False, ""),
        (None, "1", "ops", False, ""),
        ("3", "1", "promotion", False, ""),
    ],
)
def test_a_person_who_moved_traffic_back_is_not_overruled(
    left: str | None, reached: str, actor: str, forbidden: bool, who: str
) -> None:
    assert moved_back_by(left, reached, actor, forbidden=forbidden) == who


@pytest.mark.parametrize(
    ("contender", "serving", "now", "extra", "why"),
    [
        (_contender(good=False), SERVING, 100.0, {}, "not confirmed as good"),
        (_contender(94.9), SERVING, 100.0, {}, "wanted 5"),
        (_contender(float("nan")), SERVING, 100.0, {}, "no finite reward"),
        (_contender(), SERVING, 59.0, {}, "less than 60 s"),
        (_contender(), Serving("1", {"reward": 90.0}, 0.0, "ops"), 100.0, {}, "ops moved policy back to version 1"),
        (_contender(), SERVING, 100.0, {"promoted": frozenset({"runs/r/checkpoints/c2"})}, "promoted already"),
        (_contender(), SERVING, 100.0, {"quarantined": frozenset({"blake3:aa"})}, "quarantined"),
    ],
)
def test_a_hold_says_why(
    contender: Contender, serving: Serving, now: float, extra: dict[str, frozenset[str]], why: str
) -> None:
    verdict = judge(POLICY, contender, serving, now, **extra)
    assert isinstance(verdict, Hold)
    assert why in verdict.why


def test_the_first_version_needs_no_improvement_but_must_be_good() -> None:
    assert isinstance(judge(POLICY, _contender(-1e9), None, now=0.0), Promote)
    assert isinstance(judge(POLICY, _contender(good=False), None, now=0.0), Hold)


@given(
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)
def test_minimising_is_maximising_the_negated_metric(value: float, bar: float) -> None:
    down = PromotionPolicy("policy", "loss", Better.LOWER, min_improvement=0.5)
    up = PromotionPolicy("policy", "loss", Better.HIGHER, min_improvement=0.5)
    first = judge(down, Contender("c", 1, True, {"loss": value}), Serving("1", {"loss": bar}, 0.0), 1.0)
    second = judge(up, Contender("c", 1, True, {"loss": -value}), Serving("1", {"loss": -bar}, 0.0), 1.0)
    assert type(first) is type(second)


def test_the_best_contender_is_good_finite_and_the_youngest_of_equals() -> None:
    contenders = (
        Contender("a", 1, True, {"reward": 5.0}),
        Contender("b", 2, True, {"reward": 5.0}),
        Contender("c", 3, False, {"reward": 9.0}),
        Contender("d", 4, True, {"reward": float("nan")}),
        Contender("e", 5, True, {}),
    )
    chosen = best(POLICY, contenders)
    assert chosen is not None
    assert chosen.name == "b"
    assert best(POLICY, contenders[2:]) is None


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (PromotionPolicy("../x", "reward"), "promotion.model"),
        (PromotionPolicy("policy", ""), "promotion.metric"),
        (PromotionPolicy("policy", "reward", min_improvement=-1.0), "promotion.min_improvement"),
        (PromotionPolicy("policy", "reward", min_improvement=float("inf")), "promotion.min_improvement"),
        (PromotionPolicy("policy", "reward", min_interval_seconds=-1.0), "promotion.min_interval"),
    ],
)
def test_a_wrong_policy_names_the_field(policy: PromotionPolicy, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_policy(policy)
    assert caught.value.field == field


# c1 - c2 - c3        attempt 1
#       \- c4 - c5    attempt 2, after a rollback to c2
NODES = {
    c.name: c
    for c in (
        CheckpointNode("c1", "r", 10),
        CheckpointNode("c2", "r", 20, parent="c1"),
        CheckpointNode("c3", "r", 30, parent="c2"),
        CheckpointNode("c4", "r", 25, 2, parent="c2"),
        CheckpointNode("c5", "r", 35, 2, parent="c4"),
    )
}
VERSIONS = (
    VersionNode("policy", "1", "d1", "c2", proven=True),
    VersionNode("policy", "2", "d2", "c3"),
    VersionNode("policy", "3", "d3", "c5", proven=True),
    VersionNode("policy", "4", "d4"),
)


def test_a_line_of_descent_ends_at_the_first_checkpoint() -> None:
    assert ancestors(NODES, "c5") == ("c5", "c4", "c2", "c1")
    assert ancestors({"x": CheckpointNode("x", "r", 1, parent="x")}, "x") == ("x",)


def test_descendants_fall_ancestors_stay() -> None:
    fallen = condemn(NODES, VERSIONS, ["c4"])
    assert fallen.checkpoints == {"c4", "c5"}
    assert fallen.versions == (("policy", "3"),)
    assert condemn(NODES, VERSIONS, ["c2"]).versions == (("policy", "1"), ("policy", "2"), ("policy", "3"))


def test_a_rollback_leaves_the_later_steps_behind() -> None:
    assert younger(NODES.values(), NODES["c4"]) == {"c5"}
    assert younger(NODES.values(), NODES["c1"]) == {"c2", "c3", "c4", "c5"}


def test_traffic_flees_to_a_proven_version_and_never_to_a_quarantined_one() -> None:
    assert refuge(VERSIONS, left="3", order=["3", "2", "1"]) == "1"
    assert refuge(VERSIONS[1:], left="3", order=["3", "2"]) == "2"
    assert refuge([VersionNode("policy", "2", "d", quarantined=True)], left="3", order=["2"]) is None
