"""ONNX Runtime behind the `Engine` Protocol: sessions, provider choice, and its errors in our words. Nothing about versions or files' digests.

A wheel built for CUDA lists CUDA as available on a machine without it and falls back to the CPU with a line on standard error, so what
counts is what the finished session reports.
"""

from __future__ import annotations

import ctypes
import functools
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import structlog
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from interlock.errors import FailedPrecondition, InterlockError, Internal, InvalidArgument, NotFound, ResourceExhausted
from interlock.stores.modelspec import ModelSpec, TensorSpec
from interlock_inference.engines import Array, Engine, EngineOptions, Signature

DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16",
    "tensor(string)": "BYTES",
}
_log = structlog.get_logger(__name__)
_ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_CPU = "CPUExecutionProvider"
BEST_FIRST = ("TensorrtExecutionProvider", "CUDAExecutionProvider", _CPU)
_OPTIMIZATION = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "layout": ort.GraphOptimizationLevel.ORT_ENABLE_LAYOUT,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_EXECUTION = {"sequential": ort.ExecutionMode.ORT_SEQUENTIAL, "parallel": ort.ExecutionMode.ORT_PARALLEL}


def check_options(options: EngineOptions) -> EngineOptions:
    """Holds the replica's settings to what this build of the runtime knows. Raises ValueError."""
    known = ort.get_all_providers()
    for name in options.providers:
        if name != "auto" and name not in known:
            raise ValueError(f"providers: {name!r} is not one of auto, {', '.join(known)}")
    if not options.providers:
        raise ValueError("providers: at least one is needed")
    return options


def load(path: Path, spec: ModelSpec | None, options: EngineOptions) -> Engine:
    """Builds a session. Blocks for as long as reading and optimising the graph takes.

    Raises:
        NotFound: `ARTIFACT_MISSING`.
        InvalidArgument: `PATH_OUTSIDE_FOLDER`: tensor data outside the model's folder.
        FailedPrecondition: `INVALID_ARTIFACT`, `PROVIDER_UNAVAILABLE`, `SIGNATURE_MISSING`.
    """
    if not path.is_file():
        raise NotFound(f"{path}: no such model file", reason="ARTIFACT_MISSING", metadata={"path": str(path)})
    own = spec.engine_options if spec is not None else {}
    asked, wanted = _providers(own, options)
    _check_providers(asked, wanted)
    try:
        session = _session(path, own, options, wanted)
        signature = _signature(path, session)
    except InterlockError:
        raise
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base but Exception; all mean that this file can't be served
        raise _load_error(path, error) from None
    _check_providers(asked, session.get_providers())
    return _OnnxEngine(session, signature)


def _session(path: Path, own: Mapping[str, Any], options: EngineOptions, wanted: list[str]) -> ort.InferenceSession:
    """With the best provider that can be started: a library that is missing shows only here. The runtime's own way back is off, it prints."""
    details = [own.get("provider_options", {}).get(name, {}) for name in wanted]
    try:
        return ort.InferenceSession(
            str(path),
            _session_options(own, options),
            providers=wanted,
            provider_options=details,
            enable_fallback=0,
            read_config_from_model=0,
        )
    except Exception as error:
        if len(wanted) < 2:
            raise
        _log.warning("provider_dropped", provider=wanted[0], problem=_clean(error))
        return _session(path, own, options, wanted[1:])


def _providers(own: Mapping[str, Any], options: EngineOptions) -> tuple[list[str], list[str]]:
    """Those asked for by the version, else by the replica, and those of them that this build has."""
    said = own.get("providers", options.providers)
    names = [said] if isinstance(said, str) else list(said)
    asked = list(dict.fromkeys(each for name in names for each in (BEST_FIRST if name == "auto" else (name,))))
    available = ort.get_available_providers()
    return asked, [name for name in asked if name in available]


def _session_options(own: Mapping[str, Any], options: EngineOptions) -> ort.SessionOptions:
    made = ort.SessionOptions()
    made.intra_op_num_threads = options.threads(own.get("intra_op_threads"))
    made.inter_op_num_threads = options.threads(own.get("inter_op_threads", 1))
    made.execution_mode = _EXECUTION[own.get("execution_mode", "sequential")]
    made.graph_optimization_level = _OPTIMIZATION[own.get("graph_optimization", "all")]
    made.enable_cpu_mem_arena = own.get("memory_arena", True)
    made.enable_mem_pattern = own.get("memory_pattern", True)
    made.log_severity_level = 4  # its errors reach us as exceptions; its log would go past ours
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    made.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return made


def _check_providers(asked: Sequence[str], actual: Sequence[str]) -> None:
    """A session falls back to the CPU by itself; where the CPU is not on the list, that is a failure and not a fallback."""
    if set(asked) & set(actual):
        return
    raise FailedPrecondition(
        f"none of the providers {', '.join(asked)} works here, there is {', '.join(actual) or 'none of them'}; install onnxruntime-gpu or add {_CPU}",
        reason="PROVIDER_UNAVAILABLE",
        field="engine_options.providers",
        metadata={"wanted": ",".join(asked), "actual": ",".join(actual)},
    )


def _load_error(path: Path, error: Exception) -> InterlockError:
    text = _clean(error)
    metadata = {"path": str(path), "engine": "onnxruntime"}
    if "xternal data" in text and (
        "escape" in text or "Absolute path" in text or "not in" in text or "outside" in text
    ):
        return InvalidArgument(
            f"{path}: tensor data outside the model's folder: {text}",
            reason="PATH_OUTSIDE_FOLDER",
            field="artifact_uri",
            metadata=metadata,
        )
    return FailedPrecondition(
        f"{path}: not a model that ONNX Runtime can load: {text}",
        reason="INVALID_ARTIFACT",
        field="artifact_uri",
        metadata=metadata,
    )


