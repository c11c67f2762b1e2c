"""PyTorch behind the `Engine` Protocol: a module that the operator registered, with weights from a safetensors file. No file names code here.

A version's `model.toml` says `module` and `[module_args]`; what it may say is the operator's list: entry points of the group `interlock.modules`,
and the setting `inference.torch_modules`. Nothing that is not listed is imported, whatever a file says, and no pickle, TorchScript or .pt2 is read.

torch.compile is off unless a version asks for it (`compile = "auto"`): it costs about 16 seconds of a core, needs a C++ compiler, and
pays where many small element-wise steps follow one another. Its caches unpickle, so they are off; it works under the audit hook. What comes out
must agree with the module run plainly and be a tenth faster, else it is dropped. A shape that it has not seen runs plainly and compiles nothing.
Tracing (torch.jit.trace, freeze) gives the same speed in a tenth of the time and is not used: it keeps the branch that the sample took,
for every input that comes after, and no comparison of samples finds that out.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import statistics
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch

from interlock.errors import FailedPrecondition, InterlockError, Internal, InvalidArgument, NotFound
from interlock.stores import weights
from interlock.stores.modelspec import ModelSpec, TensorSpec
from interlock.stores.weights import Weight
from interlock_inference.engines import Array, Engine, EngineOptions, Signature, made_up_inputs

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "FP64": torch.float64,
    "BF16": torch.bfloat16,
}
"""Datatypes that a tensor can have; torch has no BYTES."""

_STORED: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32, "U64": torch.uint64, "I64": torch.int64,
    "F64": torch.float64,
}  # fmt: skip
GROUP = "interlock.modules"
COMPILE_GAIN = 1.1  # what a compiled module must be faster by to be kept
COMPILE_ROWS = (1, 8)
_TIMED_SECONDS = 0.05
_NAMED_MAX = 5  # tensors named in a refusal
_NAME = re.compile(r"[A-Za-z_][\w.-]*(:[A-Za-z_]\w*)?")
_log = structlog.get_logger(__name__)


def load(path: Path, spec: ModelSpec | None, options: EngineOptions) -> Engine:
    """Builds the registered module and reads its weights. Blocks.

    Raises:
        NotFound: `ARTIFACT_MISSING`.
        FailedPrecondition: `INVALID_ARTIFACT`, `MODULE_NOT_REGISTERED`, `PROVIDER_UNAVAILABLE`.
    """
    assert spec is not None, "only a model.toml asks for this engine"
    if not path.is_file():
        raise NotFound(f"{path}: no such model file", reason="ARTIFACT_MISSING", metadata={"path": str(path)})
    _check_datatypes(spec)
    table = weights.read_table(path)
    device = _device(spec, options)
    torch.set_num_threads(options.num_threads)  # of the whole process: torch knows no other
    module = _made(_factory(spec.module, options.torch_modules), spec)
    _fill(path, module, table)
    module = module.to(device).eval().requires_grad_(requires_grad=False)
    engine = _TorchEngine(module, spec, device)
    if spec.engine_options.get("compile", "off") == "auto":
        engine.try_compiled()
    return engine


def _check_datatypes(spec: ModelSpec) -> None:
    for part, specs in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        for index, each in enumerate(specs):
            if each.datatype not in DTYPES:
                raise _invalid(
                    f"{part}[{index}].datatype", f"{each.name!r} is {each.datatype}, which torch has no tensor for"
                )


# --- which code ---


def _factory(name: str, allowed: Sequence[str]) -> Callable[..., Any]:
    """The callable that the operator listed under this name; imports nothing else."""
    if not _NAME.fullmatch(name):
        raise _invalid("module", f"{name[:200]!r} is neither a registered name nor package.module:Factory")
    for entry in entry_points(group=GROUP, name=name):
        found = entry.load()
        return _callable(name, found)
    place, _, attribute = name.partition(":")
    if attribute and name in allowed:
        return _callable(name, getattr(_imported(place), attribute, None))
    if attribute and place in allowed:
        found = getattr(_imported(place), attribute, None)
        # a module's own classes only: it has imported other things, and they were not listed
        if isinstance(found, type) and issubclass(found, torch.nn.Module) and found.__module__ == place:
            return found
        raise _unregistered(name, f"{place} has no torch.nn.Module of its own by that name")
    raise _unregistered(name, "it is not on the operator's list")


def _imported(place: str) -> Any:
    try:
        return importlib.import_module(place)
    except ImportError as error:
        raise _unregistered(f"{place}", f"listed, and can't be imported: {error}") from error


def _callable(name: str, found: Any) -> Callable[..., Any]:
    if not callable(found):
        raise _unregistered(name, "there is nothing to call by that name")
    return found  # type: ignore[no-any-return]


def _unregistered(name: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"model.toml: module: {name!r}: {why}; register it as an entry point of the group {GROUP}, or list it in inference.torch_modules",
        reason="MODULE_NOT_REGISTERED",
        field="module",
        metadata={"module": name[:200]},
    )


def _made(factory: Callable[..., Any], spec: ModelSpec) -> torch.nn.Module:
    try:
        module = factory(**spec.module_args)
    except Exception as error:
        raise _invalid(
            "module_args", f"{spec.module} refused them: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise _unregistered(spec.module, f"it made a {type(module).__name__} and not a torch.nn.Module")
    return module


# --- which weights ---


def _fill(path: Path, module: torch.nn.Module, table: Mapping[str, Weight]) -> None:
    """Reads the file's tensors into the module's, none left over on either side."""
    floats = {_STORED[w.dtype] for w in table.values() if _STORED[w.dtype].is_floating_point}
    if len(floats) == 1:
        module.to(floats.pop())
    wanted = module.state_dict(keep_vars=True)
    shared = {tensor.data_ptr() for name, tensor in wanted.items() if name in table and tensor.numel()}
    missing = [n for n, tensor in wanted.items() if n not in table and tensor.data_ptr() not in shared]
    _check_names(path, "has no", missing)
    _check_names(path, "has, and the module does not,", [name for name in table if name not in wanted])
    with path.open("rb") as file, torch.no_grad():
        for name, weight in table.items():
            _check_like(path, name, weight, wanted[name])
            read = torch.empty(weight.shape, dtype=_STORED[weight.dtype])
            file.seek(weight.begin)
            _read_into(path, file, read)
            wanted[name].copy_(read)


def _read_into(path: Path, file: Any, tensor: torch.Tensor) -> None:
    if not tensor.numel():
        return
    room = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
    while room:
        count = file.readinto(room)
        if not count:
            raise _invalid("file", f"{path} became shorter while it was read")
        room = room[count:]


def _check_names(path: Path, verb: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:_NAMED_MAX]) + (
            f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
        )
        raise _invalid("module", f"{path.name} {verb} {shown}", tensors=",".join(names[:_NAMED_MAX]))


def _check_like(path: Path, name: str, weight: Weight, into: torch.Tensor) -> None:
    if tuple(into.shape) != weight.shape or into.dtype != _STORED[weight.dtype]:
        theirs, ours = (
            f"{weight.dtype} {list(weight.shape)}",
            f"{str(into.dtype).removeprefix('torch.')} {list(into.shape)}",
        )
        raise _invalid("module_args", f"{name} is {theirs} in {path.name} and {ours} in the module", tensors=name)


def _invalid(field: str, problem: str, **metadata: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"model.toml: {field}: {problem}",
        reason="INVALID_ARTIFACT",
        field=field,
        metadata={"engine": "torch", **metadata},
    )


def _device(spec: ModelSpec, options: EngineOptions) -> torch.device:
    """`auto` is CUDA where it works and the replica's providers allow it."""
    asked = spec.engine_options.get("device", "auto")
    allowed = {"auto", "CUDAExecutionProvider", "TensorrtExecutionProvider"} & set(options.providers)
    if asked == "cpu" or (asked == "auto" and not (allowed and torch.cuda.is_available())):
        return torch.device("cpu")
    device = torch.device("cuda" if asked == "auto" else asked)
    if (device.index or 0) >= torch.cuda.device_count():
        raise FailedPrecondition(
            f"model.toml: engine_options.device: {asked!r} is not here; there are {torch.cuda.device_count()} CUDA devices",
            reason="PROVIDER_UNAVAILABLE",
            field="engine_options.device",
            metadata={"wanted": asked},
        )
    return torch.device("cuda", device.index or 0)


