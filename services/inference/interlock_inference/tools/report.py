"""Where a tool's figures go: JSON beside the version, a plot, and a bar while they are taken. Knows nothing of what was measured.

A version folder never changes, so its reports stand beside it, in `<folder>.reports/`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime as ort
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from interlock.errors import FailedPrecondition
from interlock.stores.artifacts import write_durably
from interlock_inference.tools.timing import Key, Measure, Timing, interleaved

ERR = Console(stderr=True, highlight=False)


def progress() -> Progress:
    """A bar on standard error, so that standard output stays clean; nothing where that is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal)


def measured(cases: Mapping[Key, Measure], *, rounds: int, seconds: float) -> dict[Key, list[Timing]]:
    """`timing.interleaved`, under a bar."""
    with progress() as bar:
        task = bar.add_task("measuring", total=rounds * len(cases))
        return interleaved(cases, rounds=rounds, seconds=seconds, tick=lambda key: bar.advance(task))


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "providers_available": ort.get_available_providers(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def document(what: str, **parts: Any) -> dict[str, Any]:
    """A report: what it is, when and on what it was made, and its parts."""
    return {
        "what": what,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        **parts,
    }


def save(report: Mapping[str, Any], subject: Path) -> Path:
    """Writes the report beside its subject, durably; where it went."""
    folder = subject.with_name(subject.name + ".reports")
    folder.mkdir(exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    path = folder / f"{report['what']}-{stamp}.json"
    number = 1
    while path.exists():
        number += 1
        path = folder / f"{report['what']}-{stamp}-{number}.json"
    write_durably(path, dumps(report))
    return path


def dumps(report: Mapping[str, Any]) -> bytes:
    """Indented JSON with a newline at its end."""
    return orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def plot(path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, title: str) -> None:
    """One line of (x, y) points per name, both axes logarithmic; the format follows the file's suffix.

    Raises:
        FailedPrecondition: `COMPONENT_MISSING`: matplotlib is not installed.
    """
    figure, axes = _axes()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight")


def check_plot(path: Path | None) -> None:
    """Says before the work begins, not after it, that a plot can't be drawn. Raises as `plot`, and ValueError for a suffix."""
    if path is None:
        return
    figure, _ = _axes()
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in kinds:
        raise ValueError(f"--plot: {path.name}: the suffix must be one of {', '.join(sorted(kinds))}")


def _axes() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise FailedPrecondition(
            "a plot needs matplotlib: pip install 'interlock[plots]'",
            reason="COMPONENT_MISSING",
            metadata={"extra": "plots"},
        ) from None
    figure = Figure(figsize=(8, 5))
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
