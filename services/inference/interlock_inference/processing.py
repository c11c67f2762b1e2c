"""A version's own processing: encoded images to its input, its scores to labels. Built and held to the signature at load; used in worker threads.

Nothing is decoded before its kind, by its first bytes, and its size in pixels, by its header, are known to be allowed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from interlock.errors import FailedPrecondition, InterlockError, InvalidArgument
from interlock.runtime.arrays import NUMPY_TYPES
from interlock.runtime.images import IMAGE, KINDS, LABELS, SCORES, kind_of
from interlock.stores.artifacts import check_relative
from interlock.stores.imagespec import COLORS, LAYOUTS, PostprocessSpec, PreprocessSpec
from interlock.stores.modelspec import ModelSpec, TensorSpec
from interlock_inference.engines import Array, Signature

INPUT_TYPES = ("FP32", "FP16", "FP64", "UINT8")
FLOATS = ("FP32", "FP16", "FP64")
PIXELS_MAX = 50_000_000
"""Of one image, decoded: 150 MB as RGB bytes."""
LABELS_FILE_BYTES_MAX = 1 << 24


class Preprocess:
    """Encoded images to an array.

    Args:
        tensor: the input that is made; `size` is complete.
    """

    def __init__(self, spec: PreprocessSpec, tensor: TensorSpec, size: tuple[int, int]) -> None:
        self.input = tensor.name
        self._spec = spec
        self._size = size
        self._dtype = NUMPY_TYPES[tensor.datatype]
        channels = COLORS[spec.color]
        self._factor = np.float32(spec.scale) / _per_channel(spec.std, channels, 1.0)
        self._offset = _per_channel(spec.mean, channels, 0.0) / _per_channel(spec.std, channels, 1.0)

    def array(self, images: Sequence[bytes]) -> Array:
        """The model's input for these images, [images, ...] in the spec's layout.

        Raises:
            InvalidArgument: `INVALID_IMAGE`, `IMAGE_TOO_LARGE`, `UNSUPPORTED_IMAGE`, naming `image[i]`.
        """
        pixels = np.stack([self._pixels(body, f"image[{i}]") for i, body in enumerate(images)])
        if self._dtype != np.uint8:
            pixels = pixels * self._factor - self._offset
        return np.ascontiguousarray(_LAYOUT[self._spec.layout](pixels), self._dtype)

    def _pixels(self, body: bytes, where: str) -> Array:
        """One image as [height, width, channels] of uint8."""
        from PIL import Image

        kind = kind_of(body)
        if kind is None:
            raise _bad(where, f"its first bytes are of none of {', '.join(KINDS)}", "UNSUPPORTED_IMAGE")
        try:
            with Image.open(io.BytesIO(body), formats=(kind,)) as image:
                if image.width * image.height > PIXELS_MAX:
                    raise _bad(where, f"{image.width} x {image.height} pixels; at most {PIXELS_MAX} in all", "IMAGE_TOO_LARGE")  # fmt: skip
                return self._sized(image, where)
        except InterlockError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # Pillow's own limit comes first
            raise _bad(where, f"more than {PIXELS_MAX} pixels", "IMAGE_TOO_LARGE") from None
        except Exception as error:  # noqa: BLE001 - supervised edge: a decoder raises whatever broken bytes lead it to
            raise _bad(where, f"not a whole {kind} image: {str(error)[:120]}", "INVALID_IMAGE") from None

    def _sized(self, image: Any, where: str) -> Array:
        from PIL import Image, ImageOps

        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):  # 16 bits a pixel, which convert() would cut at 255
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        upright = upright.convert(self._spec.color)
        height, width = self._size
        method = Image.Resampling[self._spec.filter.upper()]
        match self._spec.resize:
            case "fit":
                upright = ImageOps.pad(upright, (width, height), method, color=0)
            case "cover":
                upright = ImageOps.fit(upright, (width, height), method)
            case "stretch":
                upright = upright.resize((width, height), method)
            case _ if upright.size != (width, height):
                raise _bad(where, f"{upright.width} x {upright.height} pixels, the model takes {width} x {height}", "INVALID_IMAGE")  # fmt: skip
        return np.asarray(upright, np.uint8).reshape(height, width, COLORS[self._spec.color])


_LAYOUT: Mapping[str, Callable[[Array], Array]] = {  # from [images, height, width, channels]
    "NHWC": lambda pixels: pixels,
    "NCHW": lambda pixels: pixels.transpose(0, 3, 1, 2),
    "NHW": lambda pixels: pixels[..., 0],
    "NF": lambda pixels: pixels.reshape(len(pixels), -1),
}


def _per_channel(values: Sequence[float], channels: int, default: float) -> Array:
    return np.broadcast_to(np.array(values or (default,), np.float32), (channels,))


def _bad(where: str, message: str, reason: str) -> InvalidArgument:
    return InvalidArgument(f"{where}: {message}", reason=reason, field=where)


class Postprocess:
    """Scores to the best labels."""

    def __init__(self, spec: PostprocessSpec, output: str, labels: Sequence[str]) -> None:
        self.output = output
        self.top_k = spec.top_k
        self._activation = spec.activation
        self.labels = tuple(labels)
        self._labels = np.array([label.encode() for label in labels], dtype=object)

    @cached_property
    def specs(self) -> tuple[TensorSpec, TensorSpec]:
        """What it gives."""
        return TensorSpec(LABELS, "BYTES", (-1, self.top_k)), TensorSpec(SCORES, "FP32", (-1, self.top_k))

    def best(self, values: Array) -> dict[str, Array]:
        """Labels and scores [images, top_k], best first, of scores [images, classes]. Raises FailedPrecondition `POSTPROCESS_FAILED`."""
        num_classes = values.shape[-1] if values.ndim == 2 else 0
        num_labels = len(self._labels) or num_classes
        if num_classes < self.top_k or num_labels != num_classes:
            raise FailedPrecondition(
                f"[postprocess] expects rows of {num_labels or self.top_k} scores, output {self.output!r} came as {list(values.shape)}",
                reason="POSTPROCESS_FAILED",
                metadata={"output": self.output},
            )
        scores = _ACTIVATION[self._activation](values.astype(np.float32))
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.top_k]
        names = self._labels if len(self._labels) else np.array([str(i).encode() for i in range(num_classes)], object)
        return {LABELS: names[order], SCORES: np.take_along_axis(scores, order, axis=1)}


def _softmax(values: Array) -> Array:
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    normal: Array = powers / powers.sum(axis=1, keepdims=True)
    return normal


_ACTIVATION: Mapping[str, Callable[[Array], Array]] = {
    "none": lambda values: values,
    "softmax": _softmax,
    "sigmoid": lambda values: 1 / (1 + np.exp(-values)),
}


class Processing:
    """What a version does before and behind its engine."""

    def __init__(self, before: Preprocess | None, behind: Postprocess | None) -> None:
        self.before = before
        self.behind = behind
        self.specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in behind.specs} if behind else {}

    def engine_names(self, names: Sequence[str]) -> Sequence[str]:
        """The engine's outputs that these outputs are made of."""
        if self.behind is None or not any(name in self.specs for name in names):
            return names
        return list(dict.fromkeys(self.behind.output if name in self.specs else name for name in names))

    def finish(self, names: Sequence[str], engine_names: Sequence[str], outputs: list[Array]) -> list[Array]:
        """The outputs asked for, of those that the engine gave."""
        if names == engine_names or self.behind is None:
            return outputs
        given = dict(zip(engine_names, outputs, strict=True))
        given.update(self.behind.best(given[self.behind.output]))
        return [given[name] for name in names]