# --- running it ---


class _TorchEngine:
    platform = "pytorch_module"

    def __init__(self, module: torch.nn.Module, spec: ModelSpec, device: torch.device) -> None:
        self._run: Callable[..., Any] | None = module
        self._module = module
        self._device = device
        self._names = tuple(each.name for each in spec.inputs)
        self._dtypes = {each.name: DTYPES[each.datatype] for each in spec.inputs}
        self._outputs = spec.outputs
        self.providers: tuple[str, ...] = (str(device),)
        self.signature = Signature(spec.inputs, spec.outputs, {})

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """See `Engine`."""
        call = self._run
        assert call is not None, "run after close"
        try:
            with torch.inference_mode():
                given = self._named(call(*[self._tensor(name, inputs[name]) for name in self._names]))
                return [_array(given[name]) for name in outputs]
        except InterlockError:
            raise
        except IndexError as error:  # what an embedding says to an index beyond its end
            raise InvalidArgument(
                f"inputs: refused by the model: {str(error)[:300]}", reason="INPUT_REFUSED", field="inputs"
            ) from None
        except Exception as error:  # noqa: BLE001 - the module is somebody's code: whatever it throws is a fault of this run
            error_id = uuid.uuid4().hex[:16]
            _log.error("engine_fault", error_id=error_id, problem=f"{type(error).__name__}: {str(error)[:400]}")
            raise Internal(
                f"the engine failed on this request: error {error_id}",
                reason="ENGINE_FAULT",
                metadata={"error_id": error_id},
            ) from None

    def _tensor(self, name: str, array: Array) -> torch.Tensor:
        """A copy: a module may write into its inputs, and the array may be a view on a request's bytes."""
        tensor = torch.from_numpy(np.array(array, order="C"))
        if self._dtypes[name] is torch.bfloat16:
            tensor = tensor.view(torch.bfloat16)
        return tensor.to(self._device) if self._device.type != "cpu" else tensor

    def _named(self, given: Any) -> Mapping[str, torch.Tensor]:
        """What the module gave, by name, held to the signature: nothing else checks what code returns."""
        if isinstance(given, torch.Tensor):
            given = (given,)
        if not isinstance(given, Mapping):
            given = dict(zip((spec.name for spec in self._outputs), given, strict=False))
        for spec in self._outputs:
            problem = _unlike(spec, given.get(spec.name))
            if problem:
                _log.error("engine_fault", problem=problem)
                raise Internal(f"the module did not give what model.toml says: {problem}", reason="ENGINE_FAULT")
        return given  # type: ignore[no-any-return]

    def close(self) -> None:
        """See `Engine`."""
        self._run = None
        self._module = torch.nn.Module()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # --- compiled where it pays ---

    def try_compiled(self) -> None:
        """Compiles the module, and keeps that if its answers agree and it is faster at each of `COMPILE_ROWS`."""
        module, began = self._module, time.perf_counter()
        try:
            with _compiling():
                compiled = torch.compile(module, dynamic=True)
                gains = [self._gain(module, compiled, rows) for rows in COMPILE_ROWS]
        except _NotTheSame as error:
            _log.warning("compile_dropped", reason=str(error))
            return
        except Exception as error:  # noqa: BLE001 - a compiler over somebody's code: whatever goes wrong, the plain module serves
            _log.warning("compile_dropped", reason=f"{type(error).__name__}: {str(error)[:300]}")
            return
        seconds = round(time.perf_counter() - began, 1)
        if min(gains) < COMPILE_GAIN:
            _log.info("compile_dropped", reason="it is not faster", gains=[round(g, 2) for g in gains], seconds=seconds)
            return
        _log.info("compiled", gains=[round(g, 2) for g in gains], seconds=seconds)
        torch.compiler.set_stance("eager_on_recompile")  # of the whole process: no request waits for a compiler
        self._run = compiled
        self.platform = "pytorch_module_compiled"

    def _gain(self, plain: Callable[..., Any], compiled: Callable[..., Any], rows: int) -> float:
        arrays = made_up_inputs(self.signature, rows)
        with (
            torch.inference_mode()
        ):  # tensors too: those made outside are of another kind, and would be compiled for again
            tensors = [self._tensor(name, arrays[name]) for name in self._names]
            expected, given = self._named(plain(*tensors)), self._named(compiled(*tensors))
            for spec in self._outputs:
                if not torch.allclose(
                    given[spec.name].double(), expected[spec.name].double(), rtol=1e-3, atol=1e-4, equal_nan=True
                ):
                    raise _NotTheSame(f"output {spec.name!r} is another one at {rows} rows")
            return statistics.median(_seconds(plain, tensors) / _seconds(compiled, tensors) for _ in range(5))


