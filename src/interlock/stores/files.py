"""The model repository on disk: `models/{model}/{version}/`, each a folder that is written whole, hashed, and never changed again.

An artifact comes in as a copy: into a scratch folder beside its place, verified there against its manifest, then renamed. So a
version folder is complete or absent, and what was hashed is what will be served, whatever happens to the source afterwards.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from interlock.errors import DataLoss, FailedPrecondition, InterlockError, InvalidArgument, NotFound, ResourceExhausted
from interlock.stores import artifacts, modelspec
from interlock.stores.artifacts import Manifest
from interlock.stores.modelspec import ModelSpec

SCRATCH = ".incoming"

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@dataclass(frozen=True, slots=True)
class Incoming:
    """A verified copy that has no number yet. `keep` or `drop` it."""

    folder: Path
    manifest: Manifest
    spec: ModelSpec | None

    @property
    def digest(self) -> str:
        return self.manifest.digest


class ModelRepository:
    """The version folders below one root. Blocking: call it from a thread."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, model: str, version: str) -> Path:
        """Where a version lies or would lie."""
        return self._root / model / version

    def highest(self, model: str) -> int:
        """The highest version number that has a folder; 0 when none has. A number is never given twice, even if the store was lost."""
        below = self._root / model
        return max((int(p.name) for p in below.iterdir() if p.name.isdecimal()), default=0) if below.is_dir() else 0

    def clear_scratch(self) -> None:
        """Makes the repository's folder and removes what a crash left half-copied. Call it before anything comes in.

        Raises:
            OSError: the folder cannot be made.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._root / SCRATCH, ignore_errors=True)

    def take_in(self, source: Path, expected_digest: str = "") -> Incoming:
        """Copies and verifies an artifact: a folder with a manifest, or a single `.onnx` file, which gets one.

        Raises:
            NotFound: `ARTIFACT_MISSING`.
            FailedPrecondition: `DIGEST_MISMATCH`, `INVALID_ARTIFACT`.
            ResourceExhausted: `REPOSITORY_UNWRITABLE`: nothing is left behind.
        """
        if not source.exists():
            raise NotFound(
                f"{source}: no such file or folder",
                reason="ARTIFACT_MISSING",
                field="artifact_uri",
                metadata={"path": str(source)},
            )
        scratch = self._root / SCRATCH / uuid.uuid4().hex
        try:
            manifest = self._copy(source, scratch)
            if expected_digest and manifest.digest != expected_digest:
                raise DataLoss(
                    f"{source}: digest is {manifest.digest}, expected {expected_digest}",
                    metadata={"digest": manifest.digest},
                )
            spec = modelspec.read_spec(scratch) if (scratch / modelspec.SPEC_FILE).exists() else None
            if spec is not None and spec.file and not (scratch / spec.file).is_file():
                raise InvalidArgument(
                    f"{source}: model.toml names {spec.file}, which is not there", reason="MODEL_FILE_MISSING"
                )
        except InterlockError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise _refused(error) from error
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            if error.errno in _NO_ROOM or self._is_ours(error.filename):
                raise self._unwritable(error) from error
            raise FailedPrecondition(
                f"{source}: {error.strerror or error}", reason="INVALID_ARTIFACT", field="artifact_uri"
            ) from error
        return Incoming(scratch, manifest, spec)

    def _is_ours(self, path: object) -> bool:
        return isinstance(path, str | Path) and Path(path).is_relative_to(self._root)

    def _unwritable(self, error: OSError) -> ResourceExhausted:
        """Not the artifact's fault, and worth another try once somebody has made room."""
        return ResourceExhausted(
            f"the model repository {self._root} cannot be written: {error.strerror or error}",
            reason="REPOSITORY_UNWRITABLE",
            metadata={"path": str(self._root)},
            retry_after_seconds=5.0,
        )

    def _copy(self, source: Path, scratch: Path) -> Manifest:
        if source.is_file():
            if source.suffix != ".onnx":
                raise InvalidArgument(f"{source}: a single file must be an .onnx model", reason="NOT_A_MODEL")
            scratch.mkdir(parents=True)
            shutil.copyfile(source, scratch / "model.onnx")
            return artifacts.write_manifest(scratch)
        manifest = artifacts.read_manifest(source)
        scratch.mkdir(parents=True)
        for entry in manifest.files:
            target = scratch / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            artifacts.check_plain(source / entry.path, entry.path)
            shutil.copyfile(source / entry.path, target)
        shutil.copyfile(source / artifacts.MANIFEST_FILE, scratch / artifacts.MANIFEST_FILE)
        return artifacts.verify(scratch)

    def keep(self, incoming: Incoming, model: str, version: str) -> Path:
        """Gives the copy its place, durably. A folder that a crash left there with the same digest is taken as it is.

        Raises:
            DataLoss: the place holds something else.
            ResourceExhausted: `REPOSITORY_UNWRITABLE`.
        """
        try:
            return self._keep(incoming, model, version)
        except OSError as error:
            self.drop(incoming)
            raise self._unwritable(error) from error

    def _keep(self, incoming: Incoming, model: str, version: str) -> Path:
        place = self.folder(model, version)
        place.parent.mkdir(parents=True, exist_ok=True)
        for path in (*incoming.folder.rglob("*"), incoming.folder):
            _fsync(path)
        if place.exists():
            if artifacts.read_manifest(place).digest != incoming.digest:
                raise DataLoss(
                    f"{place} holds another artifact than version {version} was registered with",
                    metadata={"path": str(place)},
                )
            self.drop(incoming)
            return place
        incoming.folder.rename(place)
        _fsync(place.parent)
        return place

    def drop(self, incoming: Incoming) -> None:
        """Removes the copy."""
        shutil.rmtree(incoming.folder, ignore_errors=True)

    def verify(self, model: str, version: str, digest: str) -> int:
        """Reads every byte of a version; returns its size.

        Raises:
            FailedPrecondition: `DIGEST_MISMATCH`, `INVALID_ARTIFACT`.
            NotFound: `ARTIFACT_MISSING`.
        """
        place = self.folder(model, version)
        if not place.is_dir():
            raise NotFound(
                f"{place}: the version's folder is gone", reason="ARTIFACT_MISSING", metadata={"path": str(place)}
            )
        try:
            return artifacts.verify(place, digest).size_bytes
        except InterlockError as error:
            raise _refused(error) from error
        except OSError as error:
            raise FailedPrecondition(
                f"{place}: {error.strerror or error}", reason="INVALID_ARTIFACT", metadata={"path": str(place)}
            ) from error


def _refused(error: InterlockError) -> InterlockError:
    """The words of the wire: a damaged or unfit artifact is a failed precondition of whoever wants to use it."""
    if isinstance(error, DataLoss):
        reason = "DIGEST_MISMATCH" if error.reason == DataLoss.default_reason else "INVALID_ARTIFACT"
        return FailedPrecondition(error.message, reason=reason, field="artifact_uri", metadata=error.metadata)
    return FailedPrecondition(
        error.message,
        reason="INVALID_ARTIFACT",
        field="artifact_uri",
        metadata={**error.metadata, "cause": error.reason},
    )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
