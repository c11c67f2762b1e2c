"""The controller between a trainer and a replica: good checkpoints reach traffic once, bad ones leave it, with their versions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from controller_world import CALLER, Controller, FakeTrainer, a_controller, a_trainer, state_of
from interlock.api.controller.v1 import (
    model_service_pb2,
    policy_service_pb2,
    rollback_service_pb2,
    route_service_pb2,
    swap_service_pb2,
)
from interlock.api.trainer.v1 import run_service_pb2
from interlock.api.types.v1 import types_pb2
from interlock.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable, Unimplemented
from replica_world import Remote, a_replica


@asynccontextmanager
async def a_world(home: Path) -> AsyncIterator[tuple[Controller, FakeTrainer, Remote]]:
    async with (
        a_trainer(home) as (trainer, port),
        a_replica(home) as replica,
        a_controller(home, [replica.url], port) as controller,
    ):
        yield controller, trainer, replica


async def routed(controller: Controller, version: str) -> types_pb2.Route:
    """Waits until everything of the model goes to one version."""
    async with asyncio.timeout(30):
        async for message in CALLER.stream(
            controller.stub("route").WatchRoutes, route_service_pb2.WatchRoutesRequest()
        ):
            if [w.version for w in message.route.weights] == [f"models/policy/versions/{version}"]:
                return message.route
    raise AssertionError("the stream ended")


async def swaps(controller: Controller) -> list[swap_service_pb2.Swap]:
    return list((await controller.call("swap", "ListSwaps", swap_service_pb2.ListSwapsRequest())).swaps)


async def versions(controller: Controller) -> list[model_service_pb2.Version]:
    request = model_service_pb2.ListVersionsRequest(model="models/policy")
    return list((await controller.call("model", "ListVersions", request)).versions)


async def test_the_first_good_checkpoint_serves_and_a_better_one_follows(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, trainer, _):
        trainer.promote(min_improvement=5.0)
        trainer.save(50, 30.0, good=False)
        first = trainer.save(100, 20.0)
        await routed(controller, "1")
        trainer.save(200, 22.0)  # better, but not by 5
        better = trainer.save(300, 40.0)
        await routed(controller, "2")
        assert trainer.exports == [first, better]
        assert trainer.pins == {first: True, better: True}
        newest = (await versions(controller))[0]
        assert newest.origin.checkpoint == better
        assert newest.metrics["reward"] == 40.0
        done = await swaps(controller)
        ended = (await controller.watch(done[0].name))[-1]
        assert state_of(ended) == "COMPLETED"
        assert ended.change.actor == "promotion"
        assert "reward 40 at step 300 against 20 of version 1" in ended.change.reason
        assert len(ended.trace_id) == 32


async def test_a_person_who_moved_traffic_back_is_not_overruled(tmp_path: Path) -> None:
    """An SRE's rollback would be worth nothing if the next checkpoint undid it; moving forward by hand lets promotions go on."""
    async with a_world(tmp_path) as (controller, trainer, _):
        trainer.promote(min_improvement=5.0)
        trainer.save(100, 20.0)
        await routed(controller, "1")
        trainer.save(200, 40.0)
        await routed(controller, "2")
        ended = await controller.watch((await swaps(controller))[0].name)
        assert state_of(ended[-1]) == "COMPLETED"
        back = model_service_pb2.RollbackModelRequest(
            model="models/policy", change=types_pb2.Change(reason="looks wrong")
        )
        swap = (await controller.call("model", "RollbackModel", back)).swap
        assert state_of((await controller.watch(swap.name))[-1]) == "COMPLETED"
        held = trainer.save(300, 60.0)
        await asyncio.sleep(0.5)
        assert held not in trainer.exports
        assert (await controller.route()).weights[0].version == "models/policy/versions/1"
        forward = await controller.create("models/policy/versions/2")
        assert state_of((await controller.watch(forward.name))[-1]) == "COMPLETED"
        await routed(controller, "3")
        assert held in trainer.exports


