"""Proves that a loop can be resumed exactly, or names what is in the way: save, go on, restore, replay, compare bit for bit.

    print(interlock.training.verify_resume(run, train_step))     # before a long run, on the loop as it stands

The check goes through the real checkpoint format on disk, in a temporary folder, and leaves the run where it was.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from interlock.stores.checkpoints import CheckpointStore, Loaded
from interlock.training.capture import Staging, capture, random_states, restore, set_random_states
from interlock.training.run import Run
from interlock.training.saver import WriterHere
from interlock.training.tree import Tensors, pack

LOSS, RANDOM, DATA = "loss", "random", "data"


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether the replay was exact; otherwise the first step (from 1) and the first thing that differs there.

    `differs` is "loss" alone when no registered component differs: something outside them takes part, such as an object that is not
    registered, or an operation that is not deterministic.
    """

    exact: bool
    num_steps: int
    step: int = 0
    differs: str = ""

    def __str__(self) -> str:
        if self.exact:
            return f"exact: {self.num_steps} replayed steps are bit-identical"
        return f"not exact: at replayed step {self.step} of {self.num_steps}, {self.differs} differs first"


def verify_resume(run: Run, step: Callable[[Any], Any], num_steps: int = 5) -> Verification:
    """Takes `num_steps` steps twice from the same checkpoint. `step` gets a batch, updates, and returns its loss.

    Call it between two steps, before `run.steps()` or after it ended. Nothing is recorded.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder))
        loaded = _saved(run, store)
        first = _played(run, step, num_steps)
        _restored(run, loaded)
        second = _played(run, step, num_steps)
        _restored(run, store.load(loaded.checkpoint))
    for index, (before, after) in enumerate(zip(first, second, strict=True), start=1):
        differing = [name for name in before if before[name] != after[name]]
        if differing:
            return Verification(False, num_steps, index, differing[0])
    return Verification(True, num_steps)


def _saved(run: Run, store: CheckpointStore) -> Loaded:
    parts = run.parts
    snapshot = capture(parts.components, {"data": parts.feed.state_dict(), "scales": parts.hooks.state()})
    staged = Staging().fill(snapshot)
    WriterHere(store).write("verify", staged, snapshot.state, {"seq": 0})
    return store.load("verify")


def _restored(run: Run, loaded: Loaded) -> None:
    loop = restore(loaded, run.parts.components)
    run.parts.feed.load_state_dict(loop["data"])
    run.parts.hooks.load(loop["scales"])
    run.parts.hooks.take_metrics()
    set_random_states(loop["random"])


def _played(run: Run, step: Callable[[Any], Any], num_steps: int) -> list[Mapping[str, str]]:
    """What stands after each step: components in their order first, the loss last."""
    found: list[Mapping[str, str]] = []
    for _ in range(num_steps):
        value = step(run.parts.feed.next())
        loss = float(value.detach()) if isinstance(value, torch.Tensor) else float(value)
        states: dict[str, Any] = {name: item.state_dict() for name, item in run.parts.components.items()}
        states |= {DATA: run.parts.feed.state_dict(), RANDOM: random_states()}
        found.append({name: _digest(state) for name, state in states.items()} | {LOSS: loss.hex()})
    return found


def _digest(state: Any) -> str:
    tensors: Tensors = {}
    body = json.dumps(pack(state, "", tensors), sort_keys=True)
    hasher = blake3(body.encode())
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
