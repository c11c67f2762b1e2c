"""The inference room over real sockets: tritonclient works unchanged, bad input is refused precisely, commands and health do what they say."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.utils import InferenceServerException

import onnx_models
from interlock.api.controller.v1 import route_service_pb2 as route_pb
from interlock.api.controller.v1 import route_service_pb2_grpc as route_grpc
from interlock.api.controller.v1 import swap_service_pb2 as swap_pb
from interlock.api.controller.v1 import swap_service_pb2_grpc as swap_grpc
from interlock.api.inference.v1 import runtime_service_pb2 as pb
from interlock.api.oip import messages, rpc
from interlock.api.types.v1 import types_pb2
from interlock.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    InterlockError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from interlock.runtime.access import Keys, Scope, hash_key, new_key
from interlock.runtime.status import from_rpc_error
from interlock.stores.modelspec import BatchingSpec
from replica_world import CALLER, Remote, a_replica

# tritonclient's own code
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tritonclient.*", "ignore::ResourceWarning")


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[Remote]:
    async with a_replica(tmp_path) as made:
        yield made


@pytest.fixture
async def served(remote: Remote) -> Remote:
    await remote.load("1", step=1500)
    await remote.route(1, "1")
    return remote


def infer_request(values: Any = None, **more: Any) -> messages.ModelInferRequest:
    x = np.zeros((1, 4), np.float32) if values is None else values
    request = messages.ModelInferRequest(model_name="policy", raw_input_contents=[x.tobytes()], **more)
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    return request


async def infer(
    remote: Remote, request: messages.ModelInferRequest, timeout: float = 10.0
) -> messages.ModelInferResponse:
    return await CALLER.unary(remote.oip.ModelInfer, request, timeout=timeout)


# --- tritonclient ---


def triton_story(url: str) -> dict[str, Any]:
    """What a synchronous tritonclient sees; runs in a thread."""
    with triton.InferenceServerClient(url) as client:
        x = triton.InferInput("x", [2, 4], "FP32")
        x.set_data_from_numpy(np.ones((2, 4), np.float32))
        result = client.infer(
            "policy", [x], outputs=[triton.InferRequestedOutput("y")], request_id="r-1", client_timeout=10.0
        )
        return {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model": client.is_model_ready("policy"),
            "version": client.is_model_ready("policy", "1"),
            "other": client.is_model_ready("policy", "2"),
            "none": client.is_model_ready("none"),
            "server": client.get_server_metadata(as_json=True),
            "metadata": client.get_model_metadata("policy", as_json=True),
            "config": client.get_model_config("policy", as_json=True)["config"],
            "statistics": client.get_inference_statistics("policy", as_json=True)["model_stats"],
            "index": client.get_model_repository_index(as_json=True)["models"],
            "y": result.as_numpy("y"),
            "response": result.get_response(as_json=True),
        }


async def test_tritonclient(served: Remote) -> None:
    served.artifact("2")
    seen = await asyncio.to_thread(triton_story, served.url)
    assert [seen[k] for k in ("live", "ready", "model", "version", "other", "none")] == [
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    assert seen["server"]["name"] == "interlock"
    tensor = {"datatype": "FP32", "shape": ["-1", "4"]}
    assert seen["metadata"] == {
        "name": "policy",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", **tensor}],
        "outputs": [{"name": "y", **tensor}],
    }
    assert seen["config"]["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": ["-1", "4"]}]
    assert seen["config"]["backend"] == "onnxruntime"
    assert seen["config"]["instance_group"] == [{"kind": "KIND_CPU"}]
    (stats,) = seen["statistics"]
    assert (stats["inference_count"], stats["execution_count"], stats["inference_stats"]["success"]["count"]) == (
        "2",
        "1",
        "1",
    )
    assert int(stats["last_inference"]) > 1_600_000_000_000
    assert [(m["name"], m["version"], m["state"]) for m in seen["index"]] == [
        ("policy", "1", "READY"),
        ("policy", "2", "UNAVAILABLE"),
    ]
    assert seen["y"].tolist() == [[1.0] * 4] * 2
    parameters = seen["response"]["parameters"]
    assert seen["response"]["id"] == "r-1"
    assert parameters["interlock-version"] == {"string_param": "models/policy/versions/1"}
    assert parameters["interlock-step"] == {"int64_param": "1500"}
    assert parameters["interlock-epoch"] == {"int64_param": "1"}
    assert parameters["interlock-digest"]["string_param"].startswith("blake3:")


async def test_tritonclient_aio_and_stream(served: Remote) -> None:
    async with triton_aio.InferenceServerClient(served.url) as client:
        x = triton_aio.InferInput("x", [1, 4], "FP32")
        x.set_data_from_numpy(np.zeros((1, 4), np.float32))
        assert await client.is_server_live()
        assert (await client.infer("policy", [x], client_timeout=5.0)).as_numpy("y").tolist() == [[1.0] * 4]
        with pytest.raises(InferenceServerException, match="not loaded"):
            await client.infer("none", [x])

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for name in ("policy", "none", "policy"):
                yield {"model_name": name, "inputs": [x], "request_id": name}

        answers = [(result, error) async for result, error in client.stream_infer(requests())]
    assert [error is None for _, error in answers] == [True, False, True]
    assert "not loaded" in str(answers[1][1])
    assert answers[2][0].as_numpy("y").tolist() == [[1.0] * 4]


async def test_tritonclient_repository_verbs_without_a_controller_say_who_is_missing(served: Remote) -> None:
    async with triton_aio.InferenceServerClient(served.url) as client:
        with pytest.raises(InferenceServerException) as unavailable:
            await client.load_model("policy")
        assert unavailable.value.status() == "StatusCode.UNAVAILABLE"
        with pytest.raises(InferenceServerException, match="no version in the repository"):
            await client.load_model("none")
        with pytest.raises(InferenceServerException, match="not supported"):
            await client.get_system_shared_memory_status()
    assert (await served.state()).routes[0].epoch == 1


class Controller(swap_grpc.SwapServiceServicer, route_grpc.RouteServiceServicer):
    """Answers what a replica asks of a controller; remembers it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.ends = [swap_pb.Swap.STATE_LOADING, swap_pb.Swap.STATE_COMPLETED]

    async def CreateSwap(self, request: Any, context: Any) -> Any:
        self.asked.append(request.spec.candidate_version)
        return swap_pb.CreateSwapResponse(swap=swap_pb.Swap(name="swaps/1"))

    async def WatchSwap(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for state in self.ends:
            yield swap_pb.WatchSwapResponse(
                swap=swap_pb.Swap(name=request.name, state=state, message="told so", reason="TOLD")
            )

    async def GetRoute(self, request: Any, context: Any) -> Any:
        return route_pb.GetRouteResponse(route=types_pb2.Route(model=request.model, epoch=5))

    async def SetRoute(self, request: Any, context: Any) -> Any:
        self.asked.append((request.model, request.expected_epoch, len(request.weights)))
        return route_pb.SetRouteResponse()


async def test_repository_verbs_are_the_controllers(tmp_path: Path) -> None:
    """Triton's client and KServe's alike; the model's name stands in field 2 or in field 1."""
    server, controller = aio.server(), Controller()
    swap_grpc.add_SwapServiceServicer_to_server(controller, server)
    route_grpc.add_RouteServiceServicer_to_server(controller, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with (
        a_replica(tmp_path, controller_port=port) as remote,
        triton_aio.InferenceServerClient(remote.url) as client,
    ):
        for version in ("2", "10"):
            remote.artifact(version)
        await client.load_model("policy")
        kserve = messages.RepositoryModelLoadRequest(repository_name="policy")
        kserve.parameters["version"].string_param = "2"
        assert (await remote.oip.RepositoryModelLoad(kserve)).isLoaded
        await client.unload_model("policy")
        newest = "models/policy/versions/10"
        assert controller.asked == [newest, "models/policy/versions/2", ("models/policy", 5, 0)]
        controller.ends = [swap_pb.Swap.STATE_FAILED]
        with pytest.raises(FailedPrecondition, match="STATE_FAILED: told so") as failed:
            await CALLER.unary(remote.oip.RepositoryModelLoad, kserve, timeout=5)
        assert (failed.value.reason, failed.value.metadata["cause"]) == ("SWAP_FAILED", "TOLD")
        controller.ends = []
        with pytest.raises(Unavailable):
            await CALLER.unary(remote.oip.RepositoryModelLoad, kserve, timeout=5)
    await server.stop(None)


# --- requests ---


async def test_a_readable_request_gets_a_readable_answer(served: Remote) -> None:
    request = messages.ModelInferRequest(model_name="policy")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4]).contents.fp32_contents.extend([0, 0, 0, 0])
    response = await infer(served, request)
    assert list(response.outputs[0].contents.fp32_contents) == [1.0] * 4
    assert not response.raw_output_contents


