"""`interlock config`: every setting with its value and meaning."""

from __future__ import annotations

from typing import Any

import click

from interlock.cli import console
from interlock.runtime import settings as settings_module
from interlock.runtime import terminal
from interlock.runtime.fields import Group


def _rows(group: Group, prefix: str = "") -> list[tuple[str, str, Any, str]]:
    rows = []
    for name, field in group.fields.items():
        value = getattr(group, name)
        if isinstance(value, Group):
            rows += _rows(value, f"{name}.")
        else:
            variable = f"INTERLOCK_{prefix}{name}".replace(".", "_").upper()
            rows.append((f"{prefix}{name}", variable, value, field.description))
    return rows


@click.command()
@console.as_json
def config(json_: bool) -> None:
    """Show every setting with its value, its environment variable and its meaning."""
    rows = _rows(settings_module.load())
    if json_:
        terminal.show_json(
            [
                {"setting": name, "variable": variable, "value": value, "meaning": text}
                for name, variable, value, text in rows
            ]
        )
    else:
        click.echo(
            f"file: {settings_module.config_path()} ({'read' if settings_module.config_path().is_file() else 'not there'})\n"
        )
        terminal.table(rows, ("SETTING", "VARIABLE", "VALUE", "MEANING"))
