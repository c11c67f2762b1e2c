"""The controller over real sockets with real replicas and models: swaps to their end, refusals that touch nothing, restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio
from onnx import TensorProto, helper, numpy_helper

import onnx_models
from controller_world import Controller, a_controller, state_of
from interlock.api.controller.v1 import model_service_pb2, route_service_pb2, swap_service_pb2
from interlock.api.inference.v1 import runtime_service_pb2
from interlock.api.oip import messages
from interlock.api.types.v1 import types_pb2
from interlock.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    IllegalTransition,
    InterlockError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)
from interlock.stores import artifacts, modelspec
from interlock.stores.modelspec import GateSpec
from replica_world import Remote, a_replica

V1, V2, V3 = (f"models/policy/versions/{n}" for n in (1, 2, 3))


@asynccontextmanager
async def a_world(home: Path) -> AsyncIterator[tuple[Controller, Remote]]:
    async with a_replica(home) as replica, a_controller(home, [replica.url]) as controller:
        yield controller, replica


async def answer(replica: Remote) -> tuple[float, str]:
    """(what the model says, the version that the response names)."""
    request = messages.ModelInferRequest(
        model_name="policy", raw_input_contents=[np.zeros((1, 4), np.float32).tobytes()]
    )
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    response = await replica.oip.ModelInfer(request, timeout=10)
    return float(np.frombuffer(response.raw_output_contents[0], np.float32)[0]), str(response.model_version)


async def routed(replica: Remote, epoch: int) -> None:
    """Waits until a replica applies an epoch."""
    watch = replica.runtime.WatchState(runtime_service_pb2.WatchStateRequest())
    async with asyncio.timeout(20):
        while epoch not in [route.epoch for route in (await watch.read()).state.routes]:
            pass
    watch.cancel()


async def test_two_versions_are_swapped_under_load_without_a_failed_request(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, replica):
        first = await controller.swap_to(await controller.register(1.0))
        assert state_of(first) == "COMPLETED"
        stop, seen = asyncio.Event(), []

        async def load() -> None:
            while not stop.is_set():
                seen.append(await answer(replica))

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(load())
            swap = await controller.create(await controller.register(2.0))
            states = [state_of(s) for s in await controller.watch(swap.name)]
            await asyncio.sleep(0.05)
            stop.set()
        assert {value for value, _ in seen} == {1.0, 2.0}
        assert all(str(int(value)) == version for value, version in seen), (
            "an answer's weights differ from the version it names"
        )
        assert list(dict.fromkeys(states)) == [
            "PENDING",
            "ADMITTING",
            "LOADING",
            "WARMING",
            "VERIFYING",
            "SWITCHING",
            "SOAKING",
            "DRAINING",
            "KEEP_WARM",
            "COMPLETED",
        ]
        receipt = await controller.receipt(swap.name)
        assert (receipt.failed_count, receipt.cut_count) == (0, 0)
        assert (receipt.epoch_before, receipt.epoch_after) == (1, 2)
        assert receipt.compare_sample_count > 0
        assert receipt.compare_max_abs_error == 1.0
        assert 0 < receipt.switch_duration.ToNanoseconds() < 1e9  # S1: the switch takes less than a second
        assert len(receipt.trace_id) == 32
        assert [e.state for e in receipt.events][-1] == receipt.state
        assert [s.version for s in (await replica.state()).slots] == [V2]


async def test_a_version_that_does_not_load_leaves_stable_untouched(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        ended = await controller.swap_to(await controller.register(2.0, b"this is not a model"))
        assert state_of(ended) == "FAILED"
        assert ended.reason == "INVALID_ARTIFACT", ended.message
        assert (await controller.route()).epoch == 1
        assert await answer(replica) == (1.0, "1")
        assert [s.version for s in (await replica.state()).slots] == [V1]
        receipt = await controller.receipt(ended.name)
        assert receipt.epoch_after == 1


async def test_another_signature_is_refused(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        ended = await controller.swap_to(await controller.register(2.0, onnx_models.constant(2.0, columns=7)))
        assert state_of(ended) == "FAILED"
        assert ended.reason in {"SIGNATURE_MISMATCH", "INVALID_ARTIFACT"}, ended
        assert await answer(replica) == (1.0, "1")


async def test_outputs_that_differ_too_much_are_refused(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        limits = swap_service_pb2.CompareLimits(abs_error_max=0.5)
        ended = await controller.swap_to(await controller.register(2.0), compare_limits=limits)
        assert (state_of(ended), ended.reason) == ("FAILED", "COMPARISON_FAILED")
        ended = await controller.swap_to(await controller.register(float("nan")))
        assert (state_of(ended), ended.reason) == ("FAILED", "COMPARISON_FAILED")
        assert await answer(replica) == (1.0, "1")


async def test_bytes_that_changed_on_disk_are_not_served(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, _):
        await controller.swap_to(await controller.register(1.0))
        version = await controller.register(2.0)
        path = tmp_path / "models" / "policy" / "2" / "model.onnx"
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
        ended = await controller.swap_to(version)
        assert (state_of(ended), ended.reason) == ("FAILED", "DIGEST_MISMATCH")


async def test_rollback_to_the_version_before_and_back_by_name(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        await controller.swap_to(await controller.register(2.0))
        request = model_service_pb2.RollbackModelRequest(model="models/policy", quarantine=True)
        back = (await controller.call("model", "RollbackModel", request)).swap
        assert state_of((await controller.watch(back.name))[-1]) == "COMPLETED"
        assert await answer(replica) == (1.0, "1")
        assert (await controller.receipt(back.name)).compare_sample_count == 0  # fast track: proven before
        request = model_service_pb2.RollbackModelRequest(model="models/policy", version=V2)
        with pytest.raises(FailedPrecondition) as caught:
            await controller.call("model", "RollbackModel", request)
        assert caught.value.reason == "QUARANTINED"


async def test_a_soaking_swap_is_reverted_and_its_version_quarantined(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        swap = await controller.create(await controller.register(2.0), soak_duration=Duration(seconds=60))
        await controller.watch(swap.name, until="SOAKING")
        assert await answer(replica) == (2.0, "2")
        await controller.tell("AbortSwap", swap.name)
        ended = (await controller.watch(swap.name))[-1]
        assert state_of(ended) == "REVERTED"
        assert (await controller.route()).epoch == 3
        assert await answer(replica) == (1.0, "1")
        with pytest.raises(FailedPrecondition) as caught:
            await controller.create(V2)
        assert caught.value.reason == "QUARANTINED"
        again = await controller.swap_to(V2, force=True)
        assert state_of(again) == "COMPLETED"


def only_one_row(value: float) -> bytes:
    """Like `onnx_models.constant`, and fails for any other number of rows than one."""
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["row"]),  # fails at run time unless x has four elements
        helper.make_node("Add", ["x", "row"], ["sum"]),
        helper.make_node("Mul", ["sum", "zero"], ["z"]),
        helper.make_node("Add", ["z", "value"], ["y"]),
    ]
    weights = {"shape": np.array([1, 4], np.int64), "zero": np.float32(0), "value": np.float32(value)}
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    tensors = tuple(numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
    return onnx_models.make(nodes, [info[0]], [info[1]], tensors)


async def test_a_version_that_fails_real_requests_is_reverted_by_itself(tmp_path: Path) -> None:
    """Warm-up and comparison saw single rows only; traffic brings pairs. The error rate condemns the version while it soaks."""
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        for _ in range(70):
            await answer(replica)
        swap = await controller.create(
            await controller.register(2.0, only_one_row(2.0)), soak_duration=Duration(seconds=600)
        )
        await controller.watch(swap.name, until="SOAKING")
        pair = messages.ModelInferRequest(
            model_name="policy", raw_input_contents=[np.zeros((2, 4), np.float32).tobytes()]
        )
        pair.inputs.add(name="x", datatype="FP32", shape=[2, 4])
        num_failed, back = 0, False
        async with asyncio.timeout(30):
            while not back:
                try:
                    await replica.oip.ModelInfer(pair, timeout=10)
                    back = True
                except aio.AioRpcError:
                    num_failed += 1
        ended = (await controller.watch(swap.name))[-1]
        assert (state_of(ended), ended.reason) == ("REVERTED", "ERROR_RATE")
        assert await answer(replica) == (1.0, "1")
        assert 20 <= (await controller.receipt(swap.name)).failed_count <= num_failed
        story = await controller.call(
            "model", "Explain", model_service_pb2.ExplainRequest(model="models/policy", version=V2)
        )
        assert story.version.state == model_service_pb2.Version.STATE_QUARANTINED


async def test_forbidding_what_serves_moves_the_traffic(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        await controller.swap_to(await controller.register(2.0))
        request = model_service_pb2.QuarantineRequest(
            version=V2, quarantined=True, change=types_pb2.Change(reason="drifts")
        )
        response = await controller.call("model", "Quarantine", request)
        assert state_of((await controller.watch(response.swap))[-1]) == "COMPLETED"
        assert await answer(replica) == (1.0, "1")
        story = await controller.call(
            "model", "Explain", model_service_pb2.ExplainRequest(model="models/policy", version=V2)
        )
        assert story.sentences[-1] == "version 2 must not serve: drifts"
        assert any("registered by hand" in sentence for sentence in story.sentences)


async def test_a_version_that_fell_short_of_its_own_gate_is_on_record_and_never_serves(tmp_path: Path) -> None:
    """004 part H-5; nothing forces it: whoever wants it makes it again with another limit."""
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        folder = tmp_path / "artifacts" / "short"
        onnx_models.write_version(folder, onnx_models.constant(2.0))
        gate = GateSpec("top-1 accuracy", 0.97, 0.90, 0.005, 128, "digits")
        modelspec.write_spec(folder, replace(modelspec.read_spec(folder), gate=gate))
        artifacts.write_manifest(folder)
        request = model_service_pb2.RegisterVersionRequest(model="models/policy", artifact_uri=str(folder))
        registered = (await controller.call("model", "RegisterVersion", request)).version
        assert registered.state == model_service_pb2.Version.STATE_GATE_FAILED
        assert registered.message.startswith("top-1 accuracy fell from 0.9700 to 0.9000 on 128 samples")
        for force in (False, True):
            with pytest.raises(FailedPrecondition, match="must not serve: top-1 accuracy fell") as refused:
                await controller.create(registered.name, force=force)
            assert (refused.value.reason, refused.value.field) == ("GATE_FAILED", "spec.candidate_version")
        weights = [types_pb2.RouteWeight(version=V1, weight=1), types_pb2.RouteWeight(version=V2, weight=1)]
        split = route_service_pb2.SetRouteRequest(
            model="models/policy", expected_epoch=(await controller.route()).epoch, weights=weights
        )
        with pytest.raises(FailedPrecondition) as refused:
            await controller.call("route", "SetRoute", split)
        assert (refused.value.reason, refused.value.field) == ("GATE_FAILED", "weights[1].version")
        assert await answer(replica) == (1.0, "1")


async def test_the_gate_waits_for_a_person(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        swap = await controller.create(await controller.register(2.0), approval_required=True)
        await controller.watch(swap.name, until="GATED")
        with pytest.raises(Aborted) as caught:
            await controller.create(await controller.register(3.0))
        assert caught.value.reason == "SWAP_IN_PROGRESS"
        assert caught.value.metadata["swap"] == swap.name.removeprefix("swaps/")
        assert await answer(replica) == (1.0, "1")
        await controller.tell("ApproveSwap", swap.name)
        assert state_of((await controller.watch(swap.name))[-1]) == "COMPLETED"
        assert await answer(replica) == (2.0, "2")
        with pytest.raises(FailedPrecondition) as refused:
            await controller.tell("AbortSwap", swap.name)
        assert refused.value.reason == IllegalTransition.default_reason
        assert "RollbackModel" in refused.value.message


async def test_a_canary_takes_its_share_and_is_promoted_early(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        swap = await controller.create(
            await controller.register(2.0),
            strategy=swap_service_pb2.SwapSpec.STRATEGY_CANARY,
            canary_percents=[25, 50],
            canary_step_duration=Duration(seconds=600),
        )
        await controller.watch(swap.name, until="CANARY")
        split = [(await answer(replica))[1] for _ in range(40)]
        assert split.count("2") == 10
        await controller.tell("PromoteSwap", swap.name)
        assert state_of((await controller.watch(swap.name))[-1]) == "COMPLETED"
        assert (await controller.route()).epoch == 3
        assert (await controller.receipt(swap.name)).verdicts


async def test_a_held_swap_stands_still(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, _replica):
        await controller.swap_to(await controller.register(1.0))
        swap = await controller.create(await controller.register(2.0), soak_duration=Duration(nanos=300_000_000))
        await controller.watch(swap.name, until="SOAKING")
        held = await controller.tell("PauseSwap", swap.name)
        assert held.message.endswith("(held)")
        await asyncio.sleep(0.6)  # longer than the soak
        assert state_of(await controller.get(swap.name)) == "SOAKING"
        await controller.tell("ResumeSwap", swap.name)
        assert state_of((await controller.watch(swap.name))[-1]) == "COMPLETED"


async def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        first = await controller.create(await controller.register(2.0), approval_required=True)
        await controller.watch(first.name, until="GATED")
        queue = swap_service_pb2.SwapSpec.CONCURRENCY_QUEUE
        second = await controller.create(await controller.register(3.0), concurrency=queue)
        with pytest.raises(ResourceExhausted) as caught:
            await controller.create(await controller.register(4.0), concurrency=queue)
        assert caught.value.retry_after_seconds
        assert state_of(await controller.get(second.name)) == "PENDING"
        await controller.tell("RejectSwap", first.name)
        assert state_of((await controller.watch(second.name))[-1]) == "COMPLETED"
        assert state_of(await controller.get(first.name)) == "REJECTED"
        assert await answer(replica) == (3.0, "3")


async def test_the_newest_supersedes(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        held = await controller.create(await controller.register(2.0), approval_required=True)
        await controller.watch(held.name, until="GATED")
        newer = await controller.create(
            await controller.register(3.0), concurrency=swap_service_pb2.SwapSpec.CONCURRENCY_SUPERSEDE
        )
        assert state_of((await controller.watch(newer.name))[-1]) == "COMPLETED"
        assert state_of(await controller.get(held.name)) == "SUPERSEDED"
        assert await answer(replica) == (3.0, "3")
        assert [s.version for s in (await replica.state()).slots] == [V3]


async def test_a_request_id_means_one_swap(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, _):
        version = await controller.register(1.0)
        first = await controller.create(version, request_id="once")
        again = await controller.create(version, request_id="once")
        assert again.name == first.name
        await controller.watch(first.name)
        assert (await controller.create(version, request_id="once")).name == first.name
        with pytest.raises(AlreadyExists) as caught:
            await controller.create(await controller.register(2.0), request_id="once")
        assert caught.value.reason == "REQUEST_ID_REUSED"


async def test_the_same_bytes_are_the_same_version(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, _):
        assert await controller.register(1.0) == V1
        assert await controller.register(1.0) == V1
        assert await controller.register(2.0) == V2


async def test_a_route_by_hand_splits_traffic_and_needs_the_current_epoch(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        await controller.register(2.0)
        weights = [types_pb2.RouteWeight(version=V1, weight=3), types_pb2.RouteWeight(version=V2, weight=1)]
        request = route_service_pb2.SetRouteRequest(model="models/policy", expected_epoch=1, weights=weights)
        assert (await controller.call("route", "SetRoute", request)).route.epoch == 2
        with pytest.raises(Aborted) as caught:
            await controller.call("route", "SetRoute", request)
        assert caught.value.reason == "STALE_EPOCH"
        await routed(replica, 2)
        versions = [(await answer(replica))[1] for _ in range(40)]
        assert versions.count("2") == 10


async def test_a_replica_that_comes_late_is_brought_to_the_route(tmp_path: Path) -> None:
    async with a_replica(tmp_path / "a") as first, a_replica(tmp_path / "b") as second:
        async with a_controller(tmp_path, [first.url]) as controller:
            await controller.swap_to(await controller.register(1.0))
        async with a_controller(tmp_path, [first.url, second.url]) as controller:
            await routed(second, 1)
            assert await answer(second) == (1.0, "1")
            swap = await controller.swap_to(await controller.register(2.0))
            assert state_of(swap) == "COMPLETED"
            assert await answer(first) == await answer(second) == (2.0, "2")


async def test_a_controller_that_restarts_takes_its_swap_up(tmp_path: Path) -> None:
    async with a_replica(tmp_path) as replica:
        async with a_controller(tmp_path, [replica.url]) as controller:
            await controller.swap_to(await controller.register(1.0))
            swap = await controller.create(await controller.register(2.0), approval_required=True)
            await controller.watch(swap.name, until="GATED")
        assert await answer(replica) == (1.0, "1")  # the data plane does without a controller
        async with a_controller(tmp_path, [replica.url]) as controller:
            assert state_of(await controller.get(swap.name)) == "GATED"
            await controller.tell("ApproveSwap", swap.name)
            assert state_of((await controller.watch(swap.name))[-1]) == "COMPLETED"
            assert (await controller.route()).epoch == 2


def _create(**spec: Any) -> swap_service_pb2.CreateSwapRequest:
    return swap_service_pb2.CreateSwapRequest(spec=swap_service_pb2.SwapSpec(**spec))


@pytest.mark.parametrize(
    ("service", "method", "request_", "error", "reason"),
    [
        ("swap", "GetSwap", swap_service_pb2.GetSwapRequest(name="swaps/none"), NotFound, "SWAP_NOT_FOUND"),
        ("swap", "GetSwap", swap_service_pb2.GetSwapRequest(name="none"), InvalidArgument, "INVALID_NAME"),
        (
            "swap",
            "ListSwaps",
            swap_service_pb2.ListSwapsRequest(page_token="none"),
            InvalidArgument,
            "INVALID_PAGE_TOKEN",
        ),
        ("swap", "CreateSwap", _create(candidate_version="models/policy"), InvalidArgument, "INVALID_NAME"),
        ("swap", "CreateSwap", _create(candidate_version="models/none/versions/1"), NotFound, "MODEL_NOT_FOUND"),
        ("swap", "CreateSwap", _create(candidate_version="models/policy/versions/9"), NotFound, "VERSION_NOT_FOUND"),
        ("swap", "CreateSwap", _create(candidate_version=V1), FailedPrecondition, "ALREADY_STABLE"),
        ("swap", "CreateSwap", _create(candidate_version=V1, strategy=3), Unimplemented, "PLANNED"),
        ("swap", "CreateSwap", _create(candidate_version=V1, strategy=2), InvalidArgument, "INVALID_SPEC"),
        (
            "model",
            "RollbackModel",
            model_service_pb2.RollbackModelRequest(model="models/policy"),
            FailedPrecondition,
            "NO_EARLIER_VERSION",
        ),
        ("model", "GetModel", model_service_pb2.GetModelRequest(name="models/none"), NotFound, "MODEL_NOT_FOUND"),
        (
            "model",
            "RegisterVersion",
            model_service_pb2.RegisterVersionRequest(model="models/policy", artifact_uri="/nowhere/at/all"),
            NotFound,
            "ARTIFACT_MISSING",
        ),
        (
            "model",
            "RegisterVersion",
            model_service_pb2.RegisterVersionRequest(model="models/policy", artifact_uri="http://evil/x"),
            InvalidArgument,
            "INVALID_ARTIFACT_URI",
        ),
        (
            "route",
            "SetRoute",
            route_service_pb2.SetRouteRequest(
                model="models/policy", expected_epoch=1, weights=[types_pb2.RouteWeight(version=V1, weight=-1)]
            ),
            InvalidArgument,
            "INVALID_WEIGHTS",
        ),
    ],
)
async def test_refusals_are_precise_and_touch_nothing(
    tmp_path: Path, service: str, method: str, request_: Any, error: type[InterlockError], reason: str
) -> None:
    async with a_world(tmp_path) as (controller, replica):
        await controller.swap_to(await controller.register(1.0))
        with pytest.raises(error) as caught:
            await controller.call(service, method, request_)
        assert caught.value.reason == reason
        assert await answer(replica) == (1.0, "1")
        assert (await controller.route()).epoch == 1


async def test_a_dry_run_says_what_would_happen(tmp_path: Path) -> None:
    async with a_world(tmp_path) as (controller, _):
        await controller.swap_to(await controller.register(1.0))
        spec = swap_service_pb2.SwapSpec(candidate_version=V1)
        said = await controller.call("swap", "ValidateSwap", swap_service_pb2.ValidateSwapRequest(spec=spec))
        assert (said.valid, said.stable_version) == (False, V1)
        assert said.findings[0].startswith("ALREADY_STABLE")
        spec.candidate_version = await controller.register(2.0)
        said = await controller.call("swap", "ValidateSwap", swap_service_pb2.ValidateSwapRequest(spec=spec))
        assert said.valid
        assert len((await controller.call("swap", "ListSwaps", swap_service_pb2.ListSwapsRequest())).swaps) == 1
