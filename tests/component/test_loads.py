"""Loads that do not hurt: tried in a child first, kept there when large, refused when they don't fit, held up while what serves is slow."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import onnx_models
from dataplane_world import World, a_call, dataplane_world
from interlock.core.pacing import PacingPolicy
from interlock.errors import FailedPrecondition, InterlockError, Internal, ResourceExhausted, Unavailable
from interlock.runtime import failpoints
from interlock.stores import artifacts
from interlock_inference.loads import isolated, memory
from interlock_inference.loads.history import LoadHistory
from interlock_inference.loads.isolated import IsolatedEngine
from interlock_inference.replica import Wanted

TRIED = {"tries": True}
KEPT = {"isolate_bytes": 1}
SPIN = "import signal, sys; signal.pause()"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="loading children need Linux")


async def refused(world: World, version: str, *, body: bytes | None = None) -> InterlockError:
    with pytest.raises(InterlockError) as caught:
        async for _ in world.replica.prepare(Wanted("policy", version, world.artifact(version, body))):
            pass
    return caught.value


async def answer(world: World) -> str:
    return (await world.plane.infer(a_call())).slot.version


@pytest.fixture
async def tried(tmp_path: Path) -> AsyncIterator[World]:
    """Version 1 serves; what comes next is tried in a child."""
    async with dataplane_world(tmp_path, loads=TRIED) as world:
        await world.load("1")
        await world.route(1, "1")
        yield world


def children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # also for one that has ended and is not reaped yet
            if "loads.child" in " ".join(child.cmdline()):
                found.append(child)
    return found


async def gone(children_before: list[psutil.Process]) -> None:
    async with asyncio.timeout(10):
        while [child for child in children_before if child.is_running()]:
            await asyncio.sleep(0.01)


async def test_a_candidate_is_tried_and_then_built_here(tried: World) -> None:
    slot = await tried.load("2")
    assert slot.opened is not None
    assert not isinstance(slot.opened.engine, IsolatedEngine)
    await tried.route(2, "2")
    assert await answer(tried) == "2"
    assert not children()
    assert LoadHistory(tried.home / "loads.json").peak_bytes[slot.digest] >= 0


@pytest.mark.parametrize("place", ["child.load:2", "child.load"])
async def test_a_child_that_dies_is_a_refusal(tried: World, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, place)
    error = await refused(tried, "2")
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "LOAD_CRASHED"
    assert "SIGKILL" in error.message
    assert error.metadata["how"] == "SIGKILL"
    assert await answer(tried) == "1"
    assert not children()


async def test_what_a_child_refuses_it_refuses_in_its_own_words(tried: World) -> None:
    error = await refused(tried, "2", body=b"not a model")
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "INVALID_ARTIFACT"
    assert error.field == "artifact_uri"
    assert await answer(tried) == "1"


async def test_a_child_that_hangs_is_stopped(tmp_path: Path) -> None:
    program = (sys.executable, "-c", SPIN)
    async with dataplane_world(tmp_path, loads={**KEPT, "timeout_seconds": 0.3, "program": program}) as world:
        error = await refused(world, "1")
        assert error.reason == "LOAD_CRASHED"
        assert error.metadata["how"] == "timeout"
        assert not children()


@pytest.mark.parametrize(("breaks", "how"), [("ctypes.string_at(0)", "SIGSEGV"), ("os.abort()", "SIGABRT"), ("os._exit(3)", "exit 3")])  # fmt: skip
async def test_whatever_ends_a_child_is_named(tmp_path: Path, breaks: str, how: str) -> None:
    """As a malformed graph does it: in native code, in the middle of the load."""
    code = f"import ctypes, os, socket, sys; socket.socket(fileno=int(sys.argv[1])).recv(1); {breaks}"
    async with dataplane_world(tmp_path, loads={**TRIED, "program": (sys.executable, "-c", code)}) as world:
        await world.load("1")
        await world.route(1, "1")
        error = await refused(world, "2")
        assert error.reason == "LOAD_CRASHED"
        assert error.metadata["how"] == how
        assert await answer(world) == "1"


async def test_a_child_gets_no_key_and_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERLOCK_API_KEY", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    async with dataplane_world(tmp_path, loads=KEPT) as world:
        await world.load("1")
        (child,) = children()
        assert child.environ().keys() <= {
            "PATH",
            "PYTHONPATH",
            "LD_LIBRARY_PATH",
            "LANG",
            "CUDA_VISIBLE_DEVICES",
            "OMP_NUM_THREADS",
            "LC_CTYPE",
            failpoints.VARIABLE,
        }
        limits = Path(f"/proc/{child.pid}/limits").read_text()
        core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
        assert core.split()[4:6] == ["0", "0"]


# --- tried again ---


async def test_what_may_pass_is_tried_again_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = [memory.Room(0, 1 << 40, "machine")] * 2
    real = memory.room
    monkeypatch.setattr(memory, "room", lambda *_: rooms.pop() if rooms else real(0, 0))
    async with dataplane_world(tmp_path) as world:
        messages = [load.message async for load in world.replica.prepare(Wanted("policy", "1", world.artifact("1")))]
    assert "attempt 1 failed: DOES_NOT_FIT; again in 0.1 s" in messages
    assert "attempt 2 failed: DOES_NOT_FIT; again in 0.2 s" in messages
    assert messages[-1] == "loaded"


async def test_attempts_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "room", lambda *_: memory.Room(0, 1 << 40, "machine"))
    async with dataplane_world(tmp_path) as world:
        error = await refused(world, "1")
        assert error.metadata["attempts"] == "3"
        assert error.message.endswith("(tried 3 times)")
        monkeypatch.setattr(memory, "room", lambda *_: memory.Room(0, 1, "machine"))
        never = await refused(world, "1")
        assert "attempts" not in never.metadata, "what is more than there ever is, is not tried again"


async def test_a_release_ends_the_wait_for_the_next_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "room", lambda *_: memory.Room(0, 1 << 40, "machine"))
    async with dataplane_world(tmp_path, loads={"again_seconds": 60.0}) as world, asyncio.timeout(10):
        loads = world.replica.prepare(Wanted("policy", "1", world.artifact("1")))
        while not (await anext(loads)).message.startswith("attempt"):
            pass
        await world.replica.release("policy", "1")
        with pytest.raises(FailedPrecondition) as ended:
            async for _ in loads:
                pass
        assert ended.value.reason == "RELEASED"


# --- a large version stays in its child ---


async def test_a_large_version_answers_from_its_child(tmp_path: Path) -> None:
    async with dataplane_world(tmp_path, loads=KEPT) as world:
        slot = await world.load("1")
        await world.route(1, "1")
        (child,) = children()
        reply = await world.plane.infer(a_call(rows=3))
        assert reply.outputs[0].shape[0] == 3
        assert float(reply.outputs[0].flat[0]) == 1.0
        assert slot.opened is not None
        assert slot.opened.memory_bytes > 1 << 20
        assert slot.opened.spec is not None
        await world.load("2")
        await world.route(2, "2")
        await world.replica.drain("policy", "1", 1.0)
        await world.replica.release("policy", "1")
        await gone([child])
        assert await answer(world) == "2"
    assert not children()


async def test_every_kind_of_tensor_passes(tmp_path: Path) -> None:
    async with dataplane_world(tmp_path, loads=KEPT) as world:
        (tmp_path / "two.onnx").write_bytes(onnx_models.two_inputs())
        async for load in world.replica.prepare(Wanted("policy", "1", str(tmp_path / "two.onnx"))):
            slot = load.slot
        assert slot.opened is not None
        engine = slot.opened.engine
        a = np.arange(6, dtype=np.float32).reshape(3, 2)
        total, shape = engine.run({"a": a, "b": a}, ["sum", "shape"])
        assert total.tolist() == (a + a).tolist()
        assert shape.tolist() == [3, 2]
        big = np.ones((50_000, 2), np.float32)
        assert engine.run({"a": big, "b": big}, ["sum"])[0].sum() == 200_000
        (empty,) = engine.run({"a": a[:0], "b": a[:0]}, ["sum"])
        assert empty.shape == (0, 2)
        with pytest.raises(Internal, match=r"error [0-9a-f]{16}"):
            engine.run({"a": a}, ["sum"])
        assert engine.run({"a": a, "b": a}, ["sum"])[0].shape == (3, 2)


async def test_a_lost_child_comes_back(tmp_path: Path) -> None:
    async with dataplane_world(tmp_path, loads=KEPT) as world:
        await world.load("1")
        await world.route(1, "1")
        (child,) = children()
        os.kill(child.pid, signal.SIGKILL)
        lost = set()
        async with asyncio.timeout(20):
            while True:
                try:
                    assert await answer(world) == "1"
                except Unavailable as error:
                    lost.add(error.reason)
                    await asyncio.sleep(0.02)
                else:
                    if children() and children()[0].pid != child.pid:
                        break
        assert lost == {"ENGINE_LOST"}
        assert world.metrics.get_sample_value("interlock_engine_restarts_total", {"model": "policy"}) == 1


async def test_a_child_that_hangs_in_a_run_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "RUN_SECONDS_MAX", 0.3)
    async with dataplane_world(tmp_path, loads=KEPT) as world:
        await world.load("1")
        await world.route(1, "1")
        (child,) = children()
        child.suspend()
        with pytest.raises(Unavailable) as lost:
            await answer(world)
        assert lost.value.reason == "ENGINE_LOST"
        async with asyncio.timeout(20):
            while not world.metrics.get_sample_value("interlock_engine_restarts_total", {"model": "policy"}):
                await asyncio.sleep(0.02)
        assert await answer(world) == "1"
        await gone([child])


async def test_a_replica_that_stops_takes_its_loads_along(tmp_path: Path) -> None:
    async with asyncio.timeout(20):
        async with dataplane_world(tmp_path, loads={**KEPT, "program": (sys.executable, "-c", SPIN)}) as world:
            await anext(world.replica.prepare(Wanted("policy", "1", world.artifact("1"))))
            while not psutil.Process().children():
                await asyncio.sleep(0.01)
        assert not psutil.Process().children()


async def test_a_version_released_while_it_loads_takes_its_child_with_it(tmp_path: Path) -> None:
    program = (sys.executable, "-c", SPIN)
    async with dataplane_world(tmp_path, loads={**KEPT, "program": program}) as world:
        stream = world.replica.prepare(Wanted("policy", "1", world.artifact("1")))
        await anext(stream)
        async with asyncio.timeout(10):
            while not psutil.Process().children():
                await asyncio.sleep(0.01)
            await world.replica.release("policy", "1")
            with pytest.raises(FailedPrecondition) as ended:
                async for _ in stream:
                    pass
        assert ended.value.reason == "RELEASED"
        await gone(children())


# --- a version that killed the process before ---


async def test_a_version_that_killed_the_process_is_tried_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LoadHistory(tmp_path / "loads.json").doubt(
        "models/policy/versions/1"
    )  # as a process leaves it that died in the load
    monkeypatch.setenv(failpoints.VARIABLE, "child.load:1")
    async with dataplane_world(tmp_path) as world:
        assert (await refused(world, "1")).reason == "LOAD_CRASHED"
        monkeypatch.delenv(failpoints.VARIABLE)
        await world.load("1")
        assert not LoadHistory(tmp_path / "loads.json").is_doubtful("models/policy/versions/1")


def test_a_damaged_history_is_begun_anew(tmp_path: Path) -> None:
    for damaged in (b"{", b"[]", b'{"format": 2}'):
        (tmp_path / "loads.json").write_bytes(damaged)
        history = LoadHistory(tmp_path / "loads.json")
        assert not history.peak_bytes
        history.note("blake3:1", 5)
        assert LoadHistory(tmp_path / "loads.json").peak_bytes == {"blake3:1": 5}


# --- memory ---


async def test_what_does_not_fit_is_refused_with_every_number(tmp_path: Path) -> None:
    async with dataplane_world(tmp_path, loads={"limit_bytes": psutil.Process().memory_info().rss}) as world:
        error = await refused(world, "1")
    assert isinstance(error, ResourceExhausted)
    assert error.reason == "DOES_NOT_FIT"
    assert error.metadata["bound_by"] == "memory_limit_mb"
    size_bytes = artifacts.read_manifest(tmp_path / "models" / "policy" / "1").size_bytes
    assert error.metadata["needed_bytes"] == str(memory.LOAD_FACTOR * size_bytes)
    assert error.metadata["measured"] == "false"
    assert {"reserve_bytes", "available_bytes", "limit_bytes"} <= error.metadata.keys()
    assert (error.retry_after_seconds is None) == (
        int(error.metadata["needed_bytes"]) > int(error.metadata["limit_bytes"])
    )


async def test_what_was_measured_counts_the_next_time(tmp_path: Path) -> None:
    limit = psutil.Process().memory_info().rss + (512 << 20)
    async with dataplane_world(tmp_path, loads={"limit_bytes": limit}) as world:
        digest = artifacts.read_manifest(Path(world.artifact("1"))).digest
    LoadHistory(tmp_path / "loads.json").note(digest, 1 << 40)
    async with dataplane_world(tmp_path, loads={"limit_bytes": limit}) as world:
        error = await refused(world, "1")
        assert error.metadata["needed_bytes"] == str(1 << 40)
        assert error.metadata["measured"] == "true"


async def test_a_load_that_needs_more_than_there_is_ends_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address space of the child is bounded, so a graph that asks for a terabyte is refused and not left to the kernel."""
    async with dataplane_world(tmp_path, loads=TRIED) as world:
        await world.load("1")
        await world.route(1, "1")
        error = await refused(world, "2", body=onnx_models.bomb(1 << 40))
        assert error.reason == "DOES_NOT_FIT"
        assert await answer(world) == "1"


