"""Versions that lie in a bucket, by way of the controller and straight into a replica: served, restored, refused with what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller_world import a_controller
from interlock.api.controller.v1 import model_service_pb2
from interlock.api.inference.v1 import runtime_service_pb2 as pb
from interlock.api.oip import messages
from interlock.errors import FailedPrecondition, NotFound
from replica_world import a_replica

pytest.importorskip("moto.server", reason="pip install 'moto[s3,server]'")
s3_world = pytest.importorskip("s3_world", reason="pip install 'interlock[s3]'")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_world.a_store() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    s3_world.use_credentials(monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return s3_world.Bucket(endpoint, tmp_path)


def a_request() -> Any:
    request = messages.ModelInferRequest(
        model_name="policy", raw_input_contents=[np.zeros((1, 4), np.float32).tobytes()]
    )
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    return request


async def test_the_controller_takes_a_version_from_a_bucket(bucket: Any, tmp_path: Path) -> None:
    digest = bucket.version("models/policy/3")
    async with a_replica(tmp_path / "home") as replica, a_controller(tmp_path / "home", [replica.url]) as controller:
        request = model_service_pb2.RegisterVersionRequest(
            model="models/policy", artifact_uri=bucket.uri("models/policy/3"), digest=digest
        )
        version = (await controller.call("model", "RegisterVersion", request)).version
        assert version.digest == digest
        assert (tmp_path / "home/models/policy/1/manifest.json").is_file(), (
            "its own from now on, whatever becomes of the bucket"
        )
        await controller.swap_to(version.name)
        assert (await replica.oip.ModelInfer(a_request(), timeout=10)).model_version == "1"
        missing = model_service_pb2.RegisterVersionRequest(model="models/policy", artifact_uri=bucket.uri("none"))
        with pytest.raises(NotFound, match="none/manifest") as refused:
            await controller.call("model", "RegisterVersion", missing)
        assert refused.value.reason == "ARTIFACT_MISSING"


async def test_a_replica_loads_from_a_bucket_and_restores_without_it(bucket: Any, tmp_path: Path) -> None:
    digest, uri = bucket.version("v/1"), bucket.uri("v/1")
    async with a_replica(tmp_path / "home", port=0) as replica:
        messages_seen = await replica.prepare("1", uri, digest=digest)
        assert messages_seen[-1].slot.digest == digest
        await replica.command("Warm", pb.WarmRequest(fence=replica.fence, version="models/policy/versions/1"))
        await replica.route(1, "1")
        with pytest.raises(FailedPrecondition) as refused:
            await replica.prepare("2", bucket.uri("v/1"), digest="blake3:00")
        assert refused.value.reason == "DIGEST_MISMATCH"
    for key in ("manifest.json", "model.onnx", "model.toml"):
        bucket.s3.delete_object(Bucket=bucket.name, Key=f"v/1/{key}")
    async with a_replica(tmp_path / "home", port=0) as replica:
        watch = replica.runtime.WatchState(pb.WatchStateRequest())
        while not (await watch.read()).state.routes:
            pass
        watch.cancel()
        assert (await replica.oip.ModelInfer(a_request(), timeout=10)).model_version == "1"
