"""The serving process never unpickles: an audit hook that raises when anything tries to. Not a sandbox; one door, locked.

Model files reach this process from disks and networks, and a pickle is a program. The import contract in pyproject.toml keeps pickle
out of this room's own modules; the hook also holds for everything they import. It can't be taken off again.
"""

from __future__ import annotations

import sys

_REFUSED = "pickle.find_class"
_installed = False


class UnpicklingRefused(RuntimeError):
    """Something in this process tried to unpickle an object that names a class or function."""


def _hook(event: str, args: tuple[object, ...]) -> None:
    if event == _REFUSED:
        raise UnpicklingRefused(f"this process never unpickles; refused to look up {args[0]}.{args[1]}")


def install() -> None:
    """Locks the door for the life of the process. Idempotent."""
    global _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
