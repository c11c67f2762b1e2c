"""All rooms as real processes under `interlock up`, on free ports and a state folder of their own, for system tests."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from interlock.client.load import Load

ROOT = Path(__file__).resolve().parents[1]
ROOM_PORTS = (
    "INFERENCE_PORT",
    "INFERENCE_METRICS_PORT",
    "TRAINER_PORT",
    "TRAINER_METRICS_PORT",
    "CONTROLLER_PORT",
    "CONTROLLER_METRICS_PORT",
    "GATEWAY_PORT",
)
PATHS = [ROOT / "src", *(ROOT / "services" / room for room in ("inference", "trainer", "controller")), ROOT / "gateway"]
START_SECONDS = 60.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """Waits until `condition` is true and returns its value; fails saying what was awaited."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds} s")


@dataclass
class Rooms:
    """A running Interlock."""

    home: Path
    environment: dict[str, str]
    process: subprocess.Popen[str]
    output: list[str] = field(default_factory=list)

    def port(self, name: str) -> int:
        """The port of e.g. `GATEWAY`."""
        return int(self.environment[f"INTERLOCK_{name}_PORT"])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port('GATEWAY')}"

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs `interlock ...` against these rooms."""
        done = subprocess.run(
            [sys.executable, "-m", "interlock.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, f"interlock {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done

    def room(self, name: str) -> psutil.Process:
        """The process of a room: inference, trainer, controller, gateway."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if f"interlock_{name}" in child.cmdline():
                    return child
            except psutil.Error:
                continue
        raise LookupError(name)

    def kill(self, name: str) -> int:
        """SIGKILL to a room; returns the pid that is gone."""
        process = self.room(name)
        process.kill()
        process.wait(10)
        return int(process.pid)

    def kill_all_and_start_again(self) -> None:
        """SIGKILL to the supervisor, all rooms and all runs at once; then `interlock up` on the same home, ready."""
        for pid in self.pids():
            with suppress(ProcessLookupError):  # it went with its supervisor
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        log = self.home / "again.log"
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "interlock.cli", "up"], env=self.environment, stdout=out, stderr=out, text=True
            )
        until(lambda: "\nready " in log.read_text(), "ready again", START_SECONDS)

    def until_back(self, name: str, gone: int) -> None:
        """Waits until a killed room has a new process that answers `interlock status` as up."""

        def back() -> bool:
            try:
                return self.room(name).pid != gone and f"{name} " in "".join(
                    line for line in self.status() if " up" in line
                )
            except (LookupError, psutil.Error):
                return False

        until(back, f"{name} back after a kill")

    def status(self) -> list[str]:
        return self.cli("status", check=False).stdout.splitlines()

    def log(self, room: str) -> str:
        path = self.home / "logs" / f"{room}.jsonl"
        return path.read_text() if path.exists() else ""

    def pids(self) -> list[int]:
        parent = psutil.Process(self.process.pid)
        return [parent.pid, *(child.pid for child in parent.children(recursive=True))]


def environment(home: Path, **settings: str) -> dict[str, str]:
    """The environment of rooms on free ports, isolated from this process's own settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("INTERLOCK_")}
    ports = {f"INTERLOCK_{name}": str(port) for name, port in zip(ROOM_PORTS, free_ports(len(ROOM_PORTS)), strict=True)}
    paths = os.pathsep.join([*map(str, PATHS), clean.get("PYTHONPATH", "")])
    return clean | ports | {
        "INTERLOCK_HOME": str(home),
        "INTERLOCK_PROBE_INTERVAL_SECONDS": "0",
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        **{f"INTERLOCK_{name}": value for name, value in settings.items()},
    }  # fmt: skip


@contextmanager
def running(home: Path, *arguments: str, **settings: str) -> Iterator[Rooms]:
    """`interlock up`, ready; stopped in order at the end, and killed with all children if that fails."""
    env = environment(home, **settings)
    log = home / "up.log"
    home.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "interlock.cli", "up", *arguments], env=env, stdout=out, stderr=out, text=True
        )
    rooms = Rooms(home, env, process)
    try:
        until(lambda: process.poll() is not None or "\nready " in log.read_text(), "rooms ready", START_SECONDS)
        assert process.poll() is None, log.read_text()
        yield rooms
        process = rooms.process
        if process.poll() is None:  # a test that ended it by itself knows its exit code
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()
    finally:
        process = rooms.process
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


@contextmanager
def in_background(load: Load) -> Iterator[Load]:
    """Runs a load from another thread, until the block ends."""
    loop, stopping, started = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    loop.call_soon(started.set)
    thread = threading.Thread(target=loop.run_until_complete, args=(load.run(stopping),))
    thread.start()
    started.wait()
    try:
        yield load
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(60)
        loop.close()
