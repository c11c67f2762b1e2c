"""Any order of a controller's commands, repeated, late, refused, interrupted and over restarts, against a deliberately simple oracle."""

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

import onnx_models
from dataplane_world import a_loader
from interlock.core.route import Route, Weight
from interlock.errors import InterlockError, Internal
from interlock.runtime.clock import SystemClock
from interlock_inference.assignment import AssignmentFile
from interlock_inference.dataplane import DataPlane
from interlock_inference.engines import Array
from interlock_inference.metrics import LoadMetrics
from interlock_inference.recorder import Recorder
from interlock_inference.replica import Replica, Wanted
from interlock_inference.slots import Registry, Slot, SlotState

VERSIONS = ("1", "2", "3")
X = {"x": np.zeros((1, 4), np.float32)}
COUNTER = itertools.count()


class Call:
    """A request for whatever the route picks, or for one version."""

    model, request_id, deadline, priority, has_images = "policy", "", None, 0, False
    outputs: Sequence[str] = ()

    def __init__(self, version: str = "") -> None:
        self.version = version

    def decode(self, slot: Slot) -> dict[str, Array]:
        return X


class Nobody:
    """Observes nothing."""

    def finished(self, slot: Slot, seconds: float, error: InterlockError | None) -> None:
        """Ignored."""

    def ran(self, slot: Slot, rows: int) -> None:
        """Ignored."""


@dataclass
class Oracle:
    """What must be true, without slots, threads or files: the highest token and the route last accepted."""

    token: int = 0
    epoch: int = 0
    weights: tuple[str, ...] = ()


