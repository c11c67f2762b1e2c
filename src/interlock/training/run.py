"""One training run as the loop sees it: steps, metrics, checkpoints, and obedience at the step boundary.

    for batch in run.steps():        # owns the data position; saves, rolls back, pauses, stops between two steps
        ...
        run.log(loss=loss)           # an append; tensors are read later

Nothing here judges: records and checkpoints go to a supervisor, and orders come back. Nothing here raises because of a service or a
disk; what the user's own objects raise goes through.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol, Self

import structlog
import torch

from interlock.core.policy import RunPolicy
from interlock.core.ports import Clock
from interlock.core.recovery import Rollback
from interlock.core.steps import checkpoint_id
from interlock.errors import AlreadyExists, DataLoss, InterlockError, InvalidArgument, NotFound
from interlock.stores.artifacts import Manifest
from interlock.stores.checkpoints import CheckpointStore, Loaded
from interlock.training import terms
from interlock.training.capture import (
    Snapshot,
    Stateful,
    capture,
    num_bytes,
    restore,
    seed_everything,
    set_random_states,
)
from interlock.training.courier import Courier
from interlock.training.data import Feed
from interlock.training.hooks import OptimizerHooks, Scale, add_noise
from interlock.training.saver import Saver, WriterHere
from interlock.training.terms import CheckpointInfo, Order, Result, Supervisor
from interlock.training.writer import WriterProcess

_log = structlog.get_logger(__name__)
POLL_SECONDS = 0.05

ChangeHandler = Callable[[str, float, int], bool]
"""(name, value, number of steps) -> whether the recipe knows this change."""


class Boundary(StrEnum):
    """What `tick` tells a hand-written loop."""

    GO_ON = "go_on"
    ROLLED_BACK = "rolled_back"
    STOP = "stop"


class Exporter(Protocol):
    """Writes a servable artifact from a checkpoint; `export.OnnxExporter` does."""

    @property
    def in_background(self) -> bool:
        """Whether `export` may run in a thread beside the training."""
        ...

    def export(self, loaded: Loaded, info: CheckpointInfo) -> Result:
        """Writes and verifies; raises InterlockError."""
        ...


@dataclass(slots=True)
class Parts:
    """What a run is made of; `attach` puts it together."""

    name: str
    components: Mapping[str, Stateful]
    modules: list[torch.nn.Module]
    hooks: OptimizerHooks
    feed: Feed
    policy: RunPolicy
    store: CheckpointStore
    courier: Courier
    supervisor: Supervisor
    clock: Clock
    exporter: Exporter | None = None


class Run:
    """A run. Used from one thread; close it, or use it as a context manager."""

    def __init__(self, parts: Parts, *, attempt: int, seq: int) -> None:
        self._parts = parts
        self.name = parts.name
        self.policy = parts.policy
        self.attempt, self.seq, self.step = attempt, seq, 0
        writer = WriterHere(parts.store) if parts.courier.synchronous else WriterProcess(parts.store.root)
        self._saver = Saver(writer, self._save_done)
        self._infos: dict[str, CheckpointInfo] = {}
        self._metrics: dict[str, Any] = {}
        self._last_metrics: dict[str, Any] = {}
        self._parent = ""
        self._save_due = False
        self._seen: dict[str, Result | None] = {}
        self._waiting_saves: dict[str, list[str]] = {}
        self._handlers: list[ChangeHandler] = []
        self._skip: tuple[int, int] = (0, 0)
        self._paused = self._stopping = self._closed = False
        self._initial_done = self._is_sized = False
        self._rolled_back = False
        self._poison_until = 0

    # --- what a loop calls ---

    def steps(self, data: Iterable[Any] | None = None, *, until: int | None = None) -> Iterator[Any]:
        """Yields batch after batch, one per step, until the data ends, step `until` is reached or the run is stopped.

        `data` overrides what `attach` got. Without data it yields the number of the step that begins. After a rollback it goes on from
        the data position of the checkpoint.
        """
        if data is not None:
            position = self._parts.feed.state_dict()
            self._parts.feed = Feed(data, repeat=until is not None)
            self._parts.feed.load_state_dict(position)
        self.boundary()
        while not self._stopping and (until is None or self.step < until):
            try:
                batch = self._next_batch()
            except StopIteration:
                return
            self._parts.hooks.step = self.step
            yield self.step + 1 if batch is None else batch
            self._end_step()
            self.boundary()

    def log(self, **metrics: Any) -> None:
        """Adds metrics to the step under way: numbers or one-element tensors. A device is not waited for: its tensor is read within
        `courier.FLUSH_SECONDS`, so do not change it in place."""
        taken = self._metrics
        for name, value in metrics.items():
            taken[name] = value if type(value) is float else _number(value)

    def tick(self, **metrics: Any) -> Boundary:
        """Ends a step of a hand-written loop. After ROLLED_BACK, `run.step` is where it stands; data position is the loop's own."""
        if not self._initial_done:
            self.boundary()
        self.log(**metrics)
        self._end_step()
        self._rolled_back = False
        self.boundary()
        if self._stopping:
            return Boundary.STOP
        return Boundary.ROLLED_BACK if self._rolled_back else Boundary.GO_ON

    def on_change(self, handler: ChangeHandler) -> None:
        """Registers what a recipe can change while it runs, such as its own drills."""
        self._handlers.append(handler)

    def drill(self, name: str, value: float, num_steps: int = 1) -> None:
        """Injects a fault of one's own, as `RunService.InjectFault` would; raises InvalidArgument for one nobody here knows."""
        result = self._change(terms.ChangeOrder(f"drill-{self.step}", name, value, num_steps))
        if result.error:
            raise InvalidArgument(result.error, reason="UNKNOWN_FAULT", field="name")

    @property
    def parts(self) -> Parts:
        """What the run is made of; for tools beside it, not for loops."""
        return self._parts

    @property
    def supervisor(self) -> Supervisor:
        """Who judges this run."""
        return self._parts.supervisor

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to end."""
        return self._stopping

    @property
    def num_dropped(self) -> int:
        """Steps that were not recorded because the courier was too far behind."""
        return self._parts.courier.num_dropped

    def save(self, reason: str = "asked") -> str:
        """Saves a checkpoint of the state now and returns its id; durable a little later (`wait_saved`)."""
        return self._save(reason)

    def wait_saved(self, timeout_seconds: float | None = None) -> bool:
        """Waits for the save in flight."""
        return self._saver.wait(timeout_seconds)

    def close(self, error: str = "") -> None:
        """Saves the last state if it ended well, delivers what it can, and lets go of everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if not error and self._initial_done:
            self._save("end")
        self._saver.close()
        self._parts.courier.close()
        self._parts.supervisor.close(error)
        self._parts.hooks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.close("" if error is None else f"{type(error).__name__}: {error}")

    # --- steps ---

    def _next_batch(self) -> Any:
        begin, count = self._skip
        if count and self.step + 1 >= begin:
            self._skip = (0, 0)
            _log.info("data_skipped", run=self.name, from_step=begin, num_batches=count)
            self._parts.feed.skip(count)
        return self._parts.feed.next()

    def _end_step(self) -> None:
        """Every step pays for this: an append of plain values, nothing else."""
        self.step += 1
        parts, metrics = self._parts, self._parts.hooks.take_metrics()
        metrics.update(self._metrics)
        if self.step <= self._poison_until and "loss" in metrics:
            metrics["loss"] = float("nan")
        self._last_metrics, self._metrics = metrics, {}
        if not parts.courier.full():
            self.seq += 1
            parts.courier.put((self.attempt, self.seq, self.step, parts.clock.now(), metrics))
        if self.step % self.policy.save_every == 0:
            self._save_due = True

    def boundary(self) -> None:
        """Between two steps: saves what is due, carries out orders, waits while paused."""
        if not self._initial_done:
            self._initial_done = True
            if not self.step and not self._parent:
                self._save("initial", initial=True)
        elif not self._is_sized and self._parts.hooks.optimizers:
            self._is_sized = (
                True  # optimizers make their state in their first step: now it is known how much there is to copy
            )
            self._saver.prepare(num_bytes(self._captured()))
        if self._save_due and not self._saver.busy:
            self._save_due = False
            self._save("cadence")
        self._obey()
        while self._paused and not self._stopping:
            time.sleep(POLL_SECONDS)
            self._obey()

    def _obey(self) -> None:
        parts = self._parts
        if parts.courier.synchronous:
            parts.courier.flush()
        for order in parts.supervisor.orders():
            answer = self._seen.get(order.order)
            if order.order not in self._seen:
                self._seen[order.order] = None
                self._carry_out(order)
            elif answer is not None:
                self._report(answer)

    # --- orders ---

    def _carry_out(self, order: Order) -> None:
        if isinstance(order, terms.RollBackOrder):
            self._report(self._roll_back(order))
        elif isinstance(order, terms.SaveOrder):
            self._save_ordered(order)
        elif isinstance(order, terms.ExportOrder):
            self._begin_export(order)
        elif isinstance(order, terms.ChangeOrder):
            self._report(self._change(order))
        elif isinstance(order, terms.DeleteOrder):
            self._delete(order)
        else:
            self._switch(order)
            self._report(self._result(order))

    def _switch(self, order: terms.PauseOrder | terms.ResumeOrder | terms.StopOrder) -> None:
        self._paused = isinstance(order, terms.PauseOrder)
        self._stopping = self._stopping or isinstance(order, terms.StopOrder)
        _log.warning(
            "run_switched",
            run=self.name,
            to=type(order).__name__.removesuffix("Order").lower(),
            reason=getattr(order, "reason", ""),
        )

    def _result(self, order: Order, error: str = "", checkpoint: str = "") -> Result:
        return Result(order.order, error, self.attempt, self.step, checkpoint)

    def _report(self, result: Result) -> None:
        self._seen[result.order] = result
        self._parts.courier.put(result)
        if self._parts.courier.synchronous:
            self._parts.courier.flush()

    def _delete(self, order: terms.DeleteOrder) -> None:
        for checkpoint in order.checkpoints:
            self._infos.pop(checkpoint, None)
            try:
                self._parts.store.delete(checkpoint)
            except OSError as error:
                _log.error("checkpoint_not_deleted", checkpoint=checkpoint, error=str(error))
        self._report(self._result(order))

    def _change(self, order: terms.ChangeOrder) -> Result:
        until = self.step + order.num_steps if order.num_steps else 0
        if order.name == "learning_rate":
            self._parts.hooks.scales.append(Scale(order.value, until))
        elif order.name == "nan":
            self._parts.hooks.poison_until_step = self.step + max(order.num_steps, 1)
            self._poison_until = self._parts.hooks.poison_until_step
        elif order.name == "weights":
            add_noise(self._parts.modules, order.value)
        elif not any(handler(order.name, order.value, order.num_steps) for handler in self._handlers):
            return self._result(order, f"UNKNOWN_FAULT: this loop does not know the change {order.name!r}")
        _log.warning(
            "changed", run=self.name, change=order.name, value=order.value, num_steps=order.num_steps, step=self.step
        )
        return self._result(order)

    # --- saving ---

    def _save_ordered(self, order: terms.SaveOrder) -> None:
        checkpoint = self._save(order.reason or "ordered")
        self._waiting_saves.setdefault(checkpoint, []).append(order.order)
        info = self._infos.get(checkpoint)
        if (
            info is None or info.digest
        ):  # finished already; the saver's thread may answer too, each order is answered once
            self._answer_saves(
                checkpoint, "" if info or self._parts.store.path(checkpoint).exists() else "SAVE_FAILED: see the log"
            )

    def _save(self, reason: str, *, initial: bool = False) -> str:
        checkpoint = checkpoint_id(self.step, self.attempt)
        if checkpoint in self._infos or self._parts.store.path(checkpoint).exists():
            return checkpoint
        metrics = {
            name: value for name, value in ((n, float(v)) for n, v in self._last_metrics.items()) if value == value
        }
        info = CheckpointInfo(checkpoint, self.attempt, self.step, self.seq, self._parts.clock.now(), metrics, reason)
        self._saver.wait()
        self._infos[checkpoint] = info
        self._parts.courier.put(terms.Begun(info, initial))
        try:
            snapshot = self._captured()
            metadata = terms.info_metadata(info, self.name, parent=self._parent, policy=self.policy.guard.name)
            self._saver.save(checkpoint, snapshot, metadata)
        except OSError as error:  # no memory to copy it into: as little a reason to stop training as a full disk
            self._save_done(checkpoint, None, error)
            return checkpoint
        except InterlockError:
            self._infos.pop(checkpoint)
            self._parts.courier.put(terms.Changed(info, deleted=True))
            raise
        self._parent = checkpoint
        if self._parts.courier.synchronous:
            self._saver.wait()
        return checkpoint

    def _captured(self) -> Snapshot:
        """The state now, not yet copied."""
        loop = {
            "step": self.step,
            "seq": self.seq,
            "data": self._parts.feed.state_dict(),
            "scales": self._parts.hooks.state(),
        }
        return capture(self._parts.components, loop)

    def _save_done(self, checkpoint: str, manifest: Manifest | None, failure: Exception | None) -> None:
        """In the saver's thread."""
        info = self._infos[checkpoint]
        if manifest is None and not isinstance(failure, AlreadyExists):
            _log.error("checkpoint_not_saved", run=self.name, checkpoint=checkpoint, error=str(failure))
            self._infos.pop(checkpoint)
            self._parts.courier.put(terms.Changed(replace(info, message=str(failure)), deleted=True))
            self._answer_saves(checkpoint, f"SAVE_FAILED: {failure}")
            return
        manifest = manifest or self._parts.store.manifest(checkpoint)
        info = replace(info, size_bytes=manifest.size_bytes, digest=manifest.digest)
        self._infos[checkpoint] = info
        _log.info("checkpoint_saved", run=self.name, checkpoint=checkpoint, step=info.step, reason=info.reason)
        self._parts.courier.put(terms.Saved(info))
        self._answer_saves(checkpoint, "")

    def _answer_saves(self, checkpoint: str, error: str) -> None:
        for order in self._waiting_saves.pop(checkpoint, []):
            self._seen[order] = result = Result(order, error, self.attempt, self.step, checkpoint)
            self._parts.courier.put(result)

    # --- going back ---

    def _roll_back(self, order: terms.RollBackOrder) -> Result:
        rollback = order.rollback
        self._saver.wait()
        try:
            loaded = self._parts.store.load(rollback.checkpoint)
        except (DataLoss, NotFound) as error:
            self._damaged(rollback.checkpoint, error)
            return self._result(order, f"{error.reason}: {error.message}")
        self.adopt(loaded, rollback)
        self._paused = False
        self._rolled_back = True
        return self._result(order, checkpoint=rollback.checkpoint)

    def _damaged(self, checkpoint: str, error: InterlockError) -> None:
        _log.error("checkpoint_damaged", run=self.name, checkpoint=checkpoint, error=error.message)
        info = self._infos.get(checkpoint) or CheckpointInfo(checkpoint, 0, 0, 0, 0.0)
        self._parts.courier.put(terms.Changed(replace(info, message=error.message), deleted=False))
        if isinstance(error, DataLoss):
            self._parts.store.set_aside(checkpoint)

    def adopt(self, loaded: Loaded, rollback: Rollback) -> None:
        """Takes over a loaded checkpoint and the plan of the rollback that asked for it."""
        from_step = self.step
        loop = restore(loaded, self._parts.components)
        self._parts.feed.load_state_dict(loop["data"])
        self._parts.hooks.load(loop["scales"])
        self._parts.hooks.poison_until_step = self._poison_until = 0
        set_random_states(loop["random"])
        self.step, self.attempt = int(loop["step"]), rollback.attempt
        self.seq = max(self.seq, int(loop["seq"]))
        self._parent = loaded.checkpoint
        self._metrics, self._last_metrics = {}, dict(loaded.manifest.metadata.get("metrics", {}))
        self._save_due = False
        self._parts.hooks.take_metrics()
        self._apply_plan(rollback)
        _log.warning(
            "rolled_back",
            run=self.name,
            rollback=rollback.rollback,
            rule=rollback.rule or rollback.actor,
            metric=rollback.metric,
            value=rollback.value,
            limit=rollback.limit,
            from_step=max(from_step, rollback.from_step),
            to_step=self.step,
            checkpoint=loaded.checkpoint,
            attempt=self.attempt,
        )

    def _apply_plan(self, rollback: Rollback) -> None:
        plan = rollback.plan
        if plan.lr_factor != 1.0:
            self._parts.hooks.scales.append(Scale(plan.lr_factor, self.step + plan.lr_steps if plan.lr_steps else 0))
        if plan.reset_moments:
            self._parts.hooks.reset_moments()
        if plan.new_seed:
            seed = zlib.crc32(f"{self.name}/{rollback.attempt}".encode())
            seed_everything(seed)
            self._parts.feed.reseed(seed)
        if plan.skips_data:
            begin = max(self.step + 1, rollback.onset_step - plan.skip_before)
            self._skip = (begin, plan.skip_before + plan.skip_after + 1)

    # --- export ---

    def _begin_export(self, order: terms.ExportOrder) -> None:
        if self._parts.exporter is not None and not self._parts.exporter.in_background:
            self._export(order)
        else:
            threading.Thread(target=self._export, args=(order,), name="interlock-export", daemon=True).start()

    def _export(self, order: terms.ExportOrder) -> None:
        try:
            if self._parts.exporter is None:
                raise NotFound("this run was attached without serve=: it cannot be served", reason="NOT_SERVABLE")
            loaded = self._parts.store.load(order.checkpoint)
            info = self._infos.get(order.checkpoint) or _info_of(loaded)
            result = replace(self._parts.exporter.export(loaded, info), order=order.order, checkpoint=order.checkpoint)
        except InterlockError as error:
            result = Result(order.order, f"{error.reason}: {error.message}", checkpoint=order.checkpoint)
        except Exception as error:  # noqa: BLE001 - a supervised edge: an exporter's fault must not end the run
            _log.exception("export_failed", run=self.name, checkpoint=order.checkpoint)
            result = Result(order.order, f"EXPORT_FAILED: {type(error).__name__}: {error}", checkpoint=order.checkpoint)
        self._seen[order.order] = result
        self._parts.courier.put(result)


def _info_of(loaded: Loaded) -> CheckpointInfo:
    data = loaded.manifest.metadata
    return CheckpointInfo(
        loaded.checkpoint,
        int(data["attempt"]),
        int(data["step"]),
        int(data["seq"]),
        float(data["created"]),
        dict(data.get("metrics", {})),
        str(data.get("reason", "")),
        loaded.manifest.size_bytes,
        loaded.manifest.digest,
    )


def _number(value: Any) -> Any:
    """A float, or a device tensor that the courier reads later. A number in memory is read at once: cheaper than keeping its tensor, and
    the loop may go on to change it."""
    if isinstance(value, torch.Tensor):
        return float(value.item()) if value.is_cpu else value.detach().reshape(())
    return float(value)
