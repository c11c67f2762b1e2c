"""What every command shares: the connection, the `--json` option, and how resources are shown."""

from __future__ import annotations

import asyncio
import getpass
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import click

from interlock.client.admin import AdminClient
from interlock.runtime import settings as settings_module
from interlock.runtime import terminal
from interlock.runtime.access import Keys


def key_for(settings: settings_module.Settings) -> str:
    """`INTERLOCK_API_KEY`, or the rooms' own key where this user may read it."""
    if key := os.environ.get("INTERLOCK_API_KEY"):
        return key
    try:
        return Keys(settings.home).internal_key() if (settings.home / "internal.key").exists() else ""
    except OSError:
        return ""


def connect(settings: settings_module.Settings) -> AdminClient:
    """A client of these settings' rooms, with this user's name for the history."""
    return AdminClient(
        settings.controller_address, trainer=settings.trainer_address, key=key_for(settings), actor=_user()
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"uid {os.getuid()}"


def with_admin(work: Callable[[AdminClient], Awaitable[Any]]) -> Any:
    """Runs `work` with a connected client."""
    settings = settings_module.load()

    async def connected() -> Any:
        async with connect(settings) as admin:
            return await work(admin)

    return asyncio.run(connected())


def as_json(function: Callable[..., Any]) -> Callable[..., Any]:
    """The `--json` option."""
    return click.option("--json", "json_", is_flag=True, help="Print JSON.")(function)


def runs_table(runs: Sequence[Mapping[str, Any]]) -> None:
    """Training runs, one a line."""
    columns = ("recipe", "state", "step", "attempt", "rollback_count", "message")
    rows = [
        (last(r["name"]), *((r[column] or ("own loop" if column == "recipe" else r[column])) for column in columns))
        for r in runs
    ]
    terminal.table(rows, ("RUN", "RECIPE", "STATE", "STEP", "ATTEMPT", "ROLLBACKS", "MESSAGE"))


def scalar(value: Any) -> str:
    """One value for a person: floats at four figures, nested objects as `name value` pairs."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {scalar(inner)}" for name, inner in value.items())
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def last(name: str) -> str:
    """The id at the end of a resource name."""
    return name.rsplit("/", 1)[-1]
