"""A version's story in sentences, oldest first: where it came from, what moved to or from it, what happened to its run. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from interlock.core.route import Route
from interlock.core.swap import Swap
from interlock.runtime.telemetry import trace_id_of
from interlock.stores.controller import RollbackRow, VersionRow


def tell(row: VersionRow, route: Route, swaps: Iterable[Swap], rollbacks: Iterable[RollbackRow]) -> list[str]:
    """One sentence per fact, by time, and what holds now at the end."""
    told = [(row.created_at, _registered(row))]
    told += [(swap.ended_at or swap.changed_at, _swapped(swap)) for swap in swaps]
    told += [(rollback.created_at, _rolled_back(rollback)) for rollback in rollbacks]
    lines = [f"{_when(at)} {sentence}" for at, sentence in sorted(told, key=lambda pair: pair[0])]
    return [*lines, _now(row, route)]


def _when(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _registered(row: VersionRow) -> str:
    origin = row.origin
    source = (
        f"from {origin.checkpoint} at step {origin.step}, attempt {origin.attempt}" if origin.checkpoint else "by hand"
    )
    by = f" by {row.actor}" if row.actor else ""
    metrics = ", ".join(f"{name} {value:g}" for name, value in sorted(row.metrics.items()))
    return f"version {row.version} was registered {source}{by}, {row.digest[:19]}" + (
        f" ({metrics})" if metrics else ""
    )


def _swapped(swap: Swap) -> str:
    stable = f" from version {swap.stable_version}" if swap.stable_version else ""
    why = f" because {swap.why}" if swap.why else ""
    trace = f", trace {trace_id_of(swap.trace)}" if trace_id_of(swap.trace) else ""
    return f"swap {swap.id}{stable} to version {swap.spec.candidate} is {swap.state} at epoch {swap.epoch or swap.base_epoch}{why}: {swap.message}{trace}"


def _rolled_back(row: RollbackRow) -> str:
    target = f"to step {row.to_step}" if row.target else "was paused"
    return f"{row.run} tripped {row.rule} ({row.value:g}, limit {row.limit:g}) at step {row.from_step} and went {target}, decided by {row.decided_by}"


def _now(row: VersionRow, route: Route) -> str:
    if row.quarantined:
        return f"version {row.version} must not serve: {row.quarantined}"
    if row.gate_failure:
        return f"version {row.version} must not serve: {row.gate_failure}"
    share = next((w.weight for w in route.weights if w.version == row.version), 0)
    if not share:
        return f"version {row.version} does not serve; epoch {route.epoch} routes {', '.join(route.versions()) or 'nothing'}"
    total = sum(w.weight for w in route.weights)
    return f"version {row.version} serves {share / total:.1%} of the traffic at epoch {route.epoch}"
