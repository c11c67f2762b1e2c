"""The source documents' words for a reload, from a swap's state. They exist here and nowhere else.

idle: no reload; warming_up: the new model is being prepared; ready: prepared and waiting; switching: traffic is moving; completed; failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interlock.api.controller.v1 import swap_service_pb2 as pb

STATES: Mapping[str, str] = {
    "PENDING": "warming_up",
    "ADMITTING": "warming_up",
    "LOADING": "warming_up",
    "WARMING": "warming_up",
    "VERIFYING": "warming_up",
    "GATED": "ready",
    "SWITCHING": "switching",
    "CANARY": "switching",
    "SOAKING": "switching",
    "DRAINING": "switching",
    "KEEP_WARM": "completed",
    "COMPLETED": "completed",
    "REVERTING": "failed",
    "REVERTED": "failed",
    "ABORTING": "failed",
    "FAILED": "failed",
    "CANCELLED": "failed",
    "REJECTED": "failed",
    "SUPERSEDED": "failed",
}
ENDED = frozenset({"COMPLETED", "REVERTED", "FAILED", "CANCELLED", "REJECTED", "SUPERSEDED"})


def state_name(swap: Any) -> str:
    """The swap's state without the enum's prefix."""
    return pb.Swap.State.Name(swap.state).removeprefix("STATE_")


def reload_state(model: str, swap: Any | None) -> dict[str, Any]:
    """The body of `GET /health/llm/reload/{model}` (seed 001)."""
    if swap is None:
        return {
            "model": model,
            "state": "idle",
            "progress_percent": 0.0,
            "message": "no reload",
            "started_at": None,
            "completed_at": None,
            "error": None,
        }
    state = STATES[state_name(swap)]
    error = f"{swap.reason}: {swap.message}" if state == "failed" else None
    return {
        "model": model,
        "state": state,
        "progress_percent": swap.progress_percent,
        "message": swap.message,
        "started_at": swap.create_time.ToJsonString(),
        "completed_at": swap.end_time.ToJsonString() if swap.HasField("end_time") else None,
        "error": error,
    }


def served_already(model: str, message: str) -> dict[str, Any]:
    """The body of a reload that had nothing to do: a script that is run twice succeeds twice."""
    idle = reload_state(model, None)
    return {**idle, "state": "completed", "progress_percent": 100.0, "message": message}
