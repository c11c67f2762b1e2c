"""The trainer service: composition root. Reads settings, builds the parts, serves until a signal, goes down in order."""

from __future__ import annotations

if __name__ == "__main__":
    import interlock.runtime.lean  # noqa: F401  first of all

import asyncio
import sys
from collections.abc import Awaitable
from contextlib import AsyncExitStack

import structlog

from interlock.runtime import logging as logs
from interlock.runtime import settings as configuration
from interlock.runtime.access import Keys
from interlock.runtime.channels import Caller
from interlock.runtime.clock import SystemClock
from interlock.runtime.lifecycle import GrpcRoom, run, stopping_on_signals
from interlock.runtime.metrics import metrics_server
from interlock.runtime.telemetry import telemetry
from interlock.stores.trainer import TrainerStore
from interlock_trainer.children import Children
from interlock_trainer.decisions import Controller
from interlock_trainer.runs import Runs
from interlock_trainer.servicers import add_all
from interlock_trainer.session import Shared
from interlock_trainer.watching import Hub

_log = structlog.get_logger(__name__)
DRAIN_SECONDS = 5.0
REPORT_SECONDS = 5.0


async def _report_for_ever(runs: Runs, stopping: asyncio.Event) -> None:
    """Tells the controller of what it has missed."""
    while not stopping.is_set():
        for session in runs:
            await session.report_open()
        try:
            async with asyncio.timeout(REPORT_SECONDS):
                await stopping.wait()
        except TimeoutError:
            continue


async def main() -> None:
    """Runs the room until SIGTERM or SIGINT."""
    settings = configuration.load()
    configuration.refuse_exposed(settings)
    logs.configure("trainer", settings.log_level, settings.log_format)
    keys, clock, home = Keys(settings.home), SystemClock(), settings.home.resolve()
    async with AsyncExitStack() as stack:
        stopping = stack.enter_context(stopping_on_signals())
        await stack.enter_async_context(telemetry("trainer", settings.otlp_endpoint))
        store = TrainerStore(home / "trainer.db")
        stack.callback(store.close)
        controller = Controller(
            settings.controller_address, Caller(keys.internal_key()), settings.trainer.decision_timeout_seconds
        )
        stack.push_async_callback(controller.close)
        async with asyncio.TaskGroup() as group:

            def spawn(work: Awaitable[None]) -> None:
                group.create_task(work)  # type: ignore[arg-type]  # always a coroutine

            runs = Runs(Shared(home, store, Hub(), controller, clock, spawn))
            closing = asyncio.Event()  # after `stopping`: the children say goodbye over their open streams first
            room = GrpcRoom(closing, keys)
            children = Children(home, settings.trainer_address, clock, settings.trainer.child_threads)
            add_all(room, runs, children, store, keys, spawn)
            runs.load()
            port = await room.start(settings.host, settings.trainer.port)
            children.address = f"127.0.0.1:{port}"
            stack.enter_context(
                metrics_server(
                    settings.host,
                    settings.trainer.metrics_port,
                    lambda: (not stopping.is_set(), {"service": "trainer"}),
                )
            )
            for session in runs:
                if session.row.owned and not session.terminal:
                    spawn(children.keep(session))
            spawn(_report_for_ever(runs, stopping))
            _log.info("trainer_started", port=port, num_runs=len(list(runs)))
            await stopping.wait()
            await children.stop()
            closing.set()
            await room.run(probe_interval_seconds=settings.probe_interval_seconds, drain_seconds=DRAIN_SECONDS)


if __name__ == "__main__":
    sys.exit(run(main))
