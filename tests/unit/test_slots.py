"""Slots and the registry: admission, handles that survive a switch, drains that wait or cut, engines closed after the last handle."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import FakeClock
from interlock.core.route import Route, Weight
from interlock.errors import IllegalTransition, NotFound, Unavailable
from interlock.stores.modelspec import TensorSpec
from interlock_inference.engines import Signature
from interlock_inference.repository import Opened
from interlock_inference.slots import ANSWERS, TRANSITIONS, Handle, Origin, Registry, Slot, SlotState

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1,)),), (TensorSpec("y", "FP32", (-1,)),), {})


class FakeEngine:
    """Remembers whether it was closed."""

    platform = "fake"
    providers = ("Fake",)
    signature = SIGNATURE

    def __init__(self) -> None:
        self.closed = False

    def run(self, inputs: Any, outputs: Any) -> list[Any]:
        return [np.zeros(1, np.float32)]

    def close(self) -> None:
        assert not self.closed
        self.closed = True


World = tuple[Registry, dict[str, Slot], dict[str, FakeEngine]]


def ready_slot(version: str, model: str = "m") -> tuple[Slot, FakeEngine]:
    engine = FakeEngine()
    slot = Slot(model, version, "/nowhere", Origin())
    slot.loaded(Opened(engine, "blake3:x", Path("/nowhere"), None, 0))
    slot.move(SlotState.READY)
    return slot, engine


@pytest.fixture
def world() -> World:
    registry, slots, engines = Registry(), {}, {}
    for version in ("1", "2"):
        slots[version], engines[version] = ready_slot(version)
        registry.put(slots[version])
    registry.switch(Route("m", 1, (Weight("1", 1),)))
    return registry, slots, engines


def path_to(state: SlotState) -> list[SlotState]:
    return {
        SlotState.INITIALIZING: [],
        SlotState.WARMING_UP: [SlotState.WARMING_UP],
        SlotState.READY: [SlotState.WARMING_UP, SlotState.READY],
        SlotState.SERVING: [SlotState.WARMING_UP, SlotState.READY, SlotState.SERVING],
        SlotState.DRAINING: [SlotState.WARMING_UP, SlotState.READY, SlotState.DRAINING],
        SlotState.STOPPED: [SlotState.STOPPED],
    }[state]


@pytest.mark.parametrize("start", SlotState)
@pytest.mark.parametrize("to", SlotState)
def test_the_table_is_the_whole_life(start: SlotState, to: SlotState) -> None:
    slot = Slot("m", "1", "", Origin())
    for step in path_to(start):
        slot.move(step)
    if to is start or to in TRANSITIONS[start]:
        slot.move(to)
        assert slot.state is to
    else:
        with pytest.raises(IllegalTransition, match=f"is {start} and can't become {to}"):
            slot.move(to)
        assert slot.state is start


def test_every_version_that_answers_can_be_left() -> None:
    assert all(TRANSITIONS[state] for state in ANSWERS)


def test_a_handle_keeps_its_version_over_a_switch(world: World) -> None:
    registry, slots, engines = world
    before = registry.admit("m", "", "a")
    left = registry.switch(Route("m", 2, (Weight("2", 1),)))
    after = registry.admit("m", "", "b")
    assert (before.slot.version, before.epoch) == ("1", 1)
    assert (after.slot.version, after.epoch) == ("2", 2)
    assert left == [slots["1"]]
    assert (slots["1"].state, slots["2"].state) == (SlotState.DRAINING, SlotState.SERVING)
    slots["1"].move(SlotState.STOPPED)
    assert not engines["1"].closed
    before.release()
    assert engines["1"].closed


def test_an_empty_slot_is_closed_when_it_stops(world: World) -> None:
    _, slots, engines = world
    slots["2"].move(SlotState.STOPPED)
    assert engines["2"].closed


def test_admission_refusals(world: World) -> None:
    registry, slots, _ = world
    for model, version, error, reason in (
        ("none", "", NotFound, "MODEL_NOT_FOUND"),
        ("none", "1", NotFound, "MODEL_NOT_FOUND"),
        ("m", "9", NotFound, "VERSION_NOT_FOUND"),
    ):
        with pytest.raises(error) as refused:
            registry.admit(model, version, "")
        assert refused.value.reason == reason
    registry.put(Slot("m", "3", "", Origin()))
    with pytest.raises(Unavailable, match="initializing"):
        registry.admit("m", "3", "")
    registry.switch(Route("m", 2, (Weight("2", 1),)))
    with pytest.raises(Unavailable) as draining:
        registry.admit("m", "1", "")
    assert draining.value.reason == "DRAINING"
    registry.switch(Route("m", 3))
    with pytest.raises(Unavailable, match="no version of it is routed"):
        registry.admit("m", "", "")
    other, _ = ready_slot("1", "loaded-only")
    registry.put(other)
    with pytest.raises(Unavailable):
        registry.admit("loaded-only", "", "")
    assert registry.admit("loaded-only", "1", "").slot is other
    assert all(not slot.handles for slot in slots.values())


def test_weights_are_followed_within_one_request(world: World) -> None:
    registry, _, _ = world
    registry.switch(Route("m", 2, (Weight("1", 9), Weight("2", 1))))
    picked = {"1": 0, "2": 0}
    for n in range(1, 101):
        handle = registry.admit("m", "", "")
        picked[handle.slot.version] += 1
        handle.release()
        assert abs(picked["2"] - n * 0.1) <= 1
    assert picked == {"1": 90, "2": 10}


async def test_a_drain_waits_for_the_last_handle(world: World) -> None:
    registry, slots, _ = world
    handles = [registry.admit("m", "", str(n)) for n in range(3)]
    registry.switch(Route("m", 2, (Weight("2", 1),)))
    clock = FakeClock(auto=False)
    async with asyncio.TaskGroup() as group:
        drain = group.create_task(slots["1"].drain(clock, 30.0))
        for handle in handles:
            await asyncio.sleep(0)
            assert not drain.done()
            handle.release()
    assert (drain.result().num_drained, drain.result().num_cut) == (3, 0)


async def test_a_drain_cuts_what_is_left_at_its_deadline(world: World) -> None:
    registry, slots, engines = world
    done, stuck = registry.admit("m", "", "done"), registry.admit("m", "", "stuck")
    stuck.abort = asyncio.get_running_loop().create_future()
    registry.switch(Route("m", 2, (Weight("2", 1),)))
    clock = FakeClock(auto=False)
    async with asyncio.TaskGroup() as group:
        drain = group.create_task(slots["1"].drain(clock, 30.0))
        await asyncio.sleep(0)
        done.release()
        await asyncio.sleep(0)
        assert not drain.done()
        await asyncio.sleep(0)
        clock.advance(30.0)
    assert (drain.result().num_drained, drain.result().num_cut, drain.result().cut_request_ids) == (1, 1, ("stuck",))
    with pytest.raises(Unavailable) as cut:
        stuck.abort.result()
    assert cut.value.reason == "DRAINING"
    slots["1"].move(SlotState.STOPPED)
    assert not engines["1"].closed
    stuck.release()
    assert engines["1"].closed


async def test_a_revert_during_the_drain_cuts_nobody(world: World) -> None:
    registry, slots, _ = world
    handle = registry.admit("m", "", "a")
    handle.abort = asyncio.get_running_loop().create_future()
    registry.switch(Route("m", 2, (Weight("2", 1),)))
    clock = FakeClock(auto=False)
    async with asyncio.TaskGroup() as group:
        drain = group.create_task(slots["1"].drain(clock, 30.0))
        for _ in range(3):
            await asyncio.sleep(0)
        registry.switch(Route("m", 3, (Weight("1", 1),)))
        clock.advance(30.0)
    assert drain.result().num_cut == 0
    assert not handle.abort.done()
    handle.release()


async def test_an_empty_slot_drains_at_once(world: World) -> None:
    _, slots, _ = world
    slots["2"].move(SlotState.DRAINING)
    assert (await slots["2"].drain(FakeClock(auto=False), 30.0)).num_drained == 0


def test_a_handle_is_given_back_once(world: World) -> None:
    registry, _, _ = world
    handle: Handle = registry.admit("m", "", "a")
    handle.release()
    with pytest.raises(KeyError):
        handle.release()