async def test_a_timeout_of_zero_is_none(served: Remote) -> None:
    request = infer_request()
    request.parameters["timeout"].int64_param = 0
    assert (await infer(served, request)).model_version == "1"


async def test_a_traced_request_names_its_trace(served: Remote) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    response = await served.oip.ModelInfer(infer_request(), metadata=(("traceparent", trace),))
    assert response.parameters["traceparent"].string_param.split("-")[1] == trace.split("-")[1]


Spoil = Callable[[messages.ModelInferRequest], Any]
BAD: dict[str, tuple[Spoil, type[InterlockError], str, str]] = {
    "unknown model": (lambda r: setattr(r, "model_name", "none"), NotFound, "MODEL_NOT_FOUND", ""),
    "no model": (lambda r: r.ClearField("model_name"), InvalidArgument, "INVALID_NAME", "model_name"),
    "unknown version": (lambda r: setattr(r, "model_version", "9"), NotFound, "VERSION_NOT_FOUND", ""),
    "wrong rank": (lambda r: r.inputs[0].shape.append(1), InvalidArgument, "INVALID_TENSOR", "inputs[0].shape"),
    "wrong dimension": (
        lambda r: r.inputs[0].shape.__setitem__(1, 5),
        InvalidArgument,
        "INVALID_TENSOR",
        "inputs[0].shape",
    ),
    "negative dimension": (
        lambda r: r.inputs[0].shape.__setitem__(0, -1),
        InvalidArgument,
        "INVALID_TENSOR",
        "inputs[0].shape",
    ),
    "absurd dimension": (
        lambda r: r.inputs[0].shape.__setitem__(0, 2**62),
        InvalidArgument,
        "INVALID_TENSOR",
        "inputs[0].shape",
    ),
    "wrong datatype": (
        lambda r: setattr(r.inputs[0], "datatype", "INT32"),
        InvalidArgument,
        "INVALID_TENSOR",
        "inputs[0].datatype",
    ),
    "missing tensor": (lambda r: r.ClearField("inputs"), InvalidArgument, "INVALID_TENSOR", "inputs"),
    "unknown tensor": (
        lambda r: setattr(r.inputs[0], "name", "z"),
        InvalidArgument,
        "INVALID_TENSOR",
        "inputs[0].name",
    ),
    "tensor twice": (
        lambda r: r.inputs.add().CopyFrom(r.inputs[0]),
        InvalidArgument,
        "INVALID_TENSOR",
        "inputs[1].name",
    ),
    "unknown output": (lambda r: r.outputs.add(name="z"), InvalidArgument, "INVALID_TENSOR", "outputs[0].name"),
    "truncated raw": (
        lambda r: r.raw_input_contents.__setitem__(0, b"\0" * 15),
        InvalidArgument,
        "INVALID_TENSOR",
        "raw_input_contents[0]",
    ),
    "raw too long": (
        lambda r: r.raw_input_contents.__setitem__(0, b"\0" * 17),
        InvalidArgument,
        "INVALID_TENSOR",
        "raw_input_contents[0]",
    ),
    "raw too many": (
        lambda r: r.raw_input_contents.append(b""),
        InvalidArgument,
        "INVALID_TENSOR",
        "raw_input_contents",
    ),
    "raw and typed": (
        lambda r: r.inputs[0].contents.fp32_contents.append(1),
        InvalidArgument,
        "INVALID_TENSOR",
        "inputs[0].contents",
    ),
    "no elements": (
        lambda r: r.ClearField("raw_input_contents"),
        InvalidArgument,
        "INVALID_TENSOR",
        "inputs[0].contents",
    ),
    "shared memory": (
        lambda r: setattr(r.inputs[0].parameters["shared_memory_region"], "string_param", "a"),
        Unimplemented,
        "SHARED_MEMORY",
        "",
    ),
    "no time": (lambda r: setattr(r.parameters["timeout"], "int64_param", 1), DeadlineExceeded, "DEADLINE_EXPIRED", ""),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_requests_are_refused_precisely(served: Remote, case: str) -> None:
    spoil, error, reason, field = BAD[case]
    request = infer_request()
    spoil(request)
    with pytest.raises(error) as refused:
        await infer(served, request)
    assert (refused.value.reason, refused.value.field) == (reason, field)
    assert (await infer(served, infer_request())).model_version == "1"


async def test_a_typed_field_of_another_datatype_is_named(served: Remote) -> None:
    request = messages.ModelInferRequest(model_name="policy")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4]).contents.fp64_contents.extend([0, 0, 0, 0])
    with pytest.raises(InvalidArgument, match="FP32 goes into fp32_contents"):
        await infer(served, request)


