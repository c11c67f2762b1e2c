"""Export of a checkpoint to ONNX: a servable artifact folder, compared with torch before anybody may serve it.

The graph is traced once, when the exporter is made: tracing switches torch's process-wide "is compiling" flag, on which optimizers take
another path with other last digits, so it must never run beside a training step (measured; tests/component/test_export.py). A checkpoint
only gets its weights written into the graph's initializers, which is safe beside the training. A graph that has no place for every weight
is traced anew for each export, in the loop's own thread between two steps.

    exports/<checkpoint>/model.toml   inputs, outputs, source (run, checkpoint, step, digest), figures of the comparison, and [batching] where it was
                                      shown that rows run together are answered as rows run alone
    exports/<checkpoint>/model.onnx
    exports/<checkpoint>/manifest.json
"""

from __future__ import annotations

import copy
import shutil
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import structlog
import torch
from onnx import numpy_helper

from interlock.errors import FailedPrecondition, NotFound
from interlock.stores import artifacts, modelspec
from interlock.stores.checkpoints import Loaded
from interlock.stores.modelspec import BatchingSpec, ModelSpec, TensorSpec
from interlock.training.capture import Stateful, as_tensor, random_states, set_random_states
from interlock.training.terms import CheckpointInfo, Result
from interlock.training.tree import unpack

DATATYPES = {
    np.dtype(np.float32): "FP32",
    np.dtype(np.float64): "FP64",
    np.dtype(np.float16): "FP16",
    np.dtype(np.int64): "INT64",
    np.dtype(np.int32): "INT32",
    np.dtype(np.uint8): "UINT8",
    np.dtype(np.bool_): "BOOL",
}
BATCHES = (1, 2, 7)  # the sizes a comparison runs: one, the traced one, one that divides nothing
MAX_ABS_ERROR = 1e-3
ROWS_TOLERANCE = 1e-5  # of the largest element; a replica allows 1e-4 at warm-up, for other rows than these
OPSET = 18

_log = structlog.get_logger(__name__)


