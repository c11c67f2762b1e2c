"""The trainer as real processes: SIGKILL of the trainer, of a run's process and in the middle of a save; an orderly stop; a drill."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from interlock.api.trainer.v1 import checkpoint_service_pb2 as checkpoint_pb
from interlock.api.trainer.v1 import checkpoint_service_pb2_grpc as checkpoint_grpc
from interlock.api.trainer.v1 import metrics_service_pb2 as metrics_pb
from interlock.api.trainer.v1 import metrics_service_pb2_grpc as metrics_grpc
from interlock.api.trainer.v1 import run_service_pb2 as run_pb
from interlock.api.trainer.v1 import run_service_pb2_grpc as run_grpc
from interlock.stores.checkpoints import CheckpointStore
from rooms import free_ports

pytestmark = pytest.mark.system
RUNNING, DETACHED, COMPLETED = run_pb.Run.STATE_RUNNING, run_pb.Run.STATE_DETACHED, run_pb.Run.STATE_COMPLETED


class Trainer:
    """One trainer after another on the same port and state folder."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_ports(1)[0]
        self.extra: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{self.port}",
            options=(("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)),
        )
        self.runs = run_grpc.RunServiceStub(self.channel)
        self.metrics = metrics_grpc.MetricsServiceStub(self.channel)
        self.checkpoints = checkpoint_grpc.CheckpointServiceStub(self.channel)

    def start(self) -> None:
        environment = {
            **os.environ,
            "INTERLOCK_HOME": str(self.home),
            "INTERLOCK_TRAINER_PORT": str(self.port),
            "INTERLOCK_TRAINER_METRICS_PORT": "0",
            "INTERLOCK_CONTROLLER_PORT": str(free_ports(1)[0]),
            "INTERLOCK_PROBE_INTERVAL_SECONDS": "0",
            **self.extra,
        }
        log = (self.home.parent / "trainer.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "interlock_trainer"], env=environment, stdout=log, stderr=log
        )
        log.close()
        grpc.channel_ready_future(self.channel).result(30)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def create(self, **parameters: float) -> run_pb.Run:
        request = run_pb.CreateRunRequest(run_id="r", recipe="ppo", save_every_steps=50, confirm_after_steps=10)
        request.parameters.update({"pace_ms": 3, "max_steps": 100_000, **parameters})
        return self.runs.CreateRun(request).run

    def get(self) -> run_pb.Run:
        return self.runs.GetRun(run_pb.GetRunRequest(name="runs/r"), wait_for_ready=True, timeout=10).run

    def until(self, condition: Callable[[run_pb.Run], bool]) -> run_pb.Run:
        deadline = time.monotonic() + 60
        while not condition(run := self.get()):
            assert time.monotonic() < deadline, f"still waiting, the run is\n{run}"
            time.sleep(0.05)
        return run

    def records(self) -> list[metrics_pb.StepRecord]:
        request = metrics_pb.QueryStepMetricsRequest(run="runs/r", attempt=-1, limit=1_000_000)
        return list(self.metrics.QueryStepMetrics(request).records)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    found = Trainer(tmp_path / "home")
    found.start()
    yield found
    pid = 0
    with contextlib.suppress(grpc.RpcError):
        pid = found.get().pid
    if found.process and found.process.poll() is None:
        found.process.terminate()
        found.process.wait(30)
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    found.channel.close()


def check_history(trainer: Trainer) -> None:
    """Seq has no gap and no duplicate whatever died; every checkpoint on disk can be loaded."""
    head = trainer.get().seq
    assert [record.seq for record in trainer.records()][:head] == list(range(1, head + 1))
    store = CheckpointStore(trainer.home / "runs/r/checkpoints")
    for name in store.ids():
        store.load(name)


def test_sigkill_of_the_trainer_the_run_trains_on_and_is_adopted(trainer: Trainer) -> None:
    trainer.create()
    run = trainer.until(lambda run: run.step > 60)
    pid = run.pid
    trainer.kill()
    time.sleep(1.0)
    trainer.start()
    again = trainer.until(lambda now: now.state == RUNNING and now.step > run.step + 50)
    assert (again.pid, again.attempt) == (pid, 1), "the same process, no step undone"
    check_history(trainer)


def test_sigkill_of_the_run_it_begins_again_at_the_last_good_checkpoint(trainer: Trainer) -> None:
    trainer.create()
    run = trainer.until(lambda run: run.step > 170)
    good = [
        checkpoint.step
        for checkpoint in trainer.checkpoints.List(checkpoint_pb.ListRequest(run="runs/r")).checkpoints
        if checkpoint.state == run_pb.Checkpoint.STATE_GOOD
    ]
    os.kill(run.pid, signal.SIGKILL)
    again = trainer.until(
        lambda now: now.state == RUNNING and now.attempt == 2 and now.pid != run.pid and now.seq > run.seq + 20
    )
    first = next(record for record in trainer.records() if record.attempt == 2)
    assert first.step - 1 >= max(good)
    assert (first.step - 1) % 50 == 0
    assert again.rollback_count == 0, "a restart is no rollback of the guard"
    check_history(trainer)


def test_sigkill_of_the_writer_in_the_middle_of_a_save_costs_that_save_and_nothing_else(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "home")
    trainer.extra = {"INTERLOCK_FAILPOINT": "checkpoint:25"}  # in the third checkpoint of each of the run's writers
    trainer.start()
    try:
        trainer.create()
        run = trainer.until(lambda run: run.step > 420)
        assert run.attempt == 1, "the run itself trains on"
        kept = CheckpointStore(trainer.home / "runs/r/checkpoints").ids()
        assert max(int(name.split("-")[1]) for name in kept) > 150, "a writer that died has a successor"
        check_history(trainer)
    finally:
        assert trainer.process is not None
        trainer.process.terminate()
        trainer.process.wait(30)
        trainer.channel.close()


def test_an_orderly_stop_saves_and_the_next_trainer_goes_on_from_there(trainer: Trainer) -> None:
    trainer.create()
    run = trainer.until(lambda run: run.step > 60)
    assert trainer.process is not None
    trainer.process.terminate()
    assert trainer.process.wait(30) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(run.pid, 0)
    trainer.start()
    again = trainer.until(lambda now: now.state == RUNNING and now.seq > run.seq + 20)
    assert again.attempt == 2
    records = trainer.records()
    last = max(record.step for record in records if record.attempt == 1)
    assert next(record.step for record in records if record.attempt == 2) == last + 1, "not one step was lost"
    check_history(trainer)


def test_a_drill_is_rolled_back_and_the_run_can_be_stopped(trainer: Trainer) -> None:
    trainer.create()
    trainer.until(lambda run: run.step > 150)
    request = run_pb.InjectFaultRequest(name="runs/r", fault="learning_rate", value=1000, step_count=5)
    trainer.runs.InjectFault(request)
    run = trainer.until(lambda now: now.rollback_count == 1 and now.state == RUNNING and now.attempt == 2)
    trainer.until(lambda now: now.step > run.step + 50)
    trainer.runs.StopRun(run_pb.StopRunRequest(name="runs/r"))
    trainer.until(lambda now: now.state == COMPLETED)
    check_history(trainer)
