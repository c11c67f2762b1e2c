"""The controller's store on one SQLite file. Small rows as JSON documents beside the columns that are searched for.

A write is one transaction of a few rows, synchronous and on the caller's thread: a few a second at most, a millisecond or two each.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from interlock.core.route import Route, Weight, change, stale_epoch
from interlock.core.swap import TERMINAL, Swap
from interlock.core.swap_plan import (
    CommitRoute,
    Decision,
    Quarantine,
    RevertRoute,
    StoreCommand,
    SwapReceipt,
    WriteReceipt,
    receipt,
)
from interlock.errors import Aborted, NotFound
from interlock.stores import codec
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
from interlock.stores.sqlite import Database

MIGRATIONS = (
    """
CREATE TABLE leases (name TEXT PRIMARY KEY, token INTEGER NOT NULL) STRICT;
CREATE TABLE versions (
  model TEXT NOT NULL, number INTEGER NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL, body TEXT NOT NULL,
  PRIMARY KEY (model, number), UNIQUE (model, version), UNIQUE (model, digest)
) STRICT;
CREATE TABLE quarantine (digest TEXT PRIMARY KEY, reason TEXT NOT NULL, actor TEXT NOT NULL, at REAL NOT NULL) STRICT;
CREATE TABLE routes (model TEXT PRIMARY KEY, epoch INTEGER NOT NULL, body TEXT NOT NULL, by TEXT NOT NULL, at REAL NOT NULL) STRICT;
CREATE TABLE swaps (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, model TEXT NOT NULL, active INTEGER NOT NULL,
  candidate TEXT NOT NULL, state TEXT NOT NULL, revision INTEGER NOT NULL, body TEXT NOT NULL
) STRICT;
CREATE INDEX swaps_by_model ON swaps (model);
CREATE INDEX swaps_active ON swaps (number) WHERE active = 1;
CREATE INDEX swaps_by_state ON swaps (model, state);
CREATE TABLE swap_events (swap TEXT NOT NULL, revision INTEGER NOT NULL, at REAL NOT NULL, body TEXT NOT NULL,
  PRIMARY KEY (swap, revision)) STRICT;
CREATE TABLE receipts (swap TEXT PRIMARY KEY, body TEXT NOT NULL) STRICT;
CREATE TABLE checkpoints (name TEXT PRIMARY KEY, run TEXT NOT NULL, step INTEGER NOT NULL, body TEXT NOT NULL) STRICT;
CREATE INDEX checkpoints_by_run ON checkpoints (run, step);
CREATE TABLE rollbacks (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, run TEXT NOT NULL, body TEXT NOT NULL) STRICT;
CREATE TABLE promotions (number INTEGER PRIMARY KEY AUTOINCREMENT, checkpoint TEXT NOT NULL UNIQUE, model TEXT NOT NULL,
  body TEXT NOT NULL) STRICT;
CREATE TABLE requests (id TEXT PRIMARY KEY, verb TEXT NOT NULL, digest TEXT NOT NULL, answer TEXT NOT NULL) STRICT;
CREATE TABLE outbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, subject TEXT NOT NULL, at REAL NOT NULL,
  facts TEXT NOT NULL) STRICT;
