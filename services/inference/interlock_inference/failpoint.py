"""Dies by SIGKILL at a named place, for the tests that prove a crash there is survived: INTERLOCK_FAILPOINT=inference.<place>."""

from __future__ import annotations

import os
import signal


def reached(place: str) -> None:
    """Kills this process if the environment names this place: load, warm, switch or drain."""
    if os.environ.get("INTERLOCK_FAILPOINT") == f"inference.{place}":
        os.kill(os.getpid(), signal.SIGKILL)
