"""Built-in recipes: their names and parameters. Imports no torch: the service checks parameters, only a run's own process trains.

A recipe is a module with `train(parameters, attach)`; `attach` is the SDK's, with name, policy, trainer and home filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from interlock.core.fields import parse, refuse
from interlock.errors import FailedPrecondition, InvalidArgument

FAULTS = ("learning_rate", "nan", "weights", "reward_sign")


@dataclass(frozen=True, slots=True)
class PpoParameters:
    """PPO on gymnasium's vectorised CartPole. One step is one optimizer update of one minibatch.

    Attributes:
        pace_ms: least time of a step, so that a run can share a small machine; 0: as fast as it goes.
        fault, fault_step, fault_value, fault_steps: a drill that begins by itself; see `RunService.InjectFault`.
    """

    seed: int = 1
    num_envs: int = 32
    horizon: int = 32
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 1e-3
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.01
    max_gradient_norm: float = 0.5
    hidden: int = 64
    max_steps: int = 20_000
    pace_ms: float = 0.0
    fault: str = ""
    fault_step: int = 0
    fault_value: float = 1000.0
    fault_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("num_envs", "horizon", "epochs", "minibatches", "hidden", "max_steps", "fault_steps"):
            if getattr(self, name) < 1:
                raise refuse(name, f"must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip", "max_gradient_norm"):
            if getattr(self, name) <= 0:
                raise refuse(name, f"must be positive, got {getattr(self, name)}")
        if (self.num_envs * self.horizon) % self.minibatches:
            raise refuse("minibatches", f"must divide num_envs x horizon ({self.num_envs * self.horizon})")
        if self.fault and self.fault not in FAULTS:
            raise refuse("fault", f"{self.fault!r} is not one of {', '.join(FAULTS)}")


RECIPES: Mapping[str, type[Any]] = {"ppo": PpoParameters}
NEEDS: Mapping[str, tuple[str, ...]] = {"ppo": ("torch", "gymnasium", "safetensors", "onnx", "onnxscript")}


def check_installed(recipe: str) -> None:
    """Refuses a recipe whose packages are not there, before a process is started that could only fail.

    Raises:
        FailedPrecondition: `RECIPE_NOT_INSTALLED`, naming the packages and the fix.
    """
    missing = [name for name in NEEDS[recipe] if find_spec(name) is None]
    if missing:
        raise FailedPrecondition(
            f"recipe {recipe} needs {', '.join(missing)} on the trainer's machine: pip install 'interlock[recipes]'",
            reason="RECIPE_NOT_INSTALLED",
            metadata={"recipe": recipe, "missing": ", ".join(missing)},
        )


def check(recipe: str, parameters: Mapping[str, Any]) -> Any:
    """The recipe's parameters, complete.

    Raises:
        InvalidArgument: `UNKNOWN_RECIPE` or `INVALID_PARAMETER`, naming the field and the fix.
    """
    if recipe not in RECIPES:
        raise InvalidArgument(
            f"recipe: {recipe!r} is not built in; built in are {', '.join(sorted(RECIPES))}",
            reason="UNKNOWN_RECIPE",
            field="recipe",
            metadata={"recipe": recipe[:80]},
        )
    try:
        return parse(RECIPES[recipe], parameters, "parameters")
    except InvalidArgument as error:
        raise InvalidArgument(
            error.message, reason="INVALID_PARAMETER", field=error.field, metadata=error.metadata
        ) from None
