"""Saves through the writer's process: what was staged is what is durable, whatever dies meanwhile."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from interlock.errors import AlreadyExists, FailedPrecondition, Unavailable
from interlock.stores import checkpoint_writer as wire
from interlock.stores.artifacts import Manifest
from interlock.stores.checkpoints import CheckpointStore
from interlock.training.capture import Snapshot, Staging, as_tensor
from interlock.training.saver import Saver
from interlock.training.writer import WriterProcess

Done = tuple[str, Manifest | None, Exception | None]


class Saving:
    """A saver with its writer, and what it was told."""

    def __init__(self, root: Path) -> None:
        self.store = CheckpointStore(root)
        self.writer = WriterProcess(root)
        self._done: queue.Queue[Done] = queue.Queue()
        self.saver = Saver(self.writer, lambda *done: self._done.put(done))

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        self.saver.save(name, Snapshot(tensors, {"seq": 1}), {"seq": 1})

    def done(self) -> Done:
        return self._done.get(timeout=30)

    def loaded(self, name: str) -> dict[str, torch.Tensor]:
        return {key: as_tensor(*raw) for key, raw in self.store.load(name).tensors.items()}

    def pid(self) -> int:
        assert self.writer._process is not None
        return self.writer._process.pid


@pytest.fixture
def saving(tmp_path: Path) -> Iterator[Saving]:
    made = Saving(tmp_path / "checkpoints")
    yield made
    made.saver.close()
    assert not [c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE and "checkpoint_writer" in " ".join(c.cmdline())]  # fmt: skip


def some(seed: int, count: int = 1000) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    floats = torch.randn(count, generator=made)
    return {"a": floats, "b/half": floats[: count // 2].bfloat16(), "c": torch.arange(7), "d": torch.tensor(3.5), "e": torch.empty(0)}  # fmt: skip


def test_what_was_staged_is_what_is_durable_even_if_it_changes_at_once(saving: Saving) -> None:
    tensors = some(1, 1_000_000)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    saving.save("first", tensors)
    for tensor in tensors.values():
        tensor.zero_()
    name, manifest, failure = saving.done()
    assert (name, failure) == ("first", None)
    assert manifest is not None
    assert manifest.digest == saving.store.verify("first").digest
    found = saving.loaded("first")
    assert all(torch.equal(found[key], before[key]) and found[key].dtype is before[key].dtype for key in before)


def test_the_writer_has_no_torch_in_it(saving: Saving) -> None:
    saving.save("first", some(1))
    saving.done()
    mapped = Path(f"/proc/{saving.pid()}/maps").read_text()
    assert "libtorch" not in mapped
    assert "numpy" not in mapped


def test_a_state_that_grows_is_saved_whole_with_room_made_before_or_not(saving: Saving) -> None:
    for number, count in enumerate((10, 3_000_000, 3_000_000, 5_000_000, 100)):
        if number == 3:
            saving.saver.prepare(40_000_000)
        tensors = some(number, count)
        saving.save(f"c{number}", tensors)
        assert saving.done()[2] is None
        found = saving.loaded(f"c{number}")
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_prepared_memory_is_the_memory_that_is_used() -> None:
    staging = Staging()
    staging.prepare(8_000_000)
    assert staging._growing is not None
    staging._growing.join()
    prepared = staging._next
    staged = staging.fill(Snapshot(some(1), {}))
    assert prepared is not None
    assert staged.fd == prepared.fd
    again = staging.fill(Snapshot(some(2, 1_500_000), {}))
    assert again.fd == prepared.fd, "as much as was prepared needs no other memory"
    staging.close()


def test_a_writer_that_is_killed_fails_its_save_and_the_next_one_has_another(saving: Saving) -> None:
    saving.save("first", some(1))
    saving.done()
    saving.save("second", some(2, 20_000_000))
    while not list(saving.store.root.glob(".part-second-*")):
        time.sleep(0.001)
    os.kill(saving.pid(), signal.SIGKILL)
    name, manifest, failure = saving.done()
    assert (name, manifest) == ("second", None)
    assert isinstance(failure, Unavailable)
    assert (failure.reason, failure.message) == ("WRITER_DIED", "the checkpoint writer ended by SIGKILL in the middle of a save")  # fmt: skip
    saving.save("third", some(3))
    assert saving.done()[2] is None
    assert saving.store.ids() == ["first", "third"]
    assert not list(saving.store.root.glob(".part-*"))


def test_what_the_store_refuses_comes_back_as_it_was_raised(saving: Saving, tmp_path: Path) -> None:
    saving.save("first", some(1))
    saving.done()
    saving.save("first", some(2))
    failure = saving.done()[2]
    assert isinstance(failure, AlreadyExists)
    assert failure.reason == "CHECKPOINT_EXISTS"
    (tmp_path / "checkpoints").rename(tmp_path / "gone")
    saving.save("second", some(2))
    failure = saving.done()[2]
    assert isinstance(failure, FileNotFoundError)
    assert str(tmp_path) in str(failure)
    (tmp_path / "gone").rename(tmp_path / "checkpoints")


def test_a_terminals_ctrl_c_and_a_supervisors_sigterm_do_not_stop_a_save(saving: Saving) -> None:
    saving.save("first", some(1))
    saving.done()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(saving.pid(), number)
    saving.save("second", some(2))
    assert saving.done()[2] is None
    assert saving.store.ids() == ["first", "second"]


def test_a_folder_has_one_writer(saving: Saving, tmp_path: Path) -> None:
    saving.save("first", some(1))
    saving.done()
    other = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(FailedPrecondition, match="another process writes checkpoints there") as refused, other.locked(0.05):  # fmt: skip
        pass
    assert refused.value.reason == "RUN_IN_USE"


LOOP = """
import os, signal, sys
from pathlib import Path
import torch
from interlock.training.capture import Snapshot
from interlock.training.saver import Saver
from interlock.training.writer import WriterProcess
root = Path(sys.argv[1])
saver = Saver(WriterProcess(root), lambda *done: None)
saver.save("small", Snapshot({"w": torch.ones(3)}, {"seq": 1}), {"seq": 1})
saver.wait()
saver.save("large", Snapshot({"w": torch.full((30_000_000,), 7.0)}, {"seq": 2}), {"seq": 2})
while not list(root.glob(".part-large-*")):
    pass
if os.fork() == 0:  # as a data loader's worker: it holds the loop's files open, and outlives it
    Path(sys.argv[2]).write_text(str(os.getpid()))
    signal.pause()
while not Path(sys.argv[2]).exists():
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.system
def test_a_loop_that_is_killed_in_the_middle_of_a_save_has_it_finished_and_the_next_one_waits_for_it(tmp_path: Path) -> None:  # fmt: skip
    root, child = tmp_path / "checkpoints", tmp_path / "pid"
    root.mkdir()
    loop = subprocess.run([sys.executable, "-c", LOOP, str(root), str(child)], timeout=60, check=False)
    try:
        check_finished(root, loop.returncode)
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)


def check_finished(root: Path, ended: int) -> None:
    assert ended == -signal.SIGKILL
    store = CheckpointStore(root)
    store.sweep()  # as the next loop's attach does
    assert store.ids() == ["small", "large"]
    found = as_tensor(*store.load("large").tensors["w"])
    assert bool((found == 7.0).all())
    deadline = time.monotonic() + 10
    while any({str(root), wire.__name__} <= set(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "the writer ends after its loop"
        time.sleep(0.05)
