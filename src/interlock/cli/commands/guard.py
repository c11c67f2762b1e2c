"""`interlock guard`: the policies that judge every training step."""

from __future__ import annotations

import click

from interlock.cli import console
from interlock.core.fields import plain
from interlock.core.guard import BUILT_IN
from interlock.runtime import terminal


@click.group()
def guard() -> None:
    """Guard policies: show."""


@guard.command()
@click.argument("name", required=False)
@console.as_json
def show(name: str | None, json_: bool) -> None:
    """Show the built-in policies, or all rules of one. A policy of your own is the same data with other numbers."""
    if name is None:
        rows = [
            (policy.name, policy.mode.value, ", ".join(rule.name for rule in policy.rules))
            for policy in BUILT_IN.values()
        ]
        if json_:
            terminal.show_json([plain(policy) for policy in BUILT_IN.values()])
        else:
            terminal.table(rows, ("POLICY", "MODE", "RULES"))
        return
    if name not in BUILT_IN:
        raise click.ClickException(f"{name} is not a built-in policy; they are {', '.join(sorted(BUILT_IN))}")
    policy = BUILT_IN[name]
    if json_:
        terminal.show_json(plain(policy))
        return
    rows = [(r.name, r.metric, r.statistic.value, r.limit, f"{r.hits} of {r.out_of}") for r in policy.rules]  # type: ignore[misc]
    terminal.table(rows, ("RULE", "METRIC", "STATISTIC", "LIMIT", "HITS"))
