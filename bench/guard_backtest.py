"""Scores the built-in guard policies on recorded PPO runs, healthy and faulted: false trips and detection lag.

    python bench/guard_backtest.py             # prints the table
    python bench/guard_backtest.py --write     # and puts it into docs/guard-backtest.md
    python bench/guard_backtest.py --record    # records the corpus anew (minutes)

The corpus is tests/data/ppo_runs.json.gz: columns of metrics per run, values as text of five digits.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interlock.core.backtest import Score, score
from interlock.core.guard import BUILT_IN
from interlock.core.steps import StepRecord

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests/data/ppo_runs.json.gz"
PAGE = ROOT / "docs/guard-backtest.md"
BEGIN, END = "<!-- table: bench/guard_backtest.py --write -->", "<!-- end -->"
METRICS = ("kl", "loss", "value_loss", "reward", "entropy", "gradient_norm")
SAVE_EVERY, COOL_DOWN = 100, 10
HEALTHY_STEPS, FAULT_STEP, BEFORE_STEPS, AFTER_STEPS = 1600, 600, 100, 200
HEALTHY_SEEDS, FAULT_SEEDS = (11, 12, 13, 14, 15, 16), (21, 22)
FAULTS: Mapping[str, dict[str, Any]] = {
    "learning rate x1000, 5 updates": {"fault": "learning_rate", "fault_value": 1000.0, "fault_steps": 5},
    "learning rate x20 from then on": {"fault": "learning_rate", "fault_value": 20.0, "fault_steps": 100_000},
    "weights + noise of 0.5 sigma": {"fault": "weights", "fault_value": 0.5},
    "reward sign (x -5)": {"fault": "reward_sign", "fault_value": -5.0},
    "one NaN gradient": {"fault": "nan"},
}


def record() -> None:
    """Trains every run with a guard that only observes, and writes the corpus."""
    runs = [_train(f"healthy, seed {seed}", seed, HEALTHY_STEPS, {}) for seed in HEALTHY_SEEDS]
    runs += [
        _train(name, seed, FAULT_STEP + AFTER_STEPS, {**fault, "fault_step": FAULT_STEP})
        for name, fault in FAULTS.items()
        for seed in FAULT_SEEDS
    ]
    CORPUS.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(CORPUS, "wb", mtime=0) as file:
        file.write(json.dumps(runs, separators=(",", ":")).encode())
    print(f"wrote {CORPUS}, {CORPUS.stat().st_size:,} bytes")


def _train(name: str, seed: int, steps: int, fault: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from interlock.core.policy import run_policy
    from interlock.training import attach
    from interlock_trainer.recipes import PpoParameters
    from interlock_trainer.recipes.ppo import train

    torch.set_num_threads(1)
    policy = run_policy({"guard": {"name": "watch", "mode": "observe"}, "save_every": 100_000})
    with tempfile.TemporaryDirectory() as home:
        join = functools.partial(attach, "r", home=home, trainer=None, policy=policy, synchronous=True)
        run = train(PpoParameters(seed=seed, max_steps=steps, **fault), join)
        records = run._parts.courier._log.read("r", 1, steps)
        run.close()
    first = (
        FAULT_STEP - BEFORE_STEPS if fault else 1
    )  # the steps long before a fault are like those of the healthy runs
    records = [r for r in records if r.step >= first]
    columns: dict[str, list[str | None]] = {
        metric: [f"{r.metrics[metric]:.5g}" if metric in r.metrics else None for r in records]
        for metric in (*METRICS, "nonfinite_gradients")
        if any(metric in r.metrics for r in records)
    }
    print(f"recorded {name}, seed {seed}: {len(records)} steps, last reward {columns['reward'][-1]}")
    return {
        "name": name,
        "seed": seed,
        "first_step": first,
        "fault_step": FAULT_STEP if fault else None,
        "columns": columns,
    }


def load() -> list[tuple[str, int | None, list[StepRecord]]]:
    """(name, fault step, records) of every recorded run."""
    with gzip.open(CORPUS) as file:
        runs = json.load(file)
    return [(run["name"], run["fault_step"], _records(run["first_step"], run["columns"])) for run in runs]


def _records(first: int, columns: Mapping[str, Sequence[str | None]]) -> list[StepRecord]:
    num = len(next(iter(columns.values())))
    return [
        StepRecord(
            1,
            first + i,
            first + i,
            0.0,
            {name: float(text) for name, column in columns.items() if (text := column[i]) is not None},
        )
        for i in range(num)
    ]


def scores() -> dict[str, list[tuple[str, Score]]]:
    """Policy name -> (run name, score) in the corpus's order."""
    corpus = load()
    return {
        name: [
            (run, score(policy, records, fault_step=fault, save_every=SAVE_EVERY, cool_down=COOL_DOWN))
            for run, fault, records in corpus
        ]
        for name, policy in sorted(BUILT_IN.items())
    }


def table() -> str:
    """The table as Markdown."""
    found = scores()
    rows = [
        "| recorded run | steps | " + " | ".join(f"`{name}`" for name in found) + " |",
        "|---|---|" + "---|" * len(found),
    ]
    names = list(dict.fromkeys(run for run, _ in next(iter(found.values()))))
    for run in names:
        cells = [[item for name, item in results if name == run] for results in found.values()]
        rows.append(
            f"| {run} | {sum(item.num_steps for item in cells[0])} | "
            + " | ".join(_cell(items) for items in cells)
            + " |"
        )
    healthy = {name: [item for _, item in results if item.fault_step is None] for name, results in found.items()}
    totals = [sum(item.num_false for item in items) for items in healthy.values()]
    missed = [
        sum(item.fault_step is not None and item.lag is None for _, item in results) for results in found.values()
    ]
    steps = sum(item.num_steps for item in next(iter(healthy.values())))
    rows.append(
        f"| **false trips in {steps} healthy steps** | | " + " | ".join(f"**{total}**" for total in totals) + " |"
    )
    rows.append("| **faults missed** | | " + " | ".join(f"**{count} of {2 * len(FAULTS)}**" for count in missed) + " |")
    return "\n".join(rows)


def _cell(items: Sequence[Score]) -> str:
    false = sum(item.num_false for item in items)
    if items[0].fault_step is None:
        return f"{false} false"
    return "lag " + ", ".join("missed" if item.lag is None else str(item.lag) for item in items)


def main() -> None:
    """Prints, and writes what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.record:
        record()
    print(table())
    if options.write:
        text = PAGE.read_text()
        before, after = text[: text.index(BEGIN)], text[text.index(END) :]
        PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{after}")


if __name__ == "__main__":
    main()
