"""The demo's story: what is awaited, what is promised, what came of it. Talks to running rooms like any client; shows nothing itself.

Training and requests are real; the only thing that is staged is the fault (learning rate x 1000).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from interlock.api.trainer.v1 import run_service_pb2 as run_pb
from interlock.cli.console import last
from interlock.client.admin import AdminClient
from interlock.client.load import GrpcTarget, HttpTarget, Load, Target
from interlock.errors import InterlockError, NotFound
from interlock.runtime.settings import Settings

RUN, MODEL = "demo", "policy"
RATE = 200.0
"""Requests per second, half over HTTP, half over gRPC: steady traffic that leaves the machine's cores to the training."""
FAULT_FACTOR, FAULT_STEPS = 1000.0, 3
SAVE_EVERY, CONFIRM_AFTER = 100, 60
MIN_IMPROVEMENT, MIN_INTERVAL_SECONDS = 20.0, 5
RECOVERED_SHARE = 0.9
"""Recovered: the reward is back at nine tenths of what it was when the fault was injected."""
WAIT_SECONDS = 120.0
PACE_MS = 4.0


@dataclass
class Scene:
    """Everything there is to see right now; the stage reads it, the story writes it."""

    chapter: str = "starting"
    run: dict[str, Any] = field(default_factory=dict)
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=4000))
    step: int = 0
    attempt: int = 1
    checkpoints: dict[str, str] = field(default_factory=dict)
    version: str = ""
    epoch: int = 0
    swap: dict[str, Any] = field(default_factory=dict)
    load: Load | None = None
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    receipts: list[dict[str, Any]] = field(default_factory=list)


class BrokenPromise(Exception):
    """Something that the demo promises did not happen; the message says what."""


