"""What a tool works on: a version folder or a bare `.onnx` file, opened as a replica would open it, and inputs that fit it.

The digest is checked and the claims of model.toml are held against the graph, so what a tool measures is what would serve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from interlock.errors import InvalidArgument
from interlock.runtime import settings
from interlock.stores import golden
from interlock.stores.modelspec import ModelSpec
from interlock_inference.engines import Array, Engine, EngineOptions, Signature, made_up_inputs, onnx
from interlock_inference.repository import Opened, open_artifact

SUFFIX = "ExecutionProvider"


def providers_of(text: str) -> tuple[str, ...]:
    """`CUDA,CPU` or ONNX Runtime's own names, best first."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(name if name.endswith(SUFFIX) else name + SUFFIX for name in names)


def short(provider: str) -> str:
    """`CPU` for `CPUExecutionProvider`."""
    return provider.removesuffix(SUFFIX)


def opened(path: Path, options: EngineOptions) -> Opened:
    """The version, loaded. Raises ValueError for unknown providers and for an ensemble, and what `repository.open_artifact` raises."""
    found = open_artifact(path, "", _with_modules(onnx.check_options(options)), lambda percent, message: None)
    if found.spec is not None and found.spec.engine == "ensemble":
        raise ValueError(
            f"{path}: an ensemble has no engine of its own; measure its members, or the served ensemble with --grpc or --http"
        )
    return found


def model_of(subject: Opened) -> Path:
    """The model file of a version, or the bare file."""
    if subject.path.is_file():
        return subject.path
    return subject.path / (subject.spec.file if subject.spec is not None else "model.onnx")


def _with_modules(options: EngineOptions) -> EngineOptions:
    """What the operator allows a replica, this command may run too."""
    return replace(options, torch_modules=tuple(settings.load().inference.torch_modules))


def spec_of(subject: Opened) -> ModelSpec:
    """The version's model.toml, or what stands for it beside a bare file."""
    signature = subject.engine.signature
    return subject.spec or ModelSpec(subject.path.stem, signature.inputs, signature.outputs)


def run_of(engine: Engine, inputs: Mapping[str, Array]) -> Callable[[], object]:
    """One run of the engine on these inputs, all outputs asked for."""
    names = [spec.name for spec in engine.signature.outputs]
    return lambda: engine.run(inputs, names)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Rows to measure with: the caller's, else the version's golden set, else made up. `source` says which."""

    source: str
    arrays: Mapping[str, Array]

    def rows(self, signature: Signature, count: int) -> dict[str, Array] | None:
        """A batch of `count` rows, repeated from the start where there are fewer; None where the model can't take so many."""
        if not self.arrays:
            return made_up_inputs(signature, rows=count) if _takes(signature, count) else None
        if not _takes(signature, count):
            return None
        return {name: np.resize(array, (count, *array.shape[1:])) for name, array in self.arrays.items()}


def _takes(signature: Signature, count: int) -> bool:
    return all(spec.shape and spec.shape[0] in (-1, count) for spec in signature.inputs)


def inputs_for(path: Path, engine: Engine, file: Path | None) -> Inputs:
    """Where the rows come from.

    Raises:
        InvalidArgument: `INVALID_TENSOR`: the file's arrays are not the model's inputs.
        FailedPrecondition: `INVALID_ARTIFACT`: the golden set can't be read.
    """
    if file is not None:
        return Inputs(str(file), _from_file(file, engine.signature))
    samples = list(golden.read(path).values()) if path.is_dir() else []
    if samples:
        names = [spec.name for spec in engine.signature.inputs]
        return Inputs("golden set", {name: np.concatenate([s[name] for s in samples]) for name in names})
    return Inputs("made up", {})


def _from_file(file: Path, signature: Signature) -> dict[str, Array]:
    with np.load(file, allow_pickle=False) as archive:
        found = {name: archive[name] for name in archive.files}
    wanted = {spec.name for spec in signature.inputs}
    if missing := sorted(wanted - set(found)):
        raise InvalidArgument(
            f"{file}: has no array {missing[0]!r}; the model takes {', '.join(sorted(wanted))}",
            reason="INVALID_TENSOR",
            field=missing[0],
        )
    return {name: found[name] for name in wanted}
