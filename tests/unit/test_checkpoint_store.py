"""Checkpoint folders: whole or not at all, whatever the disk or the power does, at every single disk operation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from interlock.errors import AlreadyExists, DataLoss, InvalidArgument, NotFound
from interlock.stores.checkpoints import FAILPOINT, CheckpointStore, place

SLOTS, SIZE = place([("model/w", "F32", (2, 3), 24), ("rng", "U8", (5,), 5)])
DATA = memoryview(bytes(range(SIZE)))


def write(store: CheckpointStore, name: str, seq: int) -> None:
    store.write(name, SLOTS, DATA, {"seq": seq, "x": [1.5, None]}, {"seq": seq})


def count_operations(root: Path) -> int:
    seen: list[str] = []
    write(CheckpointStore(root, seen.append), "c", 1)
    return len(seen)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "step-1", 1)
    loaded = store.load("step-1")
    assert loaded.state == {"seq": 1, "x": [1.5, None]}
    assert {name: (code, shape, bytes(raw)) for name, (code, shape, raw) in loaded.tensors.items()} == {
        "model/w": ("F32", (2, 3), bytes(range(24))),
        "rng": ("U8", (5,), bytes(range(24, 29))),
    }
    assert store.verify("step-1").digest == loaded.manifest.digest


def test_any_tool_can_read_the_tensors(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "step-1", 1)
    arrays = load_file(store.path("step-1") / "tensors.safetensors")
    assert arrays["model/w"].tobytes() == bytes(range(24))


def test_order_is_by_seq(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for name, seq in (("step-10000", 3), ("step-9900", 2), ("step-9800-b", 1)):
        write(store, name, seq)
    assert store.ids() == ["step-9800-b", "step-9900", "step-10000"]


def test_an_id_is_written_once(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "c", 1)
    with pytest.raises(AlreadyExists):
        write(store, "c", 2)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_an_id_never_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="is not an id"):
        CheckpointStore(tmp_path).path(name)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "c", 1)
    for file in sorted(store.path("c").iterdir()):
        body = file.read_bytes()
        for index in range(0, len(body), 7):
            file.write_bytes(body[:index] + bytes([body[index] ^ 0x10]) + body[index + 1 :])
            if file.name != "manifest.json":
                with pytest.raises(DataLoss):
                    store.load("c")
        file.write_bytes(body[: len(body) // 2])
        with pytest.raises(DataLoss):
            store.load("c")
        file.write_bytes(body)
    assert store.load("c").state["seq"] == 1


def test_a_missing_file_is_data_loss_and_a_missing_folder_not_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "c", 1)
    (store.path("c") / "state.json").unlink()
    with pytest.raises(DataLoss):
        store.load("c")
    with pytest.raises(NotFound):
        store.load("d")
    store.set_aside("c")
    assert store.ids() == []
    assert (tmp_path / "damaged/c").is_dir()


def test_a_disk_that_refuses_any_operation_leaves_the_set_as_it_was(tmp_path: Path) -> None:
    total = count_operations(tmp_path / "count")
    for bad in range(1, total):
        left = [bad]

        def refuse(_operation: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")

        root = tmp_path / str(bad)
        write(CheckpointStore(root), "old", 1)
        with pytest.raises(OSError, match="No space"):
            write(CheckpointStore(root, refuse), "new", 2)
        # after the rename the new one is there, whole; before it there is nothing of it
        assert CheckpointStore(root).ids() in (["old"], ["old", "new"])
        assert not list(root.glob(".part-*"))


SCRIPT = """
import sys
from pathlib import Path
from interlock.stores.checkpoints import CheckpointStore, failpoint, place
store = CheckpointStore(Path(sys.argv[1]), failpoint())
slots, size = place([("model/w", "F32", (1 << 20, 5), 20 << 20)])
store.write("new", slots, memoryview(bytes(size)), {"seq": 2}, {"seq": 2})
"""


@pytest.mark.system
def test_sigkill_at_every_disk_operation_never_leaves_a_torn_checkpoint(tmp_path: Path) -> None:
    """Crash at any byte leaves the older set intact: the process is killed before each of its disk operations in turn."""
    outcomes = []
    for point in range(1, 20):
        root = tmp_path / str(point)
        store = CheckpointStore(root)
        write(store, "old", 1)
        environment = {**os.environ, FAILPOINT: f"checkpoint:{point}"}
        ended = subprocess.run([sys.executable, "-c", SCRIPT, str(root)], env=environment, check=False, timeout=60)
        for name in store.ids():
            store.load(name)
        assert "old" in store.ids()
        store.sweep()
        assert {path.name for path in root.iterdir()} == {".lock", *store.ids()}
        outcomes.append((ended.returncode, "new" in store.ids()))
        if ended.returncode == 0:
            break
    assert outcomes[-1] == (0, True), "the last point lies behind the last operation"
    assert (-9, False) in outcomes
    assert len(outcomes) > 8
