"""Everything a run needs to go on exactly where it was: components, random generators, data position. Captured and restored in place.

A component is any object with `state_dict` and `load_state_dict`. Components are named; the name is the first part of every tensor's path
in the checkpoint. Random generators are restored last, because building an iterator may draw from them.

`Snapshot` holds references into live tensors until `stage` has copied them into one reused buffer; after that the loop may go on.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from interlock.errors import FailedPrecondition
from interlock.stores.checkpoints import Loaded, TensorSlot, place
from interlock.stores.shared import SharedBuffer
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


@dataclass(frozen=True, slots=True)
class Staged:
    """A copied snapshot: where each tensor lies in `data`, which is the head of the shared memory behind `fd`."""

    slots: list[TensorSlot]
    data: memoryview
    fd: int


class Staging:
    """One reused buffer of shared memory that a snapshot is copied into: the only copy the loop waits for."""

    def __init__(self) -> None:
        self._buffer = SharedBuffer(0)
        self._next: SharedBuffer | None = None
        self._growing: threading.Thread | None = None

    def prepare(self, size: int) -> None:
        """Makes room for `size` bytes in a thread, so that the copy that needs them first doesn't wait for fresh pages."""

        def grow() -> None:
            with suppress(OSError):  # the copy itself will say that there is no memory
                self._next = SharedBuffer(size)

        if size > self._buffer.size and self._growing is None:
            self._growing = threading.Thread(target=grow, name="interlock-staging", daemon=True)
            self._growing.start()

    def fill(self, snapshot: Snapshot) -> Staged:
        """Copies every tensor; what it returns is valid until the next call.

        Raises:
            OSError: there is no memory for it.
        """
        ordered = sorted(snapshot.tensors.items(), key=lambda item: -item[1].element_size())
        wanted = [(name, CODES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for name, t in ordered]
        slots, size = place(wanted)
        self._make_room(size)
        data = self._buffer.view()[:size]
        if size:
            bytes_ = torch.frombuffer(data, dtype=torch.uint8)
            for slot, (_, tensor) in zip(slots, ordered, strict=True):
                if slot.end > slot.begin:
                    bytes_[slot.begin : slot.end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return Staged(slots, data, self._buffer.fd)

    def _make_room(self, size: int) -> None:
        if self._growing is not None and (size > self._buffer.size or not self._growing.is_alive()):
            self._growing.join()
            self._growing = None
        if self._next is not None and self._growing is None:
            self._buffer.close()
            self._buffer, self._next = self._next, None
        if size > self._buffer.size:
            grown = SharedBuffer(size)
            self._buffer.close()
            self._buffer = grown

    def close(self) -> None:
        """Gives the memory back."""
        if self._growing is not None:
            self._growing.join()
        for buffer in (self._buffer, self._next):
            if buffer is not None:
                buffer.close()


def num_bytes(snapshot: Snapshot) -> int:
    """How many bytes its tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in snapshot.tensors.values())