async def test_a_body_of_100_mb_is_refused_and_the_server_goes_on(served: Remote) -> None:
    options = (("grpc.max_send_message_length", 200 << 20),)
    async with aio.insecure_channel(served.url, options=options) as channel:
        request = infer_request(np.zeros((100 << 18, 1), np.float32))
        with pytest.raises(aio.AioRpcError) as refused:
            await rpc.Stub(channel).ModelInfer(request, timeout=30)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max" in str(refused.value.details())
    assert (await infer(served, infer_request())).model_version == "1"


async def test_a_raw_body_of_100_mb_is_answered_where_it_is_allowed(tmp_path: Path) -> None:
    async with a_replica(tmp_path, max_message_mb=128) as remote:
        await remote.load("1")
        await remote.route(1, "1")
        rows = 100 * 1024 * 1024 // 16
        options = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
        async with aio.insecure_channel(remote.url, options=options) as channel:
            response = await rpc.Stub(channel).ModelInfer(infer_request(np.ones((rows, 4), np.float32)), timeout=60)
        assert len(response.raw_output_contents[0]) == rows * 16
        assert struct.unpack("<f", response.raw_output_contents[0][-4:]) == (1.0,)


async def test_expired_and_cancelled_requests_leave_nothing_behind(remote: Remote) -> None:
    await remote.load("1", onnx_models.slow(1.0))
    await remote.route(1, "1")
    with pytest.raises(DeadlineExceeded):
        await infer(remote, infer_request(), timeout=0.0005)
    call = remote.oip.ModelInfer(infer_request())
    await asyncio.sleep(0.002)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await remote.route(2)
    drained = await remote.drain("1")
    assert drained.cut_count == 0
    assert (await remote.state()).slots[0].in_flight_count == 0


