"""`interlock up`: what it leaves behind when it goes, and that it brings back what dies."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import psutil
import pytest

from rooms import Rooms, running, until

pytestmark = [pytest.mark.system]
ROOMS = ("inference", "trainer", "controller", "gateway")


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def create_run(rooms: Rooms) -> psutil.Process:
    """Starts a run and returns its process."""
    rooms.cli("run", "create", "ppo", "--id", "r1", "--set", "pace_ms=20", "--save-every", "50")
    return until(
        lambda: next((p for p in psutil.process_iter(["cmdline"]) if is_loop(p, rooms)), None), "the run's process"
    )


def is_loop(process: psutil.Process, rooms: Rooms) -> bool:
    try:
        return "interlock_trainer.child" in process.cmdline() and process.environ().get("INTERLOCK_HOME") == str(
            rooms.home.resolve()
        )
    except psutil.Error:
        return False


@pytest.mark.parametrize("room", ROOMS)
def test_a_killed_room_is_started_again(tmp_path: Path, room: str) -> None:
    with running(tmp_path / "home") as rooms:
        gone = rooms.kill(room)
        rooms.until_back(room, gone)
        assert f"{room} " in (rooms.home / "up.log").read_text()
        assert "signal SIGKILL; starting again" in (rooms.home / "up.log").read_text()


def test_a_killed_supervisor_leaves_no_room_behind(tmp_path: Path) -> None:
    """A port that is held for ever by an orphan would keep the next `interlock up` from starting."""
    with running(tmp_path / "home") as rooms:
        ports = [rooms.port(name.upper()) for name in ROOMS]
        assert all(answers(port) for port in ports)
        rooms.process.kill()
        rooms.process.wait()
        until(lambda: not any(answers(port) for port in ports), "all rooms gone with their supervisor", 20)


def test_stopping_stops_runs_too_and_keeps_their_state(tmp_path: Path) -> None:
    with running(tmp_path / "home") as rooms:
        loop = create_run(rooms)
        until(lambda: any((rooms.home / "runs" / "r1" / "checkpoints").glob("step-*")), "a checkpoint", 60)
    deadline = time.monotonic() + 20
    while loop.is_running() and loop.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not loop.is_running() or loop.status() == psutil.STATUS_ZOMBIE
    assert any((tmp_path / "home" / "runs" / "r1" / "checkpoints").glob("step-*"))
