"""Ensembles: several models that answer as one, as a small graph of steps over named tensors. Pure: what goes where, and in which order.

Rules of this file
- A tensor has one source: an input of the ensemble, or one output of one step.
- Nothing is left over: every input is used, every tensor that a step is said to give is taken by a step or is an output.
- Steps of one level need nothing of each other; a level needs only what stands before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from interlock.errors import InvalidArgument

SERVING = "serving"
"""The version of a step that follows its model's route."""
STEPS_MAX = 64


@dataclass(frozen=True, slots=True)
class Step:
    """One model's part: its own inputs and outputs by name, each with the name that the tensor has in the ensemble."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    version: str = SERVING


def levels(inputs: Sequence[str], outputs: Sequence[str], steps: Sequence[Step]) -> tuple[tuple[int, ...], ...]:
    """The numbers of the steps, in levels that can run one after the other.

    Raises:
        InvalidArgument: `MODEL_SPEC_INVALID`, `field` naming the step and the tensor at fault.
    """
    if not 1 <= len(steps) <= STEPS_MAX:
        raise _invalid("steps", f"{len(steps)} steps; from 1 to {STEPS_MAX} are needed")
    source = _sources(inputs, steps)
    _check_used(inputs, outputs, steps, source)
    done, order, left = set(inputs), [], set(range(len(steps)))
    while left:
        ready = tuple(sorted(n for n in left if set(steps[n].inputs.values()) <= done))
        if not ready:
            number = min(left)
            waiting = next(name for name in steps[number].inputs if steps[number].inputs[name] not in done)
            raise _invalid(
                f"steps[{number}].inputs.{waiting}",
                f"{steps[number].inputs[waiting]!r} comes from a step that waits for this one",
            )
        order.append(ready)
        left -= set(ready)
        done |= {tensor for n in ready for tensor in steps[n].outputs.values()}
    return tuple(order)


def _sources(inputs: Sequence[str], steps: Sequence[Step]) -> dict[str, str]:
    """Tensor -> where it comes from, in words."""
    source = dict.fromkeys(inputs, "an input of the ensemble")
    for number, step in enumerate(steps):
        if not step.outputs:
            raise _invalid(f"steps[{number}].outputs", "a step that gives nothing")
        for name, tensor in step.outputs.items():
            if tensor in source:
                raise _invalid(f"steps[{number}].outputs.{name}", f"{tensor!r} is {source[tensor]} already")
            source[tensor] = f"given by step {number} ({step.model})"
    return source


def _check_used(
    inputs: Sequence[str], outputs: Sequence[str], steps: Sequence[Step], source: Mapping[str, str]
) -> None:
    used = set(outputs)
    for number, step in enumerate(steps):
        for name, tensor in step.inputs.items():
            if tensor not in source:
                raise _invalid(f"steps[{number}].inputs.{name}", f"nothing gives {tensor!r}")
            used.add(tensor)
    for number, step in enumerate(steps):
        for name, tensor in step.outputs.items():
            if tensor not in used:
                raise _invalid(f"steps[{number}].outputs.{name}", f"nobody takes {tensor!r}")
    for index, tensor in enumerate(inputs):
        if tensor not in used:
            raise _invalid(f"inputs[{index}].name", f"no step takes {tensor!r}")
    for index, tensor in enumerate(outputs):
        if tensor not in source or tensor in inputs:
            raise _invalid(f"outputs[{index}].name", f"no step gives {tensor!r}")


def _invalid(field: str, problem: str) -> InvalidArgument:
    return InvalidArgument(f"model.toml: {field}: {problem}", reason="MODEL_SPEC_INVALID", field=field)
