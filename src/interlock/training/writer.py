"""The loop's end of the checkpoint writer's process: starts it, sends it saves, starts it again when it has died. Used from one thread."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import interlock
from interlock.errors import Unavailable
from interlock.stores import checkpoint_writer as wire
from interlock.stores.artifacts import Manifest
from interlock.training.capture import Staged


class WriterProcess:
    """Writes what lies in shared memory into the checkpoints below `root`. Started with the first save, or by `start`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._sent_fd = -1

    def start(self) -> None:
        """Starts the process if there is none. It imports no torch and is there in some tens of milliseconds; nobody waits for it."""
        if self._process is not None and self._process.poll() is None:
            return
        self._let_go()
        ours, theirs = socket.socketpair()
        source = str(Path(interlock.__file__).parents[1])
        path = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  this interpreter, our module
                [sys.executable, "-m", wire.__name__, str(theirs.fileno()), str(self._root)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                stdin=subprocess.DEVNULL,
            )
        self._line, self._sent_fd = ours, -1

    def write(self, checkpoint: str, staged: Staged, state: Any, metadata: Mapping[str, Any]) -> Manifest:
        """Has a staged state written, and waits for it.

        Raises:
            Unavailable: `WRITER_DIED`: the process ended in the middle; the next save starts another one.
            AlreadyExists, OSError: as `CheckpointStore.write`.
        """
        self.start()
        assert self._line is not None, "it was started"
        try:
            job = wire.job_message(checkpoint, staged.slots, len(staged.data), state, metadata)
            is_new = staged.fd not in (-1, self._sent_fd)
            wire.send(self._line, job, [staged.fd] if is_new else [])
            self._sent_fd = staged.fd
            answer, _ = wire.receive(self._line)
        except (OSError, EOFError) as error:
            raise self._died() from error
        return wire.answer_of(answer)

    def _died(self) -> Unavailable:
        code = self._process.wait() if self._process is not None else 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        self._let_go()
        return Unavailable(f"the checkpoint writer ended {how} in the middle of a save", reason="WRITER_DIED")

    def _let_go(self) -> None:
        if self._line is not None:
            self._line.close()
        if self._process is not None:
            self._process.wait()
        self._process, self._line = None, None

    def close(self) -> None:
        """Ends it after what it does now."""
        self._let_go()
