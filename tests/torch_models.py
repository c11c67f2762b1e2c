"""Modules for tests of the PyTorch engine, and version folders that name them. `MODULES` is what an operator would list."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from interlock.stores import artifacts, modelspec
from interlock.stores.modelspec import ModelSpec, TensorSpec

MODULES = (__name__, f"{__name__}:made")


class Identity(torch.nn.Module):
    """y = x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class Constant(torch.nn.Module):
    """y [-1, 4] = 0 * x + value."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0 + self.value


class Pair(torch.nn.Module):
    """sum = a + b, shape = that of a; by name, and not in the order of any file."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"shape": torch.tensor(a.shape), "sum": a + b}


class Rows(torch.nn.Module):
    """The rows of a table; an index beyond its end is refused by torch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x)


class Folds(torch.nn.Module):
    """Folds rows into threes: fails for other numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 3)


class Spoils(torch.nn.Module):
    """Writes into its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1.0).clone()


class Lies(torch.nn.Module):
    """Gives another type than any model.toml will say."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


class SoftmaxOverRows(torch.nn.Module):
    """An answer that depends on who else is there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(0)


class Tied(torch.nn.Module):
    """Two names for one tensor, of which a file holds one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4, bias=False)
        self.second = torch.nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Mlp(torch.nn.Module):
    """y [-1, sizes[-1]] from x [-1, sizes[0]]."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(sizes))
        self.layers = torch.nn.ModuleList([torch.nn.Linear(a, b) for a, b in pairs])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


def made(width: int) -> torch.nn.Module:
    """A factory that is no class."""
    return Mlp([width, width])


def spec(module: str, inputs: str = "x FP32 -1,4", outputs: str = "y FP32 -1,4", **more: Any) -> ModelSpec:
    """`name datatype shape`, several divided by semicolons; `module` is a class of this file unless it has a colon."""
    name = module if ":" in module else f"{__name__}:{module}"
    return ModelSpec(
        "policy", _tensors(inputs), _tensors(outputs), engine="torch", file="model.safetensors", module=name, **more
    )


def _tensors(text: str) -> tuple[TensorSpec, ...]:
    parts = [each.split() for each in text.split(";")]
    return tuple(
        TensorSpec(name, datatype, tuple(int(dim) for dim in "".join(shape).split(",") if dim))
        for name, datatype, *shape in parts
    )


def write_version(folder: Path, said: ModelSpec, module: torch.nn.Module | None = None) -> str:
    """A version folder with a module's weights; its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = module.state_dict() if module is not None else {}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    modelspec.write_spec(folder, said)
    return artifacts.write_manifest(folder).digest


def constant(folder: Path, value: float, **more: Any) -> str:
    """The same as `onnx_models.constant`, in torch."""
    module = Constant()
    torch.nn.init.constant_(module.value, value)
    return write_version(folder, spec("Constant", **more), module)