# --- the controller's verbs ---


async def test_prepare_streams_its_progress_and_state_tells_the_rest(remote: Remote) -> None:
    uri = remote.artifact("3", step=7)
    progress = await remote.prepare("3", uri)
    assert progress[-1].progress_percent == 100.0
    assert progress[-1].slot.state == pb.Slot.STATE_WARMING_UP
    warm = await remote.command(
        "Warm", pb.WarmRequest(fence=remote.fence, version="models/policy/versions/3", iterations=7)
    )
    assert (warm.iterations, warm.recorded_count, warm.slot.state) == (7, 0, pb.Slot.STATE_READY)
    applied = await remote.route(1, "3")
    assert applied.route.epoch == 1
    assert applied.switch_duration.ToMilliseconds() < 1000  # REQUIREMENTS S1: the switch takes less than a second
    await infer(remote, infer_request())
    state = await remote.state()
    (slot,), (route,), (traffic,) = state.slots, state.routes, state.traffic
    assert (slot.state, slot.providers, slot.origin.step) == (pb.Slot.STATE_SERVING, ["CPUExecutionProvider"], 7)
    assert [(t.name, t.datatype, list(t.shape)) for t in slot.inputs] == [("x", "FP32", [-1, 4])]
    assert (route.model, route.epoch, route.weights[0].version) == ("models/policy", 1, "models/policy/versions/3")
    assert (traffic.success_count, traffic.failure_count) == (1, 0)
    assert state.fencing_token == 1


