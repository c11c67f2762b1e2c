"""The trainer's Prometheus metrics: the operations plan's own names, and `interlock_*` for what is ours."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter, Gauge

RL_UPDATES = Counter("rl_update_total", "Optimizer updates", ["run"])
RL_LOSS = Gauge("rl_loss", "Losses of the last update", ["run", "kind"])
RL_GAUGES = {
    "reward": Gauge("rl_reward", "Mean episode reward", ["run"]),
    "entropy": Gauge("rl_entropy", "Policy entropy", ["run"]),
    "clip_fraction": Gauge("rl_clip_fraction", "Share of clipped samples", ["run"]),
    "kl": Gauge("rl_kl_divergence", "Approximate KL divergence of the update", ["run"]),
}
LOSS_KINDS = {"policy_loss": "policy", "value_loss": "value", "loss": "total"}
STEP = Gauge("interlock_run_step", "Step of the run", ["run"])
RUNS = Gauge("interlock_runs", "Runs by state", ["state"])
VERDICTS = Counter("interlock_guard_verdicts_total", "Guard verdicts", ["run", "outcome"])
TRIPS = Counter("interlock_guard_trips_total", "Guard trips by rule", ["run", "rule"])
ROLLBACKS = Counter("interlock_run_rollbacks_total", "Rollbacks of runs", ["run", "outcome"])
CHECKPOINTS = Counter("interlock_checkpoints_total", "Checkpoints by what became of them", ["run", "state"])
RESTARTS = Counter("interlock_run_restarts_total", "Restarts of a run's process", ["run"])


def count_steps(run: str, num_steps: int, step: int, latest: Mapping[str, float]) -> None:
    """A batch of records was stored."""
    RL_UPDATES.labels(run).inc(num_steps)
    STEP.labels(run).set(step)
    for name, kind in LOSS_KINDS.items():
        if name in latest:
            RL_LOSS.labels(run, kind).set(latest[name])
    for name, gauge in RL_GAUGES.items():
        if name in latest:
            gauge.labels(run).set(latest[name])
