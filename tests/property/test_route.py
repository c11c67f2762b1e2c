"""Route: weights, epochs and picks, against oracles that are plain counting."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.core.route import Picker, Route, Weight, admit, all_to, change, check_weights, cycle
from interlock.errors import Aborted, InvalidArgument

weights_strategy = st.lists(st.integers(1, 100), min_size=1, max_size=6).map(
    lambda shares: tuple(Weight(f"v{i}", share) for i, share in enumerate(shares))
)


@settings(max_examples=150)
@given(weights_strategy, st.integers(1, 400))
def test_every_prefix_of_the_picks_is_within_one_request_of_the_shares(
    weights: tuple[Weight, ...], num_picks: int
) -> None:
    total = sum(w.weight for w in weights)
    picker, seen = Picker(weights), Counter[str]()
    for n in range(1, num_picks + 1):
        version = picker.pick()
        assert version is not None
        seen[version] += 1
        for entry in weights:
            assert abs(seen[entry.version] - Fraction(n * entry.weight, total)) < 1


@given(weights_strategy)
def test_one_cycle_holds_exactly_the_shares(weights: tuple[Weight, ...]) -> None:
    turn = cycle(weights)
    total = sum(w.weight for w in weights)
    counts = Counter(turn)
    assert all(counts[w.version] * total == w.weight * len(turn) for w in weights)


def test_a_route_without_weights_picks_nothing() -> None:
    assert Picker(()).pick() is None
    assert all_to(None) == ()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), max_size=30))
def test_the_epoch_never_skips_and_never_decreases(attempts: list[tuple[int, int]]) -> None:
    route = Route("policy", 0)
    for expected, version in attempts:
        before = route
        try:
            route = change(route, expected, all_to(str(version)))
            refused = ""
        except Aborted as refusal:
            refused = refusal.reason
        assert refused == ("" if expected == before.epoch else "STALE_EPOCH")
        assert route.epoch == before.epoch + (not refused)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=40))
def test_a_data_plane_keeps_the_highest_token_and_epoch(messages: list[tuple[int, int]]) -> None:
    epoch = token = 0
    for given_epoch, given_token in messages:
        try:
            news = admit("policy", epoch=given_epoch, token=given_token, seen_epoch=epoch, seen_token=token)
            refused = ""
        except Aborted as refusal:
            refused = refusal.reason
        if refused:
            assert refused == ("STALE_CONTROLLER" if given_token < token else "STALE_EPOCH")
            continue
        assert news == (given_epoch > epoch)
        assert given_epoch >= epoch
        assert given_token >= token
        epoch, token = given_epoch, given_token


@pytest.mark.parametrize(
    ("weights", "field"),
    [
        ([Weight("1", 0)], "weights[0].weight"),
        ([Weight("1", -5)], "weights[0].weight"),
        ([Weight("1", 50), Weight("1", 50)], "weights[1].version"),
        ([Weight("../x", 50)], "weights[0].version"),
        ([Weight("1", 600), Weight("2", 600)], "weights"),
    ],
)
def test_wrong_weights_name_the_entry(weights: list[Weight], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_weights(weights)
    assert caught.value.field == field