async def test_commands_that_are_refused(served: Remote) -> None:
    cases: list[tuple[str, Any, type[InterlockError], str]] = [
        ("ApplyRoute", served.route_request(0, "1"), InvalidArgument, "INVALID_EPOCH"),
        ("ApplyRoute", served.route_request(2, "9"), FailedPrecondition, "VERSION_NOT_READY"),
        ("ApplyRoute", served.route_request(1, "1", "1"), InvalidArgument, "INVALID_WEIGHTS"),
        (
            "Release",
            pb.ReleaseRequest(fence=served.fence, version="models/policy/versions/1"),
            FailedPrecondition,
            "VERSION_ROUTED",
        ),
        ("Release", pb.ReleaseRequest(fence=served.fence, version="policy/1"), InvalidArgument, "INVALID_NAME"),
        ("Release", pb.ReleaseRequest(version="models/policy/versions/1"), Aborted, "STALE_CONTROLLER"),
        ("Warm", pb.WarmRequest(fence=served.fence, version="models/policy/versions/9"), NotFound, "SLOT_UNKNOWN"),
        (
            "Warm",
            pb.WarmRequest(fence=served.fence, version="models/policy/versions/1", iterations=-1),
            InvalidArgument,
            "INVALID_ITERATIONS",
        ),
    ]
    for method, request, error, reason in cases:
        with pytest.raises(error) as refused:
            await served.command(method, request)
        assert refused.value.reason == reason
    for version, uri, error, reason in (
        ("2", str(served.home / "nothing"), NotFound, "ARTIFACT_MISSING"),
        ("2", "gs://bucket/x", InvalidArgument, "INVALID_ARTIFACT_URI"),
        ("..", served.artifact("2"), InvalidArgument, "INVALID_ID"),
        ("2", served.artifact("2", b"not onnx"), FailedPrecondition, "INVALID_ARTIFACT"),
    ):
        with pytest.raises(error) as refused:
            await served.prepare(version, uri)
        assert refused.value.reason == reason
    wrong = served.artifact("3", onnx_models.constant(3.0, columns=5), columns=5)
    with pytest.raises(FailedPrecondition, match=r"\[-1, 4\] against FP32 \[-1, 5\]") as mismatch:
        await served.prepare("3", wrong, compatible_with="models/policy/versions/1")
    assert mismatch.value.reason == "SIGNATURE_MISMATCH"
    assert (await infer(served, infer_request())).model_version == "1"