async def test_a_checkpoint_is_promoted_once_whatever_restarts(tmp_path: Path) -> None:
    async with a_trainer(tmp_path) as (trainer, port), a_replica(tmp_path) as replica:
        trainer.promote()
        checkpoint = trainer.save(100, 20.0)
        async with a_controller(tmp_path, [replica.url], port) as controller:
            await routed(controller, "1")
        async with a_controller(tmp_path, [replica.url], port) as controller:
            trainer.save(200, 30.0)
            await routed(controller, "2")
            assert trainer.exports.count(checkpoint) == 1
            assert len(await swaps(controller)) == 2
            assert len(await versions(controller)) == 2


async def test_a_promotion_waits_for_a_loop_and_gives_up_on_a_bad_export(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, trainer, _):
        trainer.promote()
        trainer.refuse_exports = 1
        trainer.broken.add(trainer.save(100, 50.0))
        good = trainer.save(150, 10.0)
        await routed(controller, "1")
        assert (await versions(controller))[0].origin.checkpoint == good


async def test_a_trainer_that_comes_late_is_caught_up_with(tmp_path: Path) -> None:
    async with a_replica(tmp_path) as replica, a_trainer(tmp_path) as (trainer, port):
        trainer.promote()
        trainer.save(100, 20.0)
        async with a_controller(tmp_path, [replica.url], port) as controller:
            await routed(controller, "1")


def proposed(**more: Any) -> run_service_pb2.Rollback:
    return run_service_pb2.Rollback(
        **{
            "rollback_id": "rb-1",
            "run": "runs/r",
            "rule": "kl",
            "value": 0.5,
            "limit": 0.03,
            "from_step": 400,
            "onset_step": 390,
        }
        | more  # type: ignore[arg-type]
    )


async def test_a_decision_is_recorded_once_and_forbids_what_descends_from_it(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, trainer, _):
        trainer.promote()
        target = trainer.save(100, 20.0)
        await routed(controller, "1")
        bad = trainer.save(300, 90.0)
        await routed(controller, "2")
        rollback = proposed(target_checkpoint=target, to_step=100, quarantined_checkpoints=[bad], attempt=2)
        request = rollback_service_pb2.DecideRollbackRequest(
            proposed=rollback, checkpoints=trainer.checkpoints.values()
        )
        first = await controller.call("rollback", "DecideRollback", request)
        assert first.decision.target_checkpoint == target
        assert first.decision.decided_by == "controller"
        assert list(first.record.affected_versions) == ["models/policy/versions/2"]
        await routed(controller, "1")  # the version that descends from it leaves the traffic
        assert (await versions(controller))[0].state == model_service_pb2.Version.STATE_QUARANTINED
        again = await controller.call("rollback", "DecideRollback", request)
        assert again.decision == first.decision
        report = rollback_service_pb2.ReportRollbackRequest(rollback=rollback)
        await controller.call("rollback", "ReportRollback", report)
        listed = await controller.call(
            "rollback", "ListRollbacks", rollback_service_pb2.ListRollbacksRequest(run="runs/r")
        )
        assert [r.rollback_id for r in listed.rollbacks] == ["rb-1"]
        story = await controller.call("model", "Explain", model_service_pb2.ExplainRequest(model="models/policy"))
        assert any("runs/r tripped kl" in sentence for sentence in story.sentences)


async def test_a_checkpoint_that_falls_while_it_is_promoted_reaches_no_traffic(tmp_path: Path) -> None:
    """Its version does not exist yet when the rollback forbids versions: the promotion has to look again."""
    async with a_world(tmp_path) as (controller, trainer, _):
        trainer.promote()
        trainer.save(100, 20.0)
        await routed(controller, "1")
        exporting, fallen = trainer.hold_exports()
        bad = trainer.save(300, 90.0)
        async with asyncio.timeout(20):
            await exporting.wait()
        report = rollback_service_pb2.ReportRollbackRequest(rollback=proposed(quarantined_checkpoints=[bad]))
        await controller.call("rollback", "ReportRollback", report)
        fallen.set()
        trainer.save(400, 95.0, attempt=2)
        await routed(controller, "3")
        forbidden = next(v for v in await versions(controller) if v.origin.checkpoint == bad)
        assert forbidden.state == model_service_pb2.Version.STATE_QUARANTINED
        assert forbidden.name not in {swap.spec.candidate_version for swap in await swaps(controller)}


