"""docs/reference/oip.md against the service and the tests that it names."""

from __future__ import annotations

import re
from pathlib import Path

from interlock.api.oip import rpc

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reference" / "oip.md").read_text()


def test_every_rpc_stands_there_once() -> None:
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| ")]
    named = [name for cell in cells for name in re.findall(r"\b[A-Z][a-z]+[A-Z]\w+", cell)]
    assert sorted(named) == sorted(rpc.METHODS)


def test_every_feature_of_the_table_stands_there() -> None:
    assert re.findall(r"^\| (B\d+) \|", PAGE, re.MULTILINE) == [f"B{n}" for n in range(1, 20)]


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"tests/[\w/]+\.py", PAGE))
    assert named
    assert not {path for path in named if not (ROOT / path).is_file()}


def test_every_http_path_is_a_route(tmp_path: Path) -> None:
    from interlock.runtime.access import Keys
    from interlock.runtime.settings import Settings
    from interlock_gateway import web

    app = web.build(Settings(home=tmp_path), None, None, Keys(tmp_path))  # type: ignore[arg-type]
    templates = {re.sub(r"\{\w+\}", "{}", path) for _, path, _ in web.inventory(app)}
    for path in re.findall(r"`(?:GET |POST )?(/v2[^`]*)`", PAGE):
        variants = {path.replace("[/{m}[/versions/{v}]]", ""), path.replace("[/versions/{v}]", ""), path.replace("[", "").replace("]", "")}  # fmt: skip
        for variant in {re.sub(r"\{\w+\}", "{}", v) for v in variants if "[" not in v and "..." not in v}:
            assert variant in templates, f"{path}: {variant}"
