"""What lies in a folder of models: every version with its place, its stamp, or why it can't be served. Only looks; loads nothing, remembers nothing.

<root>/<model>/<version>/manifest.json ...    a version folder, finished: its manifest is written last
<root>/<model>/<version>/model.onnx           a bare file is one too, when nothing else says what it is
<root>/<model>/model.onnx                     a model of one bare file: version 1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from interlock.core.names import check_id
from interlock.errors import InvalidArgument
from interlock.stores.artifacts import MANIFEST_FILE
from interlock.stores.modelspec import SPEC_FILE

BARE = "model.onnx"
FIRST = "1"
FILES_MAX = 10_000
Stamp = tuple[tuple[str, int, int], ...]
"""Name, size and time of change in nanoseconds of every file: another stamp means other content, or content that is still coming."""


@dataclass(frozen=True, slots=True)
class Found:
    """One version on disk. `problem` says why it can't be served; empty when it can be tried."""

    model: str
    version: str
    path: Path
    stamp: Stamp = ()
    problem: str = ""

    @property
    def changed_at(self) -> float:
        """When its newest file changed, in seconds of the wall clock."""
        return max((at for _, _, at in self.stamp), default=0) / 1e9


def look(root: Path | None, named: Mapping[str, str]) -> list[Found]:
    """Every version below `root`, and those that are named one by one (model -> file or folder), newest first per model."""
    models = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) if root else []
    found = [version for model in models for version in _model(model.name, model)]
    found += [version for model, path in named.items() for version in _named(model, Path(path))]
    return sorted(found, key=lambda f: by_number((f.model, f.version)), reverse=True)


def by_number(pair: tuple[str, str]) -> tuple[str, int, str]:
    """Orders (model, version) with 10 behind 9; names that are not numbers come first."""
    model, version = pair
    return model, int(version) if version.isdecimal() else -1, version


def _model(name: str, path: Path) -> Iterator[Found]:
    problem = _id_problem(name)
    if problem:
        yield Found(name, "", path, problem=problem)
    elif (path / BARE).is_file():
        yield _file(name, FIRST, path / BARE)
    else:
        for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
            yield _version(name, folder)


def _named(name: str, path: Path) -> Iterator[Found]:
    if path.is_file():
        yield _file(name, FIRST, path)
    elif (path / MANIFEST_FILE).is_file():
        yield _folder(name, FIRST if _id_problem(path.name) else path.name, path)
    elif path.is_dir():
        yield from _model(name, path)
    else:
        yield Found(name, "", path, problem=f"{path} does not exist")


def _version(model: str, folder: Path) -> Found:
    problem = _id_problem(folder.name)
    if problem:
        return Found(model, folder.name, folder, problem=problem)
    if (folder / MANIFEST_FILE).is_file():
        return _folder(model, folder.name, folder)
    if (folder / BARE).is_file() and not (folder / SPEC_FILE).exists():
        return _file(model, folder.name, folder / BARE)
    return Found(model, folder.name, folder, problem=f"no {MANIFEST_FILE}: it was never finished")


def _file(model: str, version: str, path: Path) -> Found:
    return Found(model, version, path, _stamp([path], path.parent))


def _folder(model: str, version: str, folder: Path) -> Found:
    files = [path for path, _ in zip(folder.rglob("*"), range(FILES_MAX), strict=False) if path.is_file()]
    return Found(model, version, folder, _stamp(files, folder))


def _stamp(files: list[Path], folder: Path) -> Stamp:
    entries = []
    for path in sorted(files):
        try:
            stat = path.stat()
        except FileNotFoundError:  # it went while we looked: the next look sees another stamp
            continue
        entries.append((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns))
    return tuple(entries)


def _id_problem(name: str) -> str:
    try:
        check_id(name, "folder")
    except InvalidArgument as error:
        return error.message
    return ""
