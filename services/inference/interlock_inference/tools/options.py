"""Command line options that the tools share."""

from __future__ import annotations

import click


def numbers(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    """An option's callback: `1,2,4`, whole numbers from 1 up, each once, in the order given; nothing is no numbers.

    Raises:
        click.BadParameter: naming what is not a number.
    """
    if not value:
        return []
    parts = [part.strip() for part in value.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise click.BadParameter(f"{part!r} is not a whole number from 1 up", ctx, param)
    return list(dict.fromkeys(int(part) for part in parts))