class OnnxExporter:
    """Exports one module of one run. `components` says where in a checkpoint the module's weights lie."""

    def __init__(
        self,
        model: str,
        module: torch.nn.Module,
        example: dict[str, torch.Tensor],
        outputs: tuple[str, ...],
        run: str,
        folder: Path,
        components: Mapping[str, Stateful],
    ) -> None:
        self._model = model
        self._component = _owner(module, components)
        self._module = copy.deepcopy(module).cpu().eval()
        self._example = {name: tensor.detach().cpu() for name, tensor in example.items()}
        self._outputs = outputs
        self._run = run
        self._folder = folder
        self._lock = threading.Lock()
        self._graph = self._trace()
        self.in_background = _set_weights(self._graph, self._module)

    def export(self, loaded: Loaded, info: CheckpointInfo) -> Result:
        """Writes `exports/<checkpoint>`, or finds it there.

        Raises:
            FailedPrecondition: `EXPORT_MISMATCH`: ONNX Runtime does not give what torch gives.
        """
        with self._lock:
            target = self._folder / loaded.checkpoint
            if (target / artifacts.MANIFEST_FILE).exists():
                manifest, figures = artifacts.verify(target), modelspec.read_spec(target).export
            else:
                figures = self._write(target, loaded, info)
                manifest = artifacts.read_manifest(target)
        return Result(
            "",
            attempt=info.attempt,
            step=info.step,
            checkpoint=loaded.checkpoint,
            artifact=str(target.resolve()),
            digest=manifest.digest,
            max_abs_error=float(figures["max_abs_error"]),
            max_rel_error=float(figures["max_rel_error"]),
        )

    def _write(self, target: Path, loaded: Loaded, info: CheckpointInfo) -> dict[str, Any]:
        tensors = {name: as_tensor(*raw) for name, raw in loaded.tensors.items()}
        self._module.load_state_dict(unpack(loaded.state["components"][self._component], tensors))
        body, figures = self._checked_graph(loaded.checkpoint)
        part = target.with_name(f".part-{target.name}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        artifacts.write_durably(part / "model.onnx", body)
        modelspec.write_spec(part, self._spec(body, info, figures))
        metadata = {"run": self._run, "checkpoint": loaded.checkpoint, "step": info.step, "metrics": dict(info.metrics)}
        artifacts.write_manifest(part, metadata)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        return figures

    def _checked_graph(self, checkpoint: str) -> tuple[bytes, dict[str, Any]]:
        """The graph with this checkpoint's weights, and how it compares with torch."""
        if not _set_weights(self._graph, self._module):
            self._graph = self._trace()
        body = self._graph.SerializeToString()
        figures = self._compare(body)
        if figures["max_abs_error"] <= MAX_ABS_ERROR:
            return body, figures
        raise FailedPrecondition(
            f"checkpoint {checkpoint}: ONNX Runtime and torch differ by {figures['max_abs_error']:g}, allowed is {MAX_ABS_ERROR:g}",
            reason="EXPORT_MISMATCH",
            metadata={"max_abs_error": str(figures["max_abs_error"])},
        )

    def _trace(self) -> onnx.ModelProto:
        batch, generators = torch.export.Dim("batch", min=1), random_states()
        inputs = {name: _rows(tensor, 2) for name, tensor in self._example.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own exporter's internals
            program = torch.onnx.export(
                self._module,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=list(self._outputs),
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,  # folding would leave no place for a later checkpoint's weights; ONNX Runtime folds when it loads
                verbose=False,
            )
        set_random_states(generators)
        assert program is not None
        proto: onnx.ModelProto = program.model_proto
        return proto

    def _compare(self, body: bytes) -> dict[str, Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(body, options, providers=["CPUExecutionProvider"])
        generator = torch.Generator().manual_seed(0)
        worst_abs, worst_rel = 0.0, 0.0
        for size in BATCHES:
            inputs = {name: _random_like(_rows(tensor, size), generator) for name, tensor in self._example.items()}
            with torch.no_grad():
                wanted = self._module(*inputs.values())
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            given = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
            for want, got in zip(wanted, given, strict=True):
                gap = np.abs(want.numpy().astype(np.float64) - got.astype(np.float64))
                worst_abs = max(worst_abs, float(gap.max(initial=0.0)))
                worst_rel = max(worst_rel, float((gap / (np.abs(want.numpy()) + 1e-6)).max(initial=0.0)))
        return {"max_abs_error": worst_abs, "max_rel_error": worst_rel, "num_samples": sum(BATCHES), "opset": OPSET}

    def _spec(self, body: bytes, info: CheckpointInfo, figures: dict[str, Any]) -> ModelSpec:
        session = onnxruntime.InferenceSession(body, providers=["CPUExecutionProvider"])
        inputs = {name: _rows(tensor, 1) for name, tensor in self._example.items()}
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return ModelSpec(
            name=self._model,
            inputs=tuple(_tensor_spec(name, tensor.numpy()) for name, tensor in inputs.items()),
            outputs=tuple(_tensor_spec(name, array) for name, array in zip(self._outputs, outputs, strict=True)),
            source={
                "run": self._run,
                "checkpoint": info.checkpoint,
                "attempt": info.attempt,
                "step": info.step,
                "digest": info.digest,
            },
            export=figures,
            batching=BatchingSpec() if self._is_by_rows(session) else None,
        )

    def _is_by_rows(self, session: onnxruntime.InferenceSession) -> bool:
        """True when it was shown that each row is answered by itself; else the log says why requests will not run together."""
        generator = torch.Generator().manual_seed(0)
        inputs = {
            name: _random_like(_rows(tensor, max(BATCHES)), generator).numpy() for name, tensor in self._example.items()
        }
        problem = _not_by_rows(session, inputs)
        if problem:
            _log.info("batching_not_shown", model=self._model, problem=problem)
        return not problem


def _not_by_rows(session: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray]) -> str:
    """Why rows may not run together, or that it can't be shown; empty when they may."""
    ends = [*session.get_inputs(), *session.get_outputs()]
    fixed = [node.name for node in ends if not node.shape or isinstance(node.shape[0], int)]
    if fixed:
        return f"the first dimension of {fixed[0]!r} is fixed"
    same = [name for name, array in inputs.items() if array.dtype.kind != "f"]
    if same:
        return f"{same[0]!r} has whole numbers, of which one example is known: its rows are all alike"
    together = session.run(None, inputs)
    num_rows = max(BATCHES)
    apart = [
        session.run(None, {name: array[row : row + 1] for name, array in inputs.items()}) for row in range(num_rows)
    ]
    for index, (node, whole) in enumerate(zip(session.get_outputs(), together, strict=True)):
        alone = np.concatenate([outputs[index] for outputs in apart])
        if whole.dtype.kind != "f":
            return f"output {node.name!r} has whole numbers, which a last digit elsewhere can turn into others"
        if alone.shape != whole.shape:
            return f"output {node.name!r} has shape {list(whole.shape)} for {num_rows} rows"
        gap = np.abs(whole.astype(np.float64) - alone.astype(np.float64)).max(initial=0.0)
        if not gap <= ROWS_TOLERANCE * max(float(np.abs(alone).max(initial=0.0)), 1e-30):
            return f"output {node.name!r} differs by {gap:.3g} when {num_rows} rows run together"
    return ""


def _owner(module: torch.nn.Module, components: Mapping[str, Stateful]) -> str:
    for name, component in components.items():
        if component is module:
            return name
    raise NotFound("serve.module is not one of the run's components", reason="NOT_SERVABLE", field="serve.module")


def _rows(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """The example with `count` rows."""
    return tensor[:1].expand(count, *tensor.shape[1:]).contiguous()


def _random_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return tensor


def _tensor_spec(name: str, array: Any) -> TensorSpec:
    return TensorSpec(name, DATATYPES[array.dtype], (-1, *array.shape[1:]))


def _set_weights(graph: onnx.ModelProto, module: torch.nn.Module) -> bool:
    """Writes the module's weights into the initializers of the same name; False, and nothing written, when one has no place in the graph
    (folded into another): then the graph holds only the checkpoint it was traced from."""
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weights = {name: tensor.detach() for name, tensor in weights.items() if tensor.is_floating_point()}
    places = {item.name: item for item in graph.graph.initializer}
    if any(name not in places or list(places[name].dims) != list(tensor.shape) for name, tensor in weights.items()):
        return False
    for name, tensor in weights.items():
        places[name].CopyFrom(numpy_helper.from_array(tensor.numpy(), name))
    return True
