"""Dies by SIGKILL at a named place, for the tests of what a crash leaves behind. Does nothing unless `INTERLOCK_FAILPOINT` names it.

INTERLOCK_FAILPOINT=controller.SWITCHING                 killed right after the swap's row says SWITCHING
INTERLOCK_FAILPOINT=controller.SWITCHING:before_persist  killed when that was decided and nothing is written yet
INTERLOCK_FAILPOINT=inference.warm                       killed in a warm-up; the places are load, warm, switch and drain
INTERLOCK_FAILPOINT=inference.warm:3                     the same, of version 3 only
INTERLOCK_FAILPOINT=child.load:3                         the child that tries version 3 is killed; the replica is not
"""

from __future__ import annotations

import os
import signal

VARIABLE = "INTERLOCK_FAILPOINT"


def reached(place: str, detail: str, *, default: str | None = None) -> None:
    """Kills the process if the variable names this place and detail.

    Args:
        place: `room.place`.
        default: the detail that is meant when the variable names none; None: any.
    """
    wanted, _, named = os.environ.get(VARIABLE, "").partition(":")
    if wanted == place and (named == detail if named else default in (None, detail)):
        os.kill(os.getpid(), signal.SIGKILL)
