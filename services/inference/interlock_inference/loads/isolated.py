"""An engine whose model lives in a child process. To its slot it is an engine like any other; a run costs a hop of some 0.1 ms more.

When the child dies, runs fail with UNAVAILABLE `ENGINE_LOST` until a new one was adopted: the version is lost for a while, the process that
serves all the others is not.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import socket
import threading
from collections.abc import Callable, Mapping, Sequence

from interlock.errors import Unavailable, from_plain
from interlock_inference.engines import Array
from interlock_inference.loads import wire
from interlock_inference.loads.process import Child, Report

RETRY_SECONDS = 1.0
RUN_SECONDS_MAX = 120.0
"""A run that takes longer is taken for a hang: the child is ended and started again. In the serving process nothing could."""
Channel = tuple[socket.socket, wire.Window]


class IsolatedEngine:
    """The `Engine` of a version in a child that has loaded it. A channel is closed by whoever took it off the queue, so by one thread only."""

    def __init__(self, child: Child, report: Report) -> None:
        self.platform = report.platform
        self.providers = report.providers
        self.signature = report.signature
        self._child = child
        self._unwatch: Callable[[], object] = _nothing
        self._free: queue.SimpleQueue[Channel | None] = queue.SimpleQueue()
        self.adopt(child)

    def watch(self, lost: Callable[[], None]) -> None:
        """Has `lost` called, on the running loop, when the child ends before this is closed."""
        loop, control = asyncio.get_running_loop(), self._child.control
        self._unwatch = functools.partial(loop.remove_reader, control)
        loop.add_reader(control, lost)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def adopt(self, child: Child) -> None:
        """Runs go to this child from now on; it has loaded the same version. Raises OSError when it is dead already."""
        free: queue.SimpleQueue[Channel | None] = queue.SimpleQueue()
        for channel in child.serve():
            channel[0].settimeout(RUN_SECONDS_MAX)
            free.put(channel)
        self._child, self._free = child, free

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """See `Engine.run`. More runs at once than there are channels wait for one.

        Raises:
            Unavailable: `ENGINE_LOST`.
        """
        free = self._free
        channel = free.get()
        if channel is None:
            free.put(None)  # for the next
            raise _lost()
        try:
            answer, arrays = _exchange(channel, inputs, outputs)
        except OSError:  # a time-out among them
            answer, arrays = None, []
        if answer is None:
            self._child.kill()  # it may hang
            _shut(channel)
            free.put(None)
            raise _lost()
        free.put(channel)
        if "error" in answer:
            raise from_plain(answer["error"])
        return arrays

    def close(self) -> None:
        """See `Engine.close`; also for a child that was lost. On the loop. The kernel frees its memory, on nobody's time here."""
        self._unwatch()
        self._unwatch = _nothing
        free, self._free = self._free, queue.SimpleQueue()
        self._free.put(None)
        free.put(None)
        while (channel := free.get()) is not None:
            _shut(channel)
        free.put(None)  # for those that still come to the old queue
        if self._child.control.fileno() >= 0:
            threading.Thread(target=self._child.close, name="reap").start()


def _nothing() -> None:
    """Nobody watches."""


def _shut(channel: Channel) -> None:
    end, window = channel
    end.close()
    window.close()


def _exchange(
    channel: Channel, inputs: Mapping[str, Array], outputs: Sequence[str]
) -> tuple[wire.Message | None, list[Array]]:
    end, window = channel
    wire.send(end, wire.request(window, inputs, outputs))
    answer = wire.receive(end)
    if answer is None or "error" in answer:
        return answer, []
    return answer, [array.copy() for array in window.take(answer["tensors"])]


def _lost() -> Unavailable:
    return Unavailable(
        "the process that holds this version has ended and is being started again",
        reason="ENGINE_LOST",
        retry_after_seconds=RETRY_SECONDS,
    )
