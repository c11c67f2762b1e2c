"""`interlock config`: every setting with its value and meaning."""

from __future__ import annotations

from typing import Any

import click
from pydantic import BaseModel

from interlock.cli import console
from interlock.runtime import settings as settings_module
from interlock.runtime import terminal


def _rows(model: BaseModel, prefix: str = "") -> list[tuple[str, str, Any, str]]:
    rows = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            rows += _rows(value, f"{name}.")
        else:
            variable = f"INTERLOCK_{prefix}{name}".replace(".", "_").upper()
            rows.append((f"{prefix}{name}", variable, value, field.description or ""))
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
