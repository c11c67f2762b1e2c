"""The checkpoint writer's process: `python -m interlock.stores.checkpoint_writer FD ROOT`. Takes saves from a loop over a socket, one after the other.

The loop stages a state in memory that both map, and trains on; this process hashes, writes and fsyncs without the loop's interpreter, and
without torch. When the loop is killed it finishes the save that it has in hand and ends: what was staged becomes durable all the same.
While it lives it holds the lock of the run's folder, so that a loop that comes next waits for that save.

Messages are JSON behind a length of eight bytes; a descriptor of new memory comes with the message that names its size.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interlock.errors import InterlockError, Internal, as_plain, from_plain
from interlock.stores.artifacts import FileEntry, Manifest
from interlock.stores.checkpoints import CheckpointStore, TensorSlot, failpoint

POLL_SECONDS = 1.0
"""How often an idle writer looks whether its loop still lives: a child of the loop may hold the socket open."""


def send(line: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Sends one message, with descriptors."""
    body = json.dumps(message, separators=(",", ":")).encode()
    head = len(body).to_bytes(8, "little")
    if descriptors:
        sent = socket.send_fds(line, [head], list(descriptors))
        line.sendall(head[sent:] + body)
    else:
        line.sendall(head + body)


def receive(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message and the descriptors that came with it.

    Raises:
        EOFError: the other side is gone.
        TimeoutError: nothing came within the socket's time-out.
    """
    head, descriptors, *_ = socket.recv_fds(line, 8, 1)
    line.settimeout(None)
    body = _exactly(line, int.from_bytes(head + _exactly(line, 8 - len(head)) if head else _gone(), "little"))
    message: dict[str, Any] = json.loads(body)
    return message, list(descriptors)


def _exactly(line: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = line.recv(min(count, 1 << 20)) or _gone()
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _gone() -> bytes:
    raise EOFError("the other side of the checkpoint writer's socket is gone")


def job_message(
    checkpoint: str, slots: Sequence[TensorSlot], size: int, state: Any, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """One save: `size` bytes of the shared memory, and what they are."""
    return {
        "checkpoint": checkpoint,
        "slots": [[slot.name, slot.dtype, slot.shape, slot.begin, slot.end] for slot in slots],
        "size": size,
        "state": state,
        "metadata": metadata,
    }


def answer_of(message: Mapping[str, Any]) -> Manifest:
    """The manifest in an answer.

    Raises:
        InterlockError, OSError: what stopped the save, as the store raised it.
    """
    error = message.get("error")
    if error is None:
        files = tuple(FileEntry(path, size, digest) for path, size, digest in message["files"])
        return Manifest(files, message["metadata"])
    if error["kind"] == "OSError":
        raise OSError(error["errno"], error["text"], error["file"])
    raise from_plain(error)


def _answer(manifest: Manifest) -> dict[str, Any]:
    files = [[entry.path, entry.size_bytes, entry.blake3] for entry in manifest.files]
    return {"files": files, "metadata": dict(manifest.metadata)}


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, OSError):
        parts = {"errno": error.errno or 0, "text": error.strerror or str(error), "file": error.filename}
        return {"error": {"kind": "OSError", **parts}}
    told = error if isinstance(error, InterlockError) else Internal(f"{type(error).__name__}: {error}")
    return {"error": as_plain(told)}


def _wait_for_job(line: socket.socket, parent: int) -> tuple[dict[str, Any], list[int]]:
    while True:
        line.settimeout(POLL_SECONDS)
        try:
            return receive(line)
        except TimeoutError:
            if os.getppid() != parent:
                _gone()


def serve(line: socket.socket, store: CheckpointStore, parent: int) -> None:
    """Carries saves out until the loop is gone."""
    memory: mmap.mmap | None = None
    while True:
        try:
            job, descriptors = _wait_for_job(line, parent)
        except (EOFError, OSError):
            return
        for descriptor in descriptors:
            memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            os.close(descriptor)
        try:
            data = memoryview(memory)[: job["size"]] if memory is not None else memoryview(b"")
            slots = [TensorSlot(name, dtype, tuple(shape), *span) for name, dtype, shape, *span in job["slots"]]
            answer = _answer(store.write(job["checkpoint"], slots, data, job["state"], job["metadata"]))
        except Exception as error:  # noqa: BLE001 - a supervised edge: the loop is told, and the next save is tried
            answer = _failure(error)
        try:
            send(line, answer)
        except OSError:
            return


def main() -> None:
    """Ends with its loop; a terminal's Ctrl-C and a supervisor's SIGTERM are for the loop, which says here when it is done."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    store = CheckpointStore(Path(sys.argv[2]), failpoint())
    with store.locked(), socket.socket(fileno=int(sys.argv[1])) as line:
        store.clear_parts()  # of a writer that was killed
        serve(line, store, os.getppid())


if __name__ == "__main__":
    main()
