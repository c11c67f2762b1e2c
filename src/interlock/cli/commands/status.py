"""`interlock status`: rooms, models, swaps and runs at a glance. Exit code 1 when a room is down."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from interlock.cli import console
from interlock.cli.supervisor import is_healthy, rooms_of
from interlock.errors import InterlockError
from interlock.runtime import settings as settings_module
from interlock.runtime import terminal


async def collect(settings: settings_module.Settings) -> dict[str, Any]:
    """Everything `status` shows; a part whose room does not answer is empty, and the room says down."""
    rooms = rooms_of(settings)
    async with asyncio.TaskGroup() as group:
        checks = [group.create_task(is_healthy(room)) for room in rooms]
    up = {room.name: check.result() for room, check in zip(rooms, checks, strict=True)}
    document: dict[str, Any] = {
        "rooms": [
            {"room": room.name, "address": room.address, "state": "up" if up[room.name] else "down"} for room in rooms
        ],
        "models": [],
        "swaps": [],
        "runs": [],
    }
    async with console.connect(settings) as admin:
        for part, room, call in (
            ("models", "controller", admin.models),
            ("swaps", "controller", admin.swaps),
            ("runs", "trainer", admin.runs),
        ):
            if not up[room]:
                continue
            try:
                document[part] = await call()
            except InterlockError as error:
                document.setdefault("problems", []).append(f"{part}: {error.message} [{error.reason}]")
    return document


@click.command()
@console.as_json
def status(json_: bool) -> None:
    """Show rooms, models, swaps and runs."""
    document = asyncio.run(collect(settings_module.load()))
    if json_:
        terminal.show_json(document)
    else:
        _print(document)
    if any(room["state"] == "down" for room in document["rooms"]):
        sys.exit(1)


def _print(document: dict[str, Any]) -> None:
    terminal.table([(r["room"], r["address"], r["state"]) for r in document["rooms"]], ("ROOM", "ADDRESS", "STATE"))
    for problem in document.get("problems", ()):
        click.echo(f"problem: {problem}")
    if document["models"]:
        click.echo()
        rows: list[tuple[Any, ...]] = []
        for model in document["models"]:
            route = model.get("route") or {}
            rows.append(
                (
                    console.last(model["name"]),
                    console.last(route.get("stable_version", "")),
                    route.get("epoch", 0),
                    model["active_swap"],
                )
            )
        terminal.table(rows, ("MODEL", "VERSION", "EPOCH", "SWAP NOW"))
    if document["swaps"]:
        click.echo()
        rows = [
            (
                console.last(s["name"]),
                console.last(s["model"]),
                console.last(s["spec"]["candidate_version"]),
                s["state"],
                f"{s['progress_percent']:.0f} %",
                s["message"],
            )
            for s in document["swaps"][:5]
        ]
        terminal.table(rows, ("SWAP", "MODEL", "TO", "STATE", "DONE", "MESSAGE"))
    if document["runs"]:
        click.echo()
        console.runs_table(document["runs"][:10])
