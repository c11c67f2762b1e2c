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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import structlog
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from interlock.errors import FailedPrecondition, InterlockError, Internal, InvalidArgument, NotFound
from interlock.stores.modelspec import TensorSpec
from interlock_inference.engines import Array, Engine, Signature

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


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How sessions are built.

    Attributes:
        providers: execution providers, best first. Those that this build or machine lacks are passed over; if none is left, the load fails.
        num_threads: intra-op threads of a session. They don't spin: a replica shares its cores with its own event loop.
    """

    providers: tuple[str, ...] = (_CPU,)
    num_threads: int = 1

    def __post_init__(self) -> None:
        known = ort.get_all_providers()
        for name in self.providers:
            if name not in known:
                raise ValueError(f"providers: {name!r} is not one of {', '.join(known)}")
        if not self.providers or self.num_threads < 1:
            raise ValueError("providers and num_threads: at least one of each is needed")


def load(path: Path, options: OnnxOptions) -> Engine:
    """Builds a session. Blocks for as long as reading and optimising the graph takes.

    Raises:
        NotFound: `ARTIFACT_MISSING`.
        InvalidArgument: `PATH_OUTSIDE_FOLDER`: tensor data outside the model's folder.
        FailedPrecondition: `INVALID_ARTIFACT`, `PROVIDER_UNAVAILABLE`, `SIGNATURE_MISSING`.
    """
    if not path.is_file():
        raise NotFound(f"{path}: no such model file", reason="ARTIFACT_MISSING", metadata={"path": str(path)})
    available = ort.get_available_providers()
    wanted = [name for name in options.providers if name in available]
    _check_providers(options.providers, wanted)
    try:
        session = ort.InferenceSession(str(path), _session_options(options), providers=wanted)
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base but Exception; all mean that this file can't be served
        raise _load_error(path, error) from None
    _check_providers(options.providers, session.get_providers())
    return _OnnxEngine(session, _signature(path, session))


def _session_options(options: OnnxOptions) -> ort.SessionOptions:
    made = ort.SessionOptions()
    made.intra_op_num_threads = options.num_threads
    made.inter_op_num_threads = 1
    made.log_severity_level = 4  # its errors reach us as exceptions; its log would go past ours
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return made


def _check_providers(wanted: Sequence[str], actual: Sequence[str]) -> None:
    """A session falls back to the CPU by itself; where the CPU is not on the list, that is a failure and not a fallback."""
    if set(wanted) & set(actual):
        return
    raise FailedPrecondition(
        f"none of the providers {', '.join(wanted)} works here, the session got {', '.join(actual)}; install onnxruntime-gpu or add {_CPU}",
        reason="PROVIDER_UNAVAILABLE",
        metadata={"wanted": ",".join(wanted), "actual": ",".join(actual)},
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
            raise InvalidArgument(
                f"inputs: refused by the model: {_clean(error)}", reason="INVALID_TENSOR", field="inputs"
            ) from None
        except Exception as error:  # noqa: BLE001 - whatever the runtime throws is a fault of this run
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
        return [_to_bytes(array) if array.dtype == object else array for array in session.run(outputs, inputs)]

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
    made = np.empty(array.size, dtype=object)
    made[:] = [item.encode() for item in array.flat]
    return made.reshape(array.shape)
