"""Artifact folders: a manifest of files with digests, and the `model.toml` that says what a servable version is.

Both a checkpoint and a model version are folders whose `manifest.json` is written last. The digest of a folder is the blake3 of
its manifest's canonical file list, so two folders with the same bytes under the same names have the same digest wherever they
lie and whatever metadata stands beside them. This module neither moves folders nor decides about them.

    models/policy/3/manifest.json   {"format": 1, "files": [{"path", "size_bytes", "blake3"}], "digest": "blake3:...", "metadata": {}}
    models/policy/3/model.toml      name, engine, file, inputs, outputs, source (run, checkpoint, step), export (figures), batching
    models/policy/3/model.onnx
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from blake3 import blake3

from interlock.errors import DataLoss, InvalidArgument, NotFound

MANIFEST_FILE = "manifest.json"
SPEC_FILE = "model.toml"
FORMAT = 1
ENGINES = ("onnx",)
DATATYPES = (
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BF16",
    "BYTES",
)


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


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor of a model: an Open Inference Protocol datatype, a shape in which -1 is a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BatchingSpec:
    """The table `[batching]`: its maker says that each row of the first dimension is answered by itself, so that requests may run together.

    Attributes:
        max_rows: of a run. A larger request runs alone.
        preferred_rows: sizes that the engine likes, ascending; the largest that is reached is run, the rest waits for the next run.
        max_delay_ms: how long a request may wait for company while the engine is free.
        max_run_ms: no batch grows beyond what is measured to take longer (nor beyond twice one row's time, if that is more).
        priority_levels: 1 is served first; a request without a level, or with one that there is not, gets `default_priority`.
        queue_limit: requests waiting for this version; 0 leaves it to the replica's limit.
        timeout_ms: the longest wait in the queue, 0 for none; `timeout_action` says whether it is then refused, or served behind the others.
    """

    enabled: bool = True
    max_rows: int = 64
    preferred_rows: tuple[int, ...] = ()
    max_delay_ms: float = 0.0
    max_run_ms: float = 50.0
    priority_levels: int = 1
    default_priority: int = 1
    queue_limit: int = 0
    timeout_ms: float = 0.0
    timeout_action: str = "reject"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What `model.toml` says. `source` and `export` are flat tables of strings and numbers, shown and passed on, not interpreted here.

    Attributes:
        file: the model file, relative to the folder.
        source: where it came from: run, checkpoint, attempt, step, digest.
        export: figures of the export: max_abs_error, max_rel_error, num_samples, opset.
        batching: None where the maker said nothing: each request then runs by itself.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    engine: str = "onnx"
    file: str = "model.onnx"
    source: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    export: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    batching: BatchingSpec | None = None

    @property
    def step(self) -> int:
        """The training step this came from; 0 when it is not known."""
        return int(self.source.get("step", 0))


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
            _plain(path, relative)
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
    """The manifest as written; the files are not looked at.

    Raises:
        NotFound: `MANIFEST_MISSING`.
        DataLoss: `MANIFEST_CORRUPT`: not the JSON that `write_manifest` writes, or its own digest disagrees.
    """
    path = folder / MANIFEST_FILE
    try:
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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLoss(
            f"{path}: not a manifest: {error!r}", reason="MANIFEST_CORRUPT", metadata={"path": str(path)}
        ) from None
    if written != (FORMAT, manifest.digest):
        raise DataLoss(
            f"{path}: format or digest does not agree with its file list",
            reason="MANIFEST_CORRUPT",
            metadata={"path": str(path)},
        )
    for entry in files:
        _check_relative(entry.path, path)
    return manifest


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
    _plain(path, entry.path)
    size_bytes, digest = hash_file(path)
    if (size_bytes, digest) != (entry.size_bytes, entry.blake3):
        raise DataLoss(
            f"{path}: {size_bytes} bytes with blake3 {digest}, the manifest says {entry.size_bytes} bytes with {entry.blake3}",
            metadata={"path": str(path), "blake3": digest, "expected": entry.blake3},
        )


def read_spec(folder: Path) -> ModelSpec:
    """Reads `model.toml`.

    Raises:
        NotFound: `MODEL_SPEC_MISSING`.
        InvalidArgument: `MODEL_SPEC_INVALID`, `field` naming the key at fault.
    """
    path = folder / SPEC_FILE
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise NotFound(
            f"{path}: no {SPEC_FILE}; a version folder needs one",
            reason="MODEL_SPEC_MISSING",
            metadata={"path": str(path)},
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _invalid("", f"{path}: not TOML: {error}") from None
    return parse_spec(table)


def parse_spec(table: Mapping[str, Any]) -> ModelSpec:
    """`ModelSpec` from a parsed `model.toml`; unknown keys are refused."""
    unknown = sorted(set(table) - {"name", "engine", "file", "inputs", "outputs", "source", "export", "batching"})
    if unknown:
        raise _invalid(unknown[0], f"model.toml: unknown key {unknown[0]!r}")
    name, engine, file = (
        table.get(key, default) for key, default in (("name", None), ("engine", "onnx"), ("file", "model.onnx"))
    )
    if not isinstance(name, str) or not name:
        raise _invalid("name", "model.toml: name: a string is needed")
    if engine not in ENGINES:
        raise _invalid("engine", f"model.toml: engine: {engine!r} is not one of {', '.join(ENGINES)}")
    if not isinstance(file, str):
        raise _invalid("file", "model.toml: file: a string is needed")
    _check_relative(file, Path(SPEC_FILE))
    return ModelSpec(
        name=name,
        engine=engine,
        file=file,
        inputs=_parse_tensors(table, "inputs"),
        outputs=_parse_tensors(table, "outputs"),
        source=_parse_flat(table, "source"),
        export=_parse_flat(table, "export"),
        batching=_parse_batching(table["batching"]) if "batching" in table else None,
    )


def _whole(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"


def _milliseconds(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) in (int, float) and low <= value <= high, f"milliseconds from {low:g} to {high:g}"


_BATCHING: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "enabled": (lambda value: type(value) is bool, "true or false"),
    "max_rows": _whole(1, 65_536),
    "preferred_rows": (
        lambda value: (
            isinstance(value, list | tuple)
            and all(type(rows) is int and rows >= 1 for rows in value)
            and list(value) == sorted(set(value))
        ),
        "a list of ascending whole numbers from 1 up",
    ),
    "max_delay_ms": _milliseconds(0, 1000),
    "max_run_ms": _milliseconds(0.001, 60_000),
    "priority_levels": _whole(1, 16),
    "default_priority": _whole(1, 16),
    "queue_limit": _whole(0, 65_536),
    "timeout_ms": _milliseconds(0, 60_000),
    "timeout_action": (lambda value: value in ("reject", "continue"), "reject or continue"),
}


def _parse_batching(table: Any) -> BatchingSpec:
    if not isinstance(table, dict):
        raise _invalid("batching", "model.toml: batching: a table is needed")
    for key, value in table.items():
        if key not in _BATCHING:
            raise _invalid(
                f"batching.{key}", f"model.toml: batching: unknown key {key!r}; known: {', '.join(_BATCHING)}"
            )
        fits, wanted = _BATCHING[key]
        if not fits(value):
            raise _invalid(f"batching.{key}", f"model.toml: batching.{key}: {value!r} is not {wanted}")
    made = BatchingSpec(**{**table, "preferred_rows": tuple(table.get("preferred_rows", ()))})
    if made.preferred_rows and made.preferred_rows[-1] > made.max_rows:
        raise _invalid(
            "batching.preferred_rows",
            f"model.toml: batching.preferred_rows: {made.preferred_rows[-1]} is above max_rows, {made.max_rows}",
        )
    if made.default_priority > made.priority_levels:
        raise _invalid(
            "batching.default_priority",
            f"model.toml: batching.default_priority: {made.default_priority} is above priority_levels, {made.priority_levels}",
        )
    return made


def _parse_tensors(table: Mapping[str, Any], key: str) -> tuple[TensorSpec, ...]:
    rows = table.get(key)
    if not isinstance(rows, list) or not rows:
        raise _invalid(key, f"model.toml: {key}: at least one [[{key}]] with name, datatype and shape is needed")
    return tuple(_parse_tensor(row, f"{key}[{index}]") for index, row in enumerate(rows))


def _parse_tensor(row: Any, where: str) -> TensorSpec:
    if not isinstance(row, dict) or set(row) != {"name", "datatype", "shape"}:
        raise _invalid(where, f"model.toml: {where}: exactly name, datatype and shape are needed")
    if row["datatype"] not in DATATYPES:
        raise _invalid(
            f"{where}.datatype",
            f"model.toml: {where}.datatype: {row['datatype']!r} is not one of {', '.join(DATATYPES)}",
        )
    shape = row["shape"]
    if not isinstance(shape, list) or not all(type(dim) is int and dim >= -1 for dim in shape):
        raise _invalid(
            f"{where}.shape", f"model.toml: {where}.shape: {shape!r} is not a list of whole numbers from -1 up"
        )
    return TensorSpec(str(row["name"]), row["datatype"], tuple(shape))


def _parse_flat(table: Mapping[str, Any], key: str) -> dict[str, str | int | float | bool]:
    value = table.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(item, str | int | float | bool) for item in value.values()):
        raise _invalid(key, f"model.toml: {key}: a table of strings, numbers and booleans is needed")
    return value


def write_spec(folder: Path, spec: ModelSpec) -> None:
    """Writes `model.toml`, durably. `read_spec` gives back an equal `ModelSpec`."""
    lines = [f"{key} = {_toml(getattr(spec, key))}" for key in ("name", "engine", "file")]
    for key, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        for tensor in tensors:
            lines += [
                "",
                f"[[{key}]]",
                f"name = {_toml(tensor.name)}",
                f"datatype = {_toml(tensor.datatype)}",
                f"shape = {list(tensor.shape)}",
            ]
    for key, table in (("source", spec.source), ("export", spec.export)):
        if table:
            lines += ["", f"[{key}]", *(f"{_toml(str(k))} = {_toml(v)}" for k, v in table.items())]
    if spec.batching is not None:
        pairs = [(f.name, getattr(spec.batching, f.name)) for f in fields(spec.batching)]
        lines += ["", "[batching]", *(f"{k} = {list(v) if isinstance(v, tuple) else _toml(v)}" for k, v in pairs)]
    write_durably(folder / SPEC_FILE, ("\n".join(lines) + "\n").encode())


def _toml(value: str | float | bool) -> str:
    if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
        return str(value)
    return json.dumps(value, ensure_ascii=True)


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


def _plain(path: Path, relative: str) -> None:
    if path.is_symlink() or not path.is_file():
        raise InvalidArgument(
            f"{path}: only plain files may stand in an artifact folder",
            reason="NOT_A_PLAIN_FILE",
            field=relative,
            metadata={"path": str(path)},
        )


def _check_relative(value: str, where: Path) -> None:
    parts = PurePosixPath(value).parts
    if not value or value.startswith("/") or ".." in parts or "\\" in value or "\0" in value:
        raise InvalidArgument(
            f"{where}: {value!r} does not stay inside the folder",
            reason="PATH_OUTSIDE_FOLDER",
            field="file",
            metadata={"path": value[:200]},
        )


def _invalid(key: str, message: str) -> InvalidArgument:
    return InvalidArgument(message, reason="MODEL_SPEC_INVALID", field=key)