def _clean(error: Exception) -> str:
    """The runtime's message without its source locations, at most 400 characters."""
    text = str(error).replace("[ONNXRuntimeError] : ", "")
    return " ".join(text.split())[:400]


def _signature(path: Path, session: ort.InferenceSession) -> Signature:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if not inputs or not outputs:
        raise FailedPrecondition(
            f"{path}: the graph has {len(inputs)} inputs and {len(outputs)} outputs; at least one of each is needed",
            reason="SIGNATURE_MISSING",
            metadata={"path": str(path)},
        )
    symbols = {node.name: tuple(dim if isinstance(dim, str) else "" for dim in node.shape) for node in inputs}
    return Signature(tuple(_spec(path, node) for node in inputs), tuple(_spec(path, node) for node in outputs), symbols)


def _spec(path: Path, node: Any) -> TensorSpec:
    if node.type not in DATATYPES:
        raise FailedPrecondition(
            f"{path}: tensor {node.name!r} has type {node.type}, which the Open Inference Protocol can't carry",
            reason="INVALID_ARTIFACT",
            metadata={"path": str(path), "tensor": node.name, "type": node.type},
        )
    return TensorSpec(
        node.name, DATATYPES[node.type], tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
    )


def _faults_in_our_words(run: Callable[..., list[Array]]) -> Callable[..., list[Array]]:
    @functools.wraps(run)
    def wrapped(*args: Any) -> list[Array]:
        try:
            return run(*args)
        except InterlockError:
            raise
        except ort_errors.InvalidArgument as error:
            # names, datatypes and shapes fit: it is what the elements say, e.g. an index beyond the end, or a graph that is wrong
            raise InvalidArgument(
                f"inputs: refused by the model: {_clean(error)}", reason="INPUT_REFUSED", field="inputs"
            ) from None
        except Exception as error:  # noqa: BLE001 - whatever the runtime throws is a fault of this run
            if "allocate memory" in str(error) or "bad_alloc" in str(error):
                raise ResourceExhausted(
                    "there is not enough memory for this request",
                    reason="ENGINE_OUT_OF_MEMORY",
                    metadata={"cause": _clean(error)},
                ) from None
            error_id = uuid.uuid4().hex[:16]
            _log.error("engine_fault", error_id=error_id, problem=_clean(error))
            raise Internal(
                f"the engine failed on this request: error {error_id}",
                reason="ENGINE_FAULT",
                metadata={"error_id": error_id},
            ) from None

    return wrapped


class _OnnxEngine:
    platform = "onnxruntime_onnx"

    def __init__(self, session: ort.InferenceSession, signature: Signature) -> None:
        self._session: ort.InferenceSession | None = session
        self.signature = signature
        self.providers = tuple(session.get_providers())
        self._bytes_inputs = tuple(s.name for s in signature.inputs if s.datatype == "BYTES")
        self._has_text = any(s.datatype == "BYTES" for s in signature.outputs)
        self._bf16 = frozenset(s.name for s in (*signature.inputs, *signature.outputs) if s.datatype == "BF16")

    @_faults_in_our_words
    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        session = self._session
        assert session is not None, "run after close"
        if self._bytes_inputs:
            inputs = {
                name: _to_text(name, array) if name in self._bytes_inputs else array for name, array in inputs.items()
            }
        if self._bf16:
            return self._run_values(session, inputs, outputs)
        # the binding under `session.run`: without its checks of names, which are done, a small call is a fifth faster; binding buffers
        # instead (run_with_iobinding) is slower than either as soon as the caller is to own what comes out
        results = session._sess.run(outputs, inputs, None)
        return [_to_bytes(array) for array in results] if self._has_text else results

    def _run_values(
        self, session: ort.InferenceSession, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> list[Array]:
        """The long way round: numpy has no bfloat16, so these values are made and read as bit patterns."""
        values = {}
        for name, array in inputs.items():
            if name in self._bf16:
                values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                    np.ascontiguousarray(array), _ONNX_BFLOAT16
                )
            else:
                values[name] = ort.OrtValue.ortvalue_from_numpy(array)
        results = session.run_with_ort_values(outputs, values)
        return [
            _bits(value) if name in self._bf16 else value.numpy() for name, value in zip(outputs, results, strict=True)
        ]

    def close(self) -> None:
        self._session = None


def _bits(value: Any) -> Array:
    shape = tuple(value.shape())
    if 0 in shape:
        return np.zeros(shape, np.uint16)
    buffer = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.frombuffer(buffer, np.uint16).reshape(shape).copy()


def _to_text(name: str, array: Array) -> Array:
    """Object array of bytes -> of str, which is what the runtime takes."""
    try:
        flat = [item.decode() for item in array.flat]
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"input {name!r}: BYTES element is not UTF-8: {error}", reason="INVALID_TENSOR", field="inputs"
        ) from None
    made = np.empty(len(flat), dtype=object)
    made[:] = flat
    return made.reshape(array.shape)


def _to_bytes(array: Array) -> Array:
    if array.dtype != object:
        return array
    made = np.empty(array.size, dtype=object)
    made[:] = [item.encode() for item in array.flat]
    return made.reshape(array.shape)