def build(path: Path, spec: ModelSpec | None, signature: Signature) -> Processing | None:
    """A version's processing, held to its signature; None when its model.toml says nothing of images.

    Raises:
        FailedPrecondition: `INVALID_ARTIFACT`, with the key of model.toml as the field.
    """
    if spec is None or (spec.preprocess is None and spec.postprocess is None):
        return None
    before = None if spec.preprocess is None else _before(spec.preprocess, signature)
    behind = None if spec.postprocess is None else _behind(path, spec.postprocess, signature)
    return Processing(before, behind)


def _refused(key: str, message: str) -> FailedPrecondition:
    return FailedPrecondition(f"model.toml: {key}: {message}", reason="INVALID_ARTIFACT", field=key)


def _chosen(name: str, specs: Sequence[TensorSpec], key: str) -> TensorSpec:
    known = ", ".join(spec.name for spec in specs)
    if not name and len(specs) > 1:
        raise _refused(key, f"the model has {len(specs)}; name one of {known}")
    found = next((spec for spec in specs if spec.name == (name or specs[0].name)), None)
    if found is None:
        raise _refused(key, f"{name!r} is not one of {known}")
    return found


def _before(spec: PreprocessSpec, signature: Signature) -> Preprocess:
    tensor = _chosen(spec.input, signature.inputs, "preprocess.input")
    channels = COLORS[spec.color]
    if tensor.datatype not in INPUT_TYPES:
        raise _refused(
            "preprocess.input", f"{tensor.name!r} is {tensor.datatype}; images become {', '.join(INPUT_TYPES)}"
        )
    for key, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) not in (0, 1, channels):
            raise _refused(f"preprocess.{key}", f"{len(values)} numbers for {channels} channel{'s' * (channels > 1)}")
    if tensor.datatype == "UINT8" and (spec.mean or spec.std or spec.scale != 1):
        raise _refused(
            "preprocess.scale", "the input is UINT8, so its values are the pixels': scale = 1, no mean, no std"
        )
    if len(tensor.shape) != LAYOUTS[spec.layout]:
        raise _refused("preprocess.layout", f"{spec.layout} has {LAYOUTS[spec.layout]} dimensions, {tensor.name!r} has {list(tensor.shape)}")  # fmt: skip
    if spec.layout == "NHW" and channels != 1:
        raise _refused("preprocess.layout", f"NHW has no channels, color {spec.color} has {channels}")
    return Preprocess(spec, tensor, _size(spec, tensor, channels))


