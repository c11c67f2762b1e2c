"""One contract for every store of the controller: the fake in memory and SQLite answer alike. What only a file can do stands below."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from interlock.core.route import Weight, all_to
from interlock.core.swap import Admission, Event, State, Swap, SwapSpec
from interlock.core.swap_plan import Decision, Snapshot, act
from interlock.errors import Aborted, AlreadyExists, DataLoss, FailedPrecondition, NotFound
from interlock.stores import controller_sqlite
from interlock.stores.controller import (
    CheckpointRow,
    ControllerStore,
    Origin,
    PromotionRow,
    Request,
    RollbackRow,
    VersionRow,
)
from interlock.stores.controller_sqlite import SqliteControllerStore
from memory_store import MemoryControllerStore

Open = Callable[[], ControllerStore]
ROW = VersionRow(
    "policy",
    "",
    "blake3:aa",
    "/models/policy/1",
    10,
    Origin("runs/r", "runs/r/checkpoints/c", 5, 1),
    {"reward": 1.5},
    3.0,
)


@pytest.fixture(params=["memory", "sqlite"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same store again and again, as a restart does."""
    disk: dict[str, Any] = {}
    opened: list[ControllerStore] = []

    def opening() -> ControllerStore:
        store: ControllerStore = (
            MemoryControllerStore(disk) if request.param == "memory" else SqliteControllerStore(tmp_path / "c.db")
        )
        opened.append(store)
        return store

    yield opening
    for store in opened:
        store.close()


def a_swap(swap_id: str = "s1", **more: Any) -> Swap:
    spec = SwapSpec("policy", "2", canary_percents=(), keep_warm_seconds=7.5)
    return Swap(swap_id, spec, created_at=1.0, changed_at=1.0, actor="ana", trace="00-aa-bb-01", **more)


def in_state(store: ControllerStore, state: State, **more: Any) -> Swap:
    """A stored swap that is already further on."""
    swap = a_swap(state=state, stable=all_to("1"), base_epoch=1, **more)
    return store.create_swap(swap, None)


def switch(store: ControllerStore, swap: Swap) -> Decision:
    """The decision that commits the route."""
    return act(Snapshot(swap, store.route("policy")), Event.PASS, 2.0, "compared")


def test_versions_are_numbered_and_the_same_bytes_are_the_same_version(open_store: Open) -> None:
    store = open_store()
    first = store.add_version(ROW)
    assert first == replace(ROW, version="1")
    assert store.add_version(replace(ROW, artifact_uri="/elsewhere")) == first
    assert store.add_version(replace(ROW, digest="blake3:bb")).version == "2"
    assert store.add_version(replace(ROW, model="other")).version == "1"
    assert store.add_version(replace(ROW, digest="blake3:cc", version="9")).version == "9"
    assert [v.version for v in store.versions("policy")] == ["9", "2", "1"]
    assert store.models() == ["other", "policy"]
    assert open_store().version("policy", "1") == first
    assert store.version("policy", "7") is None


def test_quarantine_follows_the_bytes(open_store: Open) -> None:
    store = open_store()
    store.add_version(ROW)
    assert store.set_quarantine("policy", "1", "drifts", "ana", 4.0).quarantined == "drifts"
    assert store.quarantined_digests() == {"blake3:aa"}
    assert store.add_version(replace(ROW, model="other")).quarantined == "drifts"
    assert store.set_quarantine("policy", "1", "", "ana", 5.0).quarantined == ""
    assert open_store().quarantined_digests() == frozenset()
    with pytest.raises(NotFound):
        store.set_quarantine("policy", "8", "x", "ana", 4.0)


def test_a_route_is_a_compare_and_set(open_store: Open) -> None:
    store = open_store()
    assert store.route("policy").epoch == 0
    assert store.set_route("policy", 0, all_to("1"), "ana", 1.0).epoch == 1
    split = (Weight("1", 90), Weight("2", 10))
    assert store.set_route("policy", 1, split, "ana", 2.0).weights == split
    with pytest.raises(Aborted, match="epoch 2"):
        store.set_route("policy", 1, all_to("1"), "ana", 3.0)
    assert open_store().routes() == [store.route("policy")]
    assert store.route("policy").weights == split


