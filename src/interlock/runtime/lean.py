"""Imported first by a room's `__main__`, before anything else of ours: what a room never uses is not loaded for it. Only for processes of our own.

structlog imports rich, where it is installed, for coloured tracebacks that a room does not print: 60 ms and 4 MB of every start. And while
modules are imported nothing becomes garbage, so collections find nothing; `lifecycle.run` turns them on again, for what comes after.
"""

import gc
import sys

# None is how the import system is told that there is no such module
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
gc.disable()