async def test_comparison_on_recorded_requests(served: Remote) -> None:
    for _ in range(3):
        await infer(served, infer_request())
    await served.load("2")
    names = {"stable_version": "models/policy/versions/1", "candidate_version": "models/policy/versions/2"}
    seen = await served.command("Compare", pb.CompareRequest(fence=served.fence, **names))
    assert (seen.sample_count, seen.recorded_count, seen.max_abs_error, seen.top1_agreement, seen.nonfinite_count) == (
        3,
        3,
        1.0,
        1.0,
        0,
    )
    names["candidate_version"] = "models/other/versions/2"
    with pytest.raises(InvalidArgument):
        await served.command("Compare", pb.CompareRequest(fence=served.fence, **names))


async def test_swaps_under_load_fail_nothing(served: Remote) -> None:
    """REQUIREMENTS S1, over the wire: every answer is the one of the version it names, and none is missing."""
    stop, answers = asyncio.Event(), []

    async def caller() -> None:
        while not stop.is_set():
            response = await infer(served, infer_request())
            (value,) = struct.unpack("<f", response.raw_output_contents[0][:4])
            answers.append((response.model_version, value, response.parameters["interlock-epoch"].int64_param))

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(caller())
        for n in range(2, 8):
            await served.swap(n, str(n - 1), str(n))
            await infer(served, infer_request())
        stop.set()
    assert all(float(version) == value == epoch for version, value, epoch in answers)
    assert len({version for version, _, _ in answers}) >= 6
    assert len(answers) > 50


async def test_models_do_not_touch_each_other(served: Remote) -> None:
    """REQUIREMENTS S4: several models at once, each with its own epochs, health and failures."""
    await served.load("7", model="value")
    await served.route(40, "7", model="value")
    await served.route(2, model="policy")
    await served.drain("1")
    await served.release("1")
    request = infer_request()
    with pytest.raises(Unavailable):
        await infer(served, request)
    request.model_name = "value"
    answer = await infer(served, request)
    assert (answer.model_version, answer.parameters["interlock-epoch"].int64_param) == ("7", 40)
    assert await health_of(served, "models/value") == health_pb2.HealthCheckResponse.SERVING
    assert await health_of(served, "models/policy") == health_pb2.HealthCheckResponse.NOT_SERVING
    assert {(route.model, route.epoch) for route in (await served.state()).routes} == {
        ("models/policy", 2),
        ("models/value", 40),
    }


async def test_watch_state_sends_the_state_now_and_after_each_change(served: Remote) -> None:
    watch = served.runtime.WatchState(pb.WatchStateRequest())
    first = (await watch.read()).state
    assert first.routes[0].epoch == 1
    await served.load("2")
    await served.route(2, "2")
    epochs = [first.routes[0].epoch]
    async with asyncio.timeout(10):
        while epochs[-1] != 2:
            epochs.append((await watch.read()).state.routes[0].epoch)
    watch.cancel()


# --- health, reflection, metrics, keys, life ---


async def health_of(remote: Remote, name: str) -> Any:
    return (await health_pb2_grpc.HealthStub(remote.channel).Check(health_pb2.HealthCheckRequest(service=name))).status


async def test_health_per_service_model_and_version(remote: Remote) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    for name in ("", "inference.GRPCInferenceService", "interlock.api.inference.v1.RuntimeService"):
        assert await health_of(remote, name) == serving
    await remote.load("1")
    watch = health_pb2_grpc.HealthStub(remote.channel).Watch(health_pb2.HealthCheckRequest(service="models/policy"))
    assert (await watch.read()).status == not_serving
    await remote.route(1, "1")
    assert (await watch.read()).status == serving
    assert await health_of(remote, "models/policy/versions/1") == serving
    await remote.load("2")
    await remote.route(2, "2")
    await remote.drain("1")
    await remote.release("1")
    assert await health_of(remote, "models/policy/versions/1") == not_serving
    await remote.route(3)
    assert (await watch.read()).status == not_serving
    watch.cancel()


