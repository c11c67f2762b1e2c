"""`interlock keys`: API keys. Only hashes are stored; a key is shown once. Rooms see a change at once."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import click

from interlock.cli import console
from interlock.core import names
from interlock.runtime import settings as settings_module
from interlock.runtime import terminal
from interlock.runtime.access import Scope, hash_key, new_key

SCOPES = [scope.value for scope in Scope if scope is not Scope.PUBLIC]


def _read(path: Path) -> list[dict[str, Any]]:
    return list(tomllib.loads(path.read_text()).get("keys", [])) if path.exists() else []


def _write(path: Path, keys: list[dict[str, Any]]) -> None:
    """Replaces the file in one step, readable by its owner only."""
    lines = [
        "# API keys of Interlock: hashes only. Change it with `interlock keys`; rooms read it again by themselves."
    ]
    for key in keys:
        scopes = ", ".join(f'"{scope}"' for scope in key["scopes"])
        lines.append(f'\n[[keys]]\nname = "{key["name"]}"\nhash = "{key["hash"]}"\nscopes = [{scopes}]')
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


@click.group()
def keys() -> None:
    """API keys: create, list, revoke. As soon as one exists, every verb but health needs a key."""


@keys.command()
@click.option(
    "--name",
    required=True,
    help="Who the key is for; goes into logs and receipts. Two keys may share a name: that is rotation.",
)
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice(SCOPES),
    help="What it may do; admin includes the others.",
)
def create(name: str, scopes: tuple[str, ...]) -> None:
    """Make a key and print it, once."""
    path = settings_module.load().keys_path
    key = new_key()
    existing = _read(path)
    if sum(1 for entry in existing if entry["name"] == name) >= 2:
        raise click.ClickException(
            f"{name} has two keys already; revoke the older one first: interlock keys revoke --name {name} --oldest"
        )
    _write(path, [*existing, {"name": names.check_id(name, "name"), "hash": hash_key(key), "scopes": list(scopes)}])
    click.echo(key)


@keys.command(name="list")
@console.as_json
def listed(json_: bool) -> None:
    """Show names and scopes."""
    entries = [
        {"name": k["name"], "scopes": k["scopes"], "hash": k["hash"][:12]}
        for k in _read(settings_module.load().keys_path)
    ]
    if json_:
        terminal.show_json(entries)
    else:
        terminal.table([(e["name"], " ".join(e["scopes"]), e["hash"]) for e in entries], ("NAME", "SCOPES", "HASH"))


@keys.command()
@click.option("--name", required=True)
@click.option("--oldest", is_flag=True, help="Only the older of two keys of that name.")
def revoke(name: str, oldest: bool) -> None:
    """Remove the keys of a name. The file stays, so keys stay required."""
    path = settings_module.load().keys_path
    entries = _read(path)
    matching = [entry for entry in entries if entry["name"] == name]
    if not matching:
        raise click.ClickException(f"no key is named {name}; `interlock keys list` shows them")
    gone = matching[:1] if oldest else matching
    _write(path, [entry for entry in entries if entry not in gone])
    click.echo(f"revoked {len(gone)}")
