"""What commands and tools print: tables that stay readable in a pipe, and JSON. No colours beyond bold, no widgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import orjson


def table(rows: Sequence[Sequence[Any]], header: Sequence[str], *, numbers_from: int | None = None) -> None:
    """Prints columns that are as wide as their widest cell, those from `numbers_from` on to the right; `-` for an empty one."""
    cells = [list(header), *[["-" if cell in (None, "") else str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    to_the_right = len(header) if numbers_from is None else numbers_from
    for index, row in enumerate(cells):
        placed = [
            cell.ljust(width) if column < to_the_right else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line = "  ".join(placed).rstrip()
        click.echo(click.style(line, bold=True) if index == 0 else line)


def show_json(document: Any) -> None:
    """Prints JSON, indented."""
    click.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2, default=str).decode())
