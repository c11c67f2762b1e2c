"""The self-test of exactness: says yes to an exact loop, and names the culprit of one that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from interlock.training import Batches, Run, attach, verify_resume


class Case:
    """A loop with momentum, dropout and a schedule; `registered` says what the run is told of."""

    def __init__(self, tmp_path: Path, registered: tuple[str, ...]) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda epoch: 0.9**epoch)
        self.hidden = 0.0
        options: dict[str, Any] = {name: getattr(self, name) for name in registered}
        data = Batches(torch.randn(32, 3), batch_size=4)
        self.run: Run = attach("v", model=self.model, data=data, trainer=None, home=tmp_path, **options)

    def step(self, batch: tuple[torch.Tensor]) -> float:
        loss = self.model(batch[0]).square().mean() + self.hidden
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()


def test_an_exact_loop_is_exact_and_left_where_it_was(tmp_path: Path) -> None:
    case = Case(tmp_path, ("optimizer", "scheduler"))
    for batch in case.run.steps(until=7):
        case.run.log(loss=case.step(batch))
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    found = verify_resume(case.run, case.step, 6)
    assert str(found) == "exact: 6 replayed steps are bit-identical"
    assert all(torch.equal(before[name], tensor) for name, tensor in case.model.state_dict().items())
    assert case.run.step == 7
    case.run.close()


def test_a_forgotten_optimizer_shows_in_the_model_at_once(tmp_path: Path) -> None:
    case = Case(tmp_path, ())
    for batch in case.run.steps(until=3):
        case.step(batch)
    found = verify_resume(case.run, case.step)
    assert (found.exact, found.step, found.differs) == (False, 1, "model")
    case.run.close()


def test_a_forgotten_schedule_is_found_where_it_bites(tmp_path: Path) -> None:
    case = Case(tmp_path, ("optimizer",))
    found = verify_resume(case.run, case.step)
    assert (found.exact, found.differs) == (False, "optimizer")
    case.run.close()


def test_something_that_nobody_registered_shows_in_the_loss_alone(tmp_path: Path) -> None:
    case = Case(tmp_path, ("optimizer", "scheduler"))

    def step(batch: Any) -> float:
        case.hidden += 1e-3
        return case.step(batch)

    found = verify_resume(case.run, step)
    assert str(found) == "not exact: at replayed step 1 of 5, loss differs first"
    case.run.close()
