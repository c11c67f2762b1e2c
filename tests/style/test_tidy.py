"""The law that prose cannot hold: function length, module docstrings, unfinished work, words that mean nothing to a reader."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATED = "src/interlock/api/"
FUNCTION_LINES_MAX = 60
FILE_BYTES_MAX = 1_000_000


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / line for line in listed.splitlines() if (ROOT / line).is_file()]


def sources() -> list[Path]:
    return [path for path in tracked("*.py") if GENERATED not in str(path.relative_to(ROOT)) + "/"]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the style test reads git's list of files")


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines without the docstring: a public contract may be long, code may not."""
    assert function.end_lineno is not None
    first = function.body[0]
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_functions_fit_a_screen() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {length(function)} lines"
        for path in sources()
        for function in functions(path)
        if length(function) > FUNCTION_LINES_MAX
    ]
    assert not long, "\n".join(long)


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, "\n".join(silent)


def test_no_work_is_left_without_an_owner() -> None:
    pattern = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b(?!\(#\d+\))")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_module_is_dead() -> None:
    """Every module of the product is imported by another one, started as a process, or named in a table of commands."""
    product = [path for path in sources() if path.relative_to(ROOT).parts[0] in {"src", "services", "gateway"}]
    corpus = {path: path.read_text() for path in tracked("*.py", "*.toml", "Makefile")}
    dead = []
    for path in product:
        if path.name in {"__init__.py", "__main__.py"} or path.parent.name in {"commands", "recipes"}:
            continue
        name = re.compile(rf"\b{path.stem}\b")
        if not any(
            name.search(text)
            for other, text in corpus.items()
            if other != path and "tests" not in other.relative_to(ROOT).parts
        ):
            dead.append(str(path.relative_to(ROOT)))
    assert not dead, "\n".join(dead)


def test_files_are_small() -> None:
    big = [str(path.relative_to(ROOT)) for path in tracked() if path.stat().st_size > FILE_BYTES_MAX]
    assert not big, "\n".join(big)


def test_a_drawer_is_not_a_name() -> None:
    """STYLE: nouns for data, verbs for functions; no Manager, Helper, Utils, Base drawers."""
    pattern = re.compile(r"(Manager|Helper|Utils?)$")
    named = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and pattern.search(node.name)
    ]
    named += [
        str(path.relative_to(ROOT)) for path in sources() if path.stem in {"utils", "util", "helpers", "misc", "common"}
    ]
    assert not named, "\n".join(named)
