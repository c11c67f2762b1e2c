"""`attach`: puts a run together and finds out where it begins. The only place that knows all parts of the SDK."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import torch

from interlock.core.names import check_id
from interlock.core.policy import RunPolicy, run_policy
from interlock.core.ports import Clock
from interlock.core.promotion import PromotionPolicy, check_policy
from interlock.core.recovery import Plan, Rollback
from interlock.core.retention import Better
from interlock.errors import DataLoss, InvalidArgument, NotFound
from interlock.runtime.clock import SystemClock
from interlock.stores.checkpoints import CheckpointStore, Loaded, failpoint
from interlock.stores.steplog import LocalLog, StepLog, open_database
from interlock.training.capture import Stateful
from interlock.training.courier import Courier
from interlock.training.data import Feed
from interlock.training.embedded import Embedded
from interlock.training.hooks import OptimizerHooks
from interlock.training.run import Exporter, Parts, Run
from interlock.training.terms import Hello, Start, Supervisor

_log = structlog.get_logger(__name__)
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class ServeSpec:
    """How the run's checkpoints are served.

    Attributes:
        model: the served model's name.
        example: example inputs by name, leading dimension the batch; any values, they only show shape and dtype.
        outputs: names of the outputs, in the order the module returns them.
        module: what is exported; the run's `model` if None. It must be (part of) one of the run's components.
        metric, better, min_improvement, min_interval_seconds: when a known-good checkpoint is promoted.
    """

    model: str
    example: Mapping[str, torch.Tensor]
    outputs: tuple[str, ...] = ("output",)
    module: torch.nn.Module | None = None
    metric: str = "reward"
    better: Better = Better.HIGHER
    min_improvement: float = 0.0
    min_interval_seconds: float = 0.0

    def promotion(self) -> PromotionPolicy:
        """The part that the controller gets to see."""
        policy = PromotionPolicy(
            self.model, self.metric, Better(self.better), self.min_improvement, self.min_interval_seconds
        )
        return check_policy(policy, "serve")


def attach(
    name: str,
    *,
    model: torch.nn.Module | Mapping[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None = None,
    scheduler: Stateful | None = None,
    data: Iterable[Any] | None = None,
    value: torch.nn.Module | None = None,
    scaler: Stateful | None = None,
    ema: Stateful | None = None,
    extra: Mapping[str, Stateful] | None = None,
    policy: str | Path | Mapping[str, Any] | RunPolicy = "robust",
    save_every: int | None = None,
    keep: int | None = None,
    confirm_after: int | None = None,
    serve: ServeSpec | None = None,
    trainer: str | None = AUTO,
    home: str | Path | None = None,
    recipe: str = "",
    connect_seconds: float = 3.0,
    synchronous: bool = False,
    clock: Clock | None = None,
) -> Run:
    """Joins a training loop to Interlock and restores it if it ran before.

    Args:
        name: the run's id; the same name goes on where the run stood.
        model: the module, or several by name; `value` is a second one beside it.
        optimizer: one, or several by name; their steps are guarded against NaN and infinity.
        data: what `run.steps()` iterates; exact positions with `Batches` or anything that has `state_dict`.
        extra: any further objects with `state_dict` and `load_state_dict`, by name.
        policy: a built-in guard policy's name, a TOML file, a table, or a `RunPolicy`; see `interlock.core.policy`.
        save_every, keep, confirm_after: steps between checkpoints, how many stay, clean steps until one is good; over the policy.
        serve: how good checkpoints reach traffic; None: they do not.
        trainer: address of the trainer service; "auto" looks for one on this machine; None supervises inside this process. When none
            answers within `connect_seconds`, the run is supervised inside this process.
        home: the state folder; `INTERLOCK_HOME` or `./.interlock`.
        synchronous: judge and save in the loop's own thread; slow, and the same every time.

    Raises:
        InvalidArgument: a name, a policy or a component that can never work. Nothing is raised because of a service.
    """
    check_id(name, "name")
    full_policy = _policy(policy, save_every, keep, confirm_after)
    components, modules, optimizers = _components(model, optimizer, scheduler, value, scaler, ema, extra)
    folder = Path(home or os.environ.get("INTERLOCK_HOME", ".interlock")) / "runs" / name
    store = CheckpointStore(folder / "checkpoints", failpoint())
    store.sweep()
    steplog = LocalLog(open_database(folder / "steps.db"))
    hello = _hello(name, steplog, full_policy, serve, store, recipe)
    supervisor, start = _supervisor(trainer, hello, folder, steplog, connect_seconds)
    steplog.begins_after = start.acknowledged_seq
    parts = Parts(
        name=name,
        components=components,
        modules=modules,
        hooks=OptimizerHooks(optimizers),
        feed=Feed(data),
        policy=full_policy,
        store=store,
        courier=Courier(name, steplog, supervisor, synchronous=synchronous),
        supervisor=supervisor,
        clock=clock or SystemClock(),
        exporter=_exporter(serve, model, name, folder, components),
    )
    run = Run(parts, attempt=start.attempt, seq=max(hello.seq, start.acknowledged_seq))
    _begin(run, store, start)
    return run


def _hello(
    name: str, steplog: StepLog, policy: RunPolicy, serve: ServeSpec | None, store: CheckpointStore, recipe: str
) -> Hello:
    return Hello(
        run=name,
        pid=os.getpid(),
        attempt=0,
        step=0,
        seq=steplog.head(name),
        policy=policy,
        promotion=serve.promotion() if serve else None,
        checkpoint_folder=str(store.root.resolve()),
        recipe=recipe,
        servable=serve is not None,
        starting=True,
    )


def _policy(
    policy: str | Path | Mapping[str, Any] | RunPolicy,
    save_every: int | None,
    keep: int | None,
    confirm_after: int | None,
) -> RunPolicy:
    if isinstance(policy, Path) or (isinstance(policy, str) and policy.endswith(".toml")):
        try:
            policy = tomllib.loads(Path(policy).read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise InvalidArgument(f"policy: {policy}: {error}", reason="INVALID_POLICY", field="policy") from None
    full = policy if isinstance(policy, RunPolicy) else run_policy(policy)
    if save_every is not None:
        full = replace(full, save_every=save_every)
    if keep is not None:
        full = replace(full, retention=replace(full.retention, keep_last=keep))
    if confirm_after is not None:
        full = replace(full, recovery=replace(full.recovery, confirm_after=confirm_after))
    return full


def _components(
    model: torch.nn.Module | Mapping[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None,
    scheduler: Stateful | None,
    value: torch.nn.Module | None,
    scaler: Stateful | None,
    ema: Stateful | None,
    extra: Mapping[str, Stateful] | None,
) -> tuple[dict[str, Stateful], list[torch.nn.Module], list[torch.optim.Optimizer]]:
    models = {"model": model} if isinstance(model, torch.nn.Module) else {f"model.{key}": m for key, m in model.items()}
    if value is not None:
        models["value"] = value
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizers = {"optimizer": optimizer}
    elif optimizer is not None:
        optimizers = {f"optimizer.{key}": item for key, item in optimizer.items()}
    named: dict[str, Any] = {**models, **optimizers, "scheduler": scheduler, "scaler": scaler, "ema": ema}
    named |= {f"extra.{key}": item for key, item in (extra or {}).items()}
    components = {key: item for key, item in named.items() if item is not None}
    for key, item in components.items():
        if not (hasattr(item, "state_dict") and hasattr(item, "load_state_dict")):
            raise InvalidArgument(
                f"{key}: {type(item).__name__} has no state_dict and load_state_dict", reason="NOT_STATEFUL", field=key
            )
    return components, list(models.values()), list(optimizers.values())


def _supervisor(
    trainer: str | None, hello: Hello, folder: Path, steplog: StepLog, connect_seconds: float
) -> tuple[Supervisor, Start]:
    address = f"127.0.0.1:{os.environ.get('INTERLOCK_TRAINER_PORT', '8002')}" if trainer == AUTO else trainer
    if address:
        from interlock.training.remote import Remote, listening

        if trainer != AUTO or listening(address):
            remote = Remote(address, steplog, connect_seconds)
            start = remote.start(hello)
            if start is not None:
                return remote, start
            remote.close("no answer")
        _log.info("no_trainer", run=hello.run, address=address, supervised="in this process")
    embedded = Embedded(folder / "supervision.json")
    return embedded, embedded.start(hello)


def _exporter(
    serve: ServeSpec | None, model: object, name: str, folder: Path, components: Mapping[str, Stateful]
) -> Exporter | None:
    if serve is None:
        return None
    module = serve.module if serve.module is not None else model
    if not isinstance(module, torch.nn.Module):
        raise InvalidArgument(
            "serve.module: needed when model is a table of modules", reason="NOT_SERVABLE", field="serve.module"
        )
    from interlock.training.export import OnnxExporter

    return OnnxExporter(serve.model, module, dict(serve.example), serve.outputs, name, folder / "exports", components)


def _begin(run: Run, store: CheckpointStore, start: Start) -> None:
    """Restores what the supervisor asks for; without a word from it, the youngest intact checkpoint there is."""
    found = store.ids()
    wanted = [start.restore.checkpoint] if start.restore else []
    for checkpoint in [*wanted, *(name for name in reversed(found) if name not in wanted)]:
        loaded = _intact(run.name, store, checkpoint)
        if loaded is not None:
            break
    else:
        return
    if start.restore is not None and loaded.checkpoint == start.restore.checkpoint:
        run.adopt(loaded, start.restore)
        return
    meta = loaded.manifest.metadata
    attempt = max(start.attempt, int(meta["attempt"])) + (start.restore is None)
    step = int(meta["step"])
    run.adopt(
        loaded,
        Rollback(
            f"{run.name}-rollback-{attempt}",
            attempt,
            loaded.checkpoint,
            step,
            run.seq,
            step,
            step,
            Plan(),
            0,
            "found",
            "loop",
        ),
    )


def _intact(name: str, store: CheckpointStore, checkpoint: str) -> Loaded | None:
    try:
        return store.load(checkpoint)
    except NotFound:
        return None
    except DataLoss as error:
        _log.error("checkpoint_damaged", run=name, checkpoint=checkpoint, error=error.message)
        store.set_aside(checkpoint)
        return None
