"""Export: the artifact gives what torch gives, for the first checkpoint and, with the graph kept, for every later one."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto

import onnx_models
from interlock.core.retention import Better
from interlock.errors import DataLoss
from interlock.stores import artifacts, modelspec
from interlock.training import Batches, ServeSpec, attach
from interlock.training.export import OnnxExporter, _not_by_rows
from interlock.training.run import Run, _info_of
from interlock.training.terms import ExportOrder


class Net(torch.nn.Module):
    """Two outputs; with `norm` a batch norm, which torch's exporter would fold into the layer before it if it were allowed to."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        between = torch.nn.BatchNorm1d(8) if norm else torch.nn.LayerNorm(8)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 8), between, torch.nn.Tanh())
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x_BF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: N803
        logits_BA = self.head(self.body(x_BF))
        return logits_BA, logits_BA.argmax(-1)


def trained(tmp_path: Path, norm: bool) -> tuple[Run, list[str]]:
    torch.manual_seed(0)
    model = Net(norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x_NF = torch.randn(64, 4)
    serve = ServeSpec("policy", {"obs": torch.zeros(1, 4)}, ("logits", "action"), metric="loss", better=Better.LOWER)
    run = attach(
        "r",
        model=model,
        optimizer=optimizer,
        data=Batches(x_NF, batch_size=16),
        save_every=10,
        serve=serve,
        home=tmp_path,
        trainer=None,
        synchronous=True,
    )
    for (x_BF,) in run.steps(until=20):
        loss = model(x_BF)[0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
    return run, run._parts.store.ids()


@pytest.mark.parametrize("norm", [False, True], ids=["layer norm", "batch norm"])
def test_artifacts_of_two_checkpoints_answer_as_torch_does(
    tmp_path: Path, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = []
    trace = OnnxExporter._trace
    monkeypatch.setattr(OnnxExporter, "_trace", lambda self: traces.append(1) or trace(self))
    run, ids = trained(tmp_path, norm)
    exporter = run._parts.exporter
    assert isinstance(exporter, OnnxExporter)
    answers = []
    for checkpoint in ids[-2:]:
        loaded = run._parts.store.load(checkpoint)
        result = exporter.export(loaded, _info_of(loaded))
        assert result.max_abs_error < 1e-5
        folder = Path(result.artifact)
        assert artifacts.verify(folder).digest == result.digest
        spec = modelspec.read_spec(folder)
        assert [(t.name, t.datatype, t.shape) for t in (*spec.inputs, *spec.outputs)] == [
            ("obs", "FP32", (-1, 4)),
            ("logits", "FP32", (-1, 3)),
            ("action", "INT64", (-1,)),
        ]
        assert spec.batching is None, "an argmax may fall to another class by a last digit"
        assert (spec.source["checkpoint"], spec.step) == (checkpoint, _info_of(loaded).step)
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        answers.append(session.run(["logits"], {"obs": np.ones((3, 4), np.float32)})[0])
        assert exporter.export(loaded, _info_of(loaded)) == result
    assert len(traces) == 1
    assert np.abs(answers[0] - answers[1]).max() > 1e-3, "each checkpoint has its own weights"
    graph = Path(run._parts.store.root.parent / "exports" / ids[-1] / "model.onnx")
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(DataLoss):
        exporter.export(run._parts.store.load(ids[-1]), _info_of(run._parts.store.load(ids[-1])))
    run.close()


@pytest.mark.parametrize(
    ("body", "datatype", "why"),
    [
        (onnx_models.mlp((4, 8, 4)), np.float32, ""),
        (onnx_models.softmax_over_rows(), np.float32, "output 'y' differs by"),
        (onnx_models.identity(TensorProto.FLOAT, [7, 4]), np.float32, "the first dimension of 'x' is fixed"),
        (onnx_models.identity(TensorProto.INT64, ["n", 4]), np.int64, "'x' has whole numbers"),
    ],
)
def test_batching_is_written_only_where_it_was_shown(body: bytes, datatype: type, why: str) -> None:
    session = onnxruntime.InferenceSession(body, providers=["CPUExecutionProvider"])
    inputs = {"x": np.random.default_rng(0).standard_normal((7, 4)).astype(datatype)}
    assert _not_by_rows(session, inputs).startswith(why)
    assert bool(_not_by_rows(session, inputs)) == bool(why)


def losses(tmp_path: Path, name: str, exporting: bool) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    serve = ServeSpec("m", {"x": torch.zeros(1, 4)}, metric="loss") if exporting else None
    data = Batches(torch.randn(64, 4), batch_size=16)
    run = attach(
        name, model=model, optimizer=optimizer, data=data, save_every=5, serve=serve, home=tmp_path, trainer=None
    )
    found = []
    for (x_BF,) in run.steps(until=400):
        loss = model(x_BF).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
        if exporting and run.step == 100:
            run.wait_saved()
            run._carry_out(ExportOrder("now", run._parts.store.ids()[-1]))
        if exporting and run.step in (20, 150, 300):
            threading.Event().wait(1.0)  # the exporter's thread works meanwhile
    run.close()
    return found


def test_an_export_does_not_touch_the_training(tmp_path: Path) -> None:
    """Tracing and comparing in a thread draw nothing from the global generators."""
    assert losses(tmp_path, "with", True) == losses(tmp_path, "without", False)
    exports = list((tmp_path / "runs/with/exports").iterdir())
    assert exports
    assert all(modelspec.read_spec(folder).batching == modelspec.BatchingSpec() for folder in exports)
