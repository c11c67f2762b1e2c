"""Hostile artifacts (`tests/hostile.py`): each is refused with a reason, nothing of it runs, and the parsers behind survive any bytes."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hostile
import onnx_models
from interlock.errors import FailedPrecondition, InterlockError, InvalidArgument
from interlock.stores import artifacts, golden, modelspec, weights
from interlock_inference import repository
from interlock_inference.engines import EngineOptions, onnx_file

HERE = Path(__file__).resolve().parents[1]
AFTER_THE_LOAD = {"onnx-fold-petabytes"}
"""Those that load, and break at their first run, which is a warm-up's."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of each, all in one child that is locked as a replica is."""
    place = tmp_path_factory.mktemp("hostile")
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(HERE / "hostile.py"),
        str(place / "artifacts"),
        str(place / "canary"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    finished = {line["name"]: line for line in lines if "ran" in line}
    begun = [line["name"] for line in lines if "ran" not in line]
    assert done.returncode == 0, f"died at {[name for name in begun if name not in finished]}: {done.stderr[-2000:]}"
    return finished


def test_there_are_enough_of_them() -> None:
    """Issue 3: 60 code-execution artefacts, and those that lie about themselves."""
    code = [
        n
        for n in hostile.ARTIFACTS
        if n.startswith(("pickle", "bare", "packed", "torch", "keras", "golden", "module", "npy", "pt2", "exported"))
    ]
    assert len(code) >= 45
    assert len(hostile.ARTIFACTS) >= 150


@pytest.mark.parametrize("name", hostile.ARTIFACTS)
def test_it_is_refused_and_nothing_runs(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    outcome = outcomes[name]
    assert "crash" not in outcome
    assert outcome.get("reason"), "it was taken"
    assert len(outcome["message"]) > 20
    assert outcome["ran"] == []
    assert not outcome["canary"]
    assert (outcome["reason"] in ("ENGINE_FAULT", "ENGINE_OUT_OF_MEMORY")) == (name in AFTER_THE_LOAD)


@pytest.mark.parametrize("body", [hostile.payload, *hostile._CALLS.values(), hostile.torch_zip])
def test_the_canary_is_alive(tmp_path: Path, body: Callable[[Path], bytes]) -> None:
    """Without the lock the same bytes do run: otherwise the test above would show nothing."""
    canary = tmp_path / "canary"
    # unpickling may fail behind the payload: that it ran is what counts
    code = "import pickle, sys, zipfile, io; b = open(sys.argv[1], 'rb').read()\nif b[:2] == b'PK': b = zipfile.ZipFile(io.BytesIO(b)).read('archive/data.pkl')\ntry: pickle.loads(b)\nexcept Exception: pass"
    (tmp_path / "p").write_bytes(body(canary))
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], check=True, timeout=60)
    assert canary.exists()


# --- any byte, anywhere ---


def version(folder: Path) -> Path:
    inputs = {"a": {"x": np.ones((1, 4), np.float32)}}
    onnx_models.write_version(folder, onnx_models.mlp((4, 8, 4)), golden_inputs=inputs)
    return folder


def opening(path: Path, digest: str = "") -> repository.Opened:
    return repository.open_artifact(path, digest, EngineOptions(), lambda percent, message: None)


@pytest.mark.parametrize("file", ["model.onnx", "model.toml", "golden.npz", "manifest.json"])
def test_no_bit_can_be_flipped_and_no_byte_cut_off(tmp_path: Path, file: str) -> None:
    """Under its manifest an artifact is what it was, or is refused; for each file at a hundred places."""
    folder = version(tmp_path / "1")
    digest = artifacts.read_manifest(folder).digest
    body, chance = (folder / file).read_bytes(), random.Random(file)
    changes = [body[:at] for at in sorted({0, 1, len(body) - 1, *(chance.randrange(len(body)) for _ in range(50))})]
    for _ in range(50):
        at, bit = chance.randrange(len(body)), 1 << chance.randrange(8)
        changes.append(body[:at] + bytes((body[at] ^ bit,)) + body[at + 1 :])
    for changed in changes:
        (folder / file).write_bytes(changed)
        try:
            opened = opening(folder, digest)
        except (FailedPrecondition, InvalidArgument):
            continue
        else:
            assert file == "manifest.json", "white space, and metadata, which the digest does not cover"
            assert opened.digest == digest


