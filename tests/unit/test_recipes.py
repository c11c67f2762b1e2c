"""What a run is refused for before any process is started."""

from __future__ import annotations

import pytest

from interlock.errors import FailedPrecondition, InvalidArgument
from interlock_trainer import recipes


def test_a_recipe_whose_packages_are_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(FailedPrecondition) as caught:
        recipes.check_installed("ppo")
    assert caught.value.reason == "RECIPE_NOT_INSTALLED"
    assert "needs torch" in caught.value.message
    assert "pip install 'interlock[recipes]'" in caught.value.message


def test_every_recipe_says_what_it_needs() -> None:
    assert set(recipes.NEEDS) == set(recipes.RECIPES)


@pytest.mark.parametrize(
    ("recipe", "parameters", "reason", "field"),
    [
        ("alchemy", {}, "UNKNOWN_RECIPE", "recipe"),
        ("ppo", {"learning_rat": 1.0}, "INVALID_PARAMETER", "parameters.learning_rat"),
        ("ppo", {"learning_rate": "fast"}, "INVALID_PARAMETER", "parameters.learning_rate"),
    ],
)
def test_a_mistake_names_its_field(recipe: str, parameters: dict[str, object], reason: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        recipes.check(recipe, parameters)
    assert (caught.value.reason, caught.value.field) == (reason, field)
