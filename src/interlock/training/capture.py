"""Everything a run needs to go on exactly where it was: components, random generators, data position. Captured and restored in place.

A component is any object with `state_dict` and `load_state_dict`. Components are named; the name is the first part of every tensor's path
in the checkpoint. Random generators are restored last, because building an iterator may draw from them.

`Snapshot` holds references into live tensors until `stage` has copied them into one reused buffer; after that the loop may go on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from interlock.errors import FailedPrecondition
from interlock.stores.checkpoints import Loaded, TensorSlot, place
from interlock.training.tree import CODES, DTYPES, Tensors, pack, unpack


class Stateful(Protocol):
    """What can be saved and restored. torch's modules, optimizers, schedulers, scalers and loaders are."""

    def state_dict(self) -> Any:
        """The state, as tensors and plain data."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Takes the state over, in place."""
        ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One captured state: tensors by path (live, not copied) and the JSON beside them."""

    tensors: Tensors
    state: Any


def capture(components: Mapping[str, Stateful], loop: Mapping[str, Any]) -> Snapshot:
    """The state now. `loop` is the run's own: step, seq, data position; plain data and tensors.

    Raises:
        InvalidArgument: `STATE_NOT_SUPPORTED`, naming the path of what has no exact form.
    """
    tensors: Tensors = {}
    state = {
        "components": {name: pack(item.state_dict(), name, tensors) for name, item in components.items()},
        "loop": pack(dict(loop), "loop", tensors),
        "random": pack(random_states(), "random", tensors),
    }
    return Snapshot(tensors, state)


def restore(loaded: Loaded, components: Mapping[str, Stateful]) -> dict[str, Any]:
    """Puts a checkpoint into the live components and returns the loop's own state. Generators are left to `set_random_states`.

    Raises:
        FailedPrecondition: `COMPONENT_MISSING`: the checkpoint and the run do not have the same components.
    """
    tensors = {name: as_tensor(*raw) for name, raw in loaded.tensors.items()}
    saved = loaded.state["components"]
    if set(saved) != set(components):
        differing = sorted(set(saved) ^ set(components))
        raise FailedPrecondition(
            f"checkpoint {loaded.checkpoint} holds {sorted(saved)}, the run has {sorted(components)}: {differing[0]!r} differs",
            reason="COMPONENT_MISSING",
            field=differing[0],
        )
    for name, component in components.items():
        component.load_state_dict(unpack(saved[name], tensors))
    loop: dict[str, Any] = unpack(loaded.state["loop"], tensors)
    loop["random"] = unpack(loaded.state["random"], tensors)
    return loop


def as_tensor(code: str, shape: tuple[int, ...], raw: memoryview) -> torch.Tensor:
    """A tensor over the checkpoint's bytes; they are ours alone, so nothing is copied."""
    if not raw.nbytes:
        return torch.empty(shape, dtype=DTYPES[code])
    if raw.nbytes and _misaligned(raw, DTYPES[code]):
        raw = memoryview(bytearray(raw))
    return torch.frombuffer(raw, dtype=DTYPES[code]).reshape(shape)


def _misaligned(raw: memoryview, dtype: torch.dtype) -> bool:
    address = int(np.frombuffer(raw, dtype=np.uint8).__array_interface__["data"][0])
    return address % dtype.itemsize != 0


def random_states() -> dict[str, Any]:
    """The states of python's, numpy's and torch's global generators, all devices."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = list(torch.cuda.get_rng_state_all())
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Puts `random_states` back."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def seed_everything(seed: int) -> None:
    """Seeds python's, numpy's and torch's global generators, all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Staging:
    """One reused host buffer that a snapshot is copied into: the only copy the loop waits for."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def fill(self, snapshot: Snapshot) -> tuple[list[TensorSlot], memoryview]:
        """Copies every tensor; the returned bytes stay valid until the next call. Grows by a quarter when it must."""
        ordered = sorted(snapshot.tensors.items(), key=lambda item: -item[1].element_size())
        wanted = [(name, CODES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for name, t in ordered]
        slots, size = place(wanted)
        if self._buffer.numel() < size:
            self._buffer = torch.zeros(size + size // 4, dtype=torch.uint8)
        for slot, (_, tensor) in zip(slots, ordered, strict=True):
            if slot.end > slot.begin:
                self._buffer[slot.begin : slot.end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return slots, memoryview(self._buffer.numpy().data)[:size]
