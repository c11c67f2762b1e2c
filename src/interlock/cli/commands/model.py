"""`interlock model`: what serves, what could, and why."""

from __future__ import annotations

from typing import Any

import click

from interlock.cli import console
from interlock.cli.commands.swap import _finish, follow
from interlock.client.admin import AdminClient
from interlock.runtime import terminal


@click.group()
def model() -> None:
    """Models: list, versions, register, rollback, quarantine, explain."""


@model.command(name="list")
@console.as_json
def listed(json_: bool) -> None:
    """Every model with what serves."""
    models = console.with_admin(lambda admin: admin.models())
    if json_:
        terminal.show_json(models)
        return
    rows = [(console.last(m["name"]), console.last(m.get("route", {}).get("stable_version", "")), m.get("route", {}).get("epoch", 0), m["active_swap"]) for m in models]  # fmt: skip
    terminal.table(rows, ("MODEL", "VERSION", "EPOCH", "SWAP NOW"))


@model.command()
@click.argument("name")
@console.as_json
def versions(name: str, json_: bool) -> None:
    """A model's versions, newest first."""
    found = console.with_admin(lambda admin: admin.versions(name))
    if json_:
        terminal.show_json(found)
        return
    rows = [(console.last(v["name"]), v["state"], v.get("origin", {}).get("step", ""), v.get("origin", {}).get("checkpoint", ""), v["digest"][:19], v["message"]) for v in found]  # fmt: skip
    terminal.table(rows, ("VERSION", "STATE", "STEP", "CHECKPOINT", "DIGEST", "MESSAGE"))


@model.command()
@click.argument("name")
@click.argument("artifact")
@click.option("--swap/--no-swap", "and_swap", default=True, help="Move traffic to it at once.")
@click.option("--reason", default="")
def register(name: str, artifact: str, and_swap: bool, reason: str) -> None:
    """Copy an ONNX file or a version folder (a path, or s3://bucket/key) into the repository as NAME's next version, and swap to it."""
    from pathlib import Path

    if "://" not in artifact and not Path(artifact).exists():
        raise click.BadParameter(f"{artifact}: no such file or folder", param_hint="artifact")

    async def work(admin: AdminClient) -> dict[str, Any]:
        uri = artifact if "://" in artifact else str(Path(artifact).resolve())  # noqa: ASYNC240  before any traffic
        version = await admin.register(name, uri, reason=reason)
        click.echo(f"models/{name}/versions/{version}")
        if not and_swap:
            return {"state": "COMPLETED"}
        created = await admin.swap(name, version, reason=reason)
        return await follow(admin, created["name"])

    _finish(console.with_admin(work))


@model.command()
@click.argument("name")
@click.option("--version", default="", help="Default: the one that served before.")
@click.option("--quarantine", is_flag=True, help="Forbid the version that is left behind.")
@click.option("--reason", default="")
def rollback(name: str, version: str, quarantine: bool, reason: str) -> None:
    """Move NAME back to an earlier version; check with `interlock model list` or GET /version."""

    async def work(admin: AdminClient) -> dict[str, Any]:
        created = await admin.rollback_model(name, version, quarantine=quarantine, reason=reason)
        return await follow(admin, created["name"])

    _finish(console.with_admin(work))


@model.command()
@click.argument("name")
@click.argument("version")
@click.option("--lift", is_flag=True, help="Allow it again.")
@click.option("--reason", default="")
def quarantine(name: str, version: str, lift: bool, reason: str) -> None:
    """Forbid a version; if it serves, traffic moves away first."""
    answer = console.with_admin(lambda admin: admin.quarantine(name, version, quarantined=not lift, reason=reason))
    click.echo(
        f"{answer['version']['name']} {answer['version']['state']}"
        + (f"; {answer['swap']} moves traffic away" if answer["swap"] else "")
    )


@model.command()
@click.argument("name")
@click.option("--version", default="")
@console.as_json
def explain(name: str, version: str, json_: bool) -> None:
    """Why what serves is what serves: checkpoint, run, swaps, rollbacks."""
    story = console.with_admin(lambda admin: admin.explain(name, version))
    if json_:
        terminal.show_json(story)
    else:
        click.echo("\n".join(story["sentences"]))
