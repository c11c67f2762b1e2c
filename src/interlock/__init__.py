"""Interlock keeps models serving while they keep training.

    run = interlock.attach("my-run", model=model, optimizer=optimizer, data=loader)
    for batch in run.steps():
        ...
        run.log(loss=loss)

Importing this package is light: torch, pydantic and gRPC servers are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlock.training import attach as attach

__version__ = "0.1.0"
__all__ = ["__version__", "attach"]


def __getattr__(name: str) -> Any:
    if name == "attach":
        try:
            from interlock.training import attach
        except ModuleNotFoundError as error:
            raise ImportError(f"interlock.attach needs {error.name}: pip install 'interlock[train]'") from error
        return attach
    raise AttributeError(f"module 'interlock' has no attribute {name!r}")