CREATE TABLE cursors (name TEXT PRIMARY KEY, seq INTEGER NOT NULL) STRICT;
""",
)


class SqliteControllerStore:
    """See `stores.controller.ControllerStore`."""

    def __init__(self, path: Path | str) -> None:
        self._db = Database(path, MIGRATIONS)
        self._token = 0

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def take_lease(self) -> int:
        """One more than any token before."""
        with self._db.transaction() as tx:
            tx.execute("INSERT INTO leases VALUES ('controller', 1) ON CONFLICT (name) DO UPDATE SET token = token + 1")
            self._token = int(tx.execute("SELECT token FROM leases WHERE name = 'controller'").fetchone()[0])
            return self._token

    def _fence(self, tx: sqlite3.Connection) -> None:
        """Stops a controller whose lease was taken over from writing on. One that never took it only reads and registers."""
        held = tx.execute("SELECT token FROM leases WHERE name = 'controller'").fetchone()
        if self._token and held[0] != self._token:
            raise Aborted(
                f"this controller holds lease {self._token}, another one took {held[0]}: stop this process",
                reason="STALE_CONTROLLER",
                metadata={"held": str(self._token), "current": str(held[0])},
            )

    # --- versions -----------------------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """By name."""
        return [row[0] for row in self._db.all("SELECT DISTINCT model FROM versions ORDER BY model")]

    def versions(self, model: str) -> list[VersionRow]:
        """Newest first."""
        rows = self._db.all("SELECT body FROM versions WHERE model = ? ORDER BY number DESC", model)
        return [codec.loads(VersionRow, row[0]) for row in rows]

    def version(self, model: str, version: str) -> VersionRow | None:
        """One version, or None."""
        row = self._db.one("SELECT body FROM versions WHERE model = ? AND version = ?", model, version)
        return codec.loads(VersionRow, row[0]) if row else None

    def add_version(self, row: VersionRow, request: Request | None = None) -> VersionRow:
        """Numbers a new version; a digest that the model has already gives that version."""
        with self._db.transaction() as tx:
            known = tx.execute(
                "SELECT body FROM versions WHERE model = ? AND digest = ?", (row.model, row.digest)
            ).fetchone()
            if known is not None:
                numbered = codec.loads(VersionRow, known[0])
            else:
                numbered = self._insert_version(tx, row)
            if request is not None and request.id:
                _remember(tx, request, numbered.version)
            return numbered

    def _insert_version(self, tx: sqlite3.Connection, row: VersionRow) -> VersionRow:
        sql = "SELECT COALESCE(MAX(number), 0) FROM versions WHERE model = ?"
        number = int(row.version or 0) or 1 + tx.execute(sql, (row.model,)).fetchone()[0]
        bad = tx.execute("SELECT reason FROM quarantine WHERE digest = ?", (row.digest,)).fetchone()
        numbered = replace(row, version=str(number), quarantined=bad[0] if bad else "")
        tx.execute(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?)",
            (row.model, number, numbered.version, row.digest, codec.dumps(numbered)),
        )
        facts = {"digest": row.digest, "checkpoint": row.origin.checkpoint, "step": str(row.origin.step)}
        _announce(tx, "version_registered", f"{row.model}/{numbered.version}", row.created_at, facts)
        return numbered

    def set_quarantine(self, model: str, version: str, reason: str, actor: str, at: float) -> VersionRow:
        """Forbids or allows a version and its digest. Raises NotFound."""
        with self._db.transaction() as tx:
            return self._set_quarantine(tx, model, version, reason, actor, at)

    def _set_quarantine(
        self, tx: sqlite3.Connection, model: str, version: str, reason: str, actor: str, at: float
    ) -> VersionRow:
        row = self.version(model, version)
        if row is None:
            raise NotFound(
                f"model {model!r} has no version {version!r}",
                reason="VERSION_NOT_FOUND",
                metadata={"model": model, "version": version},
            )
        changed = replace(row, quarantined=reason)
        tx.execute(
            "UPDATE versions SET body = ? WHERE model = ? AND version = ?", (codec.dumps(changed), model, version)
        )
        if reason:
            tx.execute("INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?, ?)", (row.digest, reason, actor, at))
        else:
            tx.execute("DELETE FROM quarantine WHERE digest = ?", (row.digest,))
        kind = "version_quarantined" if reason else "version_allowed"
        _announce(tx, kind, f"{model}/{version}", at, {"reason": reason, "actor": actor})
        return changed

    def quarantined_digests(self) -> frozenset[str]:
        """Every forbidden digest."""
        return frozenset(row[0] for row in self._db.all("SELECT digest FROM quarantine"))

    # --- routes -------------------------------------------------------------------------------------------------------------------

    def route(self, model: str) -> Route:
        """The current route; epoch 0 when there never was one."""
        row = self._db.one("SELECT body FROM routes WHERE model = ?", model)
        return codec.loads(Route, row[0]) if row else Route(model, 0)

    def routes(self) -> list[Route]:
        """All, by model."""
        return [codec.loads(Route, row[0]) for row in self._db.all("SELECT body FROM routes ORDER BY model")]

    def set_route(self, model: str, expected_epoch: int, weights: tuple[Weight, ...], actor: str, at: float) -> Route:
        """The compare-and-set outside of a swap. Raises Aborted `STALE_EPOCH`."""
        with self._db.transaction() as tx:
            self._fence(tx)
            return self._set_route(tx, model, expected_epoch, weights, actor, at)

    def _set_route(
        self, tx: sqlite3.Connection, model: str, expected: int, weights: tuple[Weight, ...], by: str, at: float
    ) -> Route:
        current = self.route(model)
        route = change(current, expected, weights)
        values = (route.epoch, codec.dumps(route), by, at, model)
        if current.epoch == 0:
            tx.execute("INSERT INTO routes (epoch, body, by, at, model) VALUES (?, ?, ?, ?, ?)", values)
        else:
            sql = "UPDATE routes SET epoch = ?, body = ?, by = ?, at = ? WHERE model = ? AND epoch = ?"
            if tx.execute(sql, (*values, expected)).rowcount != 1:
                raise stale_epoch(model, self.route(model).epoch, expected)
        said = " ".join(f"{w.version}:{w.weight}" for w in route.weights)
        _announce(tx, "route_committed", model, at, {"epoch": str(route.epoch), "weights": said, "by": by})
        return route

    # --- swaps --------------------------------------------------------------------------------------------------------------------

    def create_swap(self, swap: Swap, request: Request | None, ended: tuple[tuple[Swap, Decision], ...] = ()) -> Swap:
        """Records a swap with what it ends; the earlier one when the request was seen before."""
        with self._db.transaction() as tx:
            self._fence(tx)
            if request is not None and (known := self.answered(request)) is not None:
                earlier = self.swap(known)
                assert earlier is not None, "a remembered swap is never deleted"
                return earlier
            for before, decision in ended:
                self.write_swap(before, decision, swap.created_at)
            tx.execute(
                "INSERT INTO swaps (id, model, active, candidate, state, revision, body) VALUES (?, ?, 1, ?, ?, ?, ?)",
                (swap.id, swap.spec.model, swap.spec.candidate, swap.state.value, swap.revision, codec.dumps(swap)),
            )
            self._note(tx, swap, swap.created_at)
            if request is not None and request.id:
                _remember(tx, request, swap.id)
            return swap

    def write_swap(self, before: Swap, decision: Decision, at: float) -> None:
        """One decision with its store commands, or nothing. Raises Aborted `STALE_ROW` or `STALE_EPOCH`."""
        after = decision.swap
        with self._db.transaction() as tx:
            self._fence(tx)
            sql = "UPDATE swaps SET active = ?, state = ?, revision = ?, body = ? WHERE id = ? AND revision = ?"
            changed = (int(after.state not in TERMINAL), after.state.value, after.revision, codec.dumps(after))
            values = (*changed, after.id, before.revision)
            if tx.execute(sql, values).rowcount != 1:
                raise stale_row(before)
            self._carry_out(tx, after, decision.store, at)
            if after.state is not before.state or after.step != before.step:
                self._note(tx, after, at)

    def _carry_out(self, tx: sqlite3.Connection, swap: Swap, commands: Iterable[StoreCommand], at: float) -> None:
        for command in commands:
            match command:
                case CommitRoute() | RevertRoute():
                    self._set_route(tx, command.model, command.expected_epoch, command.weights, f"swaps/{swap.id}", at)
                case Quarantine():
                    self._set_quarantine(tx, command.model, command.version, command.reason, f"swaps/{swap.id}", at)
                case WriteReceipt():
                    tx.execute("INSERT INTO receipts VALUES (?, ?)", (swap.id, codec.dumps(receipt(swap))))

    def _note(self, tx: sqlite3.Connection, swap: Swap, at: float) -> None:
        tx.execute("INSERT INTO swap_events VALUES (?, ?, ?, ?)", (swap.id, swap.revision, at, codec.dumps(swap)))
        _announce(tx, "swap_ended" if swap.terminal else "swap_state", swap.id, at, facts_of(swap))

    def swap(self, swap_id: str) -> Swap | None:
        """One swap, or None."""
        row = self._db.one("SELECT body FROM swaps WHERE id = ?", swap_id)
        return codec.loads(Swap, row[0]) if row else None

    def swaps(self, model: str = "", *, limit: int = 100, before: str = "") -> list[Swap]:
        """Newest first."""
        rows = self._db.all(
            "SELECT body FROM swaps WHERE (? = '' OR model = ?) AND number < COALESCE((SELECT number FROM swaps WHERE id = ?), 1 << 62)"
            " ORDER BY number DESC LIMIT ?",
            model,
            model,
            before,
            limit,
        )
        return [codec.loads(Swap, row[0]) for row in rows]

    def active_swaps(self, model: str = "") -> list[Swap]:
        """Those that have not ended, oldest first."""
        sql = "SELECT body FROM swaps WHERE active = 1 AND (? = '' OR model = ?) ORDER BY number"
        return [codec.loads(Swap, row[0]) for row in self._db.all(sql, model, model)]

    def completed_swaps(self, model: str, *, limit: int = 100) -> list[Swap]:
        """Newest first."""
        sql = "SELECT body FROM swaps WHERE model = ? AND state = 'COMPLETED' ORDER BY number DESC LIMIT ?"
        return [codec.loads(Swap, row[0]) for row in self._db.all(sql, model, limit)]

    def proven(self, model: str) -> frozenset[str]:
        """Every version that has completed a swap."""
        sql = "SELECT DISTINCT candidate FROM swaps WHERE model = ? AND state = 'COMPLETED'"
        return frozenset(row[0] for row in self._db.all(sql, model))

    def swap_events(self, swap_id: str, after_revision: int = 0) -> list[SwapEvent]:
        """The states entered, oldest first."""
        sql = "SELECT body, at FROM swap_events WHERE swap = ? AND revision > ? ORDER BY revision"
        return [SwapEvent(codec.loads(Swap, r[0]), r[1]) for r in self._db.all(sql, swap_id, after_revision)]

    def receipt(self, swap_id: str) -> SwapReceipt | None:
        """The receipt of an ended swap, or None."""
        row = self._db.one("SELECT body FROM receipts WHERE swap = ?", swap_id)
        return codec.loads(SwapReceipt, row[0]) if row else None

    # --- lineage and promotions ---------------------------------------------------------------------------------------------------

    def put_checkpoint(self, row: CheckpointRow) -> None:
        """Inserts or replaces by name."""
        with self._db.transaction() as tx:
            values = (row.name, row.run, row.step, codec.dumps(row))
            tx.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?)", values)

    def checkpoints(self, run: str) -> list[CheckpointRow]:
        """By step, oldest first."""
        rows = self._db.all("SELECT body FROM checkpoints WHERE run = ? ORDER BY step, name", run)
        return [codec.loads(CheckpointRow, row[0]) for row in rows]

    def put_rollback(self, row: RollbackRow) -> RollbackRow:
        """Records once; a second report of the same id only fills in what the first one lacked."""
        with self._db.transaction() as tx:
            known = self.rollback(row.id)
            if known is None:
                tx.execute(
                    "INSERT INTO rollbacks (id, run, body) VALUES (?, ?, ?)", (row.id, row.run, codec.dumps(row))
                )
                facts = {"rule": row.rule, "from_step": str(row.from_step), "to_step": str(row.to_step)}
                _announce(tx, "rollback_recorded", row.run, row.created_at, facts | {"decided_by": row.decided_by})
                return row
            merged = replace(
                known,
                affected=tuple(sorted({*known.affected, *row.affected})),
                quarantined=tuple(sorted({*known.quarantined, *row.quarantined})),
                target=known.target or row.target,
            )
            tx.execute("UPDATE rollbacks SET body = ? WHERE id = ?", (codec.dumps(merged), row.id))
            return merged

    def rollback(self, rollback_id: str) -> RollbackRow | None:
        """One rollback, or None."""
        row = self._db.one("SELECT body FROM rollbacks WHERE id = ?", rollback_id)
        return codec.loads(RollbackRow, row[0]) if row else None

    def rollbacks(self, run: str = "") -> list[RollbackRow]:
        """Newest first."""
        rows = self._db.all("SELECT body FROM rollbacks WHERE ? = '' OR run = ? ORDER BY number DESC", run, run)
        return [codec.loads(RollbackRow, row[0]) for row in rows]

    def put_promotion(self, row: PromotionRow) -> None:
        """Inserts or replaces by checkpoint."""
        with self._db.transaction() as tx:
            sql = "INSERT INTO promotions (checkpoint, model, body) VALUES (?, ?, ?) ON CONFLICT (checkpoint) DO UPDATE SET body = excluded.body"
            tx.execute(sql, (row.checkpoint, row.model, codec.dumps(row)))
            _announce(tx, "promotion", row.checkpoint, row.created_at, {"state": row.state, "why": row.why})

    def promotions(self, model: str = "") -> list[PromotionRow]:
        """Oldest first."""
        rows = self._db.all("SELECT body FROM promotions WHERE ? = '' OR model = ? ORDER BY number", model, model)
        return [codec.loads(PromotionRow, row[0]) for row in rows]

    # --- requests and announcements -----------------------------------------------------------------------------------------------

    def answered(self, request: Request) -> str | None:
        """What an earlier request with this id led to. Raises AlreadyExists `REQUEST_ID_REUSED`."""
        if not request.id:
            return None
        row = self._db.one("SELECT verb, digest, answer FROM requests WHERE id = ?", request.id)
        if row is None:
            return None
        if (row["verb"], row["digest"]) != (request.verb, request.digest):
            raise reused(request)
        return str(row["answer"])

    def remember(self, request: Request, answer: str) -> None:
        """Stores the answer of a request that has an id."""
        if request.id:
            with self._db.transaction() as tx:
                _remember(tx, request, answer)

    def outbox(self, limit: int = 100) -> list[OutboxEntry]:
        """What has not been announced yet."""
        sql = "SELECT * FROM outbox WHERE seq > COALESCE((SELECT seq FROM cursors WHERE name = 'outbox'), 0) ORDER BY seq LIMIT ?"
        rows = self._db.all(sql, limit)
        return [OutboxEntry(r["seq"], r["kind"], r["subject"], r["at"], codec.plain(r["facts"])) for r in rows]

    def announced(self, seq: int) -> None:
        """Moves the cursor."""
        with self._db.transaction() as tx:
            tx.execute("INSERT OR REPLACE INTO cursors VALUES ('outbox', ?)", (seq,))


def _remember(tx: sqlite3.Connection, request: Request, answer: str) -> None:
    tx.execute("INSERT INTO requests VALUES (?, ?, ?, ?)", (request.id, request.verb, request.digest, answer))


def _announce(tx: sqlite3.Connection, kind: str, subject: str, at: float, facts: dict[str, str]) -> None:
    sql = "INSERT INTO outbox (kind, subject, at, facts) VALUES (?, ?, ?, ?)"
    tx.execute(sql, (kind, subject, at, codec.dumps(facts)))