class Story:
    """Tells the story once.

    Args:
        say: told of every event, one line each.
    """

    def __init__(self, settings: Settings, admin: AdminClient, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._admin = admin
        self._say = say
        self.scene = Scene()
        self.reward_before_fault = 0.0
        self.reward_after = 0.0
        self.fault_step = 0
        self._stop_load = asyncio.Event()
        self._seen_swaps: set[str] = set()

    async def tell(self) -> None:
        """Runs all chapters.

        Raises:
            BrokenPromise: at the first thing that did not come true in its time.
        """
        try:
            async with asyncio.TaskGroup() as group:
                await self._train()
                followers = [
                    group.create_task(work()) for work in (self._follow_run, self._follow_steps, self._follow_swaps)
                ]
                await self._chapters(group)
                for follower in followers:
                    follower.cancel()
        except* BrokenPromise as broken:
            raise broken.exceptions[0] from None

    async def _chapters(self, group: asyncio.TaskGroup) -> None:
        await self._first_version()
        traffic = group.create_task(self._traffic())
        await self._swap_under_load()
        await self._fault()
        await self._recovery()
        await self._one_more_swap()
        self.scene.chapter = "ending"
        self._stop_load.set()
        await traffic
        await self._admin.steer_run(RUN, "stop", reason="the demo ends")

    # --- chapters ---------------------------------------------------------------------------------------------------------------

    async def _train(self) -> None:
        self.scene.chapter = "1/5 training: PPO on CartPole, every step guarded"
        promotion = run_pb.PromotionPolicy(
            model=f"models/{MODEL}",
            metric="reward",
            direction=run_pb.PromotionPolicy.DIRECTION_MAXIMIZE,
            min_improvement=MIN_IMPROVEMENT,
        )
        promotion.min_interval.FromSeconds(MIN_INTERVAL_SECONDS)
        self.scene.run = await self._admin.create_run(
            "ppo",
            parameters={"seed": 1, "pace_ms": PACE_MS},
            run_id=RUN,
            save_every_steps=SAVE_EVERY,
            confirm_after_steps=CONFIRM_AFTER,
            promotion=promotion,
            reason="demo",
        )
        self._say("run demo: PPO with a policy and a value network; checkpoints become known-good after clean steps")

    async def _first_version(self) -> None:
        await self._until(lambda: self.scene.version, "a first known-good checkpoint exported and served as version 1")
        self._say(f"version {self.scene.version} of {MODEL} serves: exported to ONNX, compared with torch, warmed up")

    async def _traffic(self) -> None:
        inputs = {"obs": np.zeros((1, 4), np.float32)}
        targets: list[Target] = [
            GrpcTarget(self._settings.inference_address, MODEL, inputs),
            HttpTarget(f"{self._settings.host}:{self._settings.gateway.port}", MODEL, inputs),
        ]
        self.scene.load = Load(targets, rate=RATE)
        self._say(f"load: {RATE:.0f} predictions/s, HTTP and gRPC, from now on without a pause")
        await self.scene.load.run(self._stop_load)

    async def _swap_under_load(self) -> None:
        self.scene.chapter = "2/5 a better checkpoint is promoted by a blue-green swap under that load"
        await self._until(lambda: len(self.scene.receipts) >= 2, "a better known-good checkpoint promoted under load")
        await asyncio.sleep(3)  # traffic after the swap, for its figures

    async def _fault(self) -> None:
        self.scene.chapter = (
            f"3/5 fault: learning rate x {FAULT_FACTOR:.0f} for {FAULT_STEPS} steps; the guard must see it"
        )
        self.reward_before_fault, self.fault_step = self._reward(), self.scene.step
        await self._admin.inject_fault(RUN, "learning_rate", FAULT_FACTOR, step_count=FAULT_STEPS, reason="demo")
        self._say(f"fault injected after step {self.fault_step}, reward {self.reward_before_fault:.0f}")
        await self._until(self._rolled_back, "the guard to trip and the run to roll back by itself")

    async def _recovery(self) -> None:
        self.scene.chapter = "4/5 recovery from the known-good checkpoint"
        goal = RECOVERED_SHARE * self.reward_before_fault
        rollback = self._rolled_back()
        assert rollback is not None
        attempt, first = self.scene.attempt, self.scene.step
        await self._until(
            lambda: (
                self.scene.attempt >= max(attempt, 2)
                and self.scene.step > first + CONFIRM_AFTER
                and self._reward() >= goal
            ),
            f"the reward back at {goal:.0f}",
        )
        self.reward_after = self._reward()
        self._say(f"recovered: reward {self.reward_after:.0f} at step {self.scene.step}, attempt {self.scene.attempt}")

    async def _one_more_swap(self) -> None:
        """Serving goes on as well: one more promotion if the policy still gets better within a while; not promised."""
        self.scene.chapter = "5/5 training and serving go on"
        before = len(self.scene.receipts)
        with contextlib.suppress(BrokenPromise):
            await self._until(lambda: len(self.scene.receipts) > before, "one more swap", 15.0)
        await asyncio.sleep(2)

    # --- what is awaited --------------------------------------------------------------------------------------------------------

    async def _until(self, condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise BrokenPromise(f"waited {seconds:.0f} s for {what}")
            if self.scene.run.get("state") == "FAILED":
                raise BrokenPromise(f"the run failed: {self.scene.run.get('message')}")
            await asyncio.sleep(0.05)

    def _reward(self) -> float:
        recent = list(self.scene.rewards)[-16:]
        return sum(recent) / len(recent) if recent else 0.0

    def _rolled_back(self) -> dict[str, Any] | None:
        """The rollback that answered the injected fault, once it is done."""
        return next(
            (
                r
                for r in self.scene.rollbacks
                if int(r["from_step"]) >= self.fault_step > 0 and r["state"] == "COMPLETED"
            ),
            None,
        )

    # --- followers --------------------------------------------------------------------------------------------------------------

    async def _follow_run(self) -> None:
        async for change in self._admin.watch_run(RUN):
            self.scene.run = change["run"]
            if checkpoint := change.get("checkpoint"):
                self.scene.checkpoints[last(checkpoint["name"])] = checkpoint["state"]
            if rollback := change.get("rollback"):
                self._note_rollback(rollback)

    def _note_rollback(self, rollback: dict[str, Any]) -> None:
        known = {r["rollback_id"]: index for index, r in enumerate(self.scene.rollbacks)}
        if rollback["rollback_id"] in known:
            self.scene.rollbacks[known[rollback["rollback_id"]]] = rollback
            return
        self.scene.rollbacks.append(rollback)
        figures = f"{rollback['metric']} {rollback['value']:.4g} (limit {rollback['limit']:.4g})"
        self._say(
            f"guard tripped: rule {rollback['rule']}, {figures}; step {rollback['from_step']} -> {rollback['to_step']}"
        )

    async def _follow_steps(self) -> None:
        async for record in self._admin.step_metrics(RUN):
            self.scene.step, self.scene.attempt = record["step"], record["attempt"]
            if "reward" in record:
                self.scene.rewards.append(record["reward"])

    async def _follow_swaps(self) -> None:
        while True:
            try:
                newest = await self._admin.swaps(MODEL, page_size=5)
            except NotFound:
                newest = []
            for swap in reversed(newest):
                if swap["name"] not in self._seen_swaps:
                    self._seen_swaps.add(swap["name"])
                    await self._follow_swap(swap["name"])
            await asyncio.sleep(0.1)

    async def _follow_swap(self, name: str) -> None:
        number = len(self._seen_swaps)
        load = self.scene.load
        with load.marked(f"swap {number}") if load and load.elapsed else contextlib.nullcontext():
            async for swap in self._admin.watch_swap(name):
                self.scene.swap = swap
        receipt = await self._admin.receipt(name)
        version = next(v for v in await self._admin.versions(MODEL) if v["name"] == receipt["candidate_version"])
        receipt["reward"] = version.get("metrics", {}).get("reward")
        self.scene.receipts.append(receipt)
        route = next(m["route"] for m in await self._admin.models() if last(m["name"]) == MODEL)
        self.scene.version, self.scene.epoch = last(route["stable_version"]), int(route["epoch"])
        self._say(
            f"swap to version {last(version['name'])}: {receipt['state']}; training step {version['origin']['step']}, "
            f"reward {receipt['reward'] or 0:.0f}; requests failed by it {receipt['failed_count']}"
        )

    # --- the end ----------------------------------------------------------------------------------------------------------------

    async def broken_promises(self) -> list[str]:
        """Everything that was promised and did not come true; empty when all is well."""
        broken = []
        completed = [r for r in self.scene.receipts if r["state"] == "COMPLETED"]
        if len(completed) < 2:
            broken.append(f"{len(completed)} swaps completed; at least 2 were promised")
        if self._rolled_back() is None:
            broken.append("no rollback followed the injected fault")
        if self.reward_after < RECOVERED_SHARE * self.reward_before_fault:
            broken.append(f"reward {self.reward_after:.0f} did not recover from {self.reward_before_fault:.0f}")
        failed = sum(int(r["failed_count"]) for r in self.scene.receipts)
        if failed or (self.scene.load and self.scene.load.num_failed):
            broken.append(
                f"requests failed: {self.scene.load.num_failed if self.scene.load else 0} seen by clients, {failed} in receipts"
            )
        return broken + await self._poisoned_versions()

    async def _poisoned_versions(self) -> list[str]:
        try:
            versions = await self._admin.versions(MODEL)
        except InterlockError as error:
            return [f"versions could not be read: {error.message}"]
        poisoned = {name for name, state in self.scene.checkpoints.items() if state == "QUARANTINED"}
        served = {last(r["candidate_version"]) for r in self.scene.receipts if r["state"] == "COMPLETED"}
        return [
            f"version {last(v['name'])} came from the quarantined checkpoint {last(v['origin']['checkpoint'])}"
            for v in versions
            if last(v["name"]) in served and last(v.get("origin", {}).get("checkpoint", "-")) in poisoned
        ]
