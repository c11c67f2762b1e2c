"""`interlock bench`, `ort-tune`, `quantize`: they run where the engines are, in a process of the inference room's tools."""

from __future__ import annotations

import os
import sys

import click

MODULE = "interlock_inference.tools"


def _tool(name: str) -> click.Command:
    @click.command(
        name=name,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def run(arguments: tuple[str, ...]) -> None:
        os.execv(sys.executable, [sys.executable, "-m", MODULE, name, *arguments])  # noqa: S606  the tool replaces this process

    return run


bench = _tool("bench")
ort_tune = _tool("ort-tune")
quantize = _tool("quantize")
