"""A run's whole policy as one piece of data: how it is guarded, how it recovers, what it saves and keeps. No decisions here.

The plain form (TOML, JSON) is the dataclasses' own, key by key; `guard` may also be the name of a built-in policy:

    guard = "robust"
    save_every = 500
    [recovery]
    confirm_after = 50
    [retention]
    keep_last = 5
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from interlock.core.fields import parse, plain, refuse
from interlock.core.guard import BUILT_IN, ROBUST, GuardPolicy
from interlock.core.recovery import RecoveryPolicy
from interlock.core.retention import RetentionPolicy


@dataclass(frozen=True, slots=True)
class RunPolicy:
    """What a run promises; `save_every` counts steps."""

    guard: GuardPolicy = ROBUST
    recovery: RecoveryPolicy = field(default_factory=RecoveryPolicy)
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    save_every: int = 500  # ops plan: policy and value networks every 500 steps

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise refuse("save_every", f"must be at least 1, got {self.save_every}")


def guard_policy(data: object, where: str = "guard") -> GuardPolicy:
    """A guard policy from a built-in's name or a table.

    Raises:
        InvalidArgument: `INVALID_FIELD`, naming the field and what it may be.
    """
    if isinstance(data, str):
        if data not in BUILT_IN:
            raise refuse(where, f"{data!r} is not a built-in policy; they are {', '.join(sorted(BUILT_IN))}", data)
        return BUILT_IN[data]
    return parse(GuardPolicy, data, where)


def run_policy(data: Mapping[str, Any] | str) -> RunPolicy:
    """A run's policy from plain data, or from the name of a built-in guard policy with defaults for the rest.

    Raises:
        InvalidArgument: `INVALID_FIELD`, naming the dotted path of the field at fault.
    """
    table = {"guard": data} if isinstance(data, str) else dict(data)
    if "guard" in table:
        table["guard"] = plain(guard_policy(table["guard"]))
    return parse(RunPolicy, table)
