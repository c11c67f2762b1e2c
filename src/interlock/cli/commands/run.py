"""`interlock run`: training runs."""

from __future__ import annotations

import sys
from typing import Any

import click
import orjson

from interlock.api.trainer.v1 import run_service_pb2 as run_pb
from interlock.cli import console
from interlock.client.admin import AdminClient
from interlock.core import names
from interlock.runtime import terminal

ENDED = {"COMPLETED", "FAILED"}


@click.group()
def run() -> None:
    """Training runs: create, list, watch, pause, resume, stop, rollback."""


def parameters_of(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`name=value` pairs; a value is read as JSON where it is JSON."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--set")
        try:
            found[name] = orjson.loads(value)
        except orjson.JSONDecodeError:
            found[name] = value
    return found


@run.command()
@click.argument("recipe")
@click.option("--id", "run_id", default="", help="The run's id; made up when absent.")
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="A recipe parameter.")
@click.option("--guard", "guard_policy", default="robust", show_default=True, help="Guard policy: robust or classic.")
@click.option("--save-every", type=int, default=500, show_default=True, help="Steps between checkpoints.")
@click.option("--steps", type=int, default=0, help="End after this many steps; 0: the recipe's default.")
@click.option("--promote-to", default="", help="Model that known-good checkpoints are promoted to.")
@click.option("--metric", default="reward", show_default=True, help="Metric that must improve for a promotion.")
@click.option("--minimize", is_flag=True, help="Smaller is better.")
@console.as_json
def create(
    recipe: str,
    run_id: str,
    pairs: tuple[str, ...],
    guard_policy: str,
    save_every: int,
    steps: int,
    promote_to: str,
    metric: str,
    minimize: bool,
    json_: bool,
) -> None:
    """Start a run of a built-in recipe (ppo)."""
    direction = run_pb.PromotionPolicy.DIRECTION_MINIMIZE if minimize else run_pb.PromotionPolicy.DIRECTION_MAXIMIZE
    promotion = (
        run_pb.PromotionPolicy(model=names.model_name(promote_to), metric=metric, direction=direction)
        if promote_to
        else None
    )
    fields: dict[str, Any] = {
        "run_id": run_id,
        "guard_policy": guard_policy,
        "save_every_steps": save_every,
        "max_step_count": steps,
        "promotion": promotion,
    }
    created = console.with_admin(lambda admin: admin.create_run(recipe, parameters=parameters_of(pairs), **fields))
    if json_:
        terminal.show_json(created)
    else:
        click.echo(f"{created['name']}\nfollow it with: interlock run watch {console.last(created['name'])}")


@run.command(name="list")
@console.as_json
def listed(json_: bool) -> None:
    """Newest first."""
    runs = console.with_admin(lambda admin: admin.runs())
    if json_:
        terminal.show_json(runs)
        return
    console.runs_table(runs)


@run.command()
@click.argument("run_id")
@click.option("--from-seq", default=-1, show_default=True, help="First record; -1: only new ones, 0: from the start.")
@click.option("--metric", "wanted", multiple=True, help="Only these metrics.")
@console.as_json
def watch(run_id: str, from_seq: int, wanted: tuple[str, ...], json_: bool) -> None:
    """Follow a run's step metrics until it ends."""

    async def work(admin: AdminClient) -> None:
        async for record in admin.step_metrics(run_id, from_seq):
            if json_:
                click.echo(orjson.dumps(record).decode())
                continue
            values = {
                name: value
                for name, value in record.items()
                if name not in {"seq", "step", "attempt"} and (not wanted or name in wanted)
            }
            shown = "  ".join(f"{name} {value:.4g}" for name, value in sorted(values.items()))
            click.echo(f"step {record['step']:>7}  attempt {record['attempt']}  {shown}")

    console.with_admin(work)


@run.command()
@click.argument("run_id")
@click.option("--checkpoint", default="", help="Default: the youngest known-good one.")
@click.option("--reason", default="")
@console.as_json
def rollback(run_id: str, checkpoint: str, reason: str, json_: bool) -> None:
    """Roll a run back; versions that descend from what is undone are flagged, and reverted if they serve."""
    answer = console.with_admin(lambda admin: admin.rollback_run(run_id, checkpoint, reason=reason))
    if json_:
        terminal.show_json(answer)
        return
    record = answer["record"]
    click.echo(
        f"{record['run']} goes from step {record['from_step']} to {record['to_step']} ({console.last(record['target_checkpoint'])})"
    )
    for name in answer["swaps"]:
        click.echo(f"{name} moves traffic off an affected version")


def _steering(verb: str, text: str) -> None:
    @run.command(name=verb, help=text)
    @click.argument("run_id")
    @click.option("--reason", default="", help="Why; kept in the history.")
    def steer(run_id: str, reason: str) -> None:
        last = console.with_admin(lambda admin: admin.steer_run(run_id, verb, reason=reason))
        click.echo(f"{last['name']} {last['state']}")
        if last["state"] == "FAILED":
            sys.exit(1)


_steering("pause", "Stop stepping at the next boundary and keep the state.")
_steering("resume", "Go on after a pause.")
_steering("stop", "Save a checkpoint and end the run.")
