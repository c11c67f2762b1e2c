"""The parent's end of a loading child: starts it, waits for its report, holds it up, and says how it ended. Blocking; decides nothing."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from interlock.errors import FailedPrecondition, InterlockError, from_plain
from interlock.runtime import failpoints
from interlock.stores.modelspec import TensorSpec
from interlock_inference.engines import EngineOptions, Signature
from interlock_inference.loads import wire
from interlock_inference.repository import Progress

PROGRAM = (sys.executable, "-m", "interlock_inference.loads.child")
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "LANG", failpoints.VARIABLE)
"""What a child gets of our environment, with our import path: where its programs are; never a key, never a setting."""
AGAIN_SECONDS = 5.0
_TURN_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Order:
    """What a child is to load.

    Attributes:
        memory_bytes: what it may use; 0 for no limit of its own.
        idle: it runs at the lowest priority while it loads.
        channels: how many runs it may be asked for at once, if it is kept.
    """

    version: str
    path: str
    digest: str
    options: EngineOptions
    memory_bytes: int
    cpu_seconds: int
    idle: bool = True
    channels: int = 1


@dataclass(frozen=True, slots=True)
class Report:
    """A version that a child has loaded and run, and what it took. Bytes are beyond the child's own `base_bytes`."""

    digest: str
    platform: str
    providers: tuple[str, ...]
    signature: Signature
    steady_bytes: int
    peak_bytes: int
    base_bytes: int
    seconds: float
    run_seconds: float


class Child:
    """One child. `report`, `serve` and `close` are for one thread; `pause`, `resume` and `kill` for any."""

    def __init__(self, order: Order, program: Sequence[str] = PROGRAM) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._order = order
        self._lock = threading.Lock()
        self._paused = False
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                [*program, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={
                    **environment,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OMP_NUM_THREADS": str(order.options.num_threads),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        wire.send(self.control, asdict(order))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def pause(self) -> None:
        """Stops it where it is."""
        self._signal(signal.SIGSTOP, paused=True)

    def resume(self) -> None:
        """Lets it go on."""
        self._signal(signal.SIGCONT, paused=False)

    def kill(self) -> None:
        """Ends it; its report then says so."""
        self._signal(signal.SIGKILL, paused=False)

    def _signal(self, number: int, *, paused: bool) -> None:
        with self._lock:
            self._paused = paused
            if self._process.returncode is None:  # not reaped, so the id is still its own
                os.kill(self._process.pid, number)

    def report(self, timeout_seconds: float, progress: Progress) -> Report:
        """Waits until the version is loaded, passing on progress; time in a pause does not count.

        Raises:
            InterlockError: what the child refused, in its own words.
            FailedPrecondition: `LOAD_CRASHED`: it died or took too long; the metadata names how.
        """
        left = timeout_seconds
        while left > 0:
            began = time.monotonic()
            readable, _, _ = select.select([self.control], [], [], _TURN_SECONDS)
            if not self._paused:
                left -= time.monotonic() - began
            if not readable:
                continue
            message = wire.receive(self.control)
            if message is None:
                raise self._ended()
            if "progress" in message:
                progress(*message["progress"])
            elif "error" in message:
                raise from_plain(message["error"])
            else:
                return _report(message["loaded"])
        self.kill()
        raise self._crashed("timeout", f"did not finish in {timeout_seconds:g} s and was stopped", AGAIN_SECONDS)

    def _ended(self) -> InterlockError:
        code = self._wait()
        if code >= 0:
            return self._crashed(f"exit {code}", f"ended with exit code {code}")
        name = signal.Signals(-code).name
        causes = {
            "SIGKILL": "; by the kernel, if memory ran out",
            "SIGXCPU": f"; it used {self._order.cpu_seconds} s of CPU",
        }
        return self._crashed(name, f"was ended by {name}{causes.get(name, '')}")

    def _crashed(self, how: str, what: str, again_seconds: float | None = None) -> FailedPrecondition:
        return FailedPrecondition(
            f"{self._order.path}: the process that tried to load it {what}; what serves is untouched",
            reason="LOAD_CRASHED",
            field="artifact_uri",
            retry_after_seconds=again_seconds,
            metadata={"path": self._order.path, "how": how},
        )

    def serve(self) -> list[tuple[socket.socket, wire.Window]]:
        """Keeps the child as an engine: one channel per run that may be asked for at once. Raises OSError when it died meanwhile."""
        channels, theirs = [], []
        for _ in range(self._order.channels):
            ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            window = wire.Window.made()
            channels.append((ours, window))
            theirs.append(other)
        fds = [fd for other, (_, window) in zip(theirs, channels, strict=True) for fd in (other.fileno(), window.fd)]
        try:
            socket.send_fds(self.control, [b"serve"], fds)
        finally:
            for other in theirs:
                other.close()
        return channels

    def close(self) -> None:
        """Ends it and waits for that: milliseconds, more after a large model."""
        self.kill()
        self.control.close()
        self._wait()

    def _wait(self) -> int:
        code = self._process.wait()
        with self._lock:
            return code


def _tensors(rows: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, datatype, tuple(shape)) for name, datatype, shape in rows)


def _report(body: Mapping[str, Any]) -> Report:
    symbols = {name: tuple(each) for name, each in body["symbols"].items()}
    return Report(
        digest=body["digest"],
        platform=body["platform"],
        providers=tuple(body["providers"]),
        signature=Signature(_tensors(body["inputs"]), _tensors(body["outputs"]), symbols),
        steady_bytes=body["steady_bytes"],
        peak_bytes=body["peak_bytes"],
        base_bytes=body["base_bytes"],
        seconds=body["seconds"],
        run_seconds=body["run_seconds"],
    )
