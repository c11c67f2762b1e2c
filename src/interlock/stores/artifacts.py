"""Artifact folders: a manifest of files with digests.

Both a checkpoint and a model version are folders whose `manifest.json` is written last. The digest of a folder is the blake3 of
its manifest's canonical file list, so two folders with the same bytes under the same names have the same digest wherever they
lie and whatever metadata stands beside them. This module neither moves folders nor decides about them; what a version's
`model.toml` says is `modelspec`'s.

    models/policy/3/manifest.json   {"format": 1, "files": [{"path", "size_bytes", "blake3"}], "digest": "blake3:...", "metadata": {}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from blake3 import blake3

from interlock.errors import DataLoss, InvalidArgument, NotFound

MANIFEST_FILE = "manifest.json"
FORMAT = 1
MANIFEST_BYTES_MAX = 64 << 20
_CONTROL = frozenset(map(chr, (*range(32), 127)))


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a folder: its path relative to the folder with forward slashes, its size, its blake3 as hex."""

    path: str
    size_bytes: int
    blake3: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder holds. `metadata` is plain JSON and takes no part in the digest."""

    files: tuple[FileEntry, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """`blake3:<hex>` over the files in path order, one line of `<hex> <size> <path>` each."""
        lines = [f"{f.blake3} {f.size_bytes} {f.path}\n" for f in sorted(self.files, key=lambda f: f.path)]
        return "blake3:" + blake3("".join(lines).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(f.size_bytes for f in self.files)


def hash_file(path: Path) -> tuple[int, str]:
    """(size in bytes, blake3 hex) of a file, read once."""
    hasher = blake3(max_threads=1)
    hasher.update_mmap(path)
    return path.stat().st_size, hasher.hexdigest()


def scan(folder: Path) -> tuple[FileEntry, ...]:
    """Hashes every file below `folder` but the manifest itself, in path order.

    Raises:
        InvalidArgument: `NOT_A_PLAIN_FILE` for a link, device or socket.
    """
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        relative = path.relative_to(folder).as_posix()
        if relative != MANIFEST_FILE:
            check_plain(path, relative)
            size_bytes, digest = hash_file(path)
            entries.append(FileEntry(relative, size_bytes, digest))
    return tuple(entries)


def write_manifest(
    folder: Path, metadata: Mapping[str, Any] | None = None, files: tuple[FileEntry, ...] | None = None
) -> Manifest:
    """Writes the folder's manifest, durably: file, rename, folder. Call it last.

    `files` spares reading them again when the caller hashed them while writing; without it they are hashed here.
    """
    manifest = Manifest(scan(folder) if files is None else files, dict(metadata or {}))
    body = {
        "format": FORMAT,
        "digest": manifest.digest,
        "files": [{"path": f.path, "size_bytes": f.size_bytes, "blake3": f.blake3} for f in manifest.files],
        "metadata": dict(manifest.metadata),
    }
    write_durably(folder / MANIFEST_FILE, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest as written; the files are not looked at. Whatever its bytes are, it is read or refused.

    Raises:
        NotFound: `MANIFEST_MISSING`.
        DataLoss: `MANIFEST_CORRUPT`: not the JSON that `write_manifest` writes, or its own digest disagrees.
    """
    path = folder / MANIFEST_FILE
    try:
        if path.stat().st_size > MANIFEST_BYTES_MAX or not path.is_file():
            raise ValueError(f"more than {MANIFEST_BYTES_MAX} bytes, or no plain file")
        body = json.loads(path.read_bytes())
        files = tuple(FileEntry(str(f["path"]), int(f["size_bytes"]), str(f["blake3"])) for f in body["files"])
        manifest = Manifest(files, dict(body.get("metadata", {})))
        written = (int(body["format"]), str(body["digest"]))
    except FileNotFoundError:
        raise NotFound(
            f"{path}: no manifest; a folder without one was never finished",
            reason="MANIFEST_MISSING",
            metadata={"path": str(path)},
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataLoss(
            f"{path}: not a manifest: {str(error)[:300]}", reason="MANIFEST_CORRUPT", metadata={"path": str(path)}
        ) from None
    if written != (FORMAT, manifest.digest):
        raise DataLoss(
            f"{path}: format or digest does not agree with its file list",
            reason="MANIFEST_CORRUPT",
            metadata={"path": str(path)},
        )
    for entry in files:
        check_relative(entry.path, path)
    if len({entry.path for entry in files}) < len(files):
        raise DataLoss(f"{path}: a file is listed twice", reason="MANIFEST_CORRUPT", metadata={"path": str(path)})
    return manifest


def check_complete(folder: Path, manifest: Manifest) -> None:
    """Refuses a folder in which more lies than its manifest says: nobody has vouched for the rest.

    Raises:
        InvalidArgument: `NOT_IN_MANIFEST`.
    """
    listed = {entry.path for entry in manifest.files} | {MANIFEST_FILE}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if relative not in listed and (path.is_symlink() or not path.is_dir()):
            raise InvalidArgument(
                f"{path}: lies in the folder and is not in its manifest",
                reason="NOT_IN_MANIFEST",
                field=relative,
                metadata={"path": str(path)},
            )


def verify(folder: Path, expected_digest: str = "") -> Manifest:
    """Reads every file and holds it to the manifest, and the manifest to `expected_digest` if given.

    Raises:
        NotFound: `MANIFEST_MISSING`, `FILE_MISSING`.
        DataLoss: `DIGEST_MISMATCH` naming the first file at fault, `MANIFEST_CORRUPT`.
    """
    manifest = read_manifest(folder)
    if expected_digest and manifest.digest != expected_digest:
        raise DataLoss(
            f"{folder}: digest is {manifest.digest}, expected {expected_digest}",
            metadata={"path": str(folder), "digest": manifest.digest, "expected": expected_digest},
        )
    for entry in manifest.files:
        _verify_file(folder, entry)
    return manifest


def _verify_file(folder: Path, entry: FileEntry) -> None:
    path = folder / entry.path
    if not path.exists():
        raise NotFound(
            f"{path}: listed in the manifest and not there", reason="FILE_MISSING", metadata={"path": str(path)}
        )
    check_plain(path, entry.path)
    size_bytes, digest = hash_file(path)
    if (size_bytes, digest) != (entry.size_bytes, entry.blake3):
        raise DataLoss(
            f"{path}: {size_bytes} bytes with blake3 {digest}, the manifest says {entry.size_bytes} bytes with {entry.blake3}",
            metadata={"path": str(path), "blake3": digest, "expected": entry.blake3},
        )


def write_durably(path: Path, body: bytes) -> None:
    """Replaces a file whole: write aside, fsync, rename, fsync the folder. After a crash it is the old one or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_plain(path: Path, relative: str) -> None:
    """Holds a file of a folder to be one: no link on the way below the folder, no device, no pipe. Raises InvalidArgument `NOT_A_PLAIN_FILE`."""
    depth = len(PurePosixPath(relative).parts)
    if any(part.is_symlink() for part in (path, *list(path.parents)[: depth - 1])) or not path.is_file():
        raise InvalidArgument(
            f"{path}: only plain files may stand in an artifact folder",
            reason="NOT_A_PLAIN_FILE",
            field=relative,
            metadata={"path": str(path)},
        )


def check_relative(value: str, where: Path) -> None:
    """Holds a path named in a file to the folder. Raises InvalidArgument `PATH_OUTSIDE_FOLDER`; `where` is the file that names it."""
    parts = PurePosixPath(value).parts
    if not parts or value.startswith("/") or ".." in parts or "\\" in value or _CONTROL & set(value):
        raise InvalidArgument(
            f"{where}: {value!r} does not stay inside the folder",
            reason="PATH_OUTSIDE_FOLDER",
            field="file",
            metadata={"path": value[:200]},
        )