def test_a_container_counts(tmp_path: Path) -> None:
    for name, text in (
        ("memory.max", "1000000\n"),
        ("memory.current", "900000\n"),
        ("memory.stat", "anon 1\ninactive_file 50000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert memory.room(0, 0, tmp_path) == memory.Room(150_000, 1_000_000, "container")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.room(0, 0, tmp_path).bound_by == "machine"
    assert memory.room(100, 40, tmp_path) == memory.Room(60, 100, "memory_limit_mb")
    assert memory.room(100, 140, tmp_path).available_bytes == 0


# --- held up while what serves is slow ---


async def test_a_load_waits_while_what_serves_is_slow(tmp_path: Path) -> None:
    pacing = PacingPolicy(floor_seconds=0.05, calm_seconds=0.1, slice_seconds=0.0)
    async with dataplane_world(tmp_path, pacing=pacing, loads={**TRIED, "program": slow_child(2.0)}) as world:
        await world.load("1")
        await world.route(1, "1")
        stats = world.registry.find("policy", "1").stats
        stopping, seconds = asyncio.Event(), [0.001]

        async def traffic() -> None:
            while not stopping.is_set():
                await asyncio.sleep(0.002)
                stats.success.add(1)
                stats.latencies_seconds.append(seconds[0])

        async with asyncio.TaskGroup() as group:
            group.create_task(traffic())
            await asyncio.sleep(0.2)
            messages: list[str] = []
            stopped: list[str] = []
            async for load in world.replica.prepare(Wanted("policy", "2", world.artifact("2"))):
                messages.append(load.message)
                if "verifying" in load.message:
                    seconds[0] = 0.5
                if load.message.startswith("paused"):
                    await asyncio.sleep(0.05)
                    stopped += [child.status() for child in psutil.Process().children()]
                    seconds[0] = 0.001
            stopping.set()
        assert any(m.startswith("paused: p99 5") and "over 50.0 ms" in m for m in messages), messages
        assert "stopped" in stopped
        assert messages[-1] == "loaded"
        assert world.metrics.get_sample_value("interlock_load_paused_seconds_total", {"model": "policy"}) > 0


async def test_a_load_that_never_gets_its_turn_is_given_up(tmp_path: Path) -> None:
    pacing = PacingPolicy(floor_seconds=0.01, factor=1.0, slice_seconds=0.0, pause_seconds_max=0.3, gives_up=True)
    loads = {**TRIED, "program": slow_child(30.0), "attempts": 1}
    async with dataplane_world(tmp_path, pacing=pacing, loads=loads) as world:
        await world.load("1")
        await world.route(1, "1")
        stats = world.registry.find("policy", "1").stats
        stats.latencies_seconds.extend([0.001] * 50)
        stopping = asyncio.Event()

        async def traffic() -> None:
            while not stopping.is_set():
                await asyncio.sleep(0.002)
                stats.success.add(1)
                stats.latencies_seconds.append(0.2)

        async with asyncio.TaskGroup() as group:
            before = time.monotonic()
            preparing = group.create_task(refused(world, "2"))
            await asyncio.sleep(0.4)  # the pacer has seen how it was before
            group.create_task(traffic())
            error = await preparing
            stopping.set()
        assert error.reason == "LOAD_STARVED"
        assert error.retry_after_seconds
        assert time.monotonic() - before < 20
        assert not psutil.Process().children()


def slow_child(seconds: float) -> tuple[str, ...]:
    """The real program, that much slower."""
    code = (
        "import sys, time\n"
        "from interlock_inference import repository\n"
        "real = repository.open_artifact\n"
        "def slow(path, digest, options, progress):\n"
        "    progress(5, 'verifying slowly')\n"
        f"    time.sleep({seconds})\n"
        "    return real(path, digest, options, progress)\n"
        "repository.open_artifact = slow\n"
        "from interlock_inference.loads import child\n"
        "child.main()\n"
    )
    return (sys.executable, "-c", code)
