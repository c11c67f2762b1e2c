"""A loop with the supervisor inside its own process: guarded, rolled back, resumed, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interlock.core.recovery import CheckpointState
from interlock.errors import InvalidArgument
from interlock.stores.steplog import StepLog, live_line, open_database
from interlock.training import Batches, Boundary, Run, ServeSpec, attach
from interlock.training.embedded import Embedded
from interlock.training.terms import ChangeOrder, Order, RollBackOrder, Start


class Loop:
    """A small loop that uses everything a checkpoint must hold: dropout, batch norm, momentum, a schedule, shuffled data, three generators."""

    def __init__(self, home: Path, name: str = "loop", **options: Any) -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        x_NF = torch.randn(256, 6)
        y_N = (x_NF.sum(1) > 0).long()
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(16, 2),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 400)
        self.losses: dict[tuple[int, int], float] = {}
        settings: dict[str, Any] = {
            "save_every": 20,
            "confirm_after": 10,
            "policy": "robust",
            "trainer": None,
            "synchronous": True,
        }
        self.run: Run = attach(
            name,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            data=Batches(x_NF, y_N, batch_size=32, seed=3),
            home=home,
            **{**settings, **options},
        )

    def train(self, until: int, at: Mapping[int, Any] | None = None) -> None:
        for x_BF, y_B in self.run.steps(until=until):
            if at and self.run.step + 1 in at and self.run.attempt == 1:
                at[self.run.step + 1](self)
            noise = float(np.random.rand()) * 0.01 + random.random() * 0.01
            loss = torch.nn.functional.cross_entropy(self.model(x_BF + noise), y_B)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.losses[self.run.attempt, self.run.step + 1] = loss.item()
            self.run.log(loss=loss)


def spoil(loop: Loop) -> None:
    """A fault: the weights blow up."""
    with torch.no_grad():
        for parameter in loop.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 20)


class Scripted(Embedded):
    """An embedded supervisor that gives extra orders."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.script: list[Order] = []

    def orders(self) -> list[Order]:
        given, self.script = self.script, []
        return super().orders() + given


NO_CHANGE = {"guard": "robust", "recovery": {"rewind": 0, "plans": [{}]}}


