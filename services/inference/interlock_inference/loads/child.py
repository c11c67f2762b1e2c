"""The program of a loading child: `python -m interlock_inference.loads.child FD`. Reads one order from the socket FD, reports, and serves if told to.

Rules of this file
- The load runs in a thread of the lowest priority; runs that serve are made in threads of the process's own. (A thread that was made
  nice can't become less so, and threads inherit it; that is why even the imports wait for the loading thread.)
- The environment was cleaned by the parent: no keys, no settings. Limits: no core dump, CPU seconds and address space while it loads, and
  first in line for the kernel when memory ends.
- When the socket closes, the parent is gone or has no more use for us: the process ends at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import resource
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlock.errors import InterlockError
    from interlock_inference.engines import Engine
    from interlock_inference.repository import Opened

SAMPLES_MAX = 4
_SELF = Path("/proc/self")
_OOM = "oom_score_adj"
_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


class _Work:
    """The load of one order."""

    def __init__(self, control: socket.socket, order: dict[str, Any]) -> None:
        self.engine: Engine | None = None
        self._control = control
        self._order = order
        self._oom_before = _heard(_OOM, "0")

    def run(self) -> None:
        """In a thread of its own: reports the loaded version, or why it can't be."""
        if self._order["idle"]:
            _step_back()
        import interlock.runtime.lean  # noqa: F401  first of all
        from interlock.errors import InterlockError, Internal
        from interlock_inference.loads import wire

        try:
            report = self._load()
            gc.freeze()
            gc.enable()
        except InterlockError as error:
            wire.send(self._control, {"error": wire.error_message(error)})
        except MemoryError:
            wire.send(self._control, {"error": wire.error_message(_out_of_memory(self._order))})
        except Exception as error:  # noqa: BLE001 - supervised edge: the parent is told, whatever it is
            told = Internal(f"{type(error).__name__}: {error}"[:400], reason="LOAD_CRASHED")
            wire.send(self._control, {"error": wire.error_message(told)})
        else:
            wire.send(self._control, {"loaded": report})

    def _load(self) -> dict[str, Any]:
        from interlock.errors import InterlockError
        from interlock.runtime import failpoints
        from interlock_inference import audit, repository
        from interlock_inference.engines import EngineOptions
        from interlock_inference.loads import wire

        audit.install()
        order = self._order
        own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in order["options"].items()}
        options = EngineOptions(**own)

        def progress(percent: float, message: str) -> None:
            wire.send(self._control, {"progress": [percent, message]})

        path = Path(order["path"])
        _limit_memory(order["memory_bytes"])
        start, before = time.perf_counter(), _resident()
        failpoints.reached("child.load", order["version"])
        try:
            opened = repository.open_artifact(path, order["digest"], options, progress)
            run_seconds = _tried(opened, path)
        except InterlockError as error:
            if error.reason == "ENGINE_OUT_OF_MEMORY" or "bad_alloc" in error.message:
                raise _out_of_memory(order) from None
            raise
        seconds, (steady, peak) = time.perf_counter() - start, _resident()
        self.engine = opened.engine
        _unlimited(self._oom_before)
        return {
            "digest": opened.digest,
            "platform": opened.engine.platform,
            "providers": opened.engine.providers,
            "inputs": [[spec.name, spec.datatype, spec.shape] for spec in opened.engine.signature.inputs],
            "outputs": [[spec.name, spec.datatype, spec.shape] for spec in opened.engine.signature.outputs],
            "symbols": dict(opened.engine.signature.symbols),
            "steady_bytes": max(0, steady - before[0]),
            "peak_bytes": max(0, peak - before[0]),
            "base_bytes": before[0],
            "seconds": seconds,
            "run_seconds": run_seconds,
        }


