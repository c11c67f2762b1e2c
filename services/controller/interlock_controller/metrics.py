"""What the controller counts. Names and labels are part of the contract; a metric moves only after the fact was written."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

SWAPS = Counter("interlock_swaps_total", "Swaps that ended, by how", ["model", "state"])
SWAP_SECONDS = Histogram(
    "interlock_swap_seconds",
    "From creation to end",
    ["model", "state"],
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
SWITCH_SECONDS = Histogram(
    "interlock_swap_switch_seconds",
    "From committing the route to the last replica's acknowledgement",
    ["model"],
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 5, 30),
)
SWAP_FAILED_REQUESTS = Counter("interlock_swap_failed_requests_total", "Requests that a swap failed", ["model"])
ACTIVE_SWAPS = Gauge("interlock_active_swaps", "Swaps that have not ended", ["model"])
ROUTE_EPOCH = Gauge("interlock_route_epoch", "Current route epoch", ["model"])
REPLICAS_UP = Gauge("interlock_replicas_up", "Replicas that answer")
VERSIONS = Counter("interlock_versions_registered_total", "Versions registered", ["model"])
QUARANTINES = Counter("interlock_versions_quarantined_total", "Versions forbidden", ["model"])
ROLLBACKS = Counter("interlock_rollbacks_total", "Rollbacks of runs on record", ["rule", "decided_by"])
PROMOTIONS = Counter("interlock_promotions_total", "Promotions, by state reached", ["state"])
COMMANDS = Counter("interlock_replica_commands_total", "Commands to replicas", ["command", "outcome"])
INVARIANTS = Counter(
    "interlock_invariant_violations_total", "Things that must never be seen, by number and name", ["invariant"]
)
