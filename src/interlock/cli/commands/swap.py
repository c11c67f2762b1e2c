"""`interlock swap`: move a model to another version, and watch, approve or stop it."""

from __future__ import annotations

import sys
from typing import Any

import click

from interlock.cli import console
from interlock.client.admin import AdminClient
from interlock.runtime import terminal

ENDED_WELL = "COMPLETED"


@click.group()
def swap() -> None:
    """Swaps: create, list, watch, approve, reject, promote, abort, receipt."""


def _name(swap_id: str) -> str:
    return swap_id if "/" in swap_id else f"swaps/{swap_id}"


async def follow(admin: AdminClient, name: str) -> dict[str, Any]:
    """Prints each change until the swap ends; returns its last state."""
    last: dict[str, Any] = {}
    async for last in admin.watch_swap(name):
        click.echo(f"{last['progress_percent']:5.1f} %  {last['state']:<11} {last['message']}")
    return last


def _finish(last: dict[str, Any]) -> None:
    if last.get("state") != ENDED_WELL:
        click.echo(f"{last['name']} ended {last['state']}: {last['message']} [{last['reason']}]", err=True)
        sys.exit(1)


@swap.command()
@click.argument("model")
@click.argument("version")
@click.option("--reason", default="", help="Why; kept in the history.")
@click.option("--approval", is_flag=True, help="Stop before the switch and wait for `interlock swap approve`.")
@click.option("--force", is_flag=True, help="Swap to a quarantined version all the same; recorded with your name.")
@click.option("--wait/--no-wait", default=True, help="Follow it to its end.")
@console.as_json
def create(model: str, version: str, reason: str, approval: bool, force: bool, wait: bool, json_: bool) -> None:
    """Move MODEL to VERSION without dropping a request."""

    async def work(admin: AdminClient) -> dict[str, Any]:
        created = await admin.swap(model, version, reason=reason, spec={"approval_required": approval, "force": force})
        if json_:
            return await admin.finished_swap(created["name"]) if wait else created
        click.echo(created["name"])
        return await follow(admin, created["name"]) if wait else created

    last = console.with_admin(work)
    if json_:
        terminal.show_json(last)
    if wait:
        _finish(last)


@swap.command(name="list")
@click.option("--model", default="")
@console.as_json
def listed(model: str, json_: bool) -> None:
    """Newest first."""
    swaps = console.with_admin(lambda admin: admin.swaps(model))
    if json_:
        terminal.show_json(swaps)
        return
    rows = [(console.last(s["name"]), console.last(s["model"]), console.last(s["stable_version"]), console.last(s["spec"]["candidate_version"]), s["state"], s["message"]) for s in swaps]  # fmt: skip
    terminal.table(rows, ("SWAP", "MODEL", "FROM", "TO", "STATE", "MESSAGE"))


@swap.command()
@click.argument("swap_id")
def watch(swap_id: str) -> None:
    """Follow a swap to its end; exit code 0 only when it completed."""
    _finish(console.with_admin(lambda admin: follow(admin, _name(swap_id))))


@swap.command()
@click.argument("swap_id")
@console.as_json
def receipt(swap_id: str, json_: bool) -> None:
    """What an ended swap did: versions, times, requests failed."""
    document = console.with_admin(lambda admin: admin.receipt(_name(swap_id)))
    if json_:
        terminal.show_json(document)
        return
    for name, value in document.items():
        if name == "events":
            for event in value:
                click.echo(f"  {event['time'][:23]}  {event['state']:<11} {event['message']}")
        elif value not in ("", 0, [], "0"):
            click.echo(f"{name:<30} {console.scalar(value)}")
    click.echo(f"{'failed_count':<30} {document['failed_count']}")


def _steering(verb: str, text: str) -> None:
    @swap.command(name=verb, help=text)
    @click.argument("swap_id")
    @click.option("--reason", default="", help="Why; kept in the history.")
    def steer(swap_id: str, reason: str) -> None:
        last = console.with_admin(lambda admin: admin.steer_swap(_name(swap_id), verb, reason=reason))
        click.echo(f"{last['name']} {last['state']}")


_steering("approve", "Let a swap that waits at its gate go on.")
_steering("reject", "End a swap that waits at its gate; the old version serves on.")
_steering("promote", "End canary or soak early and complete.")
_steering("abort", "Stop a swap; after the switch traffic goes back first.")
