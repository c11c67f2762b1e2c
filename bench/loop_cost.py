"""What attaching costs a small training loop, per step: bare, supervised in its own process, by a trainer, and without the optimizer's hooks.

    python bench/loop_cost.py                  # prints the table; --json for all of it

The loops (a 64-64-10 network on batches of 64, Adam, one thread, 8 metrics: 3 tensors and 5 floats) take turns in blocks of steps inside one
process. Per block: "median", the middle step, is what the loop's own thread does; "mean" holds what the threads beside it take from it, too;
"all threads" is the CPU time of the whole process, with what is carried after the block. "added" is the middle one of the differences from
the bare loop's block of the same round, so that a busy machine falls out. No checkpoint falls into a block.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from interlock.runtime import logging as logs
from interlock.training import Run, attach

BARE = "bare"
NEVER = 10**9
SETTLE_SECONDS = 0.15
WARM_UP_ROUNDS = 3
FIGURES = ("median", "mean", "all_threads")

Figures = tuple[float, ...]
"""One block's `FIGURES`, in microseconds per step."""


class Loop:
    """One loop; `block` takes a number of steps. Without a run it trains the same and computes the same metrics."""

    def __init__(self, run_name: str = "", *, hooks: bool = True, **options: object) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.images, self.labels = torch.rand(64, 64), torch.randint(0, 10, (64,))
        self.run: Run | None = None
        if run_name:
            self.run = attach(
                run_name,
                model=self.model,
                optimizer=self.optimizer,
                save_every=NEVER,
                **options,  # type: ignore[arg-type]  # home and trainer
            )
            if not hooks:
                self.run.parts.hooks.close()
        self.steps: Iterator[object] = self.run.steps() if self.run else iter(int, 1)

    def block(self, num_steps: int) -> list[int]:
        """Nanoseconds of each step, from one batch to the next."""
        taken = []
        for _ in range(num_steps):
            begin = time.perf_counter_ns()
            next(self.steps)
            self._step()
            taken.append(time.perf_counter_ns() - begin)
        return taken

    def _step(self) -> None:
        logits = self.model(self.images)
        loss = torch.nn.functional.cross_entropy(logits, self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == self.labels).float().mean()
            largest = logits.max()
        metrics = {"loss": loss, "accuracy": accuracy, "largest": largest}
        numbers = {"kl": 0.01, "entropy": 1.5, "reward": 20.0, "value_loss": 0.5, "clip_fraction": 0.1}
        if self.run is not None:
            self.run.log(**metrics, **numbers)


def start_trainer(stack: ExitStack, home: Path) -> str:
    """A trainer of its own for this measurement; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "INTERLOCK_HOME": str(home),
        "INTERLOCK_TRAINER_PORT": str(port),
        "INTERLOCK_TRAINER_METRICS_PORT": "0",
        "INTERLOCK_PROBE_INTERVAL_SECONDS": "0",
    }
    log = stack.enter_context((home / "trainer.log").open("wb"))
    process = subprocess.Popen([sys.executable, "-m", "interlock_trainer"], env=environment, stdout=log, stderr=log)
    stack.callback(process.wait, 30)
    stack.callback(process.terminate)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return f"127.0.0.1:{port}"
        time.sleep(0.1)
    raise SystemExit(f"no trainer answers, see {home / 'trainer.log'}")


def measure(loops: dict[str, Loop], num_rounds: int, num_steps: int) -> dict[str, dict[str, float]]:
    """Microseconds per step of each loop; in each round every loop takes one block."""
    rounds: dict[str, list[Figures]] = {name: [] for name in loops}
    for index in range(num_rounds + WARM_UP_ROUNDS):
        for name, loop in loops.items():
            begin = time.process_time_ns()
            taken = loop.block(num_steps)
            time.sleep(SETTLE_SECONDS)
            processor = (time.process_time_ns() - begin) / num_steps
            if index >= WARM_UP_ROUNDS:
                figures = (statistics.median(taken), statistics.fmean(taken), processor)
                rounds[name].append(tuple(figure / 1e3 for figure in figures))
    return {name: _summary(rounds[name], rounds[BARE]) for name in loops}


def _summary(rounds: list[Figures], bare: list[Figures]) -> dict[str, float]:
    found: dict[str, float] = {}
    for index, name in enumerate(FIGURES):
        found[name] = statistics.median(figures[index] for figures in rounds)
        differences = [mine[index] - other[index] for mine, other in zip(rounds, bare, strict=True)]
        found[f"{name}_added"] = statistics.median(differences)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown."""
    lines = ["| loop | median | added | ratio | mean | added | all threads | added |", "|---|" + "---:|" * 7]
    for name, row in found.items():
        ratio = 1 + row["median_added"] / found[BARE]["median"]
        lines.append(
            f"| {name} | {row['median']:.0f} | {row['median_added']:+.0f} | {ratio:.2f} | {row['mean']:.0f} | {row['mean_added']:+.0f} | "
            f"{row['all_threads']:.0f} | {row['all_threads_added']:+.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=200, help="steps of a block")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logs.configure("bench", "warning")
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        address = start_trainer(stack, home)
        loops = {
            BARE: Loop(),
            "in its own process": Loop("near", home=home, trainer=None),
            "the same, no optimizer hooks": Loop("hookless", hooks=False, home=home, trainer=None),
            "by a trainer": Loop("far", home=home, trainer=address),
        }
        found = measure(loops, options.rounds, options.steps)
        for loop in loops.values():
            if loop.run is not None:
                if loop.run.num_dropped:
                    raise SystemExit(f"{loop.run.name} dropped {loop.run.num_dropped} steps: the figures mean nothing")
                loop.run.close()
    print(json.dumps(found, indent=2) if options.json else table(found))


if __name__ == "__main__":
    main()
