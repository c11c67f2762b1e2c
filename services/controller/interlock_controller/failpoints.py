"""Dies by SIGKILL at a named place, for the tests of what a crash leaves behind. Does nothing unless `INTERLOCK_FAILPOINT` names it.

INTERLOCK_FAILPOINT=controller.SWITCHING                 killed right after the swap's row says SWITCHING
INTERLOCK_FAILPOINT=controller.SWITCHING:before_persist  killed when that was decided and nothing is written yet
"""

from __future__ import annotations

import os
import signal

VARIABLE = "INTERLOCK_FAILPOINT"


def reached(place: str, moment: str) -> None:
    """Kills the process if this is the place and moment that the variable names; the default moment is `after_persist`."""
    wanted, _, when = os.environ.get(VARIABLE, "").partition(":")
    if wanted.removeprefix("controller.") == place and (when or "after_persist") == moment:
        os.kill(os.getpid(), signal.SIGKILL)
