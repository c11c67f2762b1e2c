"""Data whose position can be saved and restored without fetching what lies before it, and an iterator that brings any data to that.

`Batches` serves minibatches of tensors in an order that follows from (seed, epoch) alone, so a position is three numbers.
`Feed` drives whatever the loop iterates: `Batches`, anything with `state_dict`, a plain loader (replayed from its epoch's start), or nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from interlock.training.capture import random_states, set_random_states


class Batches:
    """Shuffled minibatches of equally long tensors, epoch after epoch, without end unless `epochs` says so.

    A batch is a tuple of tensors with leading dimension `batch_size`; the last, smaller one of an epoch is left out unless `keep_last`.
    """

    def __init__(
        self,
        *tensors: torch.Tensor,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        keep_last: bool = False,
    ) -> None:
        if not tensors or len({len(tensor) for tensor in tensors}) != 1:
            raise ValueError("Batches needs at least one tensor, all with the same leading dimension")
        if not 1 <= batch_size <= len(tensors[0]):
            raise ValueError(f"batch_size must be between 1 and {len(tensors[0])}, got {batch_size}")
        self._tensors = tensors
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._epochs = epochs
        num, rest = divmod(len(tensors[0]), batch_size)
        self._num_batches = num + (1 if keep_last and rest else 0)
        self._seed, self._epoch, self._index = seed, 0, 0
        self._order: tuple[tuple[int, int], torch.Tensor] | None = None

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        while self._epochs is None or self._epoch < self._epochs:
            order = self._epoch_order()
            begin = self._index * self._batch_size
            self._advance(1)
            yield tuple(tensor[order[begin : begin + self._batch_size]] for tensor in self._tensors)

    def _epoch_order(self) -> torch.Tensor:
        key = (self._seed, self._epoch)
        if self._order is None or self._order[0] != key:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
            num = len(self._tensors[0])
            order = torch.randperm(num, generator=generator) if self._shuffle else torch.arange(num)
            self._order = (key, order)
        return self._order[1]

    def _advance(self, count: int) -> None:
        epochs, self._index = divmod(self._index + count, self._num_batches)
        self._epoch += epochs

    def skip(self, count: int) -> None:
        """Leaves out the next `count` batches; index arithmetic only."""
        self._advance(count)

    def reseed(self, seed: int) -> None:
        """Another order from the next batch on."""
        self._seed = seed

    def state_dict(self) -> dict[str, int]:
        """The position: seed, epoch, index of the next batch in it."""
        return {"seed": self._seed, "epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position."""
        self._seed, self._epoch, self._index = state["seed"], state["epoch"], state["index"]


class Feed:
    """The loop's data with a position. Plain iterables are replayed: exact if they draw only from the global generators."""

    def __init__(self, data: Iterable[Any] | None, repeat: bool = True) -> None:
        self._data = data
        self._repeat = repeat
        self._exact: bool = all(hasattr(data, name) for name in ("state_dict", "load_state_dict"))
        self._iterator: Iterator[Any] | None = None
        self._epoch_random: dict[str, Any] = {}
        self._index = 0

    def next(self) -> Any:
        """The next batch; None without data. Raises StopIteration at the end of data that does not repeat."""
        if self._data is None:
            return None
        iterator = self._iterator or self._open()
        try:
            batch = next(iterator)
        except StopIteration:
            if not self._repeat or not self._index:
                raise
            batch = next(self._open())
        self._index += 1
        return batch

    def _open(self) -> Iterator[Any]:
        assert self._data is not None
        self._epoch_random = {} if self._exact else random_states()
        self._iterator, self._index = iter(self._data), 0
        return self._iterator

    def skip(self, count: int) -> None:
        """Leaves out `count` batches."""
        skip = getattr(self._data, "skip", None)
        if skip is not None:
            skip(count)
            return
        for _ in range(count if self._data is not None else 0):
            self.next()

    def reseed(self, seed: int) -> None:
        """Tells data that can to take another order."""
        reseed = getattr(self._data, "reseed", None)
        if reseed is not None:
            reseed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Position, and what replaying it needs."""
        if self._exact:
            return {"data": self._data.state_dict()}  # type: ignore[union-attr]  # checked in __init__
        return {"index": self._index, "random": self._epoch_random} if self._iterator is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back. Moves the global generators when a plain iterable is replayed: restore them afterwards."""
        self._iterator = None
        if "data" in state:
            self._data.load_state_dict(state["data"])  # type: ignore[union-attr]  # saved by data that has it
        elif "index" in state:
            set_random_states(state["random"])
            iterator = self._open()
            for _ in range(state["index"]):
                next(iterator)
            self._index = state["index"]