def weights_file(path: Path) -> bytes:
    table = {f"w{n}": {"dtype": "F32", "shape": [2, n], "data_offsets": [0, 0]} for n in range(1, 9)}
    at = 0
    for entry in table.values():
        size = 8 * entry["shape"][1]  # type: ignore[index]
        entry["data_offsets"], at = [at, at + size], at + size
    return hostile.safetensors({"__metadata__": {"format": "pt"}, **table}, bytes(at))


def read_weights(path: Path) -> object:
    table = weights.read_table(path)
    size = path.stat().st_size
    assert all(0 <= w.begin <= w.end <= size for w in table.values()), "never a place outside the file"
    return table


PARSERS: dict[str, tuple[str, Callable[[Path], bytes], Callable[[Path], object]]] = {
    "safetensors": ("model.safetensors", weights_file, read_weights),
    "onnx": ("model.onnx", lambda path: hostile.external("weights.bin") + onnx_models.mlp((4, 8, 4)), onnx_file.locations),
    "manifest": ("manifest.json", lambda path: (version(path.parent) / "manifest.json").read_bytes(), lambda p: artifacts.read_manifest(p.parent)),
    "model.toml": ("model.toml", lambda path: (version(path.parent) / "model.toml").read_bytes(), lambda p: modelspec.read_spec(p.parent)),
    "golden": ("golden.npz", lambda path: (version(path.parent) / "golden.npz").read_bytes(), lambda p: golden.read(p.parent)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARSERS)
def test_parsers_take_any_bytes_or_refuse_them(tmp_path: Path, name: str) -> None:
    """Without a digest before them: cuts, flips, doubled and foreign pieces. Nothing but our own errors comes out."""
    file, make, parse = PARSERS[name]
    path = tmp_path / "v" / file
    path.parent.mkdir()
    body, chance, refused = make(path), random.Random(name), 0
    for round_ in range(1500):
        changed = bytearray(body)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(changed)) if changed else 0
            kind = round_ % 4
            if kind == 0:
                del changed[at:]
            elif kind == 1 and changed:
                changed[at] ^= 1 << chance.randrange(8)
            elif kind == 2:
                changed[at:at] = changed[chance.randrange(len(changed) + 1) :][: chance.randrange(64)]
            else:
                changed[at : at + 8] = chance.choice(
                    (b"\xff" * 8, b"\0" * 8, b"9" * 20, b'[{"', (1 << 62).to_bytes(8, "little"))
                )
        path.write_bytes(changed)
        try:
            parse(path)
        except InterlockError:
            refused += 1
    assert refused > 100


FLIPS = """
import random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import onnx_models
from interlock.errors import InterlockError
from interlock_inference import repository
from interlock_inference.engines import EngineOptions, made_up_inputs
path, chance, taken = Path(sys.argv[2]), random.Random(0), 0
body = onnx_models.mlp((4, 8, 4))
for number in range(600):
    changed = bytearray(body)
    if number % 3 == 0:
        del changed[chance.randrange(len(body)):]
    else:
        changed[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    path.write_bytes(changed)
    try:
        opened = repository.open_artifact(path, "", EngineOptions(), lambda percent, message: None)
        names = [spec.name for spec in opened.engine.signature.outputs]
        inputs = made_up_inputs(opened.engine.signature)
        if sum(array.size for array in inputs.values()) < 1_000_000:
            opened.engine.run(inputs, names)
        taken += 1
    except InterlockError:
        pass
print(taken)
"""


def test_a_damaged_graph_without_a_digest_ends_in_our_words(tmp_path: Path) -> None:
    """ONNX Runtime over 600 damaged graphs, in a child, as a replica's loads are: it refuses them or runs them, and does not die of them."""
    done = subprocess.run(
        [sys.executable, "-c", FLIPS, str(HERE), str(tmp_path / "m.onnx")],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 600


def test_an_unpickled_byte_is_refused_by_the_process_itself(tmp_path: Path) -> None:
    """The last door: even code of ours that would call pickle can't."""
    (tmp_path / "p").write_bytes(pickle.dumps(hostile.Runs(exec, hostile.touch(tmp_path / "canary"))))
    code = "import pickle, sys; from interlock_inference import audit; audit.install(); pickle.load(open(sys.argv[1], 'rb'))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "p")], capture_output=True, text=True, timeout=60, check=False
    )
    assert "UnpicklingRefused" in done.stderr
    assert not (tmp_path / "canary").exists()
    shutil.rmtree(tmp_path)
