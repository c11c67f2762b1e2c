"""Real samples with labels, for judging a version: scikit-learn's digits, an .npz, or a folder of images. Decides nothing.

An .npz holds an array per input, rows first, and, if the right answers are known, whole numbers named `label`. Object arrays are refused.
A folder has one folder of images per label, and the version's own `[preprocess]` makes its input of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from interlock.errors import FailedPrecondition, InvalidArgument
from interlock.runtime.images import BY_EXTENSION
from interlock_inference.engines import Array, Engine, Signature
from interlock_inference.processing import Preprocess
from interlock_inference.repository import Opened

LABEL = "label"
DIGITS = "digits"


@dataclass(frozen=True, slots=True)
class Samples:
    """Rows by input name, and the right class of each, or None where nobody knows. `source` is for reports."""

    source: str
    inputs: Mapping[str, Array]
    labels: Array | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def chosen(self, count: int, seed: int) -> Samples:
        """`count` of them without repetition, always the same ones for a seed; all of them where there are no more."""
        picked = np.random.default_rng(seed).permutation(len(self))[:count]
        labels = None if self.labels is None else self.labels[picked]
        return Samples(self.source, {name: array[picked] for name, array in self.inputs.items()}, labels)


def read(source: str, subject: Opened, count: int, seed: int) -> Samples:
    """`count` of the samples that `source` names: `digits`, the path of an .npz, or a folder of images.

    Raises:
        FailedPrecondition: `COMPONENT_MISSING`: digits without scikit-learn.
        InvalidArgument: `INVALID_SAMPLES`: they don't fit the model's inputs, or each other; `INVALID_IMAGE`.
    """
    signature = subject.engine.signature
    if source == DIGITS:
        return _digits(signature).chosen(count, seed)
    path = Path(source)
    if path.is_dir():
        return _images(path, subject, count, seed)
    if not path.is_file():
        raise _invalid(f"--samples: {source!r} is neither {DIGITS!r}, nor an .npz file, nor a folder of images")
    return _arrays(path, signature).chosen(count, seed)


def _images(folder: Path, subject: Opened, count: int, seed: int) -> Samples:
    """Picked before they are decoded: a folder may hold many more than are asked for."""
    processing = subject.processing
    if processing is None or processing.before is None:
        raise _invalid(f"--samples: {folder}: a folder of images needs [preprocess] in the version's model.toml")
    found = [file for file in sorted(folder.glob("*/*")) if file.suffix.lower() in BY_EXTENSION]
    if not found:
        raise _invalid(f"--samples: {folder}: no images in it; <label>/<image> is expected, {', '.join(BY_EXTENSION)}")
    labels = processing.behind.labels if processing.behind is not None else ()
    names = list(labels) or sorted({file.parent.name for file in found})
    if unknown := sorted({file.parent.name for file in found} - set(names)):
        raise _invalid(
            f"--samples: {folder}: {unknown[0]!r} is not a label of the version; they are {', '.join(names)}"
        )
    picked = [found[index] for index in np.random.default_rng(seed).permutation(len(found))[:count]]
    images = np.concatenate([_decoded(processing.before, file) for file in picked])
    classes = np.array([names.index(file.parent.name) for file in picked])
    return Samples(str(folder), {processing.before.input: images}, classes)


def _decoded(before: Preprocess, file: Path) -> Array:
    try:
        return before.array([file.read_bytes()])
    except InvalidArgument as error:
        raise InvalidArgument(f"--samples: {file}: {error.message}", reason=error.reason, field="samples") from None


def _arrays(path: Path, signature: Signature) -> Samples:
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise _invalid(f"--samples: {path}: not an .npz of plain arrays: {error}") from None
    return _checked(path, found, signature)


def _checked(path: Path, found: Mapping[str, Array], signature: Signature) -> Samples:
    inputs = {}
    for spec in signature.inputs:
        if spec.name not in found:
            raise _invalid(f"--samples: {path}: no array {spec.name!r}; it has {', '.join(found) or 'none'}")
        inputs[spec.name] = found[spec.name]
    lengths = {name: len(array) if array.ndim else 0 for name, array in {**inputs, **_labels(found)}.items()}
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        raise _invalid(f"--samples: {path}: as many rows in each array are needed, at least one; there are {lengths}")
    labels = found.get(LABEL)
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise _invalid(f"--samples: {path}: {LABEL} must be one whole number a row")
    return Samples(str(path), inputs, labels)


def _labels(found: Mapping[str, Array]) -> dict[str, Array]:
    return {LABEL: found[LABEL]} if LABEL in found else {}


def _digits(signature: Signature) -> Samples:
    """1,797 images of 8 x 8, from 0 to 1, in the shape that the model's only input has."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise FailedPrecondition(
            "the digits need scikit-learn: pip install 'interlock[recipes]'",
            reason="COMPONENT_MISSING",
            metadata={"extra": "recipes"},
        ) from None
    spec = signature.inputs[0]
    shape = tuple(dim if dim > 0 else 1 for dim in spec.shape[1:])
    if len(signature.inputs) != 1 or spec.datatype != "FP32" or int(np.prod(shape)) != 64:
        raise _invalid(f"--samples: digits are 64 numbers; {spec.name!r} is {spec.datatype} {list(spec.shape)}")
    bunch = load_digits()
    images = (bunch.data / 16.0).astype(np.float32).reshape(-1, *shape)
    return Samples(DIGITS, {spec.name: images}, bunch.target.astype(np.int64))


def classes(engine: Engine, samples: Samples, output: str) -> Array:
    """The class that the engine gives each sample, asked one by one, as a client would: an engine that quantises by the range of its
    input answers a row in company differently."""
    found = []
    for row in range(len(samples)):
        scores = engine.run({name: array[row : row + 1] for name, array in samples.inputs.items()}, [output])[0]
        if scores.ndim < 1 or scores.shape[-1] < 2:
            raise _invalid(
                f"--output: {output!r} has shape {list(scores.shape)}; scores of at least two classes are needed"
            )
        found.append(int(np.argmax(scores.reshape(-1, scores.shape[-1])[0])))
    return np.array(found)


def _invalid(message: str) -> InvalidArgument:
    return InvalidArgument(message, reason="INVALID_SAMPLES", field="samples")
