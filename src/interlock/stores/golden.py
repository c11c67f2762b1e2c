"""The golden set of a version: inputs that its makers chose, in `golden.npz` beside the model, under its manifest like every other file.

Arrays are named `<sample>/<input>`, e.g. `upright/obs`. They are what a version is warmed up with and compared on besides recorded
requests, and what a model needs whose free dimensions can't be guessed. Nothing here unpickles: object arrays are refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from interlock.errors import FailedPrecondition

Array = npt.NDArray[Any]
GOLDEN_FILE = "golden.npz"
BYTES_MAX = 64 << 20  # uncompressed; a comparison runs all of it through two versions


def write(folder: Path, samples: Mapping[str, Mapping[str, Array]]) -> None:
    """Writes the golden set; call it before the manifest is written."""
    flat = {f"{sample}/{name}": array for sample, arrays in samples.items() for name, array in arrays.items()}
    with (folder / GOLDEN_FILE).open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **flat)


def read(folder: Path) -> dict[str, dict[str, Array]]:
    """The golden set by sample; empty when there is none. Text comes back as BYTES, an object array of bytes.

    Raises:
        FailedPrecondition: `INVALID_ARTIFACT`: not such a file, or above `BYTES_MAX`.
    """
    path = folder / GOLDEN_FILE
    if not path.is_file():
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            size_bytes = sum(entry.file_size for entry in archive.infolist())
        if size_bytes > BYTES_MAX:
            raise ValueError(f"{size_bytes} bytes uncompressed, at most {BYTES_MAX}")
        with np.load(path, allow_pickle=False) as archive:
            return _by_sample({name: _as_bytes(archive[name]) for name in archive.files})
    except Exception as error:  # noqa: BLE001 - foreign bytes in two nested formats: zip and npy have a dozen ways of not being one
        raise FailedPrecondition(
            f"{path}: not a golden set: {str(error)[:300] or type(error).__name__}",
            reason="INVALID_ARTIFACT",
            field="artifact_uri",
            metadata={"path": str(path)},
        ) from None


def _by_sample(flat: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    samples: dict[str, dict[str, Array]] = {}
    for name, array in flat.items():
        sample, slash, tensor = name.partition("/")
        if not slash or not sample or not tensor:
            raise ValueError(f"array {name[:80]!r} is not named <sample>/<input>")
        samples.setdefault(sample, {})[tensor] = array
    return samples


def _as_bytes(array: Array) -> Array:
    if array.dtype.kind not in "SU":
        return array
    made = np.empty(array.size, dtype=object)
    made[:] = [item.encode() if isinstance(item, str) else item for item in array.ravel().tolist()]
    return made.reshape(array.shape)
