"""What `model.toml` says of images: how they become a version's input, and how its output becomes labels. Only values; no image is touched here.

A version owns its processing, so that a swap changes weights and processing together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Check = tuple[Callable[[Any], bool], str]
RESIZES = ("stretch", "fit", "cover", "none")
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")
COLORS: Mapping[str, int] = {"L": 1, "RGB": 3}
LAYOUTS: Mapping[str, int] = {"NCHW": 4, "NHWC": 4, "NHW": 3, "NF": 2}
"""Layout -> rank. NHW has no channel dimension; NF is all values of an image in one row."""
ACTIVATIONS = ("none", "softmax", "sigmoid")
SIDE_MAX, LABELS_MAX = 8192, 100_000


@dataclass(frozen=True, slots=True)
class PreprocessSpec:
    """The table `[preprocess]`: encoded images become one input of the model.

    Attributes:
        input: which one; empty: the only one.
        size: height and width; empty: as the input's shape fixes them.
        resize: stretch; fit (all of the image, edges filled black); cover (the middle of it); none (refuse another size).
        scale: each value from 0 to 255 is multiplied by it; then `mean` is taken away and it is divided by `std`, per channel.
    """

    input: str = ""
    size: tuple[int, ...] = ()
    resize: str = "stretch"
    filter: str = "bilinear"
    color: str = "RGB"
    scale: float = 1 / 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: str = "NCHW"


@dataclass(frozen=True, slots=True)
class PostprocessSpec:
    """The table `[postprocess]`: one output of the model, a row of scores per image, becomes the `top_k` best labels.

    Attributes:
        output: which one; empty: the only one.
        labels: names in the order of the scores; or `labels_file`, one per line, beside the model. Neither: the numbers themselves.
    """

    output: str = ""
    activation: str = "none"
    labels: tuple[str, ...] = ()
    labels_file: str = ""
    top_k: int = 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _one_of(*words: str) -> Check:
    return lambda value: value in words, f"one of {', '.join(words)}"


_TEXT: Check = (lambda value: isinstance(value, str), "a string")
_PER_CHANNEL: Check = (
    lambda value: isinstance(value, list | tuple) and len(value) in (0, 1, 3) and all(map(_is_number, value)),
    "a list of one finite number, or of one per channel",
)

PREPROCESS: Mapping[str, Check] = {
    "input": _TEXT,
    "size": (
        lambda value: (
            isinstance(value, list | tuple)
            and len(value) in (0, 2)
            and all(type(side) is int and 1 <= side <= SIDE_MAX for side in value)
        ),
        f"[height, width], each from 1 to {SIDE_MAX}",
    ),
    "resize": _one_of(*RESIZES),
    "filter": _one_of(*FILTERS),
    "color": _one_of(*COLORS),
    "scale": (lambda value: _is_number(value) and value > 0, "a finite number above 0"),
    "mean": _PER_CHANNEL,
    "std": (lambda value: _PER_CHANNEL[0](value) and all(item > 0 for item in value), f"{_PER_CHANNEL[1]}, above 0"),
    "layout": _one_of(*LAYOUTS),
}
POSTPROCESS: Mapping[str, Check] = {
    "output": _TEXT,
    "activation": _one_of(*ACTIVATIONS),
    "labels": (
        lambda value: (
            isinstance(value, list | tuple)
            and len(value) <= LABELS_MAX
            and all(isinstance(label, str) for label in value)
        ),
        f"a list of at most {LABELS_MAX} strings",
    ),
    "labels_file": _TEXT,
    "top_k": (lambda value: type(value) is int and 1 <= value <= LABELS_MAX, f"a whole number from 1 to {LABELS_MAX}"),
}


def preprocess(table: Mapping[str, Any]) -> PreprocessSpec:
    """From a table whose values fit `PREPROCESS`."""
    lists = {key: tuple(table[key]) for key in ("size", "mean", "std") if key in table}
    return PreprocessSpec(**{**table, **lists})


def postprocess(table: Mapping[str, Any]) -> PostprocessSpec:
    """From a table whose values fit `POSTPROCESS`."""
    lists = {"labels": tuple(table["labels"])} if "labels" in table else {}
    return PostprocessSpec(**{**table, **lists})