def test_a_swap_is_kept_whole_and_in_order(open_store: Open) -> None:
    store = open_store()
    swaps = [store.create_swap(a_swap(f"s{n}"), None) for n in range(4)]
    again = open_store()
    assert again.swap("s2") == swaps[2]
    assert again.swap("none") is None
    assert [s.id for s in again.swaps()] == ["s3", "s2", "s1", "s0"]
    assert [s.id for s in again.swaps("policy", limit=2, before="s3")] == ["s2", "s1"]
    assert again.swaps("other") == []
    assert [s.id for s in again.active_swaps("policy")] == ["s0", "s1", "s2", "s3"]


def test_a_decision_is_written_with_its_route_event_and_outbox(open_store: Open) -> None:
    store = open_store()
    store.set_route("policy", 0, all_to("1"), "ana", 1.0)
    swap = in_state(store, State.VERIFYING, admission=Admission("blake3:aa"))
    store.announced(store.outbox()[-1].seq)
    decision = switch(store, swap)
    store.write_swap(swap, decision, 2.0)
    again = open_store()
    assert again.swap("s1") == decision.swap
    assert again.route("policy").epoch == 2
    assert [e.swap.state for e in again.swap_events("s1")] == [State.VERIFYING, State.SWITCHING]
    assert [e.swap.state for e in again.swap_events("s1", after_revision=1)] == [State.SWITCHING]
    assert [(e.kind, e.subject) for e in again.outbox()] == [("route_committed", "policy"), ("swap_state", "s1")]


def test_an_end_writes_the_receipt_and_frees_the_model(open_store: Open) -> None:
    store = open_store()
    swap = store.create_swap(a_swap(), None)
    assert store.receipt("s1") is None
    store.write_swap(swap, act(Snapshot(swap, store.route("policy")), Event.ABORT, 5.0, "not wanted"), 5.0)
    told = open_store().receipt("s1")
    assert told is not None
    assert (told.state, told.actor, told.ended_at) == (State.CANCELLED, "ana", 5.0)
    assert store.active_swaps() == []


def test_what_completed_is_proven(open_store: Open) -> None:
    store = open_store()
    for n, candidate in enumerate(["2", "3", "2"]):
        swap = Swap(f"s{n}", SwapSpec("policy", candidate), created_at=float(n), state=State.KEEP_WARM)
        store.create_swap(swap, None)
        assert f"s{n}" not in [s.id for s in store.completed_swaps("policy")]
        store.write_swap(swap, act(Snapshot(swap, store.route("policy")), Event.RELEASED, 5.0), 5.0)
    assert [s.id for s in open_store().completed_swaps("policy", limit=2)] == ["s2", "s1"]
    assert open_store().proven("policy") == {"2", "3"}
    assert store.proven("other") == frozenset()


def test_a_reverted_version_is_forbidden_in_the_same_write(open_store: Open) -> None:
    store = open_store()
    store.add_version(ROW)
    store.add_version(replace(ROW, digest="blake3:bb"))
    store.set_route("policy", 0, all_to("1"), "ana", 1.0)
    store.set_route("policy", 1, all_to("2"), "s1", 1.0)
    swap = in_state(store, State.SOAKING, epoch=2)
    store.write_swap(swap, act(Snapshot(swap, store.route("policy")), Event.FAIL, 5.0, "errors", "ERROR_RATE"), 5.0)
    assert store.route("policy").weights == all_to("1")
    assert store.quarantined_digests() == {"blake3:bb"}


def test_a_write_that_lost_its_race_changes_nothing(open_store: Open) -> None:
    store = open_store()
    store.set_route("policy", 0, all_to("1"), "ana", 1.0)
    swap = in_state(store, State.VERIFYING)
    decision = switch(store, swap)
    store.set_route("policy", 1, all_to("1"), "ben", 1.5)
    num_events = len(store.outbox())
    with pytest.raises(Aborted) as stale:
        store.write_swap(swap, decision, 2.0)
    assert stale.value.reason == "STALE_EPOCH"
    assert store.swap("s1") == swap
    assert len(store.swap_events("s1")) == 1
    assert len(store.outbox()) == num_events
    paused = replace(swap, revision=2, paused_at=1.0)
    store.write_swap(swap, Decision(paused), 2.0)
    with pytest.raises(Aborted) as late:
        store.write_swap(swap, Decision(replace(swap, revision=2)), 2.0)
    assert late.value.reason == "STALE_ROW"
    assert store.swap("s1") == paused


