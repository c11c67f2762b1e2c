"""The trainer service with real gRPC on a free port and real loops in threads: streams, rollbacks, checkpoints, restarts of the service."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from prometheus_client import REGISTRY

from interlock.api.controller.v1 import rollback_service_pb2 as rollback_pb
from interlock.api.controller.v1 import rollback_service_pb2_grpc as rollback_grpc
from interlock.api.trainer.v1 import checkpoint_service_pb2 as checkpoint_pb
from interlock.api.trainer.v1 import checkpoint_service_pb2_grpc as checkpoint_grpc
from interlock.api.trainer.v1 import loop_service_pb2 as loop_pb
from interlock.api.trainer.v1 import loop_service_pb2_grpc as loop_grpc
from interlock.api.trainer.v1 import metrics_service_pb2 as metrics_pb
from interlock.api.trainer.v1 import metrics_service_pb2_grpc as metrics_grpc
from interlock.api.trainer.v1 import run_service_pb2 as run_pb
from interlock.api.trainer.v1 import run_service_pb2_grpc as run_grpc
from interlock.api.types.v1 import types_pb2
from interlock.runtime.access import Keys
from interlock.runtime.channels import Caller
from interlock.runtime.clock import SystemClock
from interlock.runtime.lifecycle import GrpcRoom
from interlock.runtime.telemetry import telemetry
from interlock.stores.trainer import TrainerStore
from interlock.training import Batches, Run, attach
from interlock_trainer.children import Children
from interlock_trainer.decisions import Controller
from interlock_trainer.runs import Runs
from interlock_trainer.servicers import add_all
from interlock_trainer.session import Shared
from interlock_trainer.watching import Hub


class FakeController(rollback_grpc.RollbackServiceServicer):
    """Answers as it is told to, and remembers what it was told."""

    def __init__(self) -> None:
        self.pause = False
        self.answers = asyncio.Event()
        self.answers.set()
        self.asked: list[run_pb.Rollback] = []
        self.reported: list[run_pb.Rollback] = []

    async def DecideRollback(self, request: Any, context: Any) -> Any:
        self.asked.append(request.proposed)
        await self.answers.wait()
        decision = run_pb.Rollback()
        decision.CopyFrom(request.proposed)
        if self.pause:
            decision.state = run_pb.Rollback.STATE_PAUSED
            decision.message = "a person should look"
        return rollback_pb.DecideRollbackResponse(decision=decision)

    async def ReportRollback(self, request: Any, context: Any) -> Any:
        self.reported.append(request.rollback)
        return rollback_pb.ReportRollbackResponse()


class Service:
    """A running trainer service and stubs to talk to it."""

    def __init__(self, home: Path, controller: str = "127.0.0.1:1", port: int = 0) -> None:
        self.home, self.controller_address, self.port = home, controller, port
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)  # noqa: TID251  a test's own group
        self._tasks.add(task)  # type: ignore[arg-type]

    async def start(self) -> Service:
        self.store = TrainerStore(self.home / "trainer.db")
        keys = Keys(self.home)
        self.controller = Controller(self.controller_address, Caller(keys.internal_key()), 1.0)
        self.runs = Runs(Shared(self.home, self.store, Hub(), self.controller, SystemClock(), self._spawn))
        self.room = GrpcRoom(self._stopping, keys)
        add_all(self.room, self.runs, Children(self.home, "", SystemClock(), 1), self.store, keys, self._spawn)
        self.runs.load()
        self.port = await self.room.start("127.0.0.1", self.port)
        self.address = f"127.0.0.1:{self.port}"
        self.channel = grpc.aio.insecure_channel(self.address)
        self.run = run_grpc.RunServiceStub(self.channel)
        self.metrics = metrics_grpc.MetricsServiceStub(self.channel)
        self.checkpoints = checkpoint_grpc.CheckpointServiceStub(self.channel)
        return self

    async def stop(self) -> None:
        self._stopping.set()
        await self.room.server.stop(1.0)
        await self.channel.close()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.controller.close()
        self.store.close()

    async def get(self, run: str = "loop") -> run_pb.Run:
        return (await self.run.GetRun(run_pb.GetRunRequest(name=f"runs/{run}"))).run

    async def until(self, condition: Callable[[run_pb.Run], bool], run: str = "loop") -> run_pb.Run:
        async with asyncio.timeout(30):
            while not condition(found := await self.get(run)):
                await asyncio.sleep(0.02)
        return found

    async def stands(self, run: str = "loop") -> int:
        """Waits until no more steps come in; returns the step."""
        before = -1
        while (now := (await self.get(run)).step) != before:
            before = now
            await asyncio.sleep(0.3)
        return before

    async def listed(self, run: str = "loop") -> dict[str, Any]:
        answer = await self.checkpoints.List(checkpoint_pb.ListRequest(run=f"runs/{run}"))
        return {checkpoint.name.rsplit("/", 1)[1]: checkpoint for checkpoint in answer.checkpoints}


@pytest.fixture
async def controller() -> AsyncIterator[FakeController]:
    fake = FakeController()
    server = grpc.aio.server()
    rollback_grpc.add_RollbackServiceServicer_to_server(fake, server)
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"  # type: ignore[attr-defined]
    await server.start()
    yield fake
    await server.stop(0)


@pytest.fixture
async def service(tmp_path: Path, controller: FakeController) -> AsyncIterator[Service]:
    async with telemetry("trainer"):
        running = await Service(tmp_path / "home", controller.address).start()  # type: ignore[attr-defined]
        yield running
        await running.stop()


class Loop(threading.Thread):
    """A training loop in a thread, attached to the service; `bad` makes its metric bad while it is set."""

    def __init__(
        self, service: Service, name: str = "loop", until: int = 10**6, pace: float = 0.001, **options: Any
    ) -> None:
        super().__init__(daemon=True)
        self.service, self.run_name, self.until, self.pace, self.options = service, name, until, pace, options
        self.bad = threading.Event()
        self.error: BaseException | None = None
        self.attached: Run | None = None

    def run(self) -> None:
        try:
            self._train()
        except BaseException as error:  # noqa: BLE001
            self.error = error

    def _train(self) -> None:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        policy = {"guard": "classic", "recovery": {"confirm_after": 5, "rewind": 0, "cool_down": 0, "plans": [{}]}}
        settings: dict[str, Any] = {"policy": policy, "save_every": 20, "connect_seconds": 10}
        with attach(
            self.run_name,
            model=model,
            optimizer=optimizer,
            data=Batches(torch.randn(64, 3), batch_size=8),
            trainer=self.service.address,
            home=self.options.pop("home", self.service.home),
            **{**settings, **self.options},
        ) as run:
            self.attached = run
            for (x_BF,) in run.steps(until=self.until):
                if not run.step:
                    run.wait_saved(
                        10
                    )  # its steps take a millisecond: what it goes back to shall be there before the first one
                loss = model(x_BF).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.log(kl=0.9 if self.bad.is_set() and run.attempt == 1 else 0.01, reward=float(run.step))
                threading.Event().wait(self.pace)

    async def ended(self) -> None:
        await asyncio.to_thread(self.join, 30)
        assert not self.is_alive()
        if self.error:
            raise self.error


@contextlib.asynccontextmanager
async def looping(service: Service, **options: Any) -> AsyncIterator[Loop]:
    loop = Loop(service, **options)
    loop.start()
    yield loop
    if loop.attached:
        loop.attached._stopping = True
    await asyncio.to_thread(loop.join, 30)


async def test_a_run_from_first_step_to_completed_with_every_step_streamed(service: Service) -> None:
    loop = Loop(service, until=150)
    loop.start()
    await _known(service)
    seen: list[int] = []
    async for message in service.metrics.StreamStepMetrics(metrics_pb.StreamStepMetricsRequest(run="runs/loop")):
        seen += [record.seq for record in message.records]
    await loop.ended()
    assert seen == list(range(1, 151))
    assert (await service.get()).state == run_pb.Run.STATE_COMPLETED


async def test_a_reader_that_comes_back_misses_nothing_and_gets_nothing_twice(service: Service) -> None:
    async with looping(service):
        await _known(service)
        seen: list[int] = []
        for cut in (3, 40, 90, 91, 200):
            request = metrics_pb.StreamStepMetricsRequest(run="runs/loop", from_seq=len(seen) + 1, batch_size=7)
            stream = service.metrics.StreamStepMetrics(request)
            async for message in stream:
                seen += [record.seq for record in message.records]
                if len(seen) >= cut:
                    stream.cancel()
                    break
        assert seen == list(range(1, len(seen) + 1))
        assert len(seen) >= 200


async def test_latest_mode_skips_and_counts(service: Service) -> None:
    loop = Loop(service, until=300, pace=0)
    loop.start()
    await loop.ended()
    request = metrics_pb.StreamStepMetricsRequest(run="runs/loop", mode=metrics_pb.StreamStepMetricsRequest.MODE_LATEST)
    messages = [message async for message in service.metrics.StreamStepMetrics(request)]
    assert messages[-1].records[-1].seq == 300
    assert sum(message.skipped_count + len(message.records) for message in messages) == 300


async def _known(service: Service, run: str = "loop") -> None:
    async with asyncio.timeout(30):
        while not service.runs.knows(run):
            await asyncio.sleep(0.02)


async def test_a_trip_is_decided_by_the_controller_and_carried_out(
    service: Service, controller: FakeController
) -> None:
    async with looping(service) as loop:
        await _known(service)
        await service.until(lambda run: run.step > 70)
        loop.bad.set()
        run = await service.until(lambda run: run.attempt == 2 and run.state == run_pb.Run.STATE_RUNNING)
        assert run.rollback_count == 1
        (asked,) = controller.asked
        assert (asked.rule, asked.metric, asked.value, asked.limit) == ("kl", "kl", 0.9, 0.03)
        async with asyncio.timeout(10):
            while not controller.reported:
                await asyncio.sleep(0.02)
        (reported,) = controller.reported
        assert reported.rollback_id == asked.rollback_id
        assert (reported.state, reported.decided_by) == (run_pb.Rollback.STATE_COMPLETED, "controller")
        assert reported.trace_id == asked.trace_id != ""
        query = metrics_pb.QueryStepMetricsRequest(run="runs/loop")
        await service.until(lambda run: run.step > asked.from_step + 5)
        line = (await service.metrics.QueryStepMetrics(query)).records
        assert [record.step for record in line] == list(range(1, len(line) + 1))
        assert {record.attempt for record in line} == {1, 2}


async def test_without_a_controller_the_trainer_acts_alone_and_reports_later(tmp_path: Path) -> None:
    service = await Service(tmp_path / "home").start()
    try:
        async with looping(service) as loop:
            await _known(service)
            await service.until(lambda run: run.step > 50)
            loop.bad.set()
            await service.until(lambda run: run.attempt == 2 and run.state == run_pb.Run.STATE_RUNNING)
            (row,) = service.store.rollbacks("loop")
            assert (row.state, row.decided_by, row.reported) == ("completed", "trainer", False)
    finally:
        await service.stop()


async def test_a_controller_that_wants_a_person_pauses_the_run_which_can_be_resumed(
    service: Service, controller: FakeController
) -> None:
    controller.pause = True
    async with looping(service) as loop:
        await _known(service)
        await service.until(lambda run: run.step > 50)
        loop.bad.set()
        run = await service.until(lambda run: run.state == run_pb.Run.STATE_PAUSED)
        assert run.message == "CONTROLLER: a person should look"
        loop.bad.clear()
        stood = await service.stands()
        await service.run.ResumeRun(run_pb.ResumeRunRequest(name="runs/loop"))
        run = await service.until(lambda run: run.step > stood + 20)
        assert run.attempt == 1


async def test_the_service_dies_the_loop_trains_on_and_nothing_is_lost(tmp_path: Path) -> None:
    service = await Service(tmp_path / "home").start()
    loop = Loop(service)
    loop.start()
    await _known(service)
    await service.until(lambda run: run.step > 50)
    await service.stop()
    assert loop.attached is not None
    before = loop.attached.step
    await asyncio.sleep(0.5)
    assert loop.attached.step > before, "training went on without the service"
    again = await Service(tmp_path / "home", port=service.port).start()
    try:
        await again.until(lambda run: run.state == run_pb.Run.STATE_RUNNING and run.step > before + 100)
        loop.attached._stopping = True
        await again.until(lambda run: run.state == run_pb.Run.STATE_COMPLETED)
        await loop.ended()
        records = again.store.steps.read("loop", 1, 100_000)
        assert [record.seq for record in records] == list(range(1, len(records) + 1))
        assert [record.step for record in records] == list(range(1, len(records) + 1))
        assert loop.attached.step == records[-1].step
    finally:
        await again.stop()


async def test_a_service_that_dies_between_decision_and_order_orders_after_its_restart(
    tmp_path: Path, controller: FakeController
) -> None:
    """The decision is on disk before the controller is asked; the next service asks again under the same id, and rolls back once."""
    controller.answers.clear()
    service = await Service(tmp_path / "home", controller.address).start()  # type: ignore[attr-defined]
    loop = Loop(service)
    loop.start()
    await _known(service)
    await service.until(lambda run: run.step > 50)
    loop.bad.set()
    async with asyncio.timeout(10):
        while not controller.asked:
            await asyncio.sleep(0.01)
    await service.stop()
    controller.answers.set()
    again = await Service(tmp_path / "home", controller.address, port=service.port).start()  # type: ignore[attr-defined]
    try:
        await again.until(lambda run: run.attempt == 2 and run.state == run_pb.Run.STATE_RUNNING)
        assert {asked.rollback_id for asked in controller.asked} == {"loop-rollback-2"}
        (row,) = again.store.rollbacks("loop")
        assert (row.state, row.decided_by) == ("completed", "controller")
        assert loop.attached is not None
        loop.attached._stopping = True
        await loop.ended()
        assert loop.attached.attempt == 2
    finally:
        await again.stop()


async def test_a_damaged_target_is_set_aside_and_the_next_good_one_is_taken(service: Service) -> None:
    async with looping(service) as loop:
        await _known(service)
        await service.until(lambda run: run.step > 90)
        await service.run.PauseRun(run_pb.PauseRunRequest(name="runs/loop"))
        await service.stands()
        good = [item for item in (await service.listed()).values() if item.state == run_pb.Checkpoint.STATE_GOOD]
        youngest = good[0].name.rsplit("/", 1)[1]
        body = next((service.home / "runs").rglob(f"{youngest}/tensors.safetensors"))
        body.write_bytes(body.read_bytes()[:-1] + b"\x55")
        loop.bad.set()
        await service.run.ResumeRun(run_pb.ResumeRunRequest(name="runs/loop"))
        run = await service.until(lambda run: run.attempt == 3 and run.state == run_pb.Run.STATE_RUNNING)
        first, second = service.store.rollbacks("loop")
        assert (first.rollback.checkpoint, first.state) == (youngest, "failed")
        assert (second.rollback.checkpoint, second.state) == (good[1].name.rsplit("/", 1)[1], "completed")
        assert (body.parents[1] / "damaged" / youngest).is_dir()
        assert run.rollback_count == 2


async def test_checkpoints_are_saved_pinned_marked_and_verified(service: Service) -> None:
    async with looping(service):
        await _known(service)
        await service.until(lambda run: run.step > 30)
        saved = (await service.checkpoints.Save(checkpoint_pb.SaveRequest(run="runs/loop"))).checkpoint
        assert saved.digest.startswith("blake3:")
        assert saved.reason == "asked"
        await service.checkpoints.Pin(checkpoint_pb.PinRequest(name=saved.name, pinned=True))
        name = saved.name.rsplit("/", 1)[1]
        await service.until(lambda run: run.step > 200)
        listed = await service.listed()
        assert name in listed
        assert 5 <= len(listed) <= 8, "the last five, the pinned one, and what is being written"
        good = checkpoint_pb.MarkRequest(name=saved.name, state=run_pb.Checkpoint.STATE_QUARANTINED)
        assert (await service.checkpoints.Mark(good)).checkpoint.state == run_pb.Checkpoint.STATE_QUARANTINED
        body = next((service.home / "runs").rglob(f"{name}/tensors.safetensors"))
        verified = await service.checkpoints.Verify(checkpoint_pb.VerifyRequest(name=saved.name))
        assert verified.size_bytes > body.stat().st_size
        body.write_bytes(body.read_bytes()[:-1] + b"\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.checkpoints.Verify(checkpoint_pb.VerifyRequest(name=saved.name))
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS


async def test_a_person_rolls_back_pauses_resumes_and_stops(service: Service) -> None:
    async with looping(service) as loop:
        await _known(service)
        await service.until(lambda run: run.step > 60)
        change = types_pb2.Change(request_id="once", reason="try")
        request = run_pb.RollbackRunRequest(name="runs/loop", change=change)
        first = (await service.run.RollbackRun(request)).rollback
        again = (await service.run.RollbackRun(request)).rollback
        assert first.rollback_id == again.rollback_id
        await service.until(lambda run: run.attempt == 2 and run.state == run_pb.Run.STATE_RUNNING)
        await service.run.PauseRun(run_pb.PauseRunRequest(name="runs/loop"))
        run = await service.until(lambda run: run.state == run_pb.Run.STATE_PAUSED)
        stood = await service.stands()
        await service.run.ResumeRun(run_pb.ResumeRunRequest(name="runs/loop"))
        await service.until(lambda run: run.step > stood)
        await service.run.StopRun(run_pb.StopRunRequest(name="runs/loop"))
        run = await service.until(lambda run: run.state == run_pb.Run.STATE_COMPLETED)
        await loop.ended()
        assert run.step == loop.attached.step  # type: ignore[union-attr]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.run.PauseRun(run_pb.PauseRunRequest(name="runs/loop"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_watch_sends_the_snapshot_then_changes_and_ends(service: Service) -> None:
    async with looping(service) as loop:
        await _known(service)
        await service.until(lambda run: run.step > 30)
        watch = service.run.WatchRun(run_pb.WatchRunRequest(name="runs/loop"))
        messages = aiter(watch)
        first = await anext(messages)
        assert first.run.state == run_pb.Run.STATE_RUNNING
        loop.bad.set()
        kinds = []
        async for message in messages:
            kinds.append(
                "rollback"
                if message.HasField("rollback")
                else "checkpoint"
                if message.HasField("checkpoint")
                else "run"
            )
            if message.rollback.state == run_pb.Rollback.STATE_COMPLETED:
                await service.run.StopRun(run_pb.StopRunRequest(name="runs/loop"))
        assert kinds.count("rollback") >= 2
        assert "checkpoint" in kinds
        assert (await service.get()).state == run_pb.Run.STATE_COMPLETED


async def test_the_operations_plans_metrics_are_there_under_their_names(service: Service) -> None:
    loop = Loop(service, name="measured", until=60)
    loop.start()
    await loop.ended()
    sample = REGISTRY.get_sample_value
    assert sample("rl_update_total", {"run": "measured"}) == 60
    assert sample("rl_kl_divergence", {"run": "measured"}) == 0.01
    assert sample("rl_reward", {"run": "measured"}) == 59
    assert sample("interlock_run_step", {"run": "measured"}) == 60
    assert (sample("interlock_guard_verdicts_total", {"run": "measured", "outcome": "pass"}) or 0) > 30
    assert (sample("interlock_checkpoints_total", {"run": "measured", "state": "good"}) or 0) >= 2


async def test_a_drill_that_nobody_knows_is_refused(service: Service) -> None:
    async with looping(service):
        await _known(service)
        await service.until(lambda run: run.step > 1)
        for fault in ("lightning", "reward_sign"):  # no fault at all; one that this loop has no handler for
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await service.run.InjectFault(run_pb.InjectFaultRequest(name="runs/loop", fault=fault, value=1))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("request_fields", "code", "says"),
    [
        ({"recipe": "gpt"}, grpc.StatusCode.INVALID_ARGUMENT, "built in are ppo"),
        ({"recipe": "ppo", "run_id": "../x"}, grpc.StatusCode.INVALID_ARGUMENT, "run_id: '../x' is not an id"),
        ({"recipe": "ppo", "guard_policy": "strict"}, grpc.StatusCode.INVALID_ARGUMENT, "built-in policy"),
        ({"recipe": "ppo", "parameters": {"lr": 1}}, grpc.StatusCode.INVALID_ARGUMENT, "parameters.lr: unknown key"),
        (
            {"recipe": "ppo", "parameters": {"clip": 0}},
            grpc.StatusCode.INVALID_ARGUMENT,
            "parameters.clip: must be positive",
        ),
        (
            {"recipe": "ppo", "policy": {"recovery": {"rewind": -1}}},
            grpc.StatusCode.INVALID_ARGUMENT,
            "recovery.rewind: must be at least 0",
        ),
        (
            {"recipe": "ppo", "promotion": run_pb.PromotionPolicy(model="models/policy", min_improvement=-1)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "promotion.min_improvement must be a finite number, 0 or more",
        ),
    ],
)
async def test_a_bad_run_is_refused_by_its_field(
    service: Service, request_fields: dict[str, Any], code: Any, says: str
) -> None:
    request = run_pb.CreateRunRequest()
    for name, value in request_fields.items():
        if isinstance(value, dict):
            getattr(request, name).update(value)
        elif isinstance(value, run_pb.PromotionPolicy):
            request.promotion.CopyFrom(value)
        else:
            setattr(request, name, value)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.run.CreateRun(request)
    assert caught.value.code() is code
    assert says in (caught.value.details() or "")


async def test_unknown_runs_and_checkpoints_are_not_found(service: Service) -> None:
    for call, request in (
        (service.run.GetRun, run_pb.GetRunRequest(name="runs/none")),
        (service.checkpoints.List, checkpoint_pb.ListRequest(run="runs/none")),
        (service.checkpoints.Export, checkpoint_pb.ExportRequest(name="runs/none/checkpoints/c")),
        (service.metrics.QueryStepMetrics, metrics_pb.QueryStepMetricsRequest(run="runs/none")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_loop_that_does_not_say_hello_is_refused(service: Service) -> None:
    stream = loop_grpc.LoopServiceStub(service.channel).Attach(iter([loop_pb.AttachRequest(goodbye=loop_pb.Goodbye())]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_folder_that_a_loop_names_is_never_followed_out_of_the_state_folder(
    service: Service, tmp_path: Path
) -> None:
    async with looping(service, home=tmp_path / "elsewhere"):
        await _known(service)
        await service.until(lambda run: run.step > 30)
        name = next(iter((await service.listed()).values())).name
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.checkpoints.Verify(checkpoint_pb.VerifyRequest(name=name))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "another state folder" in (caught.value.details() or "")
        assert not (service.home / "runs/loop/checkpoints").exists()


async def test_only_what_is_good_is_exported(service: Service) -> None:
    async with looping(service):
        await _known(service)
        await service.until(lambda run: run.step > 30)
        listed = await service.listed()
        name = next(iter(listed.values())).name
        await service.checkpoints.Mark(checkpoint_pb.MarkRequest(name=name, state=run_pb.Checkpoint.STATE_QUARANTINED))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.checkpoints.Export(checkpoint_pb.ExportRequest(name=name))
        assert "only a good one is exported" in (caught.value.details() or "")
