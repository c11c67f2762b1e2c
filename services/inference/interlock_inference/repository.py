"""Opens an artifact for serving: finds it, proves its bytes, builds its engine, holds its signature to what it claims. Blocking; decides nothing.

An artifact is a version folder (`manifest.json`, `model.onnx`, and mostly `model.toml`), or one bare `.onnx` file, whose digest is that of a
folder holding it as `model.onnx` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from interlock.errors import DataLoss, FailedPrecondition, InterlockError, InvalidArgument, NotFound
from interlock.stores import artifacts, modelspec, remote
from interlock.stores.artifacts import FileEntry, Manifest
from interlock.stores.modelspec import ModelSpec, TensorSpec
from interlock_inference.engines import Engine, EngineOptions, Signature, onnx_file
from interlock_inference.engines import onnx as onnx_engine
from interlock_inference.engines.ensemble import EnsembleEngine
from interlock_inference.processing import Processing
from interlock_inference.processing import build as build_processing

Progress = Callable[[float, str], None]
"""Called with percent and what is being done; from the thread that opens."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that can be run, and what is known of it.

    Attributes:
        memory_bytes: how much the process grew; other work at the same time blurs it.
        num_apart: how many runs at once the process of its own takes that it lives in; 0: it lives in this one.
    """

    engine: Engine
    digest: str
    path: Path
    spec: ModelSpec | None
    memory_bytes: int
    processing: Processing | None = None
    num_apart: int = 0


def absolute(uri: str) -> str:
    """How a slot keeps where its version lies: `s3://` as it is, else an absolute path. Raises InvalidArgument `INVALID_ARTIFACT_URI`."""
    if remote.is_remote(uri):
        remote.split(uri)
        return uri
    return str(parse_uri(uri).absolute())


def parse_uri(uri: str) -> Path:
    """The local path of an artifact: a plain path or `file://`. Raises InvalidArgument `INVALID_ARTIFACT_URI`."""
    text = uri.removeprefix("file://")
    if not text or "://" in text or "\0" in text:
        raise InvalidArgument(
            f"artifact_uri: {uri[:200]!r} is neither a path, file:// nor s3://",
            reason="INVALID_ARTIFACT_URI",
            field="artifact_uri",
            metadata={"artifact_uri": uri[:200]},
        )
    return Path(text)


def open_artifact(path: Path, expected_digest: str, options: EngineOptions, progress: Progress) -> Opened:
    """Verifies, then loads; nothing of a file is given to an engine before its digest is right.

    Raises:
        NotFound: `ARTIFACT_MISSING`.
        FailedPrecondition: `DIGEST_MISMATCH`, `INVALID_ARTIFACT`, `GATE_FAILED`, `SIGNATURE_MISMATCH`, `SIGNATURE_MISSING`, `PROVIDER_UNAVAILABLE`, `MODULE_NOT_REGISTERED`,
            `COMPONENT_MISSING`.
        InvalidArgument: `PATH_OUTSIDE_FOLDER`.
    """
    progress(5, f"verifying {path.name}")
    manifest, spec = _verified(path, expected_digest)
    if spec is not None and spec.gate_failure:
        raise gate_failed(f"{path}", spec.gate_failure)
    _check_labels_file(path, manifest, spec)
    if spec is not None and spec.engine == "ensemble":
        whole = EnsembleEngine(spec)
        progress(100, "loaded")
        return Opened(whole, manifest.digest, path, spec, 0, build_processing(path, spec, whole.signature))
    model = path if path.is_file() else path / _model_file(path, manifest, spec)
    progress(40, f"loading {manifest.size_bytes} bytes")
    before = psutil.Process().memory_info().rss
    if spec is None or spec.engine == "onnx":
        onnx_file.check_references(model, _beside(manifest, model, path))
    engine = _loader(spec)(model, spec, options)
    grown = max(0, psutil.Process().memory_info().rss - before)
    if spec is not None:
        _check_claims(path, spec, engine)
    processing = build_processing(path, spec, engine.signature)
    progress(100, "loaded")
    return Opened(engine, manifest.digest, path, spec, grown, processing)


@dataclass(frozen=True, slots=True)
class Glance:
    """What an artifact says of itself, nothing of it proven: enough to decide how to load it."""

    digest: str = ""
    size_bytes: int = 0
    spec: ModelSpec | None = None


def glance(path: Path) -> Glance:
    """Reads manifest and model.toml; an empty one where `open_artifact` will refuse."""
    try:
        if path.is_file():
            return Glance("", path.stat().st_size)
        manifest = artifacts.read_manifest(path)
        spec = modelspec.read_spec(path) if (path / modelspec.SPEC_FILE).is_file() else None
    except (OSError, InterlockError):
        return Glance()
    return Glance(manifest.digest, manifest.size_bytes, spec)


def _loader(spec: ModelSpec | None) -> Callable[[Path, ModelSpec | None, EngineOptions], Engine]:
    """What loads this version. Torch is imported with the first version that needs it: it costs a second and 150 MB."""
    if spec is None or spec.engine == "onnx":
        return onnx_engine.load
    try:
        from interlock_inference.engines import torch as torch_engine
    except ImportError as error:
        raise FailedPrecondition(
            f"engine = \"torch\" needs torch, which is not installed here: {error}; pip install 'interlock[torch]'",
            reason="COMPONENT_MISSING",
            field="engine",
            metadata={"component": "torch"},
        ) from None
    return torch_engine.load


def _beside(manifest: Manifest, model: Path, path: Path) -> frozenset[str]:
    """The verified files, as the model file would name them; a bare file has none beside it."""
    if model == path:
        return frozenset()
    folder = model.relative_to(path).parent.as_posix()
    start = "" if folder == "." else f"{folder}/"
    return frozenset(entry.path.removeprefix(start) for entry in manifest.files if entry.path.startswith(start))


def gate_failed(subject: str, why: str) -> FailedPrecondition:
    """The refusal of a version that its own model.toml says fell short."""
    return FailedPrecondition(
        f"{subject} must not serve: {why}", reason="GATE_FAILED", field="artifact_uri", metadata={"gate": why}
    )


def _verified(path: Path, expected_digest: str) -> tuple[Manifest, ModelSpec | None]:
    if not path.exists():
        raise NotFound(
            f"artifact_uri: {path}: no such file or folder",
            reason="ARTIFACT_MISSING",
            field="artifact_uri",
            metadata={"path": str(path)},
        )
    try:
        if path.is_file():
            return _bare(path, expected_digest), None
        manifest = artifacts.verify(path, expected_digest)
        artifacts.check_complete(path, manifest)
        spec = modelspec.read_spec(path) if (path / modelspec.SPEC_FILE).exists() else None
        return manifest, spec
    except DataLoss as error:
        raise FailedPrecondition(error.message, reason=error.reason, field="digest", metadata=error.metadata) from None
    except (NotFound, InvalidArgument) as error:
        metadata = {**error.metadata, "cause": error.reason, "field": error.field}
        raise FailedPrecondition(
            error.message, reason="INVALID_ARTIFACT", field="artifact_uri", metadata=metadata
        ) from None
    except OSError as error:
        raise FailedPrecondition(
            f"{path}: {error.strerror or error}",
            reason="INVALID_ARTIFACT",
            field="artifact_uri",
            metadata={"path": str(path)},
        ) from None


def _bare(path: Path, expected_digest: str) -> Manifest:
    if path.suffix != ".onnx":
        raise InvalidArgument(
            f"{path}: a single file must be an .onnx model; anything else comes as a version folder",
            reason="NOT_A_MODEL",
        )
    size_bytes, digest = artifacts.hash_file(path)
    manifest = Manifest((FileEntry("model.onnx", size_bytes, digest),))
    if expected_digest and manifest.digest != expected_digest:
        raise DataLoss(
            f"{path}: digest is {manifest.digest}, expected {expected_digest}",
            metadata={"path": str(path), "digest": manifest.digest, "expected": expected_digest},
        )
    return manifest


def _model_file(folder: Path, manifest: Manifest, spec: ModelSpec | None) -> str:
    file = spec.file if spec is not None else "model.onnx"
    if file not in {entry.path for entry in manifest.files}:
        raise FailedPrecondition(
            f"{folder}: {file} is not in the manifest",
            reason="INVALID_ARTIFACT",
            field="artifact_uri",
            metadata={"path": str(folder), "file": file},
        )
    return file


def _check_labels_file(folder: Path, manifest: Manifest, spec: ModelSpec | None) -> None:
    file = spec.postprocess.labels_file if spec is not None and spec.postprocess is not None else ""
    if file and file not in {entry.path for entry in manifest.files}:
        raise FailedPrecondition(
            f"{folder}: {file} is not in the manifest",
            reason="INVALID_ARTIFACT",
            field="postprocess.labels_file",
            metadata={"path": str(folder), "file": file},
        )


def _check_claims(path: Path, spec: ModelSpec, engine: Engine) -> None:
    """model.toml says what a client may rely on, so the graph must agree with it."""
    for part, claimed, actual in (
        ("inputs", spec.inputs, engine.signature.inputs),
        ("outputs", spec.outputs, engine.signature.outputs),
    ):
        difference = tensors_differ(claimed, actual)
        if difference:
            raise FailedPrecondition(
                f"{path}: model.toml and the graph disagree on {part}: {difference}",
                reason="SIGNATURE_MISMATCH",
                metadata={"path": str(path), "part": part},
            )


def tensors_differ(left: Sequence[TensorSpec], right: Sequence[TensorSpec]) -> str:
    """The first difference between two sets of tensors, as a sentence; empty when they are the same. Order does not matter."""
    theirs = {spec.name: spec for spec in right}
    for spec in left:
        other = theirs.pop(spec.name, None)
        if other is None:
            return f"{spec.name!r} is missing on one side"
        if other != spec:
            return f"{spec.name!r} is {spec.datatype} {list(spec.shape)} against {other.datatype} {list(other.shape)}"
    return f"{next(iter(theirs))!r} is missing on one side" if theirs else ""


def check_compatible(stable: Signature, candidate: Signature, stable_name: str) -> None:
    """A candidate must take and give what the served version does. Raises FailedPrecondition `SIGNATURE_MISMATCH`."""
    for part, left, right in (
        ("inputs", stable.inputs, candidate.inputs),
        ("outputs", stable.outputs, candidate.outputs),
    ):
        difference = tensors_differ(left, right)
        if difference:
            raise FailedPrecondition(
                f"{part} differ from those of {stable_name}, which is served: {difference}",
                reason="SIGNATURE_MISMATCH",
                field="compatible_with",
                metadata={"stable": stable_name, "part": part},
            )


def describe(error: InterlockError) -> str:
    """How a slot keeps the reason of its failure: `REASON: message`."""
    return f"{error.reason}: {error.message}"
