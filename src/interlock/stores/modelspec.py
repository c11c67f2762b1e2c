"""`model.toml`: what a servable version is. Reads, checks and writes it; opens nothing that it names.

A file of `name`, `engine` and `file`; `[[inputs]]` and `[[outputs]]` (name, datatype, shape; -1 is free); `[source]` (run, checkpoint, step),
`[export]` (figures), `[[steps]]` (of an ensemble), `[batching]` (whether and how requests may run together), `[engine_options]` (how the engine is to run it),
`[gate]` (what it had to reach to serve).
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import inf, isfinite
from pathlib import Path
from typing import Any

from interlock.core import ensemble
from interlock.core.ensemble import Step
from interlock.core.names import check_id
from interlock.errors import InvalidArgument, NotFound
from interlock.stores import imagespec
from interlock.stores.artifacts import check_relative, write_durably
from interlock.stores.imagespec import PostprocessSpec, PreprocessSpec

SPEC_FILE = "model.toml"
SPEC_BYTES_MAX = 1 << 20
DIM_MAX = 2**31 - 1
ENGINES: Mapping[str, str] = {"onnx": "model.onnx", "torch": "model.safetensors", "ensemble": ""}
"""Engine -> the model file of a version that names none."""
DATATYPES = (
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BF16",
    "BYTES",
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor of a model: an Open Inference Protocol datatype, a shape in which -1 is a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BatchingSpec:
    """The table `[batching]`: its maker says that each row of the first dimension is answered by itself, so that requests may run together.

    Attributes:
        max_rows: of a run. A larger request runs alone.
        preferred_rows: sizes that the engine likes, ascending; the largest that is reached is run, the rest waits for the next run.
        max_delay_ms: how long a request may wait for company while the engine is free.
        max_run_ms: no batch grows beyond what is measured to take longer (nor beyond twice one row's time, if that is more).
        priority_levels: 1 is served first; a request without a level, or with one that there is not, gets `default_priority`.
        queue_limit: requests waiting for this version; 0 leaves it to the replica's limit.
        timeout_ms: the longest wait in the queue, 0 for none; `timeout_action` says whether it is then refused, or served behind the others.
    """

    enabled: bool = True
    max_rows: int = 64
    preferred_rows: tuple[int, ...] = ()
    max_delay_ms: float = 0.0
    max_run_ms: float = 50.0
    priority_levels: int = 1
    default_priority: int = 1
    queue_limit: int = 0
    timeout_ms: float = 0.0
    timeout_action: str = "reject"


@dataclass(frozen=True, slots=True)
class GateSpec:
    """The table `[gate]`: what this version was held to against the one it was made from, and what it reached. One that fell short never serves.

    Attributes:
        metric: what was measured, larger is better, e.g. `top-1 accuracy`.
        baseline: of the version it was made from; `measured`: its own, on the same samples.
        drop_max: by how much `measured` may lie below `baseline`.
        samples: where the samples came from.
    """

    metric: str
    baseline: float
    measured: float
    drop_max: float
    num_samples: int
    samples: str

    @property
    def drop(self) -> float:
        """By how much it is worse than the baseline; negative when it is better."""
        return self.baseline - self.measured

    @property
    def failure(self) -> str:
        """Why it must not serve; empty when the gate was passed."""
        if self.drop <= self.drop_max + 1e-9:
            return ""
        return (
            f"{self.metric} fell from {self.baseline:.4f} to {self.measured:.4f} on {self.num_samples} samples"
            f" ({self.samples}); at most {self.drop_max:g} is allowed"
        )


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What `model.toml` says. `source` and `export` are flat tables of strings and numbers, shown and passed on, not interpreted here.

    Attributes:
        file: the model file, relative to the folder.
        instances: runs of this version at once, on threads of its own; 0 leaves it to the replica's threads, which all versions share.
        steps: for ensembles: which models answer as one, and what goes where; it has no file of its own.
        module: for torch: what makes the module, by a name that the operator registered. `module_args` are its arguments.
        source: where it came from: run, checkpoint, attempt, step, digest.
        export: figures of the export: max_abs_error, max_rel_error, num_samples, opset.
        batching: None where the maker said nothing: each request then runs by itself.
        engine_options: as `ENGINE_OPTIONS` allows for the engine; what is not said is the replica's.
        preprocess, postprocess: how encoded images become its input, and its scores labels; None: they don't.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    engine: str = "onnx"
    file: str = "model.onnx"
    source: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    export: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    batching: BatchingSpec | None = None
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    gate: GateSpec | None = None
    instances: int = 0
    module: str = ""
    module_args: Mapping[str, Any] = field(default_factory=dict)
    preprocess: PreprocessSpec | None = None
    postprocess: PostprocessSpec | None = None
    steps: tuple[Step, ...] = ()

    @property
    def gate_failure(self) -> str:
        """Why its own gate forbids it to serve; empty when there is none, or it was passed."""
        return self.gate.failure if self.gate is not None else ""

    @property
    def step(self) -> int:
        """The training step this came from; 0 when it is not known."""
        return int(self.source.get("step", 0))


def read_spec(folder: Path) -> ModelSpec:
    """Reads `model.toml`.

    Raises:
        NotFound: `MODEL_SPEC_MISSING`.
        InvalidArgument: `MODEL_SPEC_INVALID`, `field` naming the key at fault.
    """
    path = folder / SPEC_FILE
    try:
        if path.stat().st_size > SPEC_BYTES_MAX:
            raise _invalid("", f"{path}: more than {SPEC_BYTES_MAX} bytes")
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise NotFound(
            f"{path}: no {SPEC_FILE}; a version folder needs one",
            reason="MODEL_SPEC_MISSING",
            metadata={"path": str(path)},
        ) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # TOMLDecodeError, UnicodeDecodeError, a number of more digits than Python reads
        raise _invalid("", f"{path}: not TOML: {str(error)[:300]}") from None
    return parse_spec(table)


def parse_spec(table: Mapping[str, Any]) -> ModelSpec:
    """`ModelSpec` from a parsed `model.toml`; unknown keys are refused."""
    unknown = sorted(set(table) - {f.name for f in fields(ModelSpec)})
    if unknown:
        raise _invalid(unknown[0], f"model.toml: unknown key {unknown[0]!r}")
    name, engine = table.get("name"), table.get("engine", "onnx")
    if not isinstance(name, str) or not name:
        raise _invalid("name", "model.toml: name: a string is needed")
    if engine not in ENGINES:
        raise _invalid("engine", f"model.toml: engine: {engine!r} is not one of {', '.join(ENGINES)}")
    file, module = table.get("file", ENGINES[engine]), table.get("module", "")
    if not isinstance(file, str):
        raise _invalid("file", "model.toml: file: a string is needed")
    if engine != "ensemble":
        check_relative(file, Path(SPEC_FILE))
    elif file or "batching" in table or "instances" in table:
        raise _invalid(
            "engine", "model.toml: engine: an ensemble has no file, batching or instances of its own; its members have"
        )
    if not isinstance(module, str) or bool(module) != (engine == "torch"):
        raise _invalid(
            "module",
            "model.toml: module: engine torch needs the registered name of its module, and no other engine takes one",
        )
    return ModelSpec(
        name=name,
        engine=engine,
        file=file,
        inputs=_parse_tensors(table, "inputs"),
        outputs=_parse_tensors(table, "outputs"),
        source=_parse_flat(table, "source"),
        export=_parse_flat(table, "export"),
        batching=_parse_batching(table["batching"]) if "batching" in table else None,
        gate=_parse_gate(table["gate"]) if "gate" in table else None,
        engine_options=_parse_table(table.get("engine_options", {}), "engine_options", ENGINE_OPTIONS[engine]),
        instances=_parse_instances(table.get("instances", 0)),
        steps=_parse_steps(table, engine),
        module=module,
        module_args=_parse_arguments(table.get("module_args", {})),
        preprocess=imagespec.preprocess(_parse_table(table["preprocess"], "preprocess", imagespec.PREPROCESS))
        if "preprocess" in table
        else None,
        postprocess=imagespec.postprocess(_parse_table(table["postprocess"], "postprocess", imagespec.POSTPROCESS))
        if "postprocess" in table
        else None,
    )


_Check = tuple[Callable[[Any], bool], str]
"""Whether a value fits, and what would."""


def _whole(low: int, high: int) -> _Check:
    return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"


def _milliseconds(low: float, high: float) -> _Check:
    return lambda value: type(value) in (int, float) and low <= value <= high, f"milliseconds from {low:g} to {high:g}"


def _one_of(*words: str) -> _Check:
    return lambda value: value in words, f"one of {', '.join(words)}"


_SWITCH: _Check = (lambda value: type(value) is bool, "true or false")

_BATCHING: Mapping[str, _Check] = {
    "enabled": _SWITCH,
    "max_rows": _whole(1, 65_536),
    "preferred_rows": (
        lambda value: (
            isinstance(value, list | tuple)
            and all(type(rows) is int and rows >= 1 for rows in value)
            and list(value) == sorted(set(value))
        ),
        "a list of ascending whole numbers from 1 up",
    ),
    "max_delay_ms": _milliseconds(0, 1000),
    "max_run_ms": _milliseconds(0.001, 60_000),
    "priority_levels": _whole(1, 16),
    "default_priority": _whole(1, 16),
    "queue_limit": _whole(0, 65_536),
    "timeout_ms": _milliseconds(0, 60_000),
    "timeout_action": _one_of("reject", "continue"),
}

PROVIDER_OPTIONS: Mapping[str, frozenset[str]] = {
    "CUDAExecutionProvider": frozenset(
        {
            "device_id",
            "gpu_mem_limit",
            "arena_extend_strategy",
            "cudnn_conv_algo_search",
            "cudnn_conv_use_max_workspace",
            "do_copy_in_default_stream",
            "use_tf32",
            "prefer_nhwc",
            "enable_cuda_graph",
        }
    ),
    "TensorrtExecutionProvider": frozenset(
        {
            "device_id",
            "trt_max_workspace_size",
            "trt_max_partition_iterations",
            "trt_min_subgraph_size",
            "trt_fp16_enable",
            "trt_bf16_enable",
            "trt_int8_enable",
            "trt_builder_optimization_level",
            "trt_cuda_graph_enable",
        }
    ),
}
"""What a version may say to an execution provider. None of these names a file: an option that does could have a library loaded, or a path written."""

ENGINE_OPTIONS: Mapping[str, Mapping[str, _Check]] = {
    "onnx": {
        "providers": (
            lambda value: value == "auto" or (_is_list(value, str) and len(value) > 0),
            '"auto" or a list of execution providers, best first',
        ),
        "intra_op_threads": _whole(1, 256),
        "inter_op_threads": _whole(1, 256),
        "execution_mode": _one_of("sequential", "parallel"),
        "graph_optimization": _one_of("disabled", "basic", "extended", "layout", "all"),
        "memory_arena": _SWITCH,
        "memory_pattern": _SWITCH,
        "provider_options": (
            lambda value: isinstance(value, dict) and all(map(_is_provider_table, value.items())),
            "a table of providers, each a table of "
            + "; ".join(f"{k}: {', '.join(sorted(v))}" for k, v in PROVIDER_OPTIONS.items()),
        ),
    },
    "torch": {
        "device": (
            lambda value: isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value) is not None,
            "auto, cpu, cuda or cuda:<number>",
        ),
        "compile": _one_of("off", "auto"),
    },
    "ensemble": {},
}
"""Engine -> the keys of its `[engine_options]`."""


def _parse_steps(table: Mapping[str, Any], engine: str) -> tuple[Step, ...]:
    rows = table.get("steps", [])
    if not isinstance(rows, list) or bool(rows) != (engine == "ensemble"):
        raise _invalid("steps", "model.toml: steps: an ensemble needs [[steps]], and no other engine takes them")
    steps = tuple(_parse_step(row, f"steps[{number}]") for number, row in enumerate(rows))
    if steps:
        inputs, outputs = ([row["name"] for row in table[key]] for key in ("inputs", "outputs"))
        ensemble.levels(inputs, outputs, steps)
        for number, step in enumerate(steps):
            if step.model == table["name"]:
                raise _invalid(
                    f"steps[{number}].model",
                    f"model.toml: steps[{number}].model: {step.model!r} is the ensemble itself",
                )
    return steps


def _parse_step(row: Any, where: str) -> Step:
    if not isinstance(row, dict) or not {"model", "inputs", "outputs"} <= row.keys() <= {
        "model",
        "version",
        "inputs",
        "outputs",
    }:
        raise _invalid(where, f"model.toml: {where}: model, inputs and outputs are needed, and version may be said")
    model, version = row["model"], row.get("version", ensemble.SERVING)
    for key, value in (("model", model), ("version", version)):
        if not isinstance(value, str):
            raise _invalid(f"{where}.{key}", f"model.toml: {where}.{key}: a name is needed")
        check_id(value, f"{where}.{key}")
    for key in ("inputs", "outputs"):
        if not isinstance(row[key], dict) or not all(
            isinstance(tensor, str) and tensor for tensor in row[key].values()
        ):
            raise _invalid(
                f"{where}.{key}",
                f"model.toml: {where}.{key}: a table of the model's tensors, each with its name in the ensemble, is needed",
            )
    return Step(model, row["inputs"], row["outputs"], version)


def _parse_instances(value: Any) -> int:
    fits, wanted = _whole(0, 256)
    if not fits(value):
        raise _invalid("instances", f"model.toml: instances: {value!r} is not {wanted}")
    return int(value)


def _parse_arguments(table: Any) -> dict[str, Any]:
    """Numbers, strings, booleans, and lists of them: what a factory is called with."""
    fits = (str, int, float, bool)
    if not isinstance(table, dict):
        raise _invalid("module_args", "model.toml: module_args: a table is needed")
    for key, value in table.items():
        if not isinstance(value, fits) and not (
            isinstance(value, list) and all(isinstance(item, fits) for item in value)
        ):
            raise _invalid(
                f"module_args.{key}",
                f"model.toml: module_args.{key}: {value!r} is not a number, string, boolean or a list of them",
            )
    return table


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is kind for item in value)


def _is_provider_table(item: tuple[str, Any]) -> bool:
    provider, options = item
    return (
        isinstance(options, dict)
        and options.keys() <= PROVIDER_OPTIONS.get(provider, frozenset())
        and all(isinstance(value, str | int | float | bool) for value in options.values())
    )


def _parse_table(table: Any, name: str, checks: Mapping[str, _Check]) -> dict[str, Any]:
    """The table as it stands, every key known and every value as its check wants it."""
    if not isinstance(table, dict):
        raise _invalid(name, f"model.toml: {name}: a table is needed")
    for key, value in table.items():
        if key not in checks:
            raise _invalid(f"{name}.{key}", f"model.toml: {name}: unknown key {key!r}; known: {', '.join(checks)}")
        fits, wanted = checks[key]
        if not fits(value):
            raise _invalid(f"{name}.{key}", f"model.toml: {name}.{key}: {value!r} is not {wanted}")
    return table


def _parse_batching(table: Any) -> BatchingSpec:
    table = _parse_table(table, "batching", _BATCHING)
    made = BatchingSpec(**{**table, "preferred_rows": tuple(table.get("preferred_rows", ()))})
    if made.preferred_rows and made.preferred_rows[-1] > made.max_rows:
        raise _invalid(
            "batching.preferred_rows",
            f"model.toml: batching.preferred_rows: {made.preferred_rows[-1]} is above max_rows, {made.max_rows}",
        )
    if made.default_priority > made.priority_levels:
        raise _invalid(
            "batching.default_priority",
            f"model.toml: batching.default_priority: {made.default_priority} is above priority_levels, {made.priority_levels}",
        )
    return made


_GATE: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "metric": (lambda value: isinstance(value, str) and bool(value), "a name"),
    "baseline": (lambda value: type(value) in (int, float) and isfinite(value), "a finite number"),
    "measured": (lambda value: type(value) in (int, float) and isfinite(value), "a finite number"),
    "drop_max": (lambda value: type(value) in (int, float) and 0 <= value < inf, "a finite number from 0 up"),
    "num_samples": _whole(1, 2**31),
    "samples": (lambda value: isinstance(value, str), "a string"),
}


def _parse_gate(table: Any) -> GateSpec:
    if not isinstance(table, dict) or set(table) != set(_GATE):
        raise _invalid("gate", f"model.toml: gate: exactly {', '.join(_GATE)} are needed")
    return GateSpec(**_parse_table(table, "gate", _GATE))


def _parse_tensors(table: Mapping[str, Any], key: str) -> tuple[TensorSpec, ...]:
    rows = table.get(key)
    if not isinstance(rows, list) or not rows:
        raise _invalid(key, f"model.toml: {key}: at least one [[{key}]] with name, datatype and shape is needed")
    tensors = tuple(_parse_tensor(row, f"{key}[{index}]") for index, row in enumerate(rows))
    names = [tensor.name for tensor in tensors]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise _invalid(f"{key}[{index}].name", f"model.toml: {key}[{index}].name: {name!r} stands there twice")
    return tensors


def _parse_tensor(row: Any, where: str) -> TensorSpec:
    if not isinstance(row, dict) or set(row) != {"name", "datatype", "shape"}:
        raise _invalid(where, f"model.toml: {where}: exactly name, datatype and shape are needed")
    if row["datatype"] not in DATATYPES:
        raise _invalid(
            f"{where}.datatype",
            f"model.toml: {where}.datatype: {row['datatype']!r} is not one of {', '.join(DATATYPES)}",
        )
    shape = row["shape"]
    if not isinstance(shape, list) or not all(type(dim) is int and -1 <= dim <= DIM_MAX for dim in shape):
        raise _invalid(
            f"{where}.shape",
            f"model.toml: {where}.shape: {str(shape)[:200]} is not a list of whole numbers from -1 to {DIM_MAX}",
        )
    if not isinstance(row["name"], str) or not row["name"]:
        raise _invalid(f"{where}.name", f"model.toml: {where}.name: a name is needed")
    return TensorSpec(row["name"], row["datatype"], tuple(shape))


def _parse_flat(table: Mapping[str, Any], key: str) -> dict[str, str | int | float | bool]:
    value = table.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(item, str | int | float | bool) for item in value.values()):
        raise _invalid(key, f"model.toml: {key}: a table of strings, numbers and booleans is needed")
    return value


def write_spec(folder: Path, spec: ModelSpec) -> None:
    """Writes `model.toml`, durably. `read_spec` gives back an equal `ModelSpec`."""
    lines = [
        f"{key} = {_toml(getattr(spec, key))}"
        for key in ("name", "engine", "file", "module", "instances")
        if getattr(spec, key)
    ]
    for key, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        for tensor in tensors:
            lines += [
                "",
                f"[[{key}]]",
                f"name = {_toml(tensor.name)}",
                f"datatype = {_toml(tensor.datatype)}",
                f"shape = {list(tensor.shape)}",
            ]
    for step in spec.steps:
        parts = (("model", step.model), ("version", step.version), ("inputs", step.inputs), ("outputs", step.outputs))
        lines += ["", "[[steps]]", *(f"{key} = {_toml(value)}" for key, value in parts)]
    for key, table in (("source", spec.source), ("export", spec.export), ("module_args", spec.module_args)):
        if table:
            lines += ["", f"[{key}]", *(f"{_toml(str(k))} = {_toml(v)}" for k, v in table.items())]
    if spec.batching is not None:
        pairs = [(f.name, getattr(spec.batching, f.name)) for f in fields(spec.batching)]
        lines += ["", "[batching]", *(f"{k} = {_toml(v)}" for k, v in pairs)]
    for key, part in (("preprocess", spec.preprocess), ("postprocess", spec.postprocess)):
        if part is not None:
            lines += ["", f"[{key}]", *(f"{f.name} = {_toml(getattr(part, f.name))}" for f in fields(part))]
    if spec.engine_options:
        lines += ["", *engine_options_toml(spec.engine_options)]
    if spec.gate is not None:
        lines += ["", "[gate]", *(f"{f.name} = {_toml(getattr(spec.gate, f.name))}" for f in fields(spec.gate))]
    write_durably(folder / SPEC_FILE, ("\n".join(lines) + "\n").encode())


def engine_options_toml(options: Mapping[str, Any]) -> list[str]:
    """The lines of the table `[engine_options]`."""
    return ["[engine_options]", *(f"{key} = {_toml(value)}" for key, value in options.items())]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=True)


def _invalid(key: str, message: str) -> InvalidArgument:
    return InvalidArgument(message, reason="MODEL_SPEC_INVALID", field=key)