async def test_reflection_describes_both_pools(remote: Remote) -> None:
    def look() -> tuple[list[str], list[str]]:
        with grpc.insecure_channel(remote.url) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            files = [
                database.FindFileContainingSymbol(s).name
                for s in ("inference.ModelInferRequest", "grpc.health.v1.Health")
            ]
            return sorted(database.get_services()), files

    services, files = await asyncio.to_thread(look)
    assert {
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "interlock.api.inference.v1.RuntimeService",
    } <= set(services)
    assert files == ["oip/grpc_service.proto", "grpc_health/v1/health.proto"]


async def test_metrics_and_http_health(served: Remote) -> None:
    await infer(served, infer_request())
    with pytest.raises(InvalidArgument):
        await infer(served, messages.ModelInferRequest(model_name="policy"))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.metrics_port}") as client:
        text = (await client.get("/metrics")).text
        health = await client.get("/health/ready")
    for line in (
        'llm_model_loaded{model="policy"} 1.0',
        'interlock_route_epoch{model="policy"} 1.0',
        'interlock_infer_requests_total{code="OK",model="policy",version="1"} 1.0',
        'interlock_infer_requests_total{code="INVALID_ARGUMENT",model="policy",version="1"} 1.0',
        'llm_errors_total{error_type="INVALID_TENSOR",model="policy"} 1.0',
        'llm_requests_total{mode="tensor",model="policy",status="success"} 1.0',
        'interlock_slot_state{model="policy",state="serving",version="1"} 1.0',
        'llm_active_requests{model="policy"} 0.0',
    ):
        assert line in text
    await served.swap(2, "1", "2")
    await infer(served, infer_request())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.metrics_port}") as client:
        text = (await client.get("/metrics")).text
    assert 'version="1"' not in text, "a released version's series are dropped"
    assert 'interlock_infer_seconds_count{model="policy",version="2"} 1.0' in text
    assert 'llm_requests_total{mode="tensor",model="policy",status="success"} 2.0' in text
    assert (health.status_code, health.json()) == (
        200,
        {"status": "ready", "models": {"policy": {"epoch": 1, "versions": {"1": 1}}}},
    )


async def test_commands_need_the_admin_scope_where_there_are_keys(served: Remote) -> None:
    key = new_key()
    (served.home / "keys.toml").write_text(
        f'[[keys]]\nname = "app"\nhash = "{hash_key(key)}"\nscopes = ["{Scope.INFER}"]\n'
    )
    answered = await served.oip.ModelInfer(infer_request(), metadata=(("x-api-key", key),))
    assert answered.model_version == "1"
    for metadata, code in ((("x-api-key", key),), "PERMISSION_DENIED"), ((), "UNAUTHENTICATED"):
        with pytest.raises(aio.AioRpcError) as refused:
            await served.runtime.ApplyRoute(served.route_request(2), metadata=metadata)
        assert from_rpc_error(refused.value).kind == code
    with pytest.raises(aio.AioRpcError):
        await served.oip.ModelInfer(infer_request())
    internal = (("x-api-key", Keys(served.home).internal_key()),)
    assert (await served.runtime.GetState(pb.GetStateRequest(), metadata=internal)).state.routes[0].epoch == 1


async def test_a_restarted_room_serves_its_last_assignment(tmp_path: Path) -> None:
    async with a_replica(tmp_path) as before:
        await before.load("1")
        await before.load("2")
        await before.route(4, "2")
    body = json.loads((tmp_path / "replica-0.json").read_text())
    assert body["models"]["policy"]["epoch"] == 4
    async with a_replica(tmp_path) as after:
        watch = after.runtime.WatchState(pb.WatchStateRequest())
        async with asyncio.timeout(20):
            while not (await watch.read()).state.routes:
                pass
        watch.cancel()
        assert (await infer(after, infer_request())).model_version == "2"


