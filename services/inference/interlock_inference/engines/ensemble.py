"""What stands in an ensemble's slot: its plan and its signature. It has no model of its own; who runs its steps is `interlock_inference.ensembles`'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from interlock.core import ensemble
from interlock.core.ensemble import Step
from interlock.stores.modelspec import ModelSpec
from interlock_inference.engines import Array, Signature


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a loaded ensemble, and their order."""

    steps: tuple[Step, ...]
    levels: tuple[tuple[int, ...], ...]


class EnsembleEngine:
    """An `Engine` that is run step by step by whoever holds its members."""

    platform = "ensemble"
    providers: tuple[str, ...] = ()

    def __init__(self, spec: ModelSpec) -> None:
        self.signature = Signature(spec.inputs, spec.outputs, {})
        names = [each.name for each in spec.inputs], [each.name for each in spec.outputs]
        self.plan = Plan(spec.steps, ensemble.levels(*names, spec.steps))

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Not how an ensemble runs."""
        raise AssertionError("an ensemble is run step by step, on members that are held")

    def close(self) -> None:
        """Nothing to give back."""
