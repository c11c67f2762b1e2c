"""`interlock demo`: the whole story on one machine; exit code 0 only if every promise held."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
from pathlib import Path

import click
from rich.console import Console

from interlock.cli import console as shared
from interlock.cli.stage import Stage, summary
from interlock.cli.story import BrokenPromise, Story
from interlock.cli.supervisor import Supervisor, rooms_of
from interlock.client.admin import AdminClient
from interlock.runtime import settings as settings_module
from interlock.runtime.lifecycle import stopping_on_signals

PORTS = (
    "INFERENCE_PORT",
    "INFERENCE_METRICS_PORT",
    "TRAINER_PORT",
    "TRAINER_METRICS_PORT",
    "CONTROLLER_PORT",
    "CONTROLLER_METRICS_PORT",
    "GATEWAY_PORT",
)
MARK = "demo.state"
"""A file that says that the folder is the demo's own and may be emptied."""


def _fresh_home(home: Path) -> Path:
    """The demo's own state folder, empty."""
    folder = (home / "demo").resolve()
    if folder.exists() and not (folder / MARK).exists():
        raise click.ClickException(f"{folder} exists and is not the demo's; move it away, or set INTERLOCK_HOME")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    return folder


def _free_ports() -> None:
    """Gives every room a free port, so that the demo runs beside whatever uses the usual ones."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    for name, listener in zip(PORTS, sockets, strict=True):
        os.environ[f"INTERLOCK_{name}"] = str(listener.getsockname()[1])
        listener.close()


def _missing() -> str:
    """What the recipe needs and is not installed; empty when all is there."""
    from importlib.util import find_spec

    return ", ".join(name for name in ("torch", "gymnasium", "onnx", "onnxscript") if find_spec(name) is None)


@click.command()
def demo() -> None:
    """Train, guard, roll back, promote and swap under load: real training, real requests, one injected fault."""
    if missing := _missing():
        raise click.ClickException(f"the demo trains with {missing}, not installed: pip install 'interlock[recipes]'")
    os.environ["INTERLOCK_HOME"] = str(_fresh_home(settings_module.load().home))
    _free_ports()
    sys.exit(asyncio.run(_play(settings_module.load())))


async def _play(settings: settings_module.Settings) -> int:
    console = Console()
    with stopping_on_signals() as stopping:
        with Stage(console) as stage:
            supervisor = Supervisor(settings, rooms_of(settings), lambda room, what: stage.say(f"{room:<11} {what}"))
            supervisor.stopping = stopping
            async with shared.connect(settings) as admin:
                story, broken = await _perform(supervisor, settings, admin, stage)
        if story is not None:
            summary(console, story, broken, str(settings.home))
    for problem in broken if story is None else ():
        console.print(f"error: {problem}", style="red")
    if broken:
        console.print(f"logs: {settings.home / 'logs'}", soft_wrap=True)
    return 1 if broken else 0


async def _perform(
    supervisor: Supervisor, settings: settings_module.Settings, admin: AdminClient, stage: Stage
) -> tuple[Story | None, list[str]]:
    """Starts the rooms, tells the story, stops the rooms. Returns the story (None if it never began) and what broke."""
    ready = asyncio.Event()
    story: Story | None = None
    broken: list[str] = []
    async with asyncio.TaskGroup() as group:
        group.create_task(supervisor.run(ready.set))
        begun = group.create_task(ready.wait())
        stopped = group.create_task(supervisor.stopping.wait())
        await asyncio.wait({begun, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if begun.done():
            story = Story(settings, admin, stage.say)
            stage.scene = story.scene
            broken = await _tell(story, group, stopped)
        else:
            begun.cancel()
        supervisor.stopping.set()
    if supervisor.failed:
        broken.append(supervisor.failed)
    return story, broken


async def _tell(story: Story, group: asyncio.TaskGroup, stopped: asyncio.Task[bool]) -> list[str]:
    async def told() -> list[str]:
        try:
            await story.tell()
        except BrokenPromise as error:
            return [str(error)]
        return await story.broken_promises()

    telling = group.create_task(told())
    await asyncio.wait({telling, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if telling.done():
        return telling.result()
    telling.cancel()
    return ["stopped before the end"]
