"""Golden histories of swaps: each file is a story, told to the pure core in a small world and answered with its trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from interlock.core.route import all_to
from interlock.core.swap import Concurrency, Event, OnCrash, State, Strategy, SwapSpec, approve, pause, unpause
from interlock.core.swap_plan import Decision, Slot, SlotState
from interlock.errors import InterlockError
from scenario import driver
from swapworld import MODEL, Controller, FakeReplica, Store

HISTORIES = sorted((Path(__file__).parent / "histories" / "swap").glob("*.txt"))
_SECONDS = (
    "prepare_seconds",
    "drain_seconds",
    "soak_seconds",
    "keep_warm_seconds",
    "approval_seconds",
    "canary_step_seconds",
)


class Story:
    """The handler of one file: a world, and the lines traced since the last directive."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.at = 0.0
        self.store = Store()
        self.replicas: dict[str, FakeReplica] = {}
        self.controller = self._controller()

    def _controller(self) -> Controller:
        controller = Controller(self.store, self.replicas, lambda: self.at, self.lines.append)
        controller.start()
        return controller

    def __call__(self, block: driver.Block) -> str:
        self.lines.clear()
        try:
            getattr(self, f"do_{block.directive.replace('-', '_')}")(block)
        except InterlockError as refusal:
            self.lines.append(f"refused: {refusal.reason}: {refusal.message}")
        return "\n".join(self.lines) or "ok"

    def do_world(self, block: driver.Block) -> None:
        """`world replicas=2 serving=1`: replicas that serve a version (none: nothing was ever served)."""
        for n in range(int(block.option("replicas", "1"))):
            self.replicas[f"r{n + 1}"] = FakeReplica(f"r{n + 1}")
        serving = block.option("serving")
        if serving:
            self.store.route = type(self.store.route)(MODEL, 1, all_to(serving))
            for replica in self.replicas.values():
                replica.slots[serving] = Slot(SlotState.READY)
            for command in self.controller.assignments():
                self.controller.carry_out("", command)

    def do_create(self, block: driver.Block) -> None:
        options = dict(block.options)
        swap_id, candidate = options.pop("id"), options.pop("candidate")
        known: dict[str, object] = {k: float(options.pop(k)) for k in _SECONDS if k in options}
        for key, kind in (("concurrency", Concurrency), ("strategy", Strategy), ("on_crash", OnCrash)):
            if key in options:
                known[key] = kind(options.pop(key))
        if "canary" in options:
            known["canary_percents"] = tuple(int(p) for p in options.pop("canary").split(","))
        known["approval_required"] = options.pop("approval", "") == "yes"
        known["force"] = options.pop("force", "") == "yes"
        known["fast_track"] = options.pop("fast_track", "") == "yes"
        assert not options, f"unknown options {options}"
        self.at += 0.001
        self.controller.create(swap_id, SwapSpec(MODEL, candidate, **known))  # type: ignore[arg-type]

    def do_run(self, block: driver.Block) -> None:
        """Decides and carries out until nothing moves; `until=STATE` stops on entering it, before its commands."""
        for _ in range(200):
            if not self._round(block.option("until")):
                return
        raise AssertionError("the story does not come to rest")

    def _round(self, until: str) -> bool:
        busy = False
        for swap in sorted(self.store.active(), key=lambda s: s.created_at):
            before = self.store.swaps[swap.id]
            decision = self.controller.next(swap.id)
            busy |= decision.swap is not before
            if until and decision.swap.state == State(until) and decision.swap.state is not before.state:
                return False
            for command in decision.commands:
                revision = self.store.swaps[swap.id].revision
                if self.controller.attempt_and_finish(swap.id, command):
                    busy = True
                busy |= self.store.swaps[swap.id].revision != revision
        for command in [] if busy else self.controller.assignments():
            busy |= self.controller.attempt_and_finish("", command)
        return busy

    def do_wait(self, block: driver.Block) -> None:
        self.at += float(block.option("seconds"))

    def do_refuse(self, block: driver.Block) -> None:
        """`refuse command=Prepare reason=X replica=r1`: the next such command fails."""
        if block.option("command") == "Admit":
            self.controller.admit_failure = (block.option("reason"), "refused by the story")
            return
        replica = self.replicas[block.option("replica", "r1")]
        replica.refuse[block.option("command")] = (block.option("reason"), "refused by the story")
        if block.option("always") == "yes":
            replica.stubborn.add(block.option("command"))

    def do_allow(self, _block: driver.Block) -> None:
        for replica in self.replicas.values():
            replica.refuse.clear()
            replica.stubborn.clear()

    def do_poison(self, _block: driver.Block) -> None:
        for replica in self.replicas.values():
            replica.nonfinite = 3

    def do_stuck_requests(self, block: driver.Block) -> None:
        for replica in self.replicas.values():
            replica.cut = int(block.option("cut"))

    def do_errors(self, block: driver.Block) -> None:
        """`errors version=2 failures=5 successes=95`: what every replica counted."""
        for replica in self.replicas.values():
            slot = replica.slots[block.option("version")]
            counted = {k: int(block.option(k, "0")) for k in ("failures", "successes", "refusals")}
            replica.slots[block.option("version")] = type(slot)(slot.state, slot.parked, **counted)

    def do_replica(self, block: driver.Block) -> None:
        """`replica down r1` or `replica restart r1`."""
        _, verb, name = block.words
        if verb == "down":
            self.replicas[name].up = False
        else:
            self.replicas[name].restart()

    def do_crash(self, _block: driver.Block) -> None:
        """The controller dies and comes back; what is in the store is all that it knows."""
        self.controller = self._controller()

    def do_person(self, block: driver.Block) -> None:
        """`person ABORT s1`, `person APPROVE s1`, `person PAUSE s1`."""
        _, verb, swap_id = block.words
        swap = self.store.swaps[swap_id]
        steer = {
            "APPROVE": lambda: approve(swap, "ana"),
            "PAUSE": lambda: pause(swap, self.at),
            "RESUME": lambda: unpause(swap, self.at),
        }
        if verb in steer:
            self.store.write(swap, Decision(steer[verb]()))
        else:
            self.controller.person(swap_id, Event(verb), f"{verb.lower()} by ana")

    def do_state(self, _block: driver.Block) -> None:
        route = self.store.route
        self.lines.append(
            f"route epoch {route.epoch}: " + (" ".join(f"{w.version}:{w.weight}" for w in route.weights) or "nothing")
        )
        for replica in self.replicas.values():
            slots = " ".join(f"{v}={s.state}" for v, s in sorted(replica.slots.items()))
            self.lines.append(f"{replica.name} {'up' if replica.up else 'down'} epoch {replica.route.epoch}: {slots}")
        if self.store.quarantined:
            self.lines.append("quarantined: " + " ".join(sorted(self.store.quarantined)))


@pytest.mark.parametrize("path", HISTORIES, ids=lambda p: p.stem)
def test_swap_history(path: Path, rewrite: bool) -> None:
    driver.play(path, Story(), rewrite=rewrite)


def test_the_histories_are_there() -> None:
    """A glob that finds nothing would pass silently."""
    assert len(HISTORIES) >= 9
