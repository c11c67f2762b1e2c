"""Memory that another process can map: a buffer behind a file descriptor, its pages touched before they are needed.

It has no name, no file and no limit of /dev/shm: the descriptor is all there is, and with the last one the memory is gone.
"""

from __future__ import annotations

import ctypes
import mmap
import os


class SharedBuffer:
    """At least `size` bytes, every page touched, so that a later copy meets none that is new.

    Attributes:
        fd: its descriptor; -1 for a buffer of no bytes.
        size: bytes that are mapped, a multiple of the page size.

    Raises:
        OSError: there is not so much memory.
    """

    def __init__(self, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = -1
        self._map: mmap.mmap | None = None
        if not self.size:
            return
        self.fd = os.memfd_create("interlock-staging", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.fd, 0, self.size)
            self._map = mmap.mmap(self.fd, self.size)
        except OSError:
            self.close()
            raise
        # without the interpreter's lock, which the loop may want meanwhile
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(self._map)), 0, self.size)

    def view(self) -> memoryview:
        """All of it."""
        return memoryview(self._map) if self._map is not None else memoryview(b"")

    def close(self) -> None:
        """Gives the descriptor back; the memory stays as long as somebody maps it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