class _NotTheSame(Exception):
    """The compiled module answers something else."""


def _seconds(call: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> float:
    """Of one call, taken over some."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < _TIMED_SECONDS:
        call(*tensors)
        count += 1
    return (time.perf_counter() - began) / count


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """In this process and this thread alone, and without the caches: both would unpickle."""
    import torch._functorch.config
    import torch._inductor.config

    torch.compiler.set_stance("default")
    with (
        tempfile.TemporaryDirectory(prefix="interlock-compile-") as folder,  # nobody else's files are built upon
        _environment("TORCHINDUCTOR_CACHE_DIR", folder),
        warnings.catch_warnings(),
        torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False, fx_graph_remote_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        warnings.simplefilter("ignore")  # torch warns about its own internals
        yield


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _unlike(spec: TensorSpec, tensor: Any) -> str:
    """How a tensor differs from what is claimed; empty when it does not."""
    if not isinstance(tensor, torch.Tensor):
        return f"output {spec.name!r} is missing"
    shape = tuple(tensor.shape)
    fits = len(shape) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, shape, strict=True)
    )
    if fits and tensor.dtype is DTYPES[spec.datatype]:
        return ""
    return f"output {spec.name!r} is {str(tensor.dtype).removeprefix('torch.')} {list(shape)} and should be {spec.datatype} {list(spec.shape)}"


def _array(tensor: torch.Tensor) -> Array:
    """An array of its own."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()