def test_a_request_is_answered_once(open_store: Open) -> None:
    store = open_store()
    request = Request("once", "CreateSwap", "body")
    assert store.answered(request) is None
    store.create_swap(a_swap("s1"), request)
    assert store.create_swap(a_swap("s2"), request).id == "s1"
    assert open_store().answered(request) == "s1"
    assert store.swap("s2") is None
    with pytest.raises(AlreadyExists):
        store.answered(replace(request, digest="other body"))
    with pytest.raises(AlreadyExists):
        store.answered(replace(request, verb="RollbackModel"))
    nameless = Request("", "CreateSwap", "body")
    store.remember(nameless, "s9")
    assert store.answered(nameless) is None


def test_what_a_new_swap_ends_is_ended_with_it(open_store: Open) -> None:
    store = open_store()
    old = store.create_swap(a_swap("s1"), None)
    ended = act(Snapshot(old, store.route("policy")), Event.SUPERSEDE, 2.0, "by s2")
    store.create_swap(a_swap("s2"), None, ((old, ended),))
    assert store.swap("s1") == ended.swap
    with pytest.raises(Aborted):
        store.create_swap(a_swap("s3"), None, ((old, ended),))
    assert store.swap("s3") is None


def test_lineage_and_promotions_are_kept(open_store: Open) -> None:
    store = open_store()
    late = CheckpointRow("runs/r/checkpoints/c2", "runs/r", 20, 1, "GOOD", "blake3:2", {"reward": 2.0})
    early = CheckpointRow("runs/r/checkpoints/c1", "runs/r", 10, 1, "CANDIDATE")
    for row in (late, early, replace(early, state="GOOD")):
        store.put_checkpoint(row)
    assert open_store().checkpoints("runs/r") == [replace(early, state="GOOD"), late]
    first = RollbackRow("rb1", "runs/r", "kl", 0.5, 0.03, 30, 20, late.name, "trainer", quarantined=("c3",))
    assert store.put_rollback(first) == first
    merged = store.put_rollback(replace(first, decided_by="controller", quarantined=("c4",), target="other"))
    assert merged == replace(first, quarantined=("c3", "c4"))
    assert open_store().rollback("rb1") == merged
    assert store.rollbacks("runs/other") == []
    row = PromotionRow(late.name, "runs/r", "policy", created_at=1.0)
    store.put_promotion(row)
    store.put_promotion(replace(row, state="SWAPPED", swap="s1"))
    assert open_store().promotions("policy") == [replace(row, state="SWAPPED", swap="s1")]


def test_the_outbox_is_read_in_order_until_it_is_announced(open_store: Open) -> None:
    store = open_store()
    for n in range(3):
        store.create_swap(a_swap(f"s{n}"), None)
    entries = store.outbox(limit=2)
    assert [e.subject for e in entries] == ["s0", "s1"]
    assert entries[0].facts["state"] == "PENDING"
    store.announced(entries[-1].seq)
    assert [e.subject for e in open_store().outbox()] == ["s2"]


def test_a_lost_lease_writes_nothing(open_store: Open) -> None:
    old, new = open_store(), open_store()
    assert old.take_lease() == 1
    swap = old.create_swap(a_swap(), None)
    assert new.take_lease() == 2
    for attempt in (
        lambda: old.create_swap(a_swap("s2"), None),
        lambda: old.write_swap(swap, Decision(replace(swap, revision=2)), 1.0),
        lambda: old.set_route("policy", 0, all_to("1"), "ana", 1.0),
    ):
        with pytest.raises(Aborted) as caught:
            attempt()
        assert caught.value.reason == "STALE_CONTROLLER"
    new.write_swap(swap, Decision(replace(swap, revision=2)), 1.0)
    assert new.swaps()[0].revision == 2


