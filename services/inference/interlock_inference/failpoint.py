"""Dies by SIGKILL at a named place, for the tests that prove a crash there is survived.

INTERLOCK_FAILPOINT=inference.<place> or inference.<place>:<version>; the places are load, warm, switch and drain.
"""

from __future__ import annotations

import os
import signal


def reached(place: str, version: str) -> None:
    """Kills this process if the environment names this place, for this version if it names one."""
    if os.environ.get("INTERLOCK_FAILPOINT") in (f"inference.{place}", f"inference.{place}:{version}"):
        os.kill(os.getpid(), signal.SIGKILL)