async def test_a_target_that_is_forbidden_here_is_replaced_by_an_older_one(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, trainer, _):
        older = trainer.save(100, 20.0)
        bad = trainer.save(200, 30.0)
        mark = rollback_service_pb2.ReportRollbackRequest(
            rollback=proposed(rollback_id="rb-0", quarantined_checkpoints=[bad])
        )
        await controller.call("rollback", "ReportRollback", mark)
        request = rollback_service_pb2.DecideRollbackRequest(
            proposed=proposed(target_checkpoint=bad, to_step=200), checkpoints=trainer.checkpoints.values()
        )
        decision = (await controller.call("rollback", "DecideRollback", request)).decision
        assert (decision.target_checkpoint, decision.to_step) == (older, 100)
        only_bad = [c for c in trainer.checkpoints.values() if c.name == bad]
        request = rollback_service_pb2.DecideRollbackRequest(
            proposed=proposed(rollback_id="rb-2", target_checkpoint=bad, to_step=200), checkpoints=only_bad
        )
        decision = (await controller.call("rollback", "DecideRollback", request)).decision
        assert decision.state == run_service_pb2.Rollback.STATE_PAUSED
        assert not decision.target_checkpoint


async def test_a_person_rolls_a_run_back_and_its_versions_with_it(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, trainer, _):
        trainer.promote()
        target = trainer.save(100, 20.0)
        await routed(controller, "1")
        trainer.save(300, 90.0)
        await routed(controller, "2")
        change = types_pb2.Change(request_id="mine", reason="looks odd", actor="ana")
        request = rollback_service_pb2.RollbackRunRequest(change=change, run="runs/r", checkpoint=target)
        done = await controller.call("rollback", "RollbackRun", request)
        assert list(done.record.affected_versions) == ["models/policy/versions/2"]
        assert len(done.swaps) == 1
        await routed(controller, "1")
        assert trainer.rollbacks[0].quarantine_younger
        again = await controller.call("rollback", "RollbackRun", request)
        assert again.record.rollback_id == done.record.rollback_id
        assert len(trainer.rollbacks) == 1
        request.checkpoint = "runs/r/checkpoints/other"
        with pytest.raises(AlreadyExists):
            await controller.call("rollback", "RollbackRun", request)


async def test_without_a_trainer_a_rollback_says_so(tmp_path: Path) -> None:
    async with a_replica(tmp_path) as replica, a_controller(tmp_path, [replica.url]) as controller:
        with pytest.raises(Unavailable) as caught:
            await controller.call("rollback", "RollbackRun", rollback_service_pb2.RollbackRunRequest(run="runs/r"))
        assert caught.value.reason == "TRAINER_UNREACHABLE"
        with pytest.raises(InvalidArgument) as refused:
            await controller.call("rollback", "DecideRollback", rollback_service_pb2.DecideRollbackRequest())
        assert refused.value.field == "proposed.rollback_id"


async def test_policies_are_data(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, trainer, _):
        trainer.promote(min_improvement=5.0)
        trainer.save(100, 20.0)
        await routed(controller, "1")
        listed = await controller.call("policy", "ListPolicies", policy_service_pb2.ListPoliciesRequest())
        assert {(p.kind, p.name) for p in listed.policies} == {
            ("guard", "classic"),
            ("guard", "robust"),
            ("promotion", "runs/r"),
        }
        request = policy_service_pb2.GetPolicyRequest(kind="promotion", name="runs/r")
        policy = (await controller.call("policy", "GetPolicy", request)).policy
        assert policy.spec["min_improvement"] == 5.0
        with pytest.raises(NotFound):
            await controller.call("policy", "GetPolicy", policy_service_pb2.GetPolicyRequest(kind="guard", name="none"))
        with pytest.raises(Unimplemented):
            await controller.call("policy", "Backtest", policy_service_pb2.BacktestRequest())
