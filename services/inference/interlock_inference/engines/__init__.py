"""What a slot needs from an engine. Adapters stand beside this module; nothing outside them imports an engine's library.

An engine belongs to one version, is built and closed by its slot, and may be run by several threads at once. It knows tensors by
name and nothing of requests, routes or versions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from interlock.runtime.arrays import NUMPY_TYPES, Array
from interlock.stores.modelspec import TensorSpec

__all__ = ["Array", "Engine", "EngineOptions", "Signature", "made_up_inputs"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the replica says about engines. A version's own `[engine_options]` go before it, up to `max_threads`.

    Attributes:
        providers: execution providers, best first; `auto` stands for TensorRT, CUDA, CPU, as far as they are there.
        num_threads: threads inside one run. They don't spin: a replica shares its cores with its own event loop.
        max_threads: the most that a version may ask for; 0 means as many as there are cores.
        torch_modules: what a version may name as its `module`, beside registered entry points: `package.module:Factory`, or `package.module` for
            every torch.nn.Module that it defines.
    """

    providers: tuple[str, ...] = ("auto",)
    num_threads: int = 1
    max_threads: int = 0
    torch_modules: tuple[str, ...] = ()

    def threads(self, asked: int | None) -> int:
        """How many a version gets that asks for so many, or for none in particular."""
        limit = self.max_threads or len(os.sched_getaffinity(0))
        return self.num_threads if asked is None else min(asked, max(limit, self.num_threads))


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors that a version takes and gives, in the model's order.

    Attributes:
        symbols: input name -> one name per dimension, empty where it has none. Dimensions that share a name must agree in a request.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    symbols: Mapping[str, tuple[str, ...]]


class Engine(Protocol):
    """A loaded model that can be run.

    Arrays have the numpy type of their datatype; BF16 travels as uint16 bit patterns and BYTES as object arrays of bytes.
    """

    platform: str
    """Triton's platform name, e.g. `onnxruntime_onnx`."""
    providers: tuple[str, ...]
    """What it really runs on, as reported after loading, best first."""
    signature: Signature

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs, in the order asked for. Thread-safe; blocks.

        Raises:
            InvalidArgument: `INPUT_REFUSED`: what fits the signature, and the model refused all the same; `INVALID_TENSOR`: text that is none.
            Internal: `ENGINE_FAULT`.
        """
        ...

    def close(self) -> None:
        """Gives back what the engine holds. Idempotent; never while a run is in progress."""
        ...


def made_up_inputs(signature: Signature, rows: int = 1, seed: int = 0) -> dict[str, Array]:
    """Inputs that fit a signature: `rows` along the first free dimension of each tensor, 1 along the others.

    Floats are spread like a standard normal, from `seed`; whole numbers are 0, which is a valid index wherever indices are meant; BYTES are empty.
    """
    made: dict[str, Array] = {}
    for spec in signature.inputs:
        shape = tuple(_free(dim, position, rows) for position, dim in enumerate(spec.shape))
        if spec.datatype in ("FP16", "FP32", "FP64"):
            made[spec.name] = _normal(shape, seed + len(made)).astype(NUMPY_TYPES[spec.datatype])
        elif spec.datatype == "BYTES":
            made[spec.name] = np.full(shape, b"", dtype=object)
        else:
            made[spec.name] = np.zeros(shape, NUMPY_TYPES[spec.datatype])
    return made


def _normal(shape: tuple[int, ...], seed: int) -> Array:
    """Box and Muller over a sequence that fills the unit square evenly. (numpy.random would be 10 ms and 3 MB of a start.)"""
    index = np.arange(1, math.prod(shape) + 1) + 7919.0 * seed
    first, second = (index * share % 1.0 for share in (0.7548776662466927, 0.5698402909980532))  # of the plastic number
    flat: Array = np.sqrt(-2.0 * np.log1p(-first)) * np.cos(2.0 * np.pi * second)
    return flat.reshape(shape)


def _free(dim: int, position: int, rows: int) -> int:
    if dim >= 0:
        return dim
    return rows if position == 0 else 1