# --- SQLite only ------------------------------------------------------------------------------------------------------------------


class Failing:
    """A connection whose n-th statement fails."""

    def __init__(self, connection: sqlite3.Connection, nth: int) -> None:
        self._connection = connection
        self.left = nth

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        self.left -= 1
        if self.left == 0:
            raise sqlite3.OperationalError("disk I/O error")
        return self._connection.execute(sql, *parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def test_a_failure_of_any_statement_leaves_everything_or_nothing(tmp_path: Path) -> None:
    """The n-th statement of a reverting write fails, for every n: row, route, quarantine, event and outbox stay together."""
    nth = 0
    while True:
        nth += 1
        store = SqliteControllerStore(tmp_path / f"{nth}.db")
        store.add_version(ROW)
        store.add_version(replace(ROW, digest="blake3:bb"))
        store.set_route("policy", 0, all_to("1"), "ana", 1.0)
        store.set_route("policy", 1, all_to("2"), "s1", 1.0)
        swap = in_state(store, State.SOAKING, epoch=2)
        decision = act(Snapshot(swap, store.route("policy")), Event.FAIL, 5.0, "errors", "ERROR_RATE")
        before = _everything(store)
        real = store._db._connection
        failing = Failing(real, nth)
        store._db._connection = failing  # type: ignore[assignment]
        try:
            store.write_swap(swap, decision, 5.0)
        except sqlite3.OperationalError:
            store._db._connection = real
            assert _everything(store) == before, f"statement {nth}"
            store.write_swap(swap, decision, 5.0)
        store._db._connection = real
        done = _everything(store)
        store.close()
        again = SqliteControllerStore(tmp_path / f"{nth}.db")
        assert _everything(again) == done
        again.close()
        if failing.left > 0:
            break
    assert nth > 8, "fewer statements than a revert needs: the loop proves nothing"


def _everything(store: SqliteControllerStore) -> dict[str, list[tuple[Any, ...]]]:
    tables = ("versions", "quarantine", "routes", "swaps", "swap_events", "receipts", "outbox")
    return {table: [tuple(row) for row in store._db.all(f"SELECT * FROM {table}")] for table in tables}


def test_a_newer_schema_is_refused_and_an_older_one_is_brought_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SqliteControllerStore(tmp_path / "c.db").close()
    grown = (*controller_sqlite.MIGRATIONS, "CREATE TABLE more (x INTEGER) STRICT")
    with monkeypatch.context() as patch:
        patch.setattr(controller_sqlite, "MIGRATIONS", grown)
        SqliteControllerStore(tmp_path / "c.db").close()
        SqliteControllerStore(tmp_path / "c.db").close()
    with pytest.raises(FailedPrecondition) as caught:
        SqliteControllerStore(tmp_path / "c.db")
    assert caught.value.reason == "SCHEMA_NEWER"


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.db").write_bytes(b"this is not a database, it only has its name" * 100)
    with pytest.raises(DataLoss) as caught:
        SqliteControllerStore(tmp_path / "c.db")
    assert "c.db" in caught.value.message


def test_routes_are_a_register_for_any_number_of_writers(tmp_path: Path) -> None:
    """Four connections race for the same route: every epoch is written by exactly one of them, none is skipped."""
    SqliteControllerStore(tmp_path / "c.db").close()
    won: dict[int, str] = {}
    lost: list[int] = []

    def race(name: str) -> None:
        store = SqliteControllerStore(tmp_path / "c.db")
        for _ in range(50):
            seen = store.route("policy").epoch
            try:
                route = store.set_route("policy", seen, all_to("1"), name, 1.0)
            except Aborted:
                lost.append(seen)
                continue
            assert route.epoch not in won
            won[route.epoch] = name
        store.close()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(race, f"w{n}") for n in range(4)]:
            done.result()
    store = SqliteControllerStore(tmp_path / "c.db")
    assert sorted(won) == list(range(1, store.route("policy").epoch + 1))
    assert [e.facts["by"] for e in store.outbox(1000)] == [won[n] for n in sorted(won)]
    assert len(won) + len(lost) == 200
    store.close()