class World:
    """One life of a replica after the other, over the same file."""

    def __init__(self, home: Path, models: Path) -> None:
        self.home, self.models, self.oracle = home, models, Oracle()

    async def live(self, commands: list[tuple[Any, ...]]) -> None:
        self.registry, recorder = Registry(), Recorder()
        self.plane = DataPlane(self.registry, recorder, Nobody())
        async with asyncio.TaskGroup() as tasks:
            file = AssignmentFile(self.home / "replica.json")
            self.replica = Replica(
                self.registry,
                recorder,
                file,
                SystemClock(),
                tasks,
                loader=a_loader(self.home, self.registry, tasks),
                counted=LoadMetrics(CollectorRegistry()),
                warmup_iterations=1,
            )
            await self.replica.restore()
            await self.check()
            for name, *arguments in commands:
                await self.refusable(getattr(self, name)(*arguments))
                await self.check()
        self.plane.close()
        self.replica.close()

    async def refusable(self, command: Any) -> None:
        with contextlib.suppress(InterlockError):
            try:
                await command
            except Internal as fault:
                raise AssertionError("an engine or the replica broke") from fault

    async def load(self, version: str) -> None:
        async for _ in self.replica.prepare(Wanted("policy", version, str(self.models / version))):
            pass
        await self.replica.warm("policy", version, 1)

    async def half_load(self, version: str) -> None:
        async for _ in self.replica.prepare(Wanted("policy", version, str(self.models / version))):
            break

    async def route(self, token: int, epoch: int, versions: tuple[str, ...]) -> None:
        wanted = Route("policy", epoch, tuple(Weight(v, 1) for v in versions))
        await self.replica.apply_route(token, wanted, "", 0.0)
        oracle = self.oracle
        assert token >= oracle.token, "a lower token was obeyed"
        assert epoch >= oracle.epoch, "a lower epoch was obeyed"
        assert epoch > oracle.epoch or versions == oracle.weights, "one epoch had two meanings"
        oracle.token, oracle.epoch, oracle.weights = token, epoch, versions

    async def swap(self, chosen: tuple[str, ...]) -> None:
        """What a controller that is in its right mind does."""
        for name in chosen:
            await self.load(name)
        await self.route(self.replica.fencing_token, self.oracle.epoch + 1, chosen)

    async def interrupted_swap(self, chosen: tuple[str, ...], turns: int) -> None:
        """The same, the caller going away at some point of it; then it asks again."""
        for name in chosen:
            await self.load(name)
        await self.interrupted_route(self.replica.fencing_token, self.oracle.epoch + 1, chosen, turns)

    async def interrupted_route(self, token: int, epoch: int, versions: tuple[str, ...], turns: int = 1) -> None:
        """The caller goes away after some turns of the loop; afterwards the replica is asked what holds."""
        wanted = Route("policy", epoch, tuple(Weight(v, 1) for v in versions))
        async with asyncio.TaskGroup() as group:
            applying = group.create_task(self.refusable(self.replica.apply_route(token, wanted, "", 0.0)))
            for _ in range(turns):
                await asyncio.sleep(0)
            applying.cancel()
        await self.replica.obey(self.replica.fencing_token + 1)  # queues behind it
        route = self.registry.snapshot.routes.get("policy")
        if route is not None:
            self.oracle.epoch, self.oracle.weights = route.route.epoch, route.route.versions()

    async def drain(self, version: str) -> None:
        await self.replica.drain("policy", version, 0.0)

    async def park(self, version: str) -> None:
        self.replica.park("policy", version)

    async def release(self, version: str) -> None:
        await self.replica.release("policy", version)

    async def compare(self, left: str, right: str) -> None:
        seen, _ = await self.replica.compare("policy", left, right, 2)
        assert seen.max_abs_error == abs(int(left) - int(right))

    async def ask(self, version: str) -> None:
        reply = await self.plane.infer(Call(version))
        assert reply.slot.version == version
        assert float(reply.outputs[0][0, 0]) == float(version)

    async def check(self) -> None:
        """After every command: the route in force is the one accepted, it answers with the right weights, and nothing leaks."""
        self.oracle.token = max(self.oracle.token, self.replica.fencing_token)
        route = self.registry.snapshot.routes.get("policy")
        if self.oracle.epoch:
            assert route is not None
            assert (route.route.epoch, route.route.versions()) == (self.oracle.epoch, self.oracle.weights)
        for _ in self.oracle.weights * 2:
            reply = await self.plane.infer(Call())
            assert reply.slot.version in self.oracle.weights
            assert float(reply.outputs[0][0, 0]) == float(reply.slot.version)
            assert reply.epoch == self.oracle.epoch
        for slot in self.replica.slots():
            routed = slot.version in self.oracle.weights
            assert (slot.state is SlotState.SERVING) == routed
            assert slot.opened is not None or slot.state in (SlotState.INITIALIZING, SlotState.STOPPED)


version = st.sampled_from(VERSIONS)
versions = st.lists(version, max_size=2, unique=True).map(tuple)
some_versions = st.lists(version, min_size=1, max_size=2, unique=True).map(tuple)
token, epoch = st.integers(0, 4), st.integers(1, 8)
command = st.one_of(
    st.tuples(st.just("load"), version),
    st.tuples(st.just("load"), version),
    st.tuples(st.just("half_load"), version),
    st.tuples(st.just("swap"), versions),
    st.tuples(st.just("swap"), some_versions),
    st.tuples(st.just("interrupted_swap"), some_versions, st.integers(1, 6)),
    st.tuples(st.just("route"), token, epoch, versions),
    st.tuples(st.just("route"), st.integers(2, 4), epoch, versions),
    st.tuples(st.just("interrupted_route"), token, epoch, versions),
    st.tuples(st.sampled_from(["drain", "park", "release", "ask"]), version),
    st.tuples(st.just("compare"), version, version),
)
lives = st.lists(st.lists(command, max_size=12), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in VERSIONS:
        onnx_models.write_version(folder / name, onnx_models.constant(float(name)))
    return folder


@settings(deadline=None, max_examples=80)
@given(story=lives)
def test_any_story_holds(
    models: Path, tmp_path_factory: pytest.TempPathFactory, story: list[list[tuple[Any, ...]]]
) -> None:
    async def tell() -> None:
        world = World(tmp_path_factory.mktemp(f"home-{next(COUNTER)}"), models)
        for life in story:
            await world.live(life)

    asyncio.run(tell())