def _size(spec: PreprocessSpec, tensor: TensorSpec, channels: int) -> tuple[int, int]:
    """Height and width, by the spec or as the shape fixes them, and not against it."""
    sides = {"NCHW": tensor.shape[2:], "NHWC": tensor.shape[1:3], "NHW": tensor.shape[1:]}.get(spec.layout, (-1, -1))
    height, width = spec.size or sides
    if height < 1 or width < 1:
        raise _refused("preprocess.size", f"{tensor.name!r} has {list(tensor.shape)}, which does not fix it; say [height, width]")  # fmt: skip
    wanted = {
        "NCHW": (channels, height, width), "NHWC": (height, width, channels), "NHW": (height, width),
        "NF": (height * width * channels,),
    }[spec.layout]  # fmt: skip
    if any(have not in (-1, want) for want, have in zip(wanted, tensor.shape[1:], strict=True)):
        raise _refused("preprocess.size", f"{spec.layout} of {height} x {width} with {channels} channels is {list(wanted)} an image, {tensor.name!r} has {list(tensor.shape)}")  # fmt: skip
    return height, width


def _behind(path: Path, spec: PostprocessSpec, signature: Signature) -> Postprocess:
    tensor = _chosen(spec.output, signature.outputs, "postprocess.output")
    clash = {LABELS, SCORES} & {output.name for output in signature.outputs}
    if clash:
        raise _refused("postprocess", f"the model has an output {min(clash)!r} already")
    if tensor.datatype not in FLOATS or len(tensor.shape) != 2:
        raise _refused("postprocess.output", f"{tensor.name!r} is {tensor.datatype} {list(tensor.shape)}; a row of scores per image is needed: FP32, FP16 or FP64, two dimensions")  # fmt: skip
    labels = _labels(path, spec)
    num_classes = tensor.shape[1]
    if num_classes >= 0:
        if labels and len(labels) != num_classes:
            key = "postprocess.labels_file" if spec.labels_file else "postprocess.labels"
            raise _refused(key, f"{len(labels)} labels for {num_classes} scores")
        if spec.top_k > num_classes:
            raise _refused("postprocess.top_k", f"{spec.top_k} of {num_classes} scores")
    return Postprocess(spec, tensor.name, labels)


def _labels(path: Path, spec: PostprocessSpec) -> Sequence[str]:
    if not spec.labels_file:
        return spec.labels
    key = "postprocess.labels_file"
    if spec.labels:
        raise _refused(key, "give labels or labels_file, not both")
    try:
        check_relative(spec.labels_file, path)
        file = path / spec.labels_file
        if file.stat().st_size > LABELS_FILE_BYTES_MAX:
            raise _refused(key, f"{spec.labels_file} is larger than {LABELS_FILE_BYTES_MAX} bytes")
        return file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError, InvalidArgument) as error:
        raise _refused(key, f"{spec.labels_file[:80]}: {str(error)[:200]}") from None


def encoded_images(array: Array) -> list[bytes]:
    """The images of a BYTES tensor. Raises InvalidArgument for none."""
    images = [item if isinstance(item, bytes) else bytes(item) for item in array.flat]
    if not images:
        raise _bad(IMAGE, "no image", "INVALID_IMAGE")
    return images
