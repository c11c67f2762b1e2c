"""All runs of the service: rebuilt from the database at start, made by CreateRun or by a loop that says hello."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from interlock.api.trainer.v1 import run_service_pb2 as pb
from interlock.core import names, supervision
from interlock.core.fields import plain
from interlock.core.policy import RunPolicy
from interlock.core.promotion import PromotionPolicy
from interlock.errors import AlreadyExists, NotFound
from interlock.stores.artifacts import write_durably
from interlock.stores.trainer import RunRow
from interlock.training import wire
from interlock.training.terms import Hello
from interlock_trainer.session import Session, Shared

STATES: Mapping[str, pb.Run.State.ValueType] = {
    "pending": pb.Run.STATE_PENDING,
    "running": pb.Run.STATE_RUNNING,
    "paused": pb.Run.STATE_PAUSED,
    "rolling_back": pb.Run.STATE_ROLLING_BACK,
    "detached": pb.Run.STATE_DETACHED,
    "completed": pb.Run.STATE_COMPLETED,
    "failed": pb.Run.STATE_FAILED,
}
SPEC_FILE = "spec.json"


@dataclass(frozen=True, slots=True)
class Spec:
    """What a run's own process needs to know; lies in the run's folder as JSON."""

    run: str
    recipe: str
    policy: RunPolicy
    promotion: PromotionPolicy | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


class Runs:
    """The sessions by run id."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._sessions: dict[str, Session] = {}
        self.hub = shared.hub

    def load(self) -> None:
        """Rebuilds every run from the database and judges what was not judged yet."""
        for row, state in self._shared.store.runs():
            session = Session(self._shared, row, state)
            self._sessions[row.run] = session
            if not session.terminal:
                session.catch_up_judging()
                if row.state in ("running", "rolling_back"):
                    session.set_state("detached")

    def __iter__(self) -> Any:
        return iter(list(self._sessions.values()))

    def get(self, run: str) -> Session:
        """A run; raises NotFound `RUN_NOT_FOUND`."""
        if run not in self._sessions:
            raise NotFound(f"run {run!r} is not known", reason="RUN_NOT_FOUND", field="name", metadata={"run": run})
        return self._sessions[run]

    def knows(self, run: str) -> bool:
        """Whether there is such a run."""
        return run in self._sessions

    def create(self, spec: Spec, max_steps: int) -> Session:
        """A run whose process the trainer will start; its spec is written first.

        Raises:
            AlreadyExists: `RUN_EXISTS`.
        """
        if spec.run in self._sessions:
            raise AlreadyExists(
                f"run {spec.run!r} exists", reason="RUN_EXISTS", field="run_id", metadata={"run": spec.run}
            )
        folder = self._shared.home / "runs" / spec.run
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / SPEC_FILE, json.dumps(plain(spec)).encode())
        row = RunRow(
            run=spec.run,
            create_time=self._shared.clock.now(),
            recipe=spec.recipe,
            parameters=json.dumps(dict(spec.parameters)),
            promotion=json.dumps(plain(spec.promotion)) if spec.promotion else "",
            owned=True,
            max_steps=max_steps,
        )
        return self._add(row, spec.policy)

    def _add(self, row: RunRow, policy: RunPolicy) -> Session:
        session = Session(self._shared, row, supervision.begin(row.run, policy))
        self._sessions[row.run] = session
        session.persist()
        session.announce()
        return session

    def hello(self, hello: Hello) -> Session:
        """The run of a loop that says hello, made if it is not known."""
        if hello.run in self._sessions:
            return self._sessions[hello.run]
        return self._add(RunRow(run=hello.run, create_time=self._shared.clock.now()), hello.policy)

    def new_id(self, recipe: str) -> str:
        """An id nobody has."""
        return f"{recipe}-{uuid.uuid4().hex[:8]}"

    def message(self, session: Session) -> pb.Run:
        """A run for the wire."""
        row, promotion = session.row, session.promotion
        best = session.best_checkpoint()
        return pb.Run(
            name=names.run_name(row.run),
            recipe=row.recipe,
            parameters=wire.struct(json.loads(row.parameters)),
            state=STATES[row.state],
            attempt=session.state.ledger.attempt,
            step=row.step,
            seq=row.head_seq,
            guard_policy=session.state.policy.guard.name,
            promotion=wire.promotion_message(promotion) if promotion else None,
            rollback_count=sum(item.rollback.actor != supervision.RESTART for item in session.rollbacks.values()),
            message=row.message,
            create_time=wire.timestamp(row.create_time),
            update_time=wire.timestamp(row.update_time or row.create_time),
            pid=row.pid,
            latest=row.latest,
            best_checkpoint=names.checkpoint_name(row.run, best) if best else "",
        )
