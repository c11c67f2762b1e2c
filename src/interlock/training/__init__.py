"""What a training loop embeds: `attach` joins a PyTorch loop to Interlock in about three lines. Importing this package imports no torch.

    run = interlock.attach("name", model=model, optimizer=optimizer, data=batches)
    for batch in run.steps():
        run.log(loss=loss)

Contract: the loop is never blocked and never broken by a service, a network or a full disk. What is recorded, judged and ordered between
the loop and its supervisor is in `terms`; how the state is captured bit for bit in `capture`; where it goes in `interlock.stores`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlock.training.data import Batches
    from interlock.training.run import Boundary, Run
    from interlock.training.session import ServeSpec, attach
    from interlock.training.verify import Verification, verify_resume

__all__ = ["Batches", "Boundary", "Run", "ServeSpec", "Verification", "attach", "verify_resume"]
_WHERE = {
    "attach": "session",
    "ServeSpec": "session",
    "Batches": "data",
    "Run": "run",
    "Boundary": "run",
    "Verification": "verify",
    "verify_resume": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