def test_a_fault_is_rolled_back_to_the_known_good_checkpoint(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train(120, {75: spoil})
    supervisor = loop.run._parts.supervisor
    assert isinstance(supervisor, Embedded)
    (rollback,) = supervisor.state.ledger.rollbacks
    assert (rollback.checkpoint, rollback.onset_step) == ("step-000000060-a1", 75)
    assert loop.run.attempt == 2
    assert loop.run.step == 120
    states = {entry.checkpoint: entry.state for entry in supervisor.state.ledger.entries}
    assert states["step-000000100-a2"] is CheckpointState.GOOD
    loop.run.close()
    records = StepLog(open_database(tmp_path / "runs/loop/steps.db")).read("loop", 1, 10_000)
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    assert [record.step for record in live_line(records)] == list(range(1, 121))


def test_replay_after_a_rollback_is_bit_identical(tmp_path: Path) -> None:
    loop = Loop(tmp_path, policy=NO_CHANGE)
    loop.train(100, {75: spoil})
    assert loop.run.attempt == 2
    replayed = [step for attempt, step in loop.losses if attempt == 2 and step < 75]
    assert len(replayed) >= 10
    assert [loop.losses[2, step] for step in replayed] == [loop.losses[1, step] for step in replayed]
    clean = Loop(tmp_path, "clean", policy=NO_CHANGE)
    clean.train(100)
    assert [clean.losses[1, step] for step in range(75, 101)] == [loop.losses[2, step] for step in range(75, 101)]


def test_a_run_that_is_attached_again_goes_on_bit_identically(tmp_path: Path) -> None:
    first = Loop(tmp_path)
    first.train(33)
    first.run.close()
    second = Loop(tmp_path)
    assert (second.run.step, second.run.attempt) == (33, 2)
    second.train(60)
    whole = Loop(tmp_path, "whole")
    whole.train(60)
    assert [second.losses[2, step] for step in range(34, 61)] == [whole.losses[1, step] for step in range(34, 61)]
    records = second.run._parts.courier._log.read("loop", 1, 1000)
    assert [record.seq for record in records] == list(range(1, 61))


def test_after_a_crash_it_begins_at_the_youngest_good_checkpoint(tmp_path: Path) -> None:
    first = Loop(tmp_path)
    first.train(45)
    first.run.close(error="killed")
    second = Loop(tmp_path)
    assert second.run.step == 20
    assert second.run.seq == 45


def test_a_damaged_checkpoint_is_set_aside_and_the_next_good_one_is_used(tmp_path: Path) -> None:
    loop = Loop(tmp_path, policy={"guard": "robust", "recovery": {"rewind": 0, "plans": [{}]}})
    loop.train(74)
    path = tmp_path / "runs/loop/checkpoints/step-000000060-a1/tensors.safetensors"
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    spoil(loop)
    loop.train(90)
    supervisor = loop.run._parts.supervisor
    assert isinstance(supervisor, Embedded)
    assert [r.checkpoint for r in supervisor.state.ledger.rollbacks] == ["step-000000060-a1", "step-000000040-a1"]
    assert (loop.run.attempt, loop.run.step) == (3, 90)
    assert (tmp_path / "runs/loop/checkpoints/damaged/step-000000060-a1").is_dir()


def test_a_nan_never_reaches_the_weights(tmp_path: Path) -> None:
    def poison(loop: Loop) -> None:
        assert isinstance(loop.run._parts.supervisor, Scripted)
        loop.run._parts.supervisor.script.append(ChangeOrder("drill", "nan", 0, 1))

    loop = Loop(tmp_path)
    scripted = Scripted(tmp_path / "runs/loop/supervision.json")
    scripted._state = loop.run._parts.supervisor.state  # type: ignore[attr-defined]
    loop.run._parts.supervisor = loop.run._parts.courier._supervisor = scripted
    loop.train(60, {50: poison})
    (rollback,) = scripted.state.ledger.rollbacks
    assert rollback.rule in ("nonfinite", "nonfinite-gradients")
    assert all(bool(torch.isfinite(parameter).all()) for parameter in loop.model.parameters())


def test_the_plan_scales_the_learning_rate_for_its_steps_only(tmp_path: Path) -> None:
    policy = {"guard": "robust", "recovery": {"rewind": 0, "plans": [{"lr_factor": 0.5, "lr_steps": 7}]}}
    loop = Loop(tmp_path, policy=policy)
    loop.train(80, {55: spoil})
    records = loop.run._parts.courier._log.read("loop", 1, 1000)
    rate = {(record.attempt, record.step): record.metrics["learning_rate"] for record in records}
    assert [round(rate[2, step] / rate[1, step], 9) for step in range(41, 51)] == [0.5] * 7 + [1.0] * 3


def test_a_skipped_window_leaves_the_data_out(tmp_path: Path) -> None:
    policy = {"guard": "robust", "recovery": {"rewind": 0, "plans": [{"skip_before": 0, "skip_after": 4}]}}
    loop = Loop(tmp_path, policy=policy)
    loop.train(60, {55: spoil})
    position = loop.run._parts.feed.state_dict()["data"]
    assert position["epoch"] * 8 + position["index"] == 60 + 5


def test_retention_keeps_five_and_what_is_needed(tmp_path: Path) -> None:
    loop = Loop(tmp_path, save_every=5, keep=3)
    loop.train(100)
    assert loop.run._parts.store.ids() == [f"step-{step:09d}-a1" for step in (90, 95, 100)]


def test_tick_tells_a_hand_written_loop_where_it_stands(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = attach(
        "hand",
        model=model,
        optimizer=optimizer,
        policy={"guard": "classic", "recovery": {"rewind": 0}},
        save_every=5,
        confirm_after=2,
        home=tmp_path,
        trainer=None,
        synchronous=True,
    )
    told = [run.tick(loss=1.0) for _ in range(12)]
    assert told == [Boundary.GO_ON] * 12
    assert run.tick(loss=5.0) is Boundary.ROLLED_BACK
    assert run.step == 10
    run.close()


def test_the_budget_pauses_the_run_and_a_stop_ends_it(tmp_path: Path) -> None:
    policy = {"guard": "classic", "recovery": {"max_rollbacks": 0}}
    loop = Loop(tmp_path, policy=policy, synchronous=False)
    paused = []

    def obey_from_elsewhere(seconds: float) -> None:
        paused.append(loop.run._paused)
        loop.run._stopping = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interlock.training.run.time.sleep", obey_from_elsewhere)
        for step, _ in enumerate(loop.run.steps(until=5000)):
            loop.run.log(kl=0.01 if step < 3 else 0.9)
    assert paused == [True]
    loop.run.close()


def test_a_full_disk_does_not_stop_training(tmp_path: Path) -> None:
    loop = Loop(tmp_path)

    def refuse(operation: str) -> None:
        if operation.startswith("write"):
            raise OSError(28, "No space left on device")

    loop.run._parts.store._on_operation = refuse
    loop.train(30)
    assert loop.run.step == 30
    assert loop.run._parts.store.ids() == []


def test_state_without_an_exact_form_is_refused_by_its_path(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"inner": [1, object()]}

        def load_state_dict(self, state: Any) -> None: ...

    loop = Loop(tmp_path, extra={"odd": Odd()})
    with pytest.raises(InvalidArgument, match=r"extra\.odd/inner/1: object has no exact form"):
        loop.train(1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"policy": "strict"}, "guard"),
        ({"policy": {"save_evry": 3}}, "save_evry"),
        ({"extra": {"x": 3}}, "extra.x"),
        ({"policy": "no.toml"}, "policy"),
        ({"serve": ServeSpec("policy", {}, metric="")}, "serve.metric"),
        ({"serve": ServeSpec("policy", {}, min_improvement=float("nan"))}, "serve.min_improvement"),
    ],
)
def test_bad_arguments_name_the_field(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Loop(tmp_path, **options)
    assert caught.value.field == field


def test_no_trainer_means_supervised_in_this_process(tmp_path: Path) -> None:
    loop = Loop(tmp_path, trainer="127.0.0.1:1", connect_seconds=0.2)
    assert isinstance(loop.run._parts.supervisor, Embedded)
    loop.run.close()


def test_a_rollback_order_is_carried_out_once(tmp_path: Path) -> None:
    loop = Loop(tmp_path, policy=NO_CHANGE)
    loop.train(75, {70: spoil})
    supervisor = loop.run._parts.supervisor
    assert isinstance(supervisor, Embedded)
    (rollback,) = supervisor.state.ledger.rollbacks
    before = dict(loop.losses)
    supervisor._orders.append(RollBackOrder("embedded-1", rollback))
    seen = {order for order in loop.run._seen if order.startswith("embedded")}
    supervisor._orders[-1] = RollBackOrder(min(seen), rollback)
    loop.run.boundary()
    assert loop.run.step == 75
    assert before == loop.losses


def test_start_is_plain() -> None:
    assert Start(None, 1, 0).restore is None
