"""`python -m interlock_inference.tools TOOL ...`, which is what `interlock TOOL ...` runs."""

from __future__ import annotations

import importlib
import sys

import click

from interlock.errors import InterlockError

TOOLS = {"bench": "bench", "ort-tune": "tune", "quantize": "quantize"}


def main() -> None:
    """Our errors are one line and exit code 1; usage is exit code 2."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TOOLS:
        click.echo(f"error: {name!r} is not one of {', '.join(TOOLS)}", err=True)
        sys.exit(2)
    module = importlib.import_module(f"interlock_inference.tools.{TOOLS[name]}")
    command: click.Command = getattr(module, TOOLS[name])
    try:
        command(sys.argv[2:], prog_name=f"interlock {name}")
    except InterlockError as error:
        click.echo(f"error: {error.message} [{error.reason}]", err=True)
        sys.exit(1)
    except (ValueError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
