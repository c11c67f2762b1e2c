"""Which kinds of images are taken, and how to tell them by their first bytes, their names and their content types. Decodes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

IMAGE = "image"
"""The input by which encoded images come: BYTES, one element an image. A version takes it when its model.toml has [preprocess]."""
LABELS, SCORES = "labels", "scores"
"""The outputs that [postprocess] makes: BYTES and FP32, [images, top_k], best first."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of image."""

    extensions: tuple[str, ...]
    content_type: str


KINDS: Mapping[str, Kind] = {
    "PNG": Kind((".png",), "image/png"),
    "JPEG": Kind((".jpg", ".jpeg"), "image/jpeg"),
    "WEBP": Kind((".webp",), "image/webp"),
    "BMP": Kind((".bmp",), "image/bmp"),
}
BY_EXTENSION: Mapping[str, str] = {ext: name for name, kind in KINDS.items() for ext in kind.extensions}
BY_CONTENT_TYPE: Mapping[str, str] = {kind.content_type: name for name, kind in KINDS.items()}


def kind_of(body: bytes | memoryview) -> str | None:
    """The kind that the first bytes say; None for anything else."""
    start = bytes(body[:12])
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return "WEBP"
    return "BMP" if start.startswith(b"BM") else None
