"""What happens around `optimizer.step()`: NaN kept out, the learning rate scaled by a plan, drills. Nothing here decides a rollback.

- Before the step: if any gradient is NaN or infinite, all gradients are set to None, so the update does nothing; the step is recorded
  with `nonfinite_gradients`, on which every guard policy trips.
- A scale multiplies the learning rate of every group for the one step and puts it back after it, so schedulers never see it.
- `gradient_norm`, `learning_rate` and, with a device, `device_memory_bytes` are reported for free, unless the loop reports its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from interlock.core.steps import NONFINITE_GRADIENTS


@dataclass(slots=True)
class Scale:
    """The learning rate times `factor` while the run's step is below `until_step` (0: for good)."""

    factor: float
    until_step: int


class OptimizerHooks:
    """Hooks on one or more optimizers of a run."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self.scales: list[Scale] = []
        self.poison_until_step = 0
        self.step = 0
        self.metrics: dict[str, Any] = {}
        self._rates: dict[int, list[Any]] = {}
        self._scaled: set[int] = set()
        self._on_device = torch.cuda.is_available()
        self._handles: list[Any] = []
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))

    def _before(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        gradients = _gradients(optimizer)
        if gradients and self.step < self.poison_until_step:
            gradients[0].fill_(float("nan"))
        if gradients:
            norm = _total_norm(gradients)
            self.metrics["gradient_norm"] = norm
            if not math.isfinite(norm):
                self._skip(optimizer, gradients)
        factor = self.factor() if self.scales else 1.0
        self.metrics["learning_rate"] = float(optimizer.param_groups[0]["lr"]) * factor
        if self._on_device:
            self.metrics["device_memory_bytes"] = float(torch.cuda.memory_allocated())
        if factor != 1.0:
            self._scale(optimizer, factor)

    def _scale(self, optimizer: torch.optim.Optimizer, factor: float) -> None:
        """Only an optimizer that was scaled once pays for the hook that puts the rate back."""
        if id(optimizer) not in self._scaled:
            self._scaled.add(id(optimizer))
            self._handles.append(optimizer.register_step_post_hook(self._after))
        self._rates[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _skip(self, optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> None:
        bad = sum(not bool(torch.isfinite(gradient).all()) for gradient in gradients)
        self.metrics[NONFINITE_GRADIENTS] = float(max(bad, 1))
        self.metrics.pop("gradient_norm", None)
        optimizer.zero_grad(set_to_none=True)

    def _after(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        rates = self._rates.pop(id(optimizer), None)
        if rates:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def factor(self) -> float:
        """The product of the scales that hold at the current step."""
        factor = 1.0
        for scale in self.scales:
            if not scale.until_step or self.step < scale.until_step:
                factor *= scale.factor
        return factor

    def take_metrics(self) -> dict[str, Any]:
        """What the hooks saw in this step."""
        metrics, self.metrics = self.metrics, {}
        return metrics

    def reset_moments(self) -> None:
        """Drops the running moments of every optimizer."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def state(self) -> list[list[float]]:
        """The scales, for the checkpoint."""
        return [[scale.factor, scale.until_step] for scale in self.scales]

    def load(self, state: list[list[float]]) -> None:
        """The scales of a checkpoint."""
        self.scales = [Scale(float(factor), int(until)) for factor, until in state]

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()


def _gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        gradient
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (gradient := parameter.grad) is not None
    ]


def _total_norm(gradients: list[torch.Tensor]) -> float:
    """The norm of all gradients together; the one number of a step that a device is waited for, because it decides about the update."""
    first = gradients[0]
    if first.is_cpu and type(first) is torch.Tensor:
        # No device to wait for: reading every norm costs less than the two operations that would make one number of them.
        return math.hypot(*[norm.item() for norm in torch._foreach_norm(gradients)])
    if any(gradient.device != first.device or gradient.dtype != first.dtype for gradient in gradients):
        return float(torch.nn.utils.get_total_norm(gradients))
    norms = torch._foreach_norm(gradients)
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def add_noise(modules: Iterable[torch.nn.Module], deviations: float) -> None:
    """A drill: every parameter moves by noise of `deviations` times its own standard deviation."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                scale = parameter.std() if parameter.numel() > 1 else parameter.abs()
                parameter.add_(torch.randn_like(parameter) * scale * deviations)
