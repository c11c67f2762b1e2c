"""The PyTorch engine's own promises: which code may run, which weights fit, what is compiled. What all engines promise is tests/contract/test_engines.py."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import torch_models
from interlock.errors import FailedPrecondition, Internal
from interlock_inference import repository
from interlock_inference.engines import Engine, EngineOptions
from interlock_inference.engines import torch as torch_engine
from torch_models import MODULES, Mlp, spec

OPTIONS = EngineOptions(torch_modules=MODULES)
X = {"x": np.ones((2, 4), np.float32)}


def opening(folder: Path, options: EngineOptions = OPTIONS) -> Engine:
    return repository.open_artifact(folder, "", options, lambda percent, message: None).engine


def refusal(folder: Path, options: EngineOptions = OPTIONS) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as refused:
        opening(folder, options)
    return refused.value


# --- which code ---


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("os:system", "not on the operator's list"),
        ("torch_models:Constant", "not on the operator's list"),
        ("Constant", "not on the operator's list"),
        ("torch_models.Constant:__init__", "not on the operator's list"),
    ],
)
def test_code_that_is_not_listed_is_not_even_imported(tmp_path: Path, module: str, why: str) -> None:
    torch_models.write_version(tmp_path, spec(module if ":" in module else f"x:{module}"), None)
    refused = refusal(tmp_path, EngineOptions(torch_modules=("torch_models.sub", "os.path:join")))
    assert (refused.reason, refused.field) == ("MODULE_NOT_REGISTERED", "module")
    assert why in refused.message


def test_an_unlisted_module_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "canary_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch_models.write_version(tmp_path / "1", spec("canary_module:Net"), None)
    assert refusal(tmp_path / "1").reason == "MODULE_NOT_REGISTERED"
    assert not (tmp_path / "ran").exists()
    assert "canary_module" not in sys.modules


def test_a_listed_module_gives_only_modules_of_its_own(tmp_path: Path) -> None:
    """`torch_models` is listed and has imported `torch`, `save_file` and `Path`: none of them was listed."""
    for name in ("torch", "save_file", "Path", "constant", "MODULES", "nothing"):
        torch_models.write_version(tmp_path, spec(f"torch_models:{name}"), None)
        assert refusal(tmp_path).reason == "MODULE_NOT_REGISTERED"


def test_a_listed_factory_and_a_registered_name_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = spec("torch_models:made", module_args={"width": 4})
    torch_models.write_version(tmp_path / "1", said, Mlp([4, 4]))
    opening(tmp_path / "1").run(X, ["y"])
    entry = importlib.metadata.EntryPoint("square", "torch_models:made", torch_engine.GROUP)
    monkeypatch.setattr(torch_engine, "entry_points", lambda group, name: [entry] if name == "square" else [])
    registered = torch_models.spec("torch_models:made", module_args={"width": 4})
    object.__setattr__(registered, "module", "square")
    torch_models.write_version(tmp_path / "2", registered, Mlp([4, 4]))
    opening(tmp_path / "2", EngineOptions()).run(X, ["y"])


@pytest.mark.parametrize("args", [{}, {"sizes": ["a", "b"]}, {"sizes": [4, 4], "depth": 3}])
def test_arguments_that_the_factory_refuses(tmp_path: Path, args: dict[str, Any]) -> None:
    torch_models.write_version(tmp_path, spec("Mlp", module_args=args), None)
    refused = refusal(tmp_path)
    assert (refused.reason, refused.field) == ("INVALID_ARTIFACT", "module_args")


# --- which weights ---


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    said, whole = spec("Mlp", module_args={"sizes": [4, 8, 4]}), Mlp([4, 8, 4]).state_dict()
    cases = (
        ({k: v for k, v in whole.items() if k != "layers.1.bias"}, "has no layers.1.bias"),
        ({**whole, "layers.2.weight": torch.zeros(4, 4)}, "the module does not, layers.2.weight"),
        ({**whole, "layers.0.weight": torch.zeros(8, 5)}, "F32 [8, 5] in model.safetensors and float32 [8, 4]"),
        ({**whole, "layers.0.weight": torch.zeros(8, 4).half()}, "F16 [8, 4] in model.safetensors and float32 [8, 4]"),
        ({}, "has no layers.0.weight, layers.0.bias, layers.1.weight, layers.1.bias"),
    )
    for tensors, text in cases:
        torch_models.write_version(tmp_path, said, None)
        save_file(tensors, tmp_path / "model.safetensors")
        torch_models.artifacts.write_manifest(tmp_path)
        refused = refusal(tmp_path)
        assert refused.reason == "INVALID_ARTIFACT"
        assert text in refused.message


def test_half_precision_weights_make_a_half_precision_module(tmp_path: Path) -> None:
    module = Mlp([4, 4]).to(torch.bfloat16)
    said = spec("Mlp", "x BF16 -1,4", "y BF16 -1,4", module_args={"sizes": [4, 4]})
    torch_models.write_version(tmp_path, said, module)
    ones = np.full((1, 4), 0x3F80, np.uint16)
    (out,) = opening(tmp_path).run({"x": ones}, ["y"])
    wanted = module(torch.ones(1, 4, dtype=torch.bfloat16)).detach().view(torch.uint16).numpy()
    assert out.tolist() == wanted.tolist()


def test_a_tied_weight_may_stand_in_the_file_once(tmp_path: Path) -> None:
    module = torch_models.Tied()
    torch_models.write_version(tmp_path, spec("Tied"), None)
    save_file({"first.weight": module.first.weight.detach()}, tmp_path / "model.safetensors")
    torch_models.artifacts.write_manifest(tmp_path)
    (out,) = opening(tmp_path).run(X, ["y"])
    assert np.allclose(out, module(torch.ones(2, 4)).detach().numpy())


# --- how it runs ---


def test_a_module_that_writes_into_its_input_spoils_nobodys(tmp_path: Path) -> None:
    torch_models.write_version(tmp_path, spec("Spoils"), None)
    inputs = {"x": np.zeros((2, 4), np.float32)}
    for _ in range(2):
        assert opening(tmp_path).run(inputs, ["y"])[0].tolist() == [[1.0] * 4] * 2
    assert not inputs["x"].any()


def test_what_a_module_gives_is_held_to_model_toml(tmp_path: Path) -> None:
    for module, outputs, text in (
        ("Lies", "y FP32 -1,4", "float64 [2, 4] and should be FP32 [-1, 4]"),
        ("Identity", "y FP32 -1,5", "float32 [2, 4] and should be FP32 [-1, 5]"),
        ("Identity", "y FP32 -1,4; z FP32 -1", "'z' is missing"),
    ):
        torch_models.write_version(tmp_path, spec(module, outputs=outputs), None)
        with pytest.raises(Internal) as fault:
            opening(tmp_path).run(X, ["y"])
        assert text in fault.value.message


def test_text_and_devices_that_are_not_here_are_refused(tmp_path: Path) -> None:
    torch_models.write_version(tmp_path, spec("Identity", "x BYTES -1", "y BYTES -1"), None)
    refused = refusal(tmp_path)
    assert (refused.reason, refused.field) == ("INVALID_ARTIFACT", "inputs[0].datatype")
    torch_models.write_version(tmp_path, spec("Identity", engine_options={"device": "cuda:99"}), None)
    refused = refusal(tmp_path)
    assert (refused.reason, refused.field) == ("PROVIDER_UNAVAILABLE", "engine_options.device")


def test_a_compiler_that_fails_leaves_the_plain_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_models.constant(tmp_path, 3.0, engine_options={"compile": "auto"})

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    for outcome, problem in (
        (broken, "no C++ compiler"),
        (lambda module, **_: lambda x: module(x) + 1, "is another one"),
    ):
        monkeypatch.setattr(torch, "compile", outcome)
        engine = opening(tmp_path)
        assert engine.platform == "pytorch_module", problem
        assert engine.run(X, ["y"])[0].tolist() == [[3.0] * 4] * 2


@pytest.mark.slow
def test_a_module_that_gains_is_compiled_and_never_unpickles(tmp_path: Path) -> None:
    """In a process of its own: under the audit hook, and the compiler's settings are of the whole process."""
    module = torch_models.Mlp([4, 4])
    said = spec("Mlp", module_args={"sizes": [4, 4]}, engine_options={"compile": "auto"})
    torch_models.write_version(tmp_path / "1", said, module)
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from interlock_inference import audit; audit.install()
import numpy as np, torch, torch_models
from pathlib import Path
from interlock_inference import repository
from interlock_inference.engines import EngineOptions, torch as engine
engine.COMPILE_GAIN = 0.0
opened = repository.open_artifact(Path({str(tmp_path / "1")!r}), "", EngineOptions(torch_modules=torch_models.MODULES), lambda p, m: None).engine
print(opened.platform)
plain = opened._module
for rows in (1, 2, 5, 64):
    x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
    assert np.allclose(opened.run({{"x": x}}, ["y"])[0], plain(torch.tensor(x)).detach().numpy(), atol=1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if "compile_dropped" in done.stdout:
        pytest.skip(f"this machine can't compile: {done.stdout[-300:]}")
    assert "pytorch_module_compiled" in done.stdout
