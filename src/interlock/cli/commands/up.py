"""`interlock up` and `interlock serve ROOM`."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import click

from interlock.runtime import settings as settings_module

ROOMS = {
    "inference": "interlock_inference",
    "trainer": "interlock_trainer",
    "controller": "interlock_controller",
    "gateway": "interlock_gateway",
}


def _environment(host: str | None, home: str | None, insecure: bool) -> None:
    """Options become settings of this process and of the rooms it starts."""
    for name, value in (("HOST", host), ("HOME", home), ("INSECURE", "true" if insecure else None)):
        if value is not None:
            os.environ[f"INTERLOCK_{name}"] = value


@click.command()
@click.option("--host", help="Address every room listens on. Beyond loopback it needs API keys, or --insecure.")
@click.option("--home", type=click.Path(file_okay=False), help="State folder.")
@click.option("--insecure", is_flag=True, help="Listen beyond loopback without keys.")
def up(host: str | None, home: str | None, insecure: bool) -> None:
    """Start all rooms, supervise them, restart one that dies. Ctrl-C stops them in order."""
    from interlock.cli.supervisor import Supervisor, rooms_of
    from interlock.runtime.lifecycle import stopping_on_signals

    _environment(host, home, insecure)
    settings = settings_module.load()
    settings_module.refuse_exposed(settings)

    async def run() -> str:
        with stopping_on_signals() as stopping:
            supervisor = Supervisor(settings, rooms_of(settings), lambda room, what: click.echo(f"{room:<11} {what}"))
            supervisor.stopping = stopping
            await supervisor.run(lambda: _greet(settings))
            return supervisor.failed

    failed = asyncio.run(run())
    if failed:
        raise click.ClickException(failed)


def _greet(settings: settings_module.Settings) -> None:
    base = f"http://{settings.host}:{settings.gateway.port}"
    click.echo(f"\nready        {base}/health   documentation {base}/docs   logs {settings.home / 'logs'}")
    click.echo("             interlock status | interlock run create ppo --promote-to policy | Ctrl-C to stop\n")


@click.command()
@click.argument("room", type=click.Choice(sorted(ROOMS)), required=False)
@click.option("--inline", is_flag=True, help="Gateway and inference in one process: no hop, no controller needed.")
@click.option(
    "--model", "models", multiple=True, metavar="NAME=PATH", help="Serve this ONNX file or folder. Repeatable."
)
@click.option("--repository", type=click.Path(file_okay=False), help="Serve what lies in <model>/<version>/ below it.")
@click.option("--grpc/--no-grpc", default=True, help="With --inline: the gRPC listener beside HTTP.")
@click.option("--host", help="Address to listen on. Beyond loopback it needs API keys, or --insecure.")
@click.option("--home", type=click.Path(file_okay=False), help="State folder.")
@click.option("--insecure", is_flag=True, help="Listen beyond loopback without keys.")
def serve(
    room: str | None,
    inline: bool,
    models: tuple[str, ...],
    repository: str | None,
    grpc: bool,
    host: str | None,
    home: str | None,
    insecure: bool,
) -> None:
    """Run one room in the foreground, logging to standard output: what a container runs.

    `interlock serve --inline --model digits=digits.onnx` serves a model over HTTP and gRPC from one process.
    """
    if inline == (room is not None):
        raise click.UsageError("give a ROOM, or --inline for gateway and inference in one process")
    if (models or repository) and room not in (None, "inference"):
        raise click.UsageError(f"--model and --repository belong to inference, not to {room}")
    _environment(host, home, insecure)
    chosen = {
        "GATEWAY_INLINE": "true" if inline else None,
        "INFERENCE_REPOSITORY": repository,
        "INFERENCE_MODELS": json.dumps(dict(map(_named, models))) if models else None,
        "INFERENCE_LISTEN": None if grpc else "false",
    }
    os.environ.update({f"INTERLOCK_{name}": value for name, value in chosen.items() if value is not None})
    module = ROOMS[room or "gateway"]
    os.execv(sys.executable, [sys.executable, "-m", module])  # noqa: S606  the room replaces this process


def _named(option: str) -> tuple[str, str]:
    name, equals, path = option.partition("=")
    if not (name and equals and path):
        raise click.UsageError(f"--model {option}: NAME=PATH is expected, e.g. digits=digits.onnx")
    return name, path
