"""A controller's store in memory: the fake that passes the same contract suite as SQLite. One dictionary of tables, replaced whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from interlock.core.route import Route, Weight, change
from interlock.core.swap import State, Swap
from interlock.core.swap_plan import CommitRoute, Decision, Quarantine, RevertRoute, SwapReceipt, WriteReceipt, receipt
from interlock.errors import Aborted, NotFound
from interlock.stores.controller import (
    CheckpointRow,
    OutboxEntry,
    PromotionRow,
    Request,
    RollbackRow,
    SwapEvent,
    VersionRow,
    facts_of,
    reused,
    stale_row,
)

TABLES = (
    "versions",
    "routes",
    "swaps",
    "events",
    "receipts",
    "checkpoints",
    "rollbacks",
    "promotions",
    "requests",
    "digests",
)


class MemoryControllerStore:
    """See `interlock.stores.controller.ControllerStore`. Stores opened on the same `disk` see the same rows."""

    def __init__(self, disk: dict[str, Any] | None = None) -> None:
        self.disk: dict[str, Any] = disk if disk is not None else {}
        for table in TABLES:
            self.disk.setdefault(table, {})
        self.disk.setdefault("outbox", [])
        self.disk.setdefault("announced", 0)
        self.disk.setdefault("token", 0)
        self._token = 0

    def close(self) -> None:
        pass

    @contextmanager
    def _transaction(self, *, fenced: bool = False) -> Iterator[None]:
        before = {name: copy.copy(table) for name, table in self.disk.items()}
        try:
            if fenced and self._token and self._token != self.disk["token"]:
                raise Aborted("another controller took the lease", reason="STALE_CONTROLLER")
            yield
        except BaseException:
            self.disk.update(before)
            raise

    def _announce(self, kind: str, subject: str, at: float, facts: dict[str, str]) -> None:
        outbox = self.disk["outbox"]
        outbox.append(OutboxEntry(len(outbox) + 1, kind, subject, at, facts))

    def take_lease(self) -> int:
        self.disk["token"] += 1
        self._token = self.disk["token"]
        return self._token

    def models(self) -> list[str]:
        return sorted({model for model, _ in self.disk["versions"]})

    def versions(self, model: str) -> list[VersionRow]:
        rows = [row for (of, _), row in self.disk["versions"].items() if of == model]
        return sorted(rows, key=lambda row: -int(row.version))

    def version(self, model: str, version: str) -> VersionRow | None:
        found: VersionRow | None = self.disk["versions"].get((model, version))
        return found

    def add_version(self, row: VersionRow, request: Request | None = None) -> VersionRow:
        with self._transaction():
            known = next((v for v in self.versions(row.model) if v.digest == row.digest), None)
            if known is None:
                number = row.version or str(1 + max((int(v.version) for v in self.versions(row.model)), default=0))
                known = replace(row, version=number, quarantined=self.disk["digests"].get(row.digest, ""))
                self.disk["versions"][row.model, number] = known
                facts = {"digest": row.digest, "checkpoint": row.origin.checkpoint, "step": str(row.origin.step)}
                self._announce("version_registered", f"{row.model}/{number}", row.created_at, facts)
            if request is not None:
                self.remember(request, known.version)
            return known

    def set_quarantine(self, model: str, version: str, reason: str, actor: str, at: float) -> VersionRow:
        with self._transaction():
            row = self.version(model, version)
            if row is None:
                raise NotFound("no such version", reason="VERSION_NOT_FOUND")
            changed = replace(row, quarantined=reason)
            self.disk["versions"][model, version] = changed
            if reason:
                self.disk["digests"][row.digest] = reason
            else:
                self.disk["digests"].pop(row.digest, None)
            kind = "version_quarantined" if reason else "version_allowed"
            self._announce(kind, f"{model}/{version}", at, {"reason": reason, "actor": actor})
            return changed

    def quarantined_digests(self) -> frozenset[str]:
        return frozenset(self.disk["digests"])

    def route(self, model: str) -> Route:
        found: Route = self.disk["routes"].get(model, Route(model, 0))
        return found

    def routes(self) -> list[Route]:
        return [self.disk["routes"][model] for model in sorted(self.disk["routes"])]

    def set_route(self, model: str, expected_epoch: int, weights: tuple[Weight, ...], actor: str, at: float) -> Route:
        with self._transaction(fenced=True):
            route = change(self.route(model), expected_epoch, weights)
            self.disk["routes"][model] = route
            said = " ".join(f"{w.version}:{w.weight}" for w in route.weights)
            self._announce("route_committed", model, at, {"epoch": str(route.epoch), "weights": said, "by": actor})
            return route

    def create_swap(self, swap: Swap, request: Request | None, ended: tuple[tuple[Swap, Decision], ...] = ()) -> Swap:
        with self._transaction(fenced=True):
            if request is not None and (known := self.answered(request)) is not None:
                earlier: Swap = self.disk["swaps"][known]
                return earlier
            for before, decision in ended:
                self.write_swap(before, decision, swap.created_at)
            self.disk["swaps"][swap.id] = swap
            self._note(swap, swap.created_at)
            if request is not None:
                self.remember(request, swap.id)
            return swap

    def write_swap(self, before: Swap, decision: Decision, at: float) -> None:
        after = decision.swap
        with self._transaction(fenced=True):
            if self.disk["swaps"][after.id].revision != before.revision:
                raise stale_row(before)
            self.disk["swaps"][after.id] = after
            for command in decision.store:
                match command:
                    case CommitRoute() | RevertRoute():
                        self.set_route(command.model, command.expected_epoch, command.weights, f"swaps/{after.id}", at)
                    case Quarantine():
                        self.set_quarantine(command.model, command.version, command.reason, f"swaps/{after.id}", at)
                    case WriteReceipt():
                        self.disk["receipts"][after.id] = receipt(after)
            if after.state is not before.state or after.step != before.step:
                self._note(after, at)

    def _note(self, swap: Swap, at: float) -> None:
        self.disk["events"][swap.id, swap.revision] = SwapEvent(swap, at)
        self._announce("swap_ended" if swap.terminal else "swap_state", swap.id, at, facts_of(swap))

    def swap(self, swap_id: str) -> Swap | None:
        found: Swap | None = self.disk["swaps"].get(swap_id)
        return found

    def swaps(self, model: str = "", *, limit: int = 100, before: str = "") -> list[Swap]:
        every = list(self.disk["swaps"].values())
        if before:
            every = every[: next(i for i, s in enumerate(every) if s.id == before)]
        return [s for s in reversed(every) if model in ("", s.spec.model)][:limit]

    def active_swaps(self, model: str = "") -> list[Swap]:
        return [s for s in self.disk["swaps"].values() if not s.terminal and model in ("", s.spec.model)]

    def completed_swaps(self, model: str, *, limit: int = 100) -> list[Swap]:
        return [s for s in self.swaps(model, limit=1_000_000) if s.state is State.COMPLETED][:limit]

    def proven(self, model: str) -> frozenset[str]:
        return frozenset(s.spec.candidate for s in self.completed_swaps(model, limit=1_000_000))

    def swap_events(self, swap_id: str, after_revision: int = 0) -> list[SwapEvent]:
        keys = sorted(key for key in self.disk["events"] if key[0] == swap_id and key[1] > after_revision)
        return [self.disk["events"][key] for key in keys]

    def receipt(self, swap_id: str) -> SwapReceipt | None:
        found: SwapReceipt | None = self.disk["receipts"].get(swap_id)
        return found

    def put_checkpoint(self, row: CheckpointRow) -> None:
        self.disk["checkpoints"][row.name] = row

    def checkpoints(self, run: str) -> list[CheckpointRow]:
        return sorted((c for c in self.disk["checkpoints"].values() if c.run == run), key=lambda c: (c.step, c.name))

    def put_rollback(self, row: RollbackRow) -> RollbackRow:
        known: RollbackRow | None = self.disk["rollbacks"].get(row.id)
        if known is not None:
            row = replace(
                known,
                affected=tuple(sorted({*known.affected, *row.affected})),
                quarantined=tuple(sorted({*known.quarantined, *row.quarantined})),
                target=known.target or row.target,
            )
        else:
            facts = {"rule": row.rule, "from_step": str(row.from_step), "to_step": str(row.to_step)}
            self._announce("rollback_recorded", row.run, row.created_at, facts | {"decided_by": row.decided_by})
        self.disk["rollbacks"][row.id] = row
        return row

    def rollback(self, rollback_id: str) -> RollbackRow | None:
        found: RollbackRow | None = self.disk["rollbacks"].get(rollback_id)
        return found

    def rollbacks(self, run: str = "") -> list[RollbackRow]:
        return [r for r in reversed(list(self.disk["rollbacks"].values())) if run in ("", r.run)]

    def put_promotion(self, row: PromotionRow) -> None:
        self.disk["promotions"][row.checkpoint] = row
        self._announce("promotion", row.checkpoint, row.created_at, {"state": row.state, "why": row.why})

    def promotions(self, model: str = "") -> list[PromotionRow]:
        return [p for p in self.disk["promotions"].values() if model in ("", p.model)]

    def answered(self, request: Request) -> str | None:
        known = self.disk["requests"].get(request.id) if request.id else None
        if known is None:
            return None
        if known[:2] != (request.verb, request.digest):
            raise reused(request)
        return str(known[2])

    def remember(self, request: Request, answer: str) -> None:
        if request.id:
            self.disk["requests"][request.id] = (request.verb, request.digest, answer)

    def outbox(self, limit: int = 100) -> list[OutboxEntry]:
        return [e for e in self.disk["outbox"] if e.seq > self.disk["announced"]][:limit]

    def announced(self, seq: int) -> None:
        self.disk["announced"] = seq
