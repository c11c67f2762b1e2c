"""`interlock ...`: one group, a command a module, imported when it is called so that `--help` stays quick."""

from __future__ import annotations

import importlib
import sys

import click

import interlock
from interlock.errors import InterlockError

COMMANDS = {
    "up": ("up", "Start all rooms, supervise them, restart one that dies."),
    "serve": ("up", "Run one room in the foreground, or gateway and inference in one process (--inline)."),
    "status": ("status", "Show rooms, models, swaps and runs."),
    "demo": ("demo", "Train, guard, roll back, promote and swap under load; about two minutes."),
    "run": ("run", "Training runs: create, list, watch, pause, resume, stop, rollback."),
    "checkpoint": ("checkpoint", "Checkpoints: list, pin, verify."),
    "swap": ("swap", "Swaps: create, list, watch, approve, reject, abort, receipt."),
    "model": ("model", "Models: list, versions, register, rollback, quarantine, explain."),
    "guard": ("guard", "Guard policies: show."),
    "bench": ("tools", "Measure a version: bare engine, gRPC, HTTP; batches, threads, providers."),
    "ort-tune": ("tools", "Search ONNX Runtime's options for the fastest set."),
    "quantize": ("tools", "Make an INT8 version, held to an accuracy limit on real samples."),
    "keys": ("keys", "API keys: create, list, revoke."),
    "config": ("config", "Every setting with its value, source and meaning."),
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a story, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"interlock.cli.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names and one line each, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(interlock.__version__, prog_name="interlock")
def cli() -> None:
    """Keeps models serving while they keep training.

    Start with `interlock demo`, or `interlock up` and then `interlock status`. Settings: interlock.toml, INTERLOCK_* on top.
    """


def main() -> None:
    """The console script: our errors are one line and exit code 1; mistakes in settings are exit code 2."""
    try:
        cli()
    except InterlockError as error:
        click.echo(f"error: {error.message} [{error.reason}]", err=True)
        sys.exit(1)
    except ValueError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
