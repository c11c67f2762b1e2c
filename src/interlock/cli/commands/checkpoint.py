"""`interlock checkpoint`: checkpoints of a run."""

from __future__ import annotations

import click

from interlock.cli import console
from interlock.runtime import terminal


@click.group()
def checkpoint() -> None:
    """Checkpoints: list, pin, unpin, verify."""


@checkpoint.command(name="list")
@click.argument("run_id")
@console.as_json
def listed(run_id: str, json_: bool) -> None:
    """Youngest first."""
    found = console.with_admin(lambda admin: admin.checkpoints(run_id))
    if json_:
        terminal.show_json(found)
        return
    rows = [(console.last(c["name"]), c["step"], c["attempt"], c["state"], "pinned" if c["pinned"] else "", c["size_bytes"], c["digest"][:19], c["message"]) for c in found]  # fmt: skip
    terminal.table(rows, ("CHECKPOINT", "STEP", "ATTEMPT", "STATE", "PIN", "BYTES", "DIGEST", "MESSAGE"))


def _pinning(verb: str, pinned: bool, text: str) -> None:
    @checkpoint.command(name=verb, help=text)
    @click.argument("run_id")
    @click.argument("checkpoint_id")
    @click.option("--reason", default="")
    def change(run_id: str, checkpoint_id: str, reason: str) -> None:
        answer = console.with_admin(lambda admin: admin.pin(run_id, checkpoint_id, pinned=pinned, reason=reason))
        click.echo(f"{answer['name']} {'pinned' if answer['pinned'] else 'not pinned'}")


_pinning("pin", True, "Keep a checkpoint from retention.")
_pinning("unpin", False, "Let retention have a checkpoint again.")


@checkpoint.command()
@click.argument("run_id")
@click.argument("checkpoint_id")
def verify(run_id: str, checkpoint_id: str) -> None:
    """Read every byte and compare digests; damage is quarantined and exit code 1."""
    answer = console.with_admin(lambda admin: admin.verify(run_id, checkpoint_id))
    click.echo(
        f"{answer['checkpoint']['name']} is whole: {answer['size_bytes']} bytes, {answer['checkpoint']['digest']}"
    )
