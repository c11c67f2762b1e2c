"""Typed groups: every mistake is told at once, each by its name, and what is made never changes."""

from pathlib import Path
from typing import Any, Literal

import pytest

from interlock.runtime.fields import Field, Group


class Inner(Group):
    """A group inside a group."""

    port: int = Field(80, ge=0, le=99, description="a port")
    names: list[str] = Field(default_factory=lambda: ["a"])


class Outer(Group):
    """One field of every kind."""

    share: float = Field(0.5, gt=0)
    on: bool = False
    word: Literal["x", "y"] = "x"
    home: Path = Path("here")
    table: dict[str, int] = Field(default_factory=dict)
    inner: Inner = Inner()


def test_defaults_are_each_their_own() -> None:
    first, second = Inner(), Inner()
    assert first.names == ["a"]
    assert first.names is not second.names
    assert first == second
    assert Outer().inner.port == 80
    assert Inner.fields["port"].description == "a port"


@pytest.mark.parametrize(
    ("name", "given", "made"),
    [
        ("share", "0.25", 0.25),
        ("share", 2, 2.0),
        ("on", "yes", True),
        ("on", "0", False),
        ("word", "y", "y"),
        ("home", "there", Path("there")),
        ("table", '{"a": "3"}', {"a": 3}),
        ("inner", {"port": "7", "names": '["b"]'}, Inner(port=7, names=["b"])),
        ("inner", Inner(port=1), Inner(port=1)),
    ],
)
def test_text_is_read_as_what_is_meant(name: str, given: Any, made: Any) -> None:
    assert getattr(Outer(**{name: given}), name) == made


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"share": 0}, "share: 0.0 must be above 0"),
        ({"share": "much"}, "share: 'much' is not a number"),
        ({"share": True}, "share: True is not a number"),
        ({"on": "perhaps"}, "on: 'perhaps' is neither true nor false"),
        ({"word": "z"}, "word: 'z' is none of 'x', 'y'"),
        ({"home": 3}, "home: 3 is not a path"),
        ({"table": "[1]"}, "table: [1] is not a table"),
        ({"table": "{"}, "table: '{' is not JSON"),
        ({"inner": 3}, "inner.*: 3 is not a table"),
        ({"inner": {"port": 100}}, "inner.port: 100 must be at most 99"),
        ({"inner": {"port": 1.5}}, "inner.port: 1.5 is not a whole number"),
        ({"inner": {"port": True}}, "inner.port: True is not a whole number"),
        ({"inner": {"names": [1]}}, "inner.names: 1 is not text"),
        ({"inner": {"prot": 1}}, "inner.prot: there is no such setting"),
        ({"colour": 1}, "colour: there is no such setting"),
    ],
)
def test_mistakes_name_the_field(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=r"[a-z]") as refused:
        Outer(**given)
    assert str(refused.value) == told


def test_every_mistake_is_told() -> None:
    with pytest.raises(ValueError, match=r"share.*inner\.prot.*inner\.port") as refused:
        Outer(share=-1, inner={"port": -1, "prot": 1})  # type: ignore[arg-type]
    assert str(refused.value).count("; ") == 2


def test_a_group_never_changes() -> None:
    with pytest.raises(AttributeError, match=r"Inner\.port"):
        Inner().port = 3  # type: ignore[misc]
