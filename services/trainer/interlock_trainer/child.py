"""A run's own process: `python -m interlock_trainer.child --run R --home H --trainer A`. Trains one recipe; knows no servicer.

SIGTERM saves and ends in order, for a restart. A child whose trainer has been away for two minutes does the same by itself: nobody is
left who could want its steps.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import structlog

from interlock.core.fields import parse
from interlock.runtime import logging as logs
from interlock.runtime.access import Keys
from interlock_trainer.recipes import check
from interlock_trainer.runs import SPEC_FILE, Spec
from interlock_trainer.session import INTERRUPTED

_log = structlog.get_logger(__name__)
AWAY_SECONDS = 120.0
CONNECT_SECONDS = 30.0


class _Interrupted:
    """Whether the process was asked to end."""

    def __init__(self) -> None:
        self.why = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.why = signal.Signals(number).name


def main(arguments: list[str] | None = None) -> int:
    """Trains until the run ends or the process is asked to."""
    parser = argparse.ArgumentParser()
    for name in ("run", "home", "trainer"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args(arguments)
    home = Path(options.home)
    logs.configure(f"run-{options.run}")
    os.environ.setdefault("INTERLOCK_API_KEY", Keys(home).internal_key())
    spec = parse(Spec, json.loads((home / "runs" / options.run / SPEC_FILE).read_text()))
    return _train(spec, home, options.trainer)


def _train(spec: Spec, home: Path, trainer: str) -> int:
    import torch

    from interlock.training import attach
    from interlock.training.remote import Remote
    from interlock_trainer.recipes import ppo

    interrupted = _Interrupted()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    parameters = check(spec.recipe, spec.parameters)
    promotion = spec.promotion
    serve = (
        ppo.serve_spec(
            promotion.model,
            promotion.metric,
            promotion.better,
            promotion.min_improvement,
            promotion.min_interval_seconds,
        )
        if promotion
        else None
    )
    joined = functools.partial(
        attach,
        spec.run,
        policy=spec.policy,
        serve=serve,
        trainer=trainer,
        home=home,
        recipe=spec.recipe,
        connect_seconds=CONNECT_SECONDS,
    )

    def go_on(supervisor: object) -> bool:
        if isinstance(supervisor, Remote) and supervisor.away_seconds() > AWAY_SECONDS:
            interrupted.why = "the trainer is gone"
        return not interrupted.why

    run = ppo.train(parameters, joined, go_on=go_on)
    if interrupted.why:
        run.save("interrupted")
        run.close(error=f"{INTERRUPTED}: {interrupted.why}")
    else:
        run.close()
    _log.info("run_ended", run=spec.run, step=run.step, interrupted=interrupted.why)
    return 0


if __name__ == "__main__":
    sys.exit(main())
