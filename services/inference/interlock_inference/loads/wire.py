"""What a replica and its loading children say to each other: JSON messages over a socket, tensors in shared memory. Nothing is pickled.

A message is one packet of a Unix socket. Tensors are written into a memory file that both ends map; a message names type, shape and place.
The child is ours but reads files that are not, so its answers are held to what was asked before an array is made of them.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from interlock.errors import InterlockError, as_plain
from interlock.runtime.arrays import Array, decode_raw, encode_raw

MESSAGE_BYTES_MAX = 160 << 10  # below the default buffer of a Unix socket
WINDOW_BYTES = 64 << 10  # to start with
ALIGN = 64
Message = dict[str, Any]


def send(end: socket.socket, message: Message) -> None:
    """One message. Raises OSError when the other end is gone."""
    end.sendall(orjson.dumps(message))


def receive(end: socket.socket) -> Message | None:
    """The next message; None when the other end is gone."""
    try:
        packet = end.recv(MESSAGE_BYTES_MAX)
    except ConnectionError:
        return None
    return orjson.loads(packet) if packet else None


def error_message(error: InterlockError) -> Message:
    """An error as it travels."""
    return {**as_plain(error), "message": error.message[:2000]}


class Window:
    """A memory file that both ends map, as large as the largest exchange so far. One exchange at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size = 0
        self._map: mmap.mmap | None = None

    @classmethod
    def made(cls) -> Window:
        """A new one; `fd` is what the other end needs."""
        return cls(os.memfd_create("interlock-tensors", os.MFD_CLOEXEC))

    @property
    def fd(self) -> int:
        """The file behind it."""
        return self._fd

    def put(self, arrays: Sequence[Array], offset: int) -> tuple[list[Any], int]:
        """Copies arrays in from `offset` on; how the message names them, and where the next may begin."""
        named = []
        for array in arrays:
            text = array.dtype == object
            raw = np.frombuffer(encode_raw(array, "BYTES"), np.uint8) if text else array
            offset = -(-offset // ALIGN) * ALIGN
            if raw.nbytes:
                into = self._reached(offset + raw.nbytes)
                np.frombuffer(into, raw.dtype, raw.size, offset).reshape(raw.shape)[...] = raw
            named.append(["BYTES" if text else array.dtype.str, array.shape, offset, raw.nbytes])
            offset += raw.nbytes
        return named, offset

    def take(self, named: Sequence[Any]) -> list[Array]:
        """The arrays of a message, as views that hold until the next exchange; BYTES are copied out.

        Raises ValueError for places or types that make no sense.
        """
        return [self._array(str(dtype), shape, int(offset), int(size)) for dtype, shape, offset, size in named]

    def _array(self, dtype: str, shape: Sequence[int], offset: int, size: int) -> Array:
        if not size and dtype != "BYTES":
            return np.empty(shape, np.dtype(dtype))
        if offset < 0 or size < 0 or (size and offset + size > os.fstat(self._fd).st_size):
            raise ValueError(f"a tensor of {size} bytes at {offset} lies outside the shared memory")
        if dtype == "BYTES":
            return decode_raw(self._reached(offset + size)[offset : offset + size] if size else b"", dtype, shape)
        kind = np.dtype(dtype)
        return np.frombuffer(self._reached(offset + size), kind, size // kind.itemsize, offset).reshape(shape)

    def _reached(self, end: int) -> mmap.mmap:
        """The mapping, grown to hold `end` bytes. An older one lives as long as views on it do."""
        if self._map is None or end > self._size:
            self._size = max(WINDOW_BYTES, 1 << (end - 1).bit_length())
            if os.fstat(self._fd).st_size < self._size:
                os.ftruncate(self._fd, self._size)
            self._map = mmap.mmap(self._fd, self._size)
        return self._map

    def close(self) -> None:
        """Lets go of the memory; views that are left keep their own mapping."""
        self._map = None
        os.close(self._fd)


def request(window: Window, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Message:
    """A run as it is asked for."""
    named, end = window.put(list(inputs.values()), 0)
    return {"inputs": list(inputs), "tensors": named, "outputs": list(outputs), "end": end}