async def test_shutdown_ends_watches_and_streams_at_once(tmp_path: Path) -> None:
    async with asyncio.timeout(20):
        async with a_replica(tmp_path, drain_seconds=60) as remote:
            await remote.load("1")
            await remote.route(1, "1")
            watch = remote.runtime.WatchState(pb.WatchStateRequest())
            await watch.read()
            stream = remote.oip.ModelStreamInfer()
            await stream.write(infer_request())
            assert (await stream.read()).infer_response.model_version == "1"


async def test_text_is_planned(remote: Remote) -> None:
    from interlock.api.inference.v1 import text_service_pb2, text_service_pb2_grpc

    stub: Any = text_service_pb2_grpc.TextServiceStub(remote.channel)
    with pytest.raises(Unimplemented) as planned:
        await CALLER.unary(stub.Embed, text_service_pb2.EmbedRequest(), timeout=5)
    assert planned.value.reason == "PLANNED"
    with pytest.raises(Unimplemented):
        async for _ in CALLER.stream(stub.Generate, text_service_pb2.GenerateRequest(), timeout=5):
            pass


async def test_nothing_is_served_before_it_is_told(remote: Remote) -> None:
    with pytest.raises(NotFound):
        await infer(remote, infer_request())
    await remote.load("1")
    with pytest.raises(Unavailable) as loaded:
        await infer(remote, infer_request())
    assert (loaded.value.reason, loaded.value.retry_after_seconds) == ("MODEL_NOT_READY", 0.1)
    assert (await infer(remote, infer_request(model_version="1"))).parameters["interlock-epoch"].int64_param == 0


async def test_overload_is_shed_with_a_time_to_try_again(remote: Remote) -> None:
    await remote.load("1", onnx_models.slow(1.0), batching=BatchingSpec(max_rows=1, queue_limit=4))
    await remote.route(1, "1")

    async def one() -> InterlockError | None:
        try:
            await infer(remote, infer_request(), timeout=60)
        except InterlockError as error:
            return error
        return None

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one()) for _ in range(40)]
    errors = [task.result() for task in tasks if task.result() is not None]
    assert 0 < len(errors) < 40
    assert all(isinstance(e, ResourceExhausted) and e.retry_after_seconds is not None for e in errors)


async def test_batching_over_the_wire(remote: Remote) -> None:
    """Sixteen at once on a slow model: fewer runs than requests, each with its own answer, and all of it counted."""
    await remote.load("1", onnx_models.slow(1.0, size=300), batching=BatchingSpec(priority_levels=2))
    await remote.route(1, "1")

    async def ask(number: int) -> None:
        request = infer_request(np.full((1 + number % 2, 4), number, np.float32))
        request.parameters["priority"].uint64_param = number % 3
        response = await infer(remote, request)
        assert list(response.outputs[0].shape) == [1 + number % 2, 4]

    async with asyncio.TaskGroup() as group:
        for number in range(16):
            group.create_task(ask(number))
    seen = await CALLER.unary(remote.oip.ModelStatistics, messages.ModelStatisticsRequest(name="policy"), timeout=5)
    (stats,) = seen.model_stats
    assert (stats.inference_count, stats.inference_stats.queue.count) == (24, 16)
    assert stats.execution_count == sum(batch.compute_infer.count for batch in stats.batch_stats) < 16
    assert sum(batch.batch_size * batch.compute_infer.count for batch in stats.batch_stats) == 24
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{remote.metrics_port}") as client:
        text = (await client.get("/metrics")).text
    assert f'interlock_infer_batch_rows_count{{model="policy",version="1"}} {stats.execution_count}.0' in text
    assert 'interlock_infer_batch_rows_sum{model="policy",version="1"} 24.0' in text
    wrong = infer_request(np.ones((1, 4), np.float32))
    wrong.parameters["priority"].string_param = "high"
    with pytest.raises(InvalidArgument) as refused:
        await infer(remote, wrong)
    assert (refused.value.reason, refused.value.field) == ("INVALID_PARAMETER", "parameters.priority")
