"""Restarts of a run's process: back-off, budget, and an end when the run has ended. No process is started here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import FakeClock
from interlock_trainer import children
from interlock_trainer.children import Children


class FakeSession:
    """The part of a session that `Children` uses."""

    def __init__(self, pid: int = 0) -> None:
        self.run, self.row, self.terminal = "r", SimpleNamespace(pid=pid), False
        self.message = ""

    def set_state(self, state: str, message: str = "") -> None:
        self.terminal, self.message = state in ("failed", "completed"), f"{state} {message}"


def keeper(tmp_path: Path, codes: list[int], session: FakeSession, clock: FakeClock, lasts: float = 1.0) -> Children:
    found = Children(tmp_path, "127.0.0.1:1", clock, 1)

    async def run_once(_session: Any) -> int:
        await clock.sleep(lasts)
        code = codes.pop(0)
        if code == 0:
            session.set_state("completed")
        return code

    found._run_once = run_once  # type: ignore[method-assign]
    return found


async def test_a_crash_is_restarted_with_growing_delays_until_the_budget_is_spent(tmp_path: Path) -> None:
    session, clock = FakeSession(), FakeClock()
    begun = clock.monotonic()
    codes = [1] * 10
    await keeper(tmp_path, codes, session, clock).keep(session)  # type: ignore[arg-type]
    assert len(codes) == 10 - (children.MAX_RESTARTS + 1)
    assert session.message == "failed RESTART_BUDGET: 6 crashes in 600 s, exit code 1"
    assert clock.monotonic() - begun == pytest.approx(6 * 1.0 + 0.5 + 1 + 2 + 4 + 8)


async def test_crashes_that_lie_far_apart_do_not_add_up(tmp_path: Path) -> None:
    session, clock = FakeSession(), FakeClock()
    codes = [-9] * 8 + [0]
    await keeper(tmp_path, codes, session, clock, lasts=children.RESTART_WINDOW_SECONDS).keep(session)  # type: ignore[arg-type]
    assert session.message.startswith("completed")
    assert not codes


async def test_a_run_that_has_ended_is_left_alone(tmp_path: Path) -> None:
    session, clock = FakeSession(), FakeClock()
    session.terminal = True
    await keeper(tmp_path, [], session, clock).keep(session)  # type: ignore[arg-type]


def test_a_stranger_with_the_same_pid_is_not_adopted() -> None:
    import os

    assert not children._is_child(os.getpid(), "r")
    assert not children._is_child(2**22 + 1, "r")
