"""Parts of the controller by themselves: what is announced, what the watchdog says, what a store that fails for a while costs."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

import onnx_models
from fakes import FakeClock
from interlock.core.route import Route, all_to
from interlock.core.swap import Event, State, Swap, SwapSpec
from interlock.core.swap_plan import Slot, SlotState, Snapshot, act
from interlock.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from interlock.runtime.changed import Changed
from interlock.stores import artifacts
from interlock.stores.controller import Origin, RollbackRow, VersionRow
from interlock.stores.files import ModelRepository
from interlock_controller import story
from interlock_controller.announcer import Announcer
from interlock_controller.fleet import Fleet
from interlock_controller.reconciler import Reconciler
from interlock_controller.registry import parse_uri
from interlock_controller.replicas import View
from interlock_controller.watchdog import Watchdog
from memory_store import MemoryControllerStore


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_what_was_written_is_announced_once_and_counted() -> None:
    store = MemoryControllerStore()
    announcer = Announcer(store, Changed())
    swap = store.create_swap(Swap("s1", SwapSpec("counted", "2"), created_at=1.0), None)
    store.write_swap(swap, act(Snapshot(swap, Route("counted", 0)), Event.ABORT, 4.0, "not wanted"), 4.0)
    store.set_route("counted", 0, all_to("1"), "ana", 5.0)
    store.add_version(VersionRow("counted", "", "blake3:aa", "/x"))
    before = metric("interlock_swaps_total", model="counted", state="CANCELLED")
    assert announcer.announce() == 4
    assert announcer.announce() == 0
    assert metric("interlock_swaps_total", model="counted", state="CANCELLED") == before + 1
    assert metric("interlock_swap_seconds_sum", model="counted", state="CANCELLED") == 3.0
    assert metric("interlock_route_epoch", model="counted") == 1
    assert metric("interlock_active_swaps", model="counted") == 0


def test_an_announcement_that_could_not_be_noted_is_made_again() -> None:
    store = MemoryControllerStore()
    store.create_swap(Swap("s1", SwapSpec("policy", "2"), created_at=1.0), None)

    def full(_seq: int) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    noted, store.announced = store.announced, full  # type: ignore[method-assign]
    with pytest.raises(sqlite3.OperationalError):
        Announcer(store, Changed()).announce()
    store.announced = noted  # type: ignore[method-assign]
    assert Announcer(store, Changed()).announce() == 1


async def test_a_store_that_fails_for_a_while_stops_nothing(tmp_path: Path) -> None:
    store, changed = MemoryControllerStore(), Changed()
    clock = FakeClock(auto=False)
    reconciler = Reconciler(
        store, Fleet({}, clock, changed), ModelRepository(tmp_path), clock, changed, tick_seconds=0.5
    )
    reconciler.take_over()
    store.create_swap(Swap("s1", SwapSpec("policy", "2"), created_at=1.0), None)
    write, failures = store.write_swap, [sqlite3.OperationalError("disk I/O error")] * 3

    def flaky(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        write(*arguments)

    store.write_swap = flaky  # type: ignore[method-assign]
    stopping = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(reconciler.run(stopping))
        for _ in range(20):
            changed.fire()
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
        stopping.set()
        changed.fire()
    swap = store.swap("s1")
    assert swap is not None
    assert swap.state is not State.PENDING
    assert not failures


async def test_a_controller_that_lost_its_lease_stops(tmp_path: Path) -> None:
    store, changed, clock = MemoryControllerStore(), Changed(), FakeClock()
    reconciler = Reconciler(
        store, Fleet({}, clock, changed), ModelRepository(tmp_path), clock, changed, tick_seconds=0.5
    )
    reconciler.take_over()
    swap = store.create_swap(Swap("s1", SwapSpec("policy", "2"), created_at=1.0), None)
    MemoryControllerStore(store.disk).take_lease()
    stopping = asyncio.Event()
    async with asyncio.timeout(10):
        await reconciler.run(stopping)
    assert stopping.is_set()
    assert store.swap("s1") == swap


def test_the_watchdog_says_each_thing_once() -> None:
    watchdog, routes = Watchdog(), {"policy": Route("policy", 3, all_to("2"))}
    before = {
        n: metric("interlock_invariant_violations_total", invariant=n) for n in ("1_replica_is_ahead_of_the_record",)
    }
    sound = View("i1", {"policy": 3}, {"policy": {"2": Slot(SlotState.SERVING)}}, token=5)
    watchdog.look("r1", sound, 5, routes)
    for _ in range(3):
        watchdog.look("r1", replace(sound, epochs={"policy": 4}), 5, routes)
    name = "1_replica_is_ahead_of_the_record"
    assert metric("interlock_invariant_violations_total", invariant=name) == before[name] + 1
    watchdog.look("r1", replace(sound, slots={}), 5, routes)
    assert metric("interlock_invariant_violations_total", invariant="5_route_to_a_released_version") == 1
    watchdog.look("r1", replace(sound, token=6), 5, routes)
    assert metric("interlock_invariant_violations_total", invariant="8_replica_obeys_another_controller") == 1
    watchdog.look("r1", sound, 5, {"policy": Route("policy", 2, all_to("2"))})
    assert metric("interlock_invariant_violations_total", invariant="2_epoch_went_back") == 1


@pytest.mark.parametrize(
    ("uri", "path"), [("/a/b", "/a/b"), ("file:///a/b%20c", "/a/b c"), ("file://localhost/a", "/a"), ("a/b", "a/b")]
)
def test_local_artifacts_are_found(uri: str, path: str) -> None:
    assert parse_uri(uri) == Path(path)


@pytest.mark.parametrize("uri", ["", "http://host/a", "gs://bucket/a", "file://host/a", "a\0b"])
def test_other_places_are_refused(uri: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_uri(uri)


def test_an_artifact_is_copied_verified_and_numbered(tmp_path: Path) -> None:
    repository, source = ModelRepository(tmp_path / "models"), tmp_path / "source"
    digest = onnx_models.write_version(source, onnx_models.constant(1.0))
    incoming = repository.take_in(source, digest)
    place = repository.keep(incoming, "policy", "1")
    assert repository.verify("policy", "1", digest) > 0
    (source / "model.onnx").write_bytes(b"changed afterwards")
    assert repository.verify("policy", "1", digest) > 0
    assert repository.highest("policy") == 1
    assert [p.name for p in place.parent.iterdir()] == ["1"]
    with pytest.raises(FailedPrecondition) as caught:
        repository.take_in(source)
    assert caught.value.reason == "DIGEST_MISMATCH"
    assert not list((tmp_path / "models" / ".incoming").iterdir())


@pytest.mark.parametrize("moment", ["scratch", "place"])
def test_a_repository_that_cannot_be_written_is_not_the_artifacts_fault(tmp_path: Path, moment: str) -> None:
    repository, source = ModelRepository(tmp_path / "models"), tmp_path / "source"
    digest = onnx_models.write_version(source, onnx_models.constant(1.0))
    if moment == "scratch":
        (tmp_path / "models").write_text("a file where a folder belongs")
        with pytest.raises(ResourceExhausted) as caught:
            repository.take_in(source, digest)
    else:
        incoming = repository.take_in(source, digest)
        (tmp_path / "models" / "policy").write_text("a file where a folder belongs")
        with pytest.raises(ResourceExhausted) as caught:
            repository.keep(incoming, "policy", "1")
        assert not incoming.folder.exists()
    assert caught.value.reason == "REPOSITORY_UNWRITABLE"
    assert str(tmp_path / "models") in caught.value.message


@pytest.mark.parametrize("damage", ["missing file", "wrong digest", "no manifest", "link", "not onnx"])
def test_an_unfit_artifact_leaves_nothing_behind(tmp_path: Path, damage: str) -> None:
    repository, source = ModelRepository(tmp_path / "models"), tmp_path / "source"
    onnx_models.write_version(source, onnx_models.constant(1.0))
    expected = ""
    if damage == "missing file":
        (source / "model.onnx").unlink()
    elif damage == "wrong digest":
        expected = "blake3:" + "0" * 64
    elif damage == "no manifest":
        (source / artifacts.MANIFEST_FILE).unlink()
    elif damage == "link":
        (source / "model.onnx").rename(tmp_path / "elsewhere")
        (source / "model.onnx").symlink_to(tmp_path / "elsewhere")
    else:
        source = source / "model.toml"
    with pytest.raises(FailedPrecondition) as caught:
        repository.take_in(source, expected)
    assert caught.value.reason in {"DIGEST_MISMATCH", "INVALID_ARTIFACT"}
    assert not list(tmp_path.glob("models/.incoming/*"))
    with pytest.raises(NotFound):
        repository.take_in(tmp_path / "nothing")


def test_a_story_is_told_in_order() -> None:
    row = VersionRow(
        "policy",
        "2",
        "blake3:" + "a" * 64,
        "/x",
        1,
        Origin("runs/r", "runs/r/checkpoints/c", 300, 1),
        {"reward": 40.0},
        20.0,
    )
    swap = Swap(
        "s1", SwapSpec("policy", "2"), 30.0, State.COMPLETED, 40.0, 40.0, stable=all_to("1"), epoch=2, why="better"
    )
    rollback = RollbackRow(
        "rb", "runs/r", "kl", 0.5, 0.03, 400, 300, "runs/r/checkpoints/c", "controller", created_at=50.0
    )
    told = story.tell(row, Route("policy", 2, all_to("2")), [swap], [rollback])
    assert [sentence.split()[1] for sentence in told[:-1]] == ["version", "swap", "runs/r"]
    assert told[-1] == "version 2 serves 100.0% of the traffic at epoch 2"
