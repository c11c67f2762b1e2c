"""Every reason that the code can give is in docs/reference/errors.md, and the page names no reason that nothing gives."""

from __future__ import annotations

import re
from pathlib import Path

from interlock.errors import BY_KIND

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("src/interlock", "services", "gateway")


def sources() -> list[str]:
    return [path.read_text() for folder in PRODUCT for path in (ROOT / folder).rglob("*.py") if "api" not in path.parts]


def given() -> set[str]:
    found: set[str] = set()
    for text in sources():
        found |= set(re.findall(r'reason\s*=\s*"([A-Z][A-Z0-9_]+)"', text))
    return found - set(BY_KIND)


def documented() -> set[str]:
    page = (ROOT / "docs/reference/errors.md").read_text()
    return set(re.findall(r"`([A-Z][A-Z0-9_]{3,})`", page))


def test_every_reason_is_documented() -> None:
    assert not given() - documented()


def test_every_documented_reason_stands_in_the_code() -> None:
    everything = "\n".join(sources())
    assert not {reason for reason in documented() if f'"{reason}"' not in everything}
