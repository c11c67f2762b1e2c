"""Checkpoint folders of one run on disk: written whole or not at all, verified when read. It knows bytes, not what they mean.

    <root>/step-000000500-a1/tensors.safetensors   every tensor; the plain safetensors layout, any tool can read it
    <root>/step-000000500-a1/state.json            everything else as JSON
    <root>/step-000000500-a1/manifest.json         format, files with size and blake3, metadata; written last
    <root>/.lock                                   held by the one writer while it lives
    <root>/.part-...                               a save that has not finished; swept when the store is opened
    <root>/damaged/...                             folders whose bytes were not what the manifest says

Order of a save: files into a hidden folder, each fsynced; the manifest; fsync of the folder; rename into place; fsync of the parent. A
crash at any byte leaves the set of checkpoints as it was. `on_operation` is called before every disk operation with its name: tests
raise or kill there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from interlock.core.names import check_id
from interlock.errors import AlreadyExists, DataLoss, FailedPrecondition, NotFound
from interlock.stores import artifacts
from interlock.stores.artifacts import FileEntry, Manifest

TENSOR_FILE = "tensors.safetensors"
STATE_FILE = "state.json"
DAMAGED = "damaged"
PART = ".part-"
LOCK_FILE = ".lock"
LOCK_SECONDS = 60.0
BLOCK_BYTES = 8 << 20  # large enough that the write call costs nothing, small enough that hashing overlaps the disk
ALIGN = 8
FAILPOINT = "INTERLOCK_FAILPOINT"

OnOperation = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One tensor's place in the data area: safetensors dtype code, shape, byte range."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A verified checkpoint: raw tensors by name (dtype code, shape, bytes), and the JSON state."""

    checkpoint: str
    tensors: Mapping[str, tuple[str, tuple[int, ...], memoryview]]
    state: Any
    manifest: Manifest


def place(tensors: Sequence[tuple[str, str, tuple[int, ...], int]]) -> tuple[list[TensorSlot], int]:
    """Slots for (name, dtype, shape, num_bytes), and the size of the data area. Without gaps, as the format demands."""
    slots, offset = [], 0
    for name, dtype, shape, num_bytes in tensors:
        slots.append(TensorSlot(name, dtype, shape, offset, offset + num_bytes))
        offset += num_bytes
    return slots, offset


def header(slots: Sequence[TensorSlot]) -> bytes:
    """The safetensors header with its length in front, padded to eight bytes."""
    table = {
        slot.name: {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [slot.begin, slot.end]}
        for slot in slots
    }
    body = json.dumps(table, separators=(",", ":")).encode()
    body += b" " * (-len(body) % ALIGN)
    return len(body).to_bytes(8, "little") + body


def failpoint() -> OnOperation | None:
    """From `INTERLOCK_FAILPOINT=checkpoint:<n>`: the process kills itself before its n-th disk operation of checkpoints. For crash tests."""
    name, _, count = os.environ.get(FAILPOINT, "").partition(":")
    if name != "checkpoint":
        return None
    left = [int(count)]

    def tick(_operation: str) -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return tick