def _tried(opened: Opened, path: Path) -> float:
    """Runs the version on a few golden or made-up inputs: what breaks an engine shall do it here. Seconds of the fastest run; 0 if none worked."""
    from interlock.errors import InterlockError, ResourceExhausted
    from interlock.stores import golden
    from interlock_inference.engines import made_up_inputs

    signature = opened.engine.signature
    samples = list(golden.read(path).values())[:SAMPLES_MAX] or [made_up_inputs(signature)] * 2
    timings = []
    for inputs in samples:
        start = time.perf_counter()
        try:
            opened.engine.run(inputs, [spec.name for spec in signature.outputs])
        except ResourceExhausted:
            raise
        except InterlockError:  # the warm-up judges that, with recorded requests
            continue
        timings.append(time.perf_counter() - start)
    return min(timings, default=0.0)


def _step_back() -> None:
    """This thread, and those that it starts, run when nobody else wants to; its disk reads likewise."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # a sandbox may forbid it; then niceness must do
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _restrict(cpu_seconds: int) -> None:
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(
        resource.RLIMIT_CPU, (cpu_seconds if hard == resource.RLIM_INFINITY else min(cpu_seconds, hard), hard)
    )
    _say(_OOM, "1000")


def _limit_memory(budget_bytes: int) -> None:
    """Address space: what is there now and the budget on top; 0 is no limit. A device's driver reserves it by the terabyte, so none there either."""
    _say("clear_refs", "5")  # the peak is counted from here
    if budget_bytes and not any(device.exists() for device in _DEVICES):
        now = _field("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (now + budget_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _unlimited(oom_before: str) -> None:
    """The load is over; what serves is bounded by what it was measured to need."""
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (hard, hard))
    _say(_OOM, oom_before)


def _say(name: str, text: str) -> None:
    """To the kernel, of this process; some sandboxes have no ear for it."""
    with contextlib.suppress(OSError):
        (_SELF / name).write_text(text)


def _heard(name: str, default: str) -> str:
    try:
        return (_SELF / name).read_text()
    except OSError:
        return default


def _field(name: str) -> int:
    for line in _heard("status", "").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0


def _resident() -> tuple[int, int]:
    """(now, at most since the load began), in bytes."""
    return _field("VmRSS"), _field("VmHWM")


def _out_of_memory(order: dict[str, Any]) -> InterlockError:
    from interlock.errors import ResourceExhausted

    return ResourceExhausted(
        f"loading {order['path']} needs more than the {order['memory_bytes']} bytes of memory there are for it",
        reason="DOES_NOT_FIT",
        metadata={"path": order["path"], "available_bytes": str(order["memory_bytes"])},
    )


def _serve(engine: Engine, end: socket.socket, fd: int) -> None:
    """Runs what is asked for over one channel, one after the other, until the other end closes it."""
    from interlock.errors import InterlockError
    from interlock_inference.loads import wire

    window = wire.Window(fd)
    while (asked := wire.receive(end)) is not None:
        try:
            inputs = dict(zip(asked["inputs"], window.take(asked["tensors"]), strict=True))
            outputs = engine.run(inputs, asked["outputs"])
            named, _ = window.put(outputs, asked["end"])
            answer: dict[str, Any] = {"tensors": named}
        except InterlockError as error:
            answer = {"error": wire.error_message(error)}
        wire.send(end, answer)


def main() -> None:
    """Until the socket closes."""
    control = socket.socket(fileno=int(sys.argv[1]))
    order = json.loads(control.recv(1 << 16))
    work = _Work(control, order)
    _restrict(order["cpu_seconds"])
    threading.Thread(target=work.run, name="load", daemon=True).start()
    while True:
        packet, fds, _, _ = socket.recv_fds(control, 1 << 10, order["channels"] * 2)
        if not packet:
            os._exit(0)
        assert work.engine is not None, "told to serve before it was loaded"
        for end, fd in zip(fds[::2], fds[1::2], strict=True):
            channel = socket.socket(fileno=end)
            threading.Thread(target=_serve, args=(work.engine, channel, fd), name="run", daemon=True).start()


if __name__ == "__main__":
    main()
