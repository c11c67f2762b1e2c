"""Resource names: what is built can be taken apart again, and what is not an id never becomes a path."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core import names
from interlock.errors import InvalidArgument

HOSTILE = [
    "", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\x00b", "a b", "a\nb", "..%2f", "%2e%2e", "a..b", ".hidden", "-x", "_x", "é", "a" * 64, "a:b", "~",
    "$(id)", "`id`", "a;b", "\u202e", "con/", "models/x", "*", "?", "x" * 5000,
]  # fmt: skip
ids = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=63).filter(
    lambda text: text[0].isalnum()
)


@given(ids, ids)
def test_a_name_comes_apart_as_it_was_built(first: str, second: str) -> None:
    assert names.parse_model(names.model_name(first)) == first
    assert names.parse_run(names.run_name(first)) == first
    assert names.parse_swap(names.swap_name(first)) == first
    assert names.parse_version(names.version_name(first, second)) == (first, second)
    assert names.parse_checkpoint(names.checkpoint_name(first, second)) == (first, second)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_is_not_an_id_is_refused_everywhere(hostile: str) -> None:
    for build in (names.model_name, names.run_name, names.swap_name):
        with pytest.raises(InvalidArgument) as caught:
            build(hostile)
        assert caught.value.reason == "INVALID_ID"
        assert len(caught.value.message) < 400
    for build_two in (names.version_name, names.checkpoint_name):
        with pytest.raises(InvalidArgument):
            build_two("fine", hostile)
        with pytest.raises(InvalidArgument):
            build_two(hostile, "fine")
    with pytest.raises(InvalidArgument):
        names.parse_model(f"models/{hostile}")


@given(st.text(max_size=80))
def test_an_id_can_never_leave_its_folder(text: str) -> None:
    try:
        names.check_id(text, "field")
    except InvalidArgument:
        return
    assert not set(text) & set("/\\\0\n\r%~$`;:* ")
    assert ".." not in text
    assert text[0].isalnum()


@pytest.mark.parametrize(
    "name", ["models", "models/", "model/x", "models/x/versions", "models/x/versions/1/more", "versions/1", ""]
)
def test_a_name_of_another_shape_says_the_pattern(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        names.parse_version(name, "spec.candidate_version")
    assert caught.value.field == "spec.candidate_version"
    assert caught.value.reason in {"INVALID_NAME", "INVALID_ID"}
