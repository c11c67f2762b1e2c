"""The graph of an ensemble: its order, and every way in which it can be wrong, named by step and tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.core.ensemble import Step, levels
from interlock.errors import InterlockError, InvalidArgument
from interlock.stores import modelspec


def step(model: str, inputs: str, outputs: str) -> Step:
    """`step("a", "x=in", "y=mid")`: several divided by spaces."""
    return Step(model, *(dict(pair.split("=") for pair in text.split()) for text in (inputs, outputs)))  # type: ignore[arg-type]


def test_steps_that_need_nothing_of_each_other_stand_side_by_side() -> None:
    steps = [
        step("join", "a=left b=right", "y=out"),
        step("left", "x=mid", "y=left"),
        step("right", "x=mid z=in", "y=right"),
        step("head", "x=in", "y=mid"),
    ]
    assert levels(["in"], ["out"], steps) == ((3,), (1, 2), (0,))
    assert levels(["in"], ["out", "mid"], steps) == ((3,), (1, 2), (0,)), "what is used inside may be an output too"


@pytest.mark.parametrize(
    ("inputs", "outputs", "steps", "field", "why"),
    [
        (["in"], ["out"], [], "steps", "from 1 to"),
        (["in"], ["out"], [step("a", "x=in", "y=out")] * 65, "steps", "65 steps"),
        (["in"], ["out"], [step("a", "x=nothing", "y=out")], "steps[0].inputs.x", "nothing gives 'nothing'"),
        (["in"], ["out"], [step("a", "x=in", "")], "steps[0].outputs", "gives nothing"),
        (["in"], ["out"], [step("a", "x=in", "y=in")], "steps[0].outputs.y", "an input of the ensemble already"),
        (["in"], ["out"], [step("a", "x=in", "y=out"), step("b", "x=in", "y=out")], "steps[1].outputs.y", "given by step 0"),
        (["in"], ["out"], [step("a", "x=in", "y=out z=rest")], "steps[0].outputs.z", "nobody takes 'rest'"),
        (["in", "more"], ["out"], [step("a", "x=in", "y=out")], "inputs[1].name", "no step takes 'more'"),
        (["in"], ["out", "none"], [step("a", "x=in", "y=out")], "outputs[1].name", "no step gives 'none'"),
        (["in"], ["out", "in"], [step("a", "x=in", "y=out")], "outputs[1].name", "no step gives 'in'"),
        (["in"], ["out"], [step("a", "x=in w=back", "y=mid"), step("b", "x=mid", "y=out z=back")], "steps[0].inputs.w", "waits for this one"),
        (["in"], ["out"], [step("a", "x=in w=own", "y=out z=own")], "steps[0].inputs.w", "waits for this one"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(inputs: list[str], outputs: list[str], steps: list[Step], field: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as refused:
        levels(inputs, outputs, steps)
    assert (refused.value.reason, refused.value.field) == ("MODEL_SPEC_INVALID", field)


@given(st.integers(1, 30), st.randoms())
def test_any_graph_without_a_cycle_is_ordered(count: int, chance: Any) -> None:
    """Each step takes some of what stands before it; the order it is written in does not matter."""
    tensors, steps = ["in"], []
    for number in range(count):
        taken = chance.sample(tensors, chance.randint(1, len(tensors)))
        steps.append(Step(f"m{number}", {f"i{n}": tensor for n, tensor in enumerate(taken)}, {"y": f"t{number}"}))
        tensors.append(f"t{number}")
    steps.append(Step("sum", {f"i{n}": tensor for n, tensor in enumerate(tensors)}, {"y": "out"}))
    chance.shuffle(steps)
    order = levels(["in"], ["out"], steps)
    assert sorted(n for level in order for n in level) == list(range(len(steps)))
    known = {"in"}
    for level in order:
        assert all(set(steps[n].inputs.values()) <= known for n in level)
        known |= {tensor for n in level for tensor in steps[n].outputs.values()}


TENSORS = [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
GOOD = {
    "name": "both",
    "engine": "ensemble",
    "inputs": TENSORS,
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
    "steps": [
        {"model": "first", "inputs": {"x": "x"}, "outputs": {"y": "mid"}},
        {"model": "second", "version": "3", "inputs": {"x": "mid"}, "outputs": {"y": "y"}},
    ],
}


def test_an_ensemble_is_read_back_as_written(tmp_path: Path) -> None:
    spec = modelspec.parse_spec(GOOD)
    assert (spec.file, spec.steps[0].version, spec.steps[1].version) == ("", "serving", "3")
    modelspec.write_spec(tmp_path, spec)
    assert modelspec.read_spec(tmp_path) == spec


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"steps": []}, "steps"),
        ({"steps": 3}, "steps"),
        ({"steps": [3]}, "steps[0]"),
        ({"steps": [{"model": "a", "inputs": {}}]}, "steps[0]"),
        ({"steps": [{"model": "a/b", "inputs": {"x": "x"}, "outputs": {"y": "y"}}]}, "steps[0].model"),
        ({"steps": [{"model": 3, "inputs": {"x": "x"}, "outputs": {"y": "y"}}]}, "steps[0].model"),
        (
            {"steps": [{"model": "a", "version": "../1", "inputs": {"x": "x"}, "outputs": {"y": "y"}}]},
            "steps[0].version",
        ),
        ({"steps": [{"model": "a", "inputs": {"x": 3}, "outputs": {"y": "y"}}]}, "steps[0].inputs"),
        ({"steps": [{"model": "both", "inputs": {"x": "x"}, "outputs": {"y": "y"}}]}, "steps[0].model"),
        ({"file": "model.onnx"}, "engine"),
        ({"batching": {}}, "engine"),
        ({"instances": 2}, "engine"),
        ({"module": "a:b"}, "module"),
        ({"engine": "onnx"}, "steps"),
        ({"engine_options": {"providers": "auto"}}, "engine_options.providers"),
    ],
)
def test_a_wrong_ensemble_names_its_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InterlockError) as refused:
        modelspec.parse_spec({**GOOD, **change})
    assert refused.value.field == field
