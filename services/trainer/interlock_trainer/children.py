"""Keeps the processes of owned runs alive: starts them, adopts those of an earlier trainer, restarts what crashed within a budget.

A child is its own session: neither a terminal's Ctrl-C nor the trainer's sudden end reaches it. It trains on and attaches again; only an
orderly stop of the trainer stops it too, after it has saved.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from pathlib import Path

import psutil
import structlog

from interlock.core.ports import Clock
from interlock_trainer import telemetry
from interlock_trainer.session import Session

_log = structlog.get_logger(__name__)
BACK_OFF_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
MAX_RESTARTS = 5
RESTART_WINDOW_SECONDS = 600.0
POLL_SECONDS = 0.25
STOP_SECONDS = 15.0


class Children:
    """The processes. `address` is where they find this trainer."""

    def __init__(self, home: Path, address: str, clock: Clock, threads: int) -> None:
        self._home = home
        self.address = address
        self._clock = clock
        self._threads = threads
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = False

    async def keep(self, session: Session) -> None:
        """Sees to it that a run has a process until it has ended; returns then, or when the trainer stops."""
        crashes: deque[float] = deque()
        await self._adopted(session)
        while not self._over(session):
            code = await self._run_once(session)
            if self._over(session):
                return
            now = self._clock.monotonic()
            crashes.append(now)
            while crashes and now - crashes[0] > RESTART_WINDOW_SECONDS:
                crashes.popleft()
            if len(crashes) > MAX_RESTARTS:
                session.set_state(
                    "failed",
                    f"RESTART_BUDGET: {len(crashes)} crashes in {RESTART_WINDOW_SECONDS:g} s, exit code {code}",
                )
                return
            telemetry.RESTARTS.labels(session.run).inc()
            delay = BACK_OFF_SECONDS[min(len(crashes), len(BACK_OFF_SECONDS)) - 1]
            _log.warning("run_process_ended", run=session.run, exit_code=code, restart_in_seconds=delay)
            await self._clock.sleep(delay)

    def _over(self, session: Session) -> bool:
        return self._stopping or session.terminal

    async def _adopted(self, session: Session) -> None:
        """Waits while the process of an earlier trainer lives."""
        pid = session.row.pid
        if pid and _is_child(pid, session.run):
            _log.info("run_process_adopted", run=session.run, pid=pid)
            while not self._over(session) and _is_child(pid, session.run):
                await self._clock.sleep(POLL_SECONDS)

    async def _run_once(self, session: Session) -> int:
        logs = self._home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        threads = str(self._threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with (logs / f"run-{session.run}.jsonl").open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "interlock_trainer.child",
                "--run",
                session.run,
                "--home",
                str(self._home),
                "--trainer",
                self.address,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,
            )
        self._processes[session.run] = process
        _log.info("run_process_started", run=session.run, pid=process.pid)
        return await process.wait()

    async def stop(self) -> None:
        """Asks every child to save and end, and waits for it; kills what does not."""
        self._stopping = True
        alive = [process for process in self._processes.values() if process.returncode is None]
        for process in alive:
            process.send_signal(signal.SIGTERM)
        for process in alive:
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                _log.error("run_process_killed", pid=process.pid)
                process.kill()


def _is_child(pid: int, run: str) -> bool:
    try:
        process = psutil.Process(pid)
        command = process.cmdline()
        return "interlock_trainer.child" in command and run in command and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
