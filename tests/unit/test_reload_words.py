"""The source documents' words for a reload (seed 001): one table, total over the swap's states."""

from __future__ import annotations

import pytest

from interlock.api.controller.v1 import swap_service_pb2 as pb
from interlock.core.swap import TERMINAL, State
from interlock_gateway.reload_words import ENDED, STATES, reload_state, served_already

WORDS = {"idle", "warming_up", "ready", "switching", "completed", "failed"}


def test_every_state_of_a_swap_has_a_word() -> None:
    names = {name.removeprefix("STATE_") for name, _ in pb.Swap.State.items()} - {"UNSPECIFIED"}
    assert set(STATES) == names == {state.name for state in State}
    assert set(STATES.values()) <= WORDS
    assert {state.name for state in TERMINAL} == ENDED


@pytest.mark.parametrize(("state", "word"), [("LOADING", "warming_up"), ("GATED", "ready"), ("SWITCHING", "switching"), ("COMPLETED", "completed"), ("REVERTED", "failed"), ("FAILED", "failed")])  # fmt: skip
def test_the_body_is_the_documents(state: str, word: str) -> None:
    swap = pb.Swap(
        state=pb.Swap.State.Value(f"STATE_{state}"), progress_percent=45.0, message="warm-up 3 of 5", reason="WHY"
    )
    swap.create_time.GetCurrentTime()
    body = reload_state("policy", swap)
    assert list(body) == ["model", "state", "progress_percent", "message", "started_at", "completed_at", "error"]
    assert (body["model"], body["state"], body["progress_percent"]) == ("policy", word, 45.0)
    assert body["error"] == ("WHY: warm-up 3 of 5" if word == "failed" else None)


def test_nothing_to_reload_and_nothing_to_do() -> None:
    assert reload_state("policy", None)["state"] == "idle"
    assert served_already("policy", "serves")["state"] == "completed"