class CheckpointStore:
    """The checkpoints of one run. One writer; readers at any time."""

    def __init__(self, root: Path, on_operation: OnOperation | None = None) -> None:
        self.root = root
        self._on_operation = on_operation or (lambda _operation: None)
        root.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self, timeout_seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """Holds the folder's lock: one writer at a time.

        Raises:
            FailedPrecondition: `RUN_IN_USE`: another writer holds it and did not end in time.
        """
        with (self.root / LOCK_FILE).open("ab") as file:
            deadline = time.monotonic() + timeout_seconds
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise FailedPrecondition(
                            f"{self.root}: another process writes checkpoints there; end it, or give this run another name",
                            reason="RUN_IN_USE",
                            metadata={"folder": str(self.root)},
                        ) from None
                    time.sleep(0.01)
            yield

    def sweep(self) -> None:
        """Removes what an interrupted save left, once the writer of a loop that died has finished what it had in hand. Raises as `locked`."""
        with self.locked():
            self.clear_parts()

    def clear_parts(self) -> None:
        """Removes unfinished saves; only for who holds the lock."""
        for part in self.root.glob(f"{PART}*"):
            shutil.rmtree(part, ignore_errors=True)

    def path(self, checkpoint: str) -> Path:
        """The folder of a checkpoint, whether it exists or not."""
        return self.root / check_id(checkpoint, "checkpoint")

    def ids(self) -> list[str]:
        """Finished checkpoints, oldest first by seq; a folder without a readable manifest is none."""
        found = []
        for folder in self.root.iterdir():
            if folder.name.startswith(".") or folder.name == DAMAGED:
                continue
            try:
                found.append((int(artifacts.read_manifest(folder).metadata["seq"]), folder.name))
            except (NotFound, DataLoss, KeyError):
                continue
        return [name for _, name in sorted(found)]

    def manifest(self, checkpoint: str) -> Manifest:
        """The manifest as written; raises NotFound or DataLoss as `artifacts.read_manifest` does."""
        return artifacts.read_manifest(self.path(checkpoint))

    def write(
        self, checkpoint: str, slots: Sequence[TensorSlot], data: memoryview, state: object, metadata: Mapping[str, Any]
    ) -> Manifest:
        """Writes a checkpoint durably; when it returns, a power cut does not lose it.

        Raises:
            AlreadyExists: `CHECKPOINT_EXISTS`.
            OSError: the disk refused; nothing is left behind and nothing else was touched.
        """
        target = self.path(checkpoint)
        if target.exists():
            raise AlreadyExists(f"checkpoint {checkpoint} exists in {self.root}", reason="CHECKPOINT_EXISTS")
        part = self.root / f"{PART}{checkpoint}-{os.getpid()}"
        try:
            self._operation("mkdir")
            part.mkdir()
            files = (
                self._file(part / STATE_FILE, [json.dumps(state, separators=(",", ":")).encode()]),
                self._file(part / TENSOR_FILE, [header(slots), data]),
            )
            self._operation("manifest")
            manifest = artifacts.write_manifest(part, metadata, files=files)
            self._operation("rename")
            part.rename(target)
            self._operation("fsync parent")
            _fsync_folder(self.root)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return manifest

    def _operation(self, name: str) -> None:
        self._on_operation(name)

    def _file(self, path: Path, parts: Sequence[bytes | memoryview]) -> FileEntry:
        hasher, size = blake3(max_threads=1), 0
        self._operation(f"open {path.name}")
        with path.open("wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part)
                for begin in range(0, len(view), BLOCK_BYTES):
                    block = view[begin : begin + BLOCK_BYTES]
                    self._operation(f"write {path.name}")
                    _write_all(file.fileno(), block)
                    hasher.update(block)
                    size += len(block)
            self._operation(f"fsync {path.name}")
            os.fsync(file.fileno())
        return FileEntry(path.name, size, hasher.hexdigest())

    def load(self, checkpoint: str) -> Loaded:
        """Reads and verifies a checkpoint.

        Raises:
            NotFound: there is no such finished checkpoint.
            DataLoss: `DIGEST_MISMATCH` or `MANIFEST_CORRUPT`; the caller decides to `set_aside` it.
        """
        folder = self.path(checkpoint)
        manifest = artifacts.read_manifest(folder)
        entries = {entry.path: entry for entry in manifest.files}
        if set(entries) != {TENSOR_FILE, STATE_FILE}:
            raise DataLoss(f"{folder}: the manifest lists {sorted(entries)}", reason="MANIFEST_CORRUPT")
        raw = _read_verified(folder / TENSOR_FILE, entries[TENSOR_FILE])
        state = json.loads(bytes(_read_verified(folder / STATE_FILE, entries[STATE_FILE])))
        return Loaded(checkpoint, _tensors(raw), state, manifest)

    def verify(self, checkpoint: str) -> Manifest:
        """Reads every byte and holds it to the manifest; raises as `artifacts.verify` does."""
        return artifacts.verify(self.path(checkpoint))

    def set_aside(self, checkpoint: str) -> Path:
        """Moves a damaged checkpoint out of the way, for a look at it later."""
        folder = self.root / DAMAGED
        folder.mkdir(exist_ok=True)
        target, number = folder / checkpoint, 1
        while target.exists():
            number += 1
            target = folder / f"{checkpoint}.{number}"
        self.path(checkpoint).rename(target)
        _fsync_folder(self.root)
        return target

    def delete(self, checkpoint: str) -> None:
        """Removes a checkpoint; no error when it is gone. Hidden first, so that a crash leaves no half of one."""
        folder = self.path(checkpoint)
        hidden = self.root / f"{PART}deleted-{checkpoint}-{os.getpid()}"
        try:
            folder.rename(hidden)
        except FileNotFoundError:
            return
        shutil.rmtree(hidden, ignore_errors=True)


def _write_all(handle: int, block: memoryview) -> None:
    while block:
        block = block[os.write(handle, block) :]


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_verified(path: Path, entry: FileEntry) -> memoryview:
    try:
        body = bytearray(path.stat().st_size)
        with path.open("rb", buffering=0) as file:
            view, filled = memoryview(body), 0
            while filled < len(body) and (count := file.readinto(view[filled:])):
                filled += count
    except FileNotFoundError:
        raise DataLoss(f"{path}: listed in the manifest and not there", metadata={"path": str(path)}) from None
    found = blake3(body, max_threads=1).hexdigest()
    if (len(body), found) != (entry.size_bytes, entry.blake3):
        raise DataLoss(
            f"{path}: {len(body)} bytes with blake3 {found}, the manifest says {entry.size_bytes} bytes with {entry.blake3}",
            metadata={"path": str(path), "blake3": found, "expected": entry.blake3},
        )
    return memoryview(body)


def _tensors(raw: memoryview) -> dict[str, tuple[str, tuple[int, ...], memoryview]]:
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(bytes(raw[8 : 8 + length]))
    data = raw[8 + length :]
    return {
        name: (item["dtype"], tuple(item["shape"]), data[item["data_offsets"][0] : item["data_offsets"][1]])
        for name, item in table.items()
        if name != "__metadata__"
    }
