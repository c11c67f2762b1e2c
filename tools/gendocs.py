"""Regenerates the reference pages that are drawn from code: the swap's states. `--check` writes nothing and fails on a difference."""

from __future__ import annotations

import sys
from pathlib import Path

from interlock.core.swap import AFTER_SWITCH, BEFORE_SWITCH, TABLE, TERMINAL, State

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "swap-states.md"
HEAD = """# The states of a swap

Drawn by `tools/gendocs.py` from the table in `interlock.core.swap`; do not edit. An event that a state does not take is refused (`ILLEGAL_TRANSITION`) and changes nothing.

Before the switch every failure ends in ABORTING with the stable version untouched. The commit is one compare-and-set of the model's route. After it every failure ends in REVERTING,
whose first act is the compare-and-set back, without asking whether the candidate is healthy.
"""


def _side(state: State) -> str:
    if state in TERMINAL:
        return "terminal"
    return (
        "before the switch" if state in BEFORE_SWITCH else "after the switch" if state in AFTER_SWITCH else "going back"
    )


def page() -> str:
    """The whole page."""
    edges = sorted({(source.name, target.name) for (source, _), target in TABLE.items() if source is not target})
    drawing = "\n".join(f"  {source} --> {target}" for source, target in edges)
    ends = "\n".join(f"  {state.name} --> [*]" for state in State if state in TERMINAL)
    rows = []
    for state in State:
        moves = ", ".join(
            f"{event.name} -> {target.name}" for (source, event), target in TABLE.items() if source is state
        )
        rows.append(f"| {state.name} | {_side(state)} | {moves or '-'} |")
    table = "\n".join(["| state | | event -> next state |", "|---|---|---|", *rows])
    return f"{HEAD}\n```mermaid\nstateDiagram-v2\n  [*] --> PENDING\n{drawing}\n{ends}\n```\n\n{table}\n"


def main() -> int:
    """Writes the page, or compares with `--check`; returns the exit code."""
    if "--check" in sys.argv[1:]:
        fresh = PAGE.exists() and PAGE.read_text() == page()
        print("docs are up to date" if fresh else f"{PAGE.relative_to(ROOT)} is stale; run `make proto`")
        return 0 if fresh else 1
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
