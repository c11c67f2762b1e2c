"""The PPO recipe: it learns, every metric of the operations plan is there, and a replay from the middle of an epoch is bit-identical."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from interlock.core.steps import StepRecord
from interlock.errors import InvalidArgument
from interlock.training import Run, attach
from interlock_trainer.recipes import PpoParameters, check
from interlock_trainer.recipes.ppo import train

METRICS = {
    "loss",
    "policy_loss",
    "value_loss",
    "reward",
    "entropy",
    "clip_fraction",
    "kl",
    "explained_variance",
    "learning_rate",
    "gradient_norm",
    "steps_per_second",
}


def played(home: Path, policy: Any = "robust", save_every: int = 37, **parameters: Any) -> tuple[Run, list[StepRecord]]:
    join = functools.partial(
        attach, "ppo", home=home, trainer=None, policy=policy, save_every=save_every, confirm_after=10, synchronous=True
    )
    run = train(PpoParameters(**parameters), join)
    run.close()
    return run, run._parts.courier._log.read("ppo", 1, 100_000)


@pytest.mark.slow
def test_it_learns_and_reports_every_metric(tmp_path: Path) -> None:
    _, records = played(tmp_path, max_steps=640, save_every=500)
    assert set(records[-1].metrics) >= METRICS
    assert records[40].metrics["reward"] < 60
    assert records[-1].metrics["reward"] > 200
    assert 0 <= max(record.metrics["clip_fraction"] for record in records) <= 1
    assert all(record.metrics["entropy"] <= 0.6932 for record in records)


def test_a_replay_from_the_middle_of_an_epoch_is_bit_identical(tmp_path: Path) -> None:
    """37 is no multiple of the 16 updates of a rollout: the checkpoint holds the buffers, the order and every environment."""
    unchanged = {"guard": "robust", "recovery": {"rewind": 0, "plans": [{}]}}
    run, records = played(tmp_path, unchanged, max_steps=160, fault="nan", fault_step=140)
    assert run.attempt == 2
    seen = ("loss", "policy_loss", "value_loss", "kl", "entropy", "reward", "explained_variance", "gradient_norm")
    first = {
        record.step: [record.metrics[name] for name in seen]
        for record in records
        if record.attempt == 1 and record.step < 140
    }
    again = {
        record.step: [record.metrics[name] for name in seen]
        for record in records
        if record.attempt == 2 and record.step < 140
    }
    assert min(again) == 112, "from the checkpoint at step 111"
    assert again == {step: first[step] for step in again}


def test_the_learning_rate_drill_is_rolled_back_and_the_run_recovers(tmp_path: Path) -> None:
    run, records = played(
        tmp_path, max_steps=400, save_every=50, fault="learning_rate", fault_step=220, fault_value=1000.0, fault_steps=5
    )
    assert run.attempt >= 2
    before = next(record.metrics["reward"] for record in records if record.step == 219)
    assert records[-1].metrics["reward"] >= 0.8 * before


@pytest.mark.parametrize(
    ("parameters", "field", "says"),
    [
        ({"learning_rat": 1}, "parameters.learning_rat", "unknown key"),
        ({"num_envs": 0}, "parameters.num_envs", "must be at least 1"),
        ({"minibatches": 3}, "parameters.minibatches", "must divide"),
        ({"fault": "rain"}, "parameters.fault", "is not one of"),
        ({"seed": "x"}, "parameters.seed", "expected int"),
    ],
)
def test_bad_parameters_are_refused_by_field(parameters: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check("ppo", parameters)
    assert (caught.value.field, caught.value.reason) == (field, "INVALID_PARAMETER")
    assert says in caught.value.message


def test_whole_floats_are_taken_for_ints_as_a_struct_sends_them() -> None:
    assert check("ppo", {"seed": 7.0, "max_steps": 10.0}) == PpoParameters(seed=7, max_steps=10)
