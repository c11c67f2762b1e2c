"""The gateway in front of a real replica, over real sockets; the controller and the trainer are not there unless a test says so."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from grpc import aio

import onnx_models
from gateway_world import BAD, ROW, World, http_request, raw, tensor, world
from interlock.runtime.access import Scope, hash_key, new_key
from interlock.runtime.settings import Settings
from interlock.runtime.telemetry import trace_id_of


async def test_infer_answers_in_the_protocols_json_and_names_the_weights(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        answer = await w.http.post("/v2/models/policy/infer", json={**ROW, "id": "abc"})
    assert answer.status_code == 200
    body = answer.json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("policy", "1", "abc")
    assert body["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}]
    assert (answer.headers["interlock-version"], answer.headers["interlock-epoch"]) == ("models/policy/versions/1", "1")
    assert answer.headers["interlock-digest"].startswith("blake3:")
    assert answer.headers["x-request-id"]


async def test_nested_data_and_versioned_urls(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        answer = await w.http.post(
            "/v2/models/policy/versions/1/infer", json=tensor([[0, 0, 0, 0], [0, 0, 0, 0]], [2, 4])
        )
        assert answer.json()["outputs"][0]["data"] == [1.0] * 8
        missing = await w.http.post("/v2/models/policy/versions/9/infer", json=ROW)
    assert (missing.status_code, missing.json()["reason"]) == (404, "VERSION_NOT_FOUND")


async def test_predict_in_the_plain_form(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one = await w.http.post("/predict", json={"instances": [[0, 0, 0, 0]]})
        named = await w.http.post("/predict", json={"model": "policy", "inputs": {"x": [0, 0, 0, 0]}})
    assert one.json()["outputs"] == named.json()["outputs"] == {"y": [[1.0] * 4]}
    assert (one.json()["model"], one.json()["version"], one.json()["epoch"]) == ("policy", "1", 1)


async def test_bad_input_gets_a_precise_error_and_serving_goes_on(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for name, (path, body, status, reason, field) in BAD.items():
            answer = await w.http.post(path, json=body)
            problem = answer.json()
            assert (answer.status_code, problem["reason"]) == (status, reason), f"{name}: {problem}"
            assert not field or problem["field"] == field, f"{name}: {problem}"
            assert answer.headers["content-type"] == "application/problem+json"
            assert problem["detail"], name
            if path.startswith("/v2"):
                assert problem["error"] == problem["detail"]
        assert (await w.http.post("/v2/models/policy/infer", json=ROW)).status_code == 200


async def test_json_that_is_not_json_says_where(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        answer = await w.http.post("/v2/models/policy/infer", content=b'{"inputs": [')
    assert (answer.status_code, answer.json()["reason"]) == (400, "INVALID_JSON")
    assert "column" in answer.json()["detail"]


async def test_a_body_over_the_limit_is_refused_while_it_comes(tmp_path: Path) -> None:
    async def hundred_megabytes() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * (1 << 20)

    async with world(tmp_path, max_body_mb=2) as w:
        try:
            answer = await w.http.post("/v2/models/policy/infer", content=hundred_megabytes())
            assert (answer.status_code, answer.json()["reason"]) == (413, "BODY_TOO_LARGE")
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            pass  # the connection was closed in the middle of the upload: refused all the same
        assert (await w.http.post("/v2/models/policy/infer", json=ROW)).status_code == 200


async def test_a_body_that_says_its_size_is_refused_before_it_comes(tmp_path: Path) -> None:
    async with world(tmp_path, max_body_mb=2) as w:
        reader, writer = await asyncio.open_connection("127.0.0.1", w.port)
        writer.write(b"POST /v2/models/policy/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: 104857600\r\n\r\n")
        answer = await reader.read()  # to the end: the gateway hangs up
        writer.close()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"BODY_TOO_LARGE" in answer


async def test_a_foreign_host_is_refused_on_loopback(tmp_path: Path) -> None:
    """A page in a browser must not reach this gateway by rebinding its own name to 127.0.0.1."""
    async with world(tmp_path) as w:
        for path in ("/version", "/v2/models/policy/infer"):
            for method in ("GET", "POST", "DELETE", "OPTIONS"):
                answer = await w.http.request(method, path, headers={"host": "evil.example:8000"})
                assert (answer.status_code, answer.json()["reason"]) == (403, "HOST_REFUSED")
        assert (await w.http.get("/health/live", headers={"host": f"localhost:{w.port}"})).status_code == 200


async def test_with_keys_every_verb_needs_its_scope(tmp_path: Path) -> None:
    keys = {scope: new_key() for scope in (Scope.INFER, Scope.TRAIN, Scope.ADMIN)}
    (tmp_path / "keys.toml").write_text(
        "".join(f'[[keys]]\nname = "{s}"\nhash = "{hash_key(k)}"\nscopes = ["{s}"]\n' for s, k in keys.items())
    )
    async with world_with_keys(tmp_path, keys[Scope.ADMIN]) as w:
        for method, template, scope in inventory(tmp_path):
            path = template.format(
                model="policy",
                version="1",
                kind="system",
                name="n",
                swap="s",
                run="r",
                verb="abort" if "swap" in template else "stop",
            )
            nobody = await w.http.request(method, path)
            assert (nobody.status_code == 401) is (scope is not Scope.PUBLIC), (
                f"{method} {path} without a key: {nobody.status_code}"
            )
            wrong = await w.http.request(method, path, headers={"x-api-key": "ilk_wrong"})
            assert (wrong.status_code == 401) is (scope is not Scope.PUBLIC), (
                f"{method} {path} with a wrong key: {wrong.status_code}"
            )
            for held, key in keys.items():
                if scope is Scope.PUBLIC or held in {scope, Scope.ADMIN}:
                    continue  # allowed: the rooms behind are not there to answer
                refused = await w.http.request(method, path, headers={"x-api-key": key})
                assert (refused.status_code, refused.json()["reason"]) == (403, "SCOPE_MISSING"), (
                    f"{method} {path} with {held}"
                )
        for held in (Scope.INFER, Scope.ADMIN):
            assert (
                await w.http.post("/v2/models/policy/infer", json=ROW, headers={"x-api-key": keys[held]})
            ).status_code == 200
        assert (await w.http.get("/version", headers={"x-api-key": keys[Scope.INFER]})).status_code == 503
        probe = {"model": "policy", "run_inference": "true"}
        assert (await w.http.get("/health/llm", params=probe)).status_code == 401  # it would cost compute
        assert (
            await w.http.get("/health/llm", params=probe, headers={"x-api-key": keys[Scope.INFER]})
        ).status_code == 200


def inventory(home: Path) -> list[tuple[str, str, Scope]]:
    from interlock.runtime.access import Keys
    from interlock_gateway import web

    return web.inventory(web.build(Settings(home=home), None, None, Keys(home)))  # type: ignore[arg-type]


@asynccontextmanager
async def world_with_keys(home: Path, admin_key: str) -> AsyncIterator[World]:
    """Like `world`, commanded with an admin key."""
    import replica_world
    from interlock.runtime.channels import Caller

    before, replica_world.CALLER = replica_world.CALLER, Caller(admin_key)
    try:
        async with world(home) as w:
            yield w
    finally:
        replica_world.CALLER = before


async def test_a_dead_room_is_said_and_predictions_go_on(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        version = await w.http.get("/version")
        assert (version.status_code, version.json()["title"]) == (503, "Unavailable")
        health = (await w.http.get("/health")).json()
        assert health == {
            "status": "degraded",
            "rooms": {"inference": "up", "trainer": "down", "controller": "down"},
            "models": {"policy": "healthy"},
        }
        assert (await w.http.post("/v2/models/policy/infer", json=ROW)).status_code == 200
        assert (await w.http.get("/health/ready")).json() == {"status": "ready"}


async def test_health_of_one_model_in_the_documents_words(tmp_path: Path) -> None:
    """Seed 001: the body of GET /health/llm, its codes, and /health/llm/all."""
    async with world(tmp_path) as w:
        good = await w.http.get("/health/llm", params={"model": "policy", "run_inference": "true"})
        assert good.status_code == 200
        assert set(good.json()) == {
            "model_name", "status", "loaded", "inference_ready", "last_inference_ms", "memory_mb", "gpu_memory_mb", "error_message", "checked_at", "uptime_seconds",
        }  # fmt: skip
        assert (good.json()["status"], good.json()["loaded"], good.json()["inference_ready"]) == ("healthy", True, True)
        bad = await w.http.get("/health/llm", params={"model": "nobody"})
        assert (bad.status_code, bad.json()["status"]) == (503, "unhealthy")
        everything = await w.http.get("/health/llm/all")
        assert (everything.status_code, everything.json()["models"]) == (200, {"policy": "healthy"})


async def test_metrics_carry_the_documents_names(tmp_path: Path) -> None:
    """REQUIREMENTS O1."""
    async with world(tmp_path) as w:
        await w.http.post("/v2/models/policy/infer", json=ROW)
        text = (await w.http.get("/metrics")).text
        flat = (await w.http.get("/health/metrics/json")).json()
    for name in (
        "api_request_total",
        "api_request_latency_seconds_bucket",
        "http_requests_total",
        "http_request_duration_seconds_bucket",
    ):
        assert f"\n{name}{{" in text
    assert flat["api_request_total_endpoint=/v2/models/{model}/infer,method=POST,status=200"] >= 1


async def test_unknown_paths_and_methods_are_problems_too(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        lost = await w.http.get("/nothing/here")
        wrong = await w.http.delete("/version")
        bad = await w.http.post("/reload", json={"modle_path": "x"})
    assert (lost.status_code, lost.json()["reason"]) == (404, "PATH_NOT_FOUND")
    assert (wrong.status_code, wrong.json()["reason"]) == (405, "METHOD_NOT_ALLOWED")
    assert (bad.status_code, bad.json()["field"]) == (400, "body.modle_path")


def triton(port: int) -> tuple[Any, Any]:
    from tritonclient import http as tc

    return tc, tc.InferenceServerClient(f"127.0.0.1:{port}")


@pytest.mark.parametrize("binary", [False, True])
async def test_tritonclient_over_http(tmp_path: Path, binary: bool) -> None:
    """Health, metadata and infer by somebody else's client, JSON and with the binary tensor extension."""

    def use(port: int) -> Any:
        tc, client = triton(port)
        try:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("policy")
            assert not client.is_model_ready("nobody")
            assert client.get_server_metadata()["name"]
            assert client.get_model_metadata("policy")["inputs"] == [
                {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
            ]
            assert client.get_model_repository_index()
            tensor_in = tc.InferInput("x", [2, 4], "FP32")
            tensor_in.set_data_from_numpy(np.zeros((2, 4), np.float32), binary_data=binary)
            wanted = tc.InferRequestedOutput("y", binary_data=binary)
            return client.infer("policy", [tensor_in], outputs=[wanted]).as_numpy("y")
        finally:
            client.close()

    async with world(tmp_path) as w:
        answer = await asyncio.to_thread(use, w.port)
    np.testing.assert_array_equal(answer, np.ones((2, 4), np.float32))


async def test_a_slow_prediction_meets_its_deadline(tmp_path: Path) -> None:
    async with world(tmp_path, onnx_models.slow(1.0)) as w:
        answer = await w.http.post("/v2/models/policy/infer", json=ROW, headers={"x-request-timeout-seconds": "0.001"})
        assert (answer.status_code, answer.json()["title"]) == (504, "Deadline exceeded")
        wrong = await w.http.post("/v2/models/policy/infer", json=ROW, headers={"x-request-timeout-seconds": "soon"})
        assert (wrong.status_code, wrong.json()["field"]) == (400, "x-request-timeout-seconds")


async def test_pipelined_and_cut_up_requests_are_answered_in_order(tmp_path: Path) -> None:
    row = orjson.dumps(ROW)
    bad = orjson.dumps(tensor([0.0] * 3, [1, 3]))
    async with world(tmp_path) as w:
        several = http_request(row) + http_request(bad) + b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
        heard = await raw(w.port, several + http_request(row))
        assert re.findall(rb"HTTP/1\.1 (\d+)", heard) == [b"200", b"400", b"200", b"200"]
        whole = http_request(row)
        cut = await raw(w.port, *(whole[i : i + 40] for i in range(0, len(whole), 40)), pause=0.005)
        assert cut.startswith(b"HTTP/1.1 200")
        chunked = b"POST /v2/models/policy/infer HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        body = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (10, row[:10], len(row) - 10, row[10:])
        assert (await raw(w.port, chunked + body)).startswith(b"HTTP/1.1 200")
        close = await raw(w.port, http_request(row, b"connection: close"))
        assert close.startswith(b"HTTP/1.1 200")
        expect = await raw(w.port, http_request(b"", b"expect: 100-continue").replace(b": 0", b": %d" % len(row)), row)
        assert b"HTTP/1.1 200" in expect


@pytest.mark.parametrize("path", [b"/v2/models/policy/infer", b"/predict", b"/swaps"])
async def test_a_request_that_does_not_come_in_is_given_up(tmp_path: Path, path: bytes) -> None:
    async with world(tmp_path, receive_timeout_seconds=0.2) as w:
        half = http_request(b"{" * 100, path=path)[:-50]
        heard = await raw(w.port, half)
        assert heard.startswith(b"HTTP/1.1 408"), heard
        assert b"SLOW_REQUEST" in heard
        assert (await raw(w.port, b"POST /v2/mod")).startswith(b"HTTP/1.1 408")
        assert (await w.http.post("/v2/models/policy/infer", json=ROW)).status_code == 200


async def test_every_answer_names_its_trace(tmp_path: Path) -> None:
    """DESIGN 9: every response carries the trace id, sampled or not; a caller's own is kept."""
    mine = f"00-{'ab' * 16}-{'cd' * 8}-"
    async with world(tmp_path) as w:
        for path, body in (("/v2/models/policy/infer", ROW), ("/predict", {"instances": [[0, 0, 0, 0]]})):
            fresh = {(await w.http.post(path, json=body)).headers["traceparent"] for _ in range(3)}
            assert len(fresh) == 3
            for flags in ("00", "01"):
                kept = await w.http.post(path, json=body, headers={"traceparent": mine + flags})
                assert kept.headers["traceparent"].split("-")[1] == "ab" * 16
                inner = kept.json().get("parameters", kept.json())["traceparent"]
                assert inner.split("-")[1] == "ab" * 16
        refused = await w.http.post("/v2/models/nobody/infer", json=ROW)
        assert refused.json()["trace_id"] == refused.headers["traceparent"].split("-")[1]
        assert (await w.http.get("/health/live")).headers["traceparent"]
        direct = onnx_request()
        answer = await w.replica.oip.ModelInfer(direct)
        assert answer.parameters["traceparent"].string_param.startswith("00-")
        echoed = await w.replica.oip.ModelInfer(direct, metadata=(("traceparent", mine + "00"),))
        assert echoed.parameters["traceparent"].string_param == mine + "00"
        direct.model_name = "nobody"
        for metadata, trace in (((("traceparent", mine + "00"),), "ab" * 16), ((), "")):
            with pytest.raises(aio.AioRpcError) as refusal:
                await w.replica.oip.ModelInfer(direct, metadata=metadata)
            said = dict(refusal.value.trailing_metadata())["traceparent"]
            assert trace_id_of(said) == (trace or trace_id_of(said)) != ""


def onnx_request() -> Any:
    from interlock.api.oip import messages

    request = messages.ModelInferRequest(model_name="policy", raw_input_contents=[bytes(16)])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    return request


async def test_a_caller_that_hangs_up_cancels_its_prediction(tmp_path: Path) -> None:
    async with world(tmp_path, onnx_models.slow(1.0)) as w:
        writers = []
        for _ in range(20):  # more than the worker threads can begin at once
            _, writer = await asyncio.open_connection("127.0.0.1", w.port)
            writer.write(http_request(orjson.dumps(ROW)))
            writers.append(writer)
        await asyncio.sleep(0.05)
        for writer in writers:
            writer.close()
        async with asyncio.timeout(20):
            while (await w.replica.state()).slots[0].in_flight_count:
                await asyncio.sleep(0.01)
        assert (await w.http.post("/v2/models/policy/infer", json=ROW)).status_code == 200
