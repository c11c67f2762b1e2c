"""A folder of models decides what a replica serves: watched, or by RepositoryModelLoad; a bad version never replaces what serves."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

import onnx_models
from dataplane_world import Nobody, a_call, a_loader
from interlock.api.inference.v1 import runtime_service_pb2 as runtime_pb
from interlock.api.oip import messages as pb
from interlock.core.ensemble import Step
from interlock.errors import FailedPrecondition, InterlockError, NotFound, ResourceExhausted, Unimplemented
from interlock.runtime.clock import SystemClock
from interlock.runtime.settings import InferenceSettings
from interlock.stores import artifacts, modelspec
from interlock.stores.modelspec import ModelSpec, TensorSpec
from interlock_inference import standalone
from interlock_inference.dataplane import DataPlane
from interlock_inference.metrics import LoadMetrics
from interlock_inference.recorder import Recorder
from interlock_inference.replica import Replica
from interlock_inference.slots import Registry
from interlock_inference.standalone import NoFile, Standalone
from replica_world import CALLER, a_replica

NAN = float("nan")


@dataclass
class Folder:
    root: Path
    registry: Registry
    plane: DataPlane
    standalone: Standalone

    def put(self, version: str, body: bytes | None = None, model: str = "policy") -> Path:
        folder = self.root / model / version
        onnx_models.write_version(folder, body or onnx_models.constant(float(version)), name=model)
        return folder

    def bare(self, version: str, body: bytes) -> None:
        (self.root / "policy" / version).mkdir(parents=True)
        (self.root / "policy" / version / "model.onnx").write_bytes(body)

    async def answers(self) -> float:
        return float((await self.plane.infer(a_call())).outputs[0][0, 0])

    def state(self, version: str) -> str:
        return self.standalone.versions()["policy", version]

    async def until_loaded(self, *versions: str) -> None:
        async with asyncio.timeout(10):
            while {s.version for s in self.registry.all_slots()} != set(versions):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def folder(root: Path, **settings: Any) -> AsyncIterator[Folder]:
    root.mkdir(exist_ok=True)
    registry, recorder = Registry(), Recorder()
    plane = DataPlane(registry, recorder, Nobody())
    own = InferenceSettings(**{"repository": str(root), "repository_settle_seconds": 0, **settings})
    async with asyncio.TaskGroup() as tasks:
        loader, counted = a_loader(root.parent, registry, tasks), LoadMetrics(CollectorRegistry())
        replica = Replica(
            registry, recorder, NoFile(), SystemClock(), tasks, loader=loader, counted=counted, warmup_iterations=2
        )
        try:
            yield Folder(root, registry, plane, Standalone(replica, registry, own, SystemClock(), tasks))
        finally:
            await asyncio.to_thread(plane.close)
            replica.close()


async def test_the_newest_version_by_number_is_served_and_the_older_one_released(tmp_path: Path) -> None:
    async with folder(tmp_path / "models") as f:
        f.put("2")
        f.put("9")
        await f.standalone.step()
        assert await f.answers() == 9
        f.put("10")
        await f.standalone.step()
        assert await f.answers() == 10
        await f.until_loaded("10")
        shutil.rmtree(f.root / "policy" / "10")  # how a person goes back
        await f.standalone.step()
        assert await f.answers() == 9
        await f.until_loaded("9")
        shutil.rmtree(f.root / "policy")
        await f.standalone.step()
        with pytest.raises(InterlockError):
            await f.answers()


async def test_a_folder_that_cannot_be_read_takes_nothing_out_of_service(tmp_path: Path) -> None:
    async with folder(tmp_path / "models") as f:
        f.put("1")
        await f.standalone.step()
        (tmp_path / "models").rename(tmp_path / "gone")
        await f.standalone.step()
        assert await f.answers() == 1


BROKEN: dict[str, tuple[Any, str]] = {
    # what is wrong with version 2: (its maker, what the index says)
    "not a graph": (lambda f: f.put("2", b"no graph"), "INVALID_ARTIFACT"),
    "another signature": (lambda f: f.bare("2", onnx_models.constant(2.0, output_name="answer")), "SIGNATURE_MISMATCH"),
    "answers NaN": (lambda f: f.put("2", onnx_models.constant(NAN)), "COMPARE_FAILED"),
    "a flipped byte": (lambda f: flip(f.put("2")), "DIGEST_MISMATCH"),
    "unfinished": (lambda f: (f.put("2") / "manifest.json").unlink(), "never finished"),
    "no name": (lambda f: f.put("2").rename(f.root / "policy" / "two words"), "not an id"),
}


def flip(folder: Path) -> None:
    body = bytearray((folder / "model.onnx").read_bytes())
    body[40] ^= 1
    (folder / "model.onnx").write_bytes(bytes(body))


@pytest.mark.parametrize("wrong", sorted(BROKEN))
async def test_a_broken_version_never_replaces_what_serves(tmp_path: Path, wrong: str) -> None:
    make, says = BROKEN[wrong]
    async with folder(tmp_path / "models") as f:
        f.put("1")
        await f.standalone.step()
        make(f)
        await f.standalone.step()
        assert await f.answers() == 1
        reasons = {why for (_, version), why in f.standalone.versions().items() if version != "1"}
        assert len(reasons) == 1
        assert says in reasons.pop()
        await f.until_loaded("1")
        before = f.registry.snapshot
        await f.standalone.step()
        assert f.registry.snapshot is before, "it is not tried again before it changes"
        for path in (f.root / "policy").iterdir():
            if path.name != "1":
                shutil.rmtree(path)
        f.put("2")
        await f.standalone.step()
        assert await f.answers() == 2


async def test_what_still_changes_is_left_alone(tmp_path: Path) -> None:
    async with folder(tmp_path / "models", repository_settle_seconds=0.2) as f:
        body = onnx_models.constant(7.0)
        bare = f.root / "policy" / "model.onnx"
        bare.parent.mkdir()
        bare.write_bytes(body[:50])
        assert await f.standalone.step(), "it waits"
        assert not f.registry.all_slots()
        bare.write_bytes(body)
        assert await f.standalone.step()
        await asyncio.sleep(0.25)
        assert not await f.standalone.step()
        assert await f.answers() == 7


async def test_a_version_changed_in_place_is_another_version(tmp_path: Path) -> None:
    async with folder(tmp_path / "models") as f:
        bare = f.root / "policy" / "model.onnx"
        bare.parent.mkdir()
        bare.write_bytes(onnx_models.constant(1.0))
        await f.standalone.step()
        assert (await f.plane.infer(a_call())).slot.version == "1"
        os.utime(bare)  # touched, not changed
        before = f.registry.snapshot
        await f.standalone.step()
        assert f.registry.snapshot is before
        bare.write_bytes(onnx_models.constant(5.0))
        await f.standalone.step()
        reply = await f.plane.infer(a_call())
        assert float(reply.outputs[0][0, 0]) == 5
        assert reply.slot.version == f"1-{reply.slot.digest[7:15]}"
        await f.until_loaded(reply.slot.version)


async def test_models_are_named_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "somewhere.onnx").write_bytes(onnx_models.constant(3.0))
    async with folder(tmp_path / "models", repository="", models={"policy": str(tmp_path / "somewhere.onnx"), "lost": "nowhere"}) as f:  # fmt: skip
        await f.standalone.step()
        assert await f.answers() == 3
        assert f.standalone.versions()["lost", ""] == "nowhere does not exist"


async def test_explicit_loads_by_both_clients_forms_and_unloads(tmp_path: Path) -> None:
    """Triton's field 2 and KServe's field 1 name the model; `version` names a version, else the newest."""
    models = tmp_path / "models"
    for version in ("1", "2"):
        onnx_models.write_version(models / "policy" / version, onnx_models.constant(float(version)))
    onnx_models.write_version(models / "policy" / "3", b"broken")
    async with a_replica(tmp_path, repository=str(models), repository_mode="explicit") as remote:
        async with asyncio.timeout(10):
            while not (await remote.oip.ServerReady(pb.ServerReadyRequest())).ready:
                await asyncio.sleep(0.01)

        async def call(method: str, request: Any) -> Any:
            return await CALLER.unary(getattr(remote.oip, method), request, timeout=20)

        async def index(ready: bool = False) -> dict[str, tuple[str, str]]:
            answer = await call("RepositoryIndex", pb.RepositoryIndexRequest(ready=ready))
            return {m.version: (m.state, m.reason) for m in answer.models}

        assert set(await index()) == {"1", "2", "3"}
        assert await index(ready=True) == {}
        named = pb.RepositoryModelLoadRequest(model_name="policy")
        named.parameters["version"].string_param = "1"
        assert (await call("RepositoryModelLoad", named)).isLoaded
        assert await index(ready=True) == {"1": ("READY", "")}
        with pytest.raises(FailedPrecondition) as refused:  # the newest, in KServe's form; 1 goes on serving
            await call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(repository_name="policy"))
        assert refused.value.reason == "INVALID_ARTIFACT"
        assert "INVALID_ARTIFACT" in (await index())["3"][1]
        assert set(await index(ready=True)) == {"1"}
        with pytest.raises(NotFound):
            await call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="nobody"))
        named.parameters["version"].string_param = "9"
        with pytest.raises(NotFound):
            await call("RepositoryModelLoad", named)
        named.parameters["config"].string_param = "{}"
        with pytest.raises(Unimplemented, match=r"parameters\.config"):
            await call("RepositoryModelLoad", named)
        with pytest.raises(FailedPrecondition) as commanded:
            await remote.command("Warm", runtime_pb.WarmRequest(version="models/policy/versions/1"))
        assert commanded.value.reason == "STANDALONE"
        with pytest.raises(FailedPrecondition, match="the folder"):
            await remote.route(5, "1")
        assert (
            await call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(repository_name="policy"))
        ).isUnloaded
        assert await index(ready=True) == {}


async def test_a_watched_folder_takes_no_orders_and_is_ready_when_it_serves(tmp_path: Path) -> None:
    models = tmp_path / "models"
    onnx_models.write_version(models / "policy" / "1", onnx_models.constant(1.0))
    async with a_replica(tmp_path, repository=str(models), repository_poll_seconds=0.05) as remote:
        async with asyncio.timeout(10):
            while not (await remote.oip.ServerReady(pb.ServerReadyRequest())).ready:
                await asyncio.sleep(0.01)
        assert (await remote.oip.ModelReady(pb.ModelReadyRequest(name="policy"))).ready
        with pytest.raises(FailedPrecondition) as refused:
            await CALLER.unary(remote.oip.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="policy"), timeout=5)  # fmt: skip
        assert refused.value.reason == "WATCHED"
        onnx_models.write_version(models / "policy" / "2", onnx_models.constant(2.0))
        async with asyncio.timeout(10):
            while not (await remote.oip.ModelReady(pb.ModelReadyRequest(name="policy", version="2"))).ready:
                await asyncio.sleep(0.02)


async def test_an_ensemble_is_served_after_the_members_that_lie_beside_it(tmp_path: Path) -> None:
    """The last by name is looked at first, and again after its member."""
    async with folder(tmp_path / "models") as f:
        tensors = [TensorSpec(name, "FP32", (-1, 4)) for name in ("x", "y")]
        steps = (Step("policy", {"x": "x"}, {"y": "y"}),)
        (f.root / "zoo" / "1").mkdir(parents=True)
        spec = ModelSpec("zoo", (tensors[0],), (tensors[1],), "ensemble", "", steps=steps)
        modelspec.write_spec(f.root / "zoo" / "1", spec)
        artifacts.write_manifest(f.root / "zoo" / "1")
        f.put("7")
        assert await f.standalone.step()
        assert not await f.standalone.step()
        reply = await f.plane.infer(a_call(model="zoo"))
        assert float(reply.outputs[0][0, 0]) == 7
        assert [slot.name for slot in reply.members] == ["models/policy/versions/7"]


async def test_a_refusal_that_may_pass_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standalone, "AGAIN_SECONDS", 0.05)
    async with folder(tmp_path / "models") as f:
        f.put("1")
        serve, refused = f.standalone._serve, [ResourceExhausted("no room", reason="DOES_NOT_FIT", retry_after_seconds=0.01)]  # fmt: skip

        async def short_of_memory(found: Any) -> None:
            if refused:
                raise refused.pop()
            await serve(found)

        monkeypatch.setattr(f.standalone, "_serve", short_of_memory)
        await f.standalone.step()
        assert f.state("1") == "DOES_NOT_FIT: no room"
        await f.standalone.step()
        assert f.state("1") == "DOES_NOT_FIT: no room", "not at once"
        await asyncio.sleep(0.06)
        await f.standalone.step()
        assert await f.answers() == 1
