"""A prediction between a face and whoever answers it: neither HTTP nor protobuf. Elements travel as arrays or as raw wire bytes, and are not copied here."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from interlock.runtime.arrays import NUMPY_TYPES, Array, decode_raw, encode_raw

Buffer = bytes | memoryview
VERSION, STEP, DIGEST, EPOCH, MEMBERS, TRACE = (
    "interlock-version",
    "interlock-step",
    "interlock-digest",
    "interlock-epoch",
    "interlock-members",
    "traceparent",
)
"""Response parameters that say which weights answered, and in which trace."""
STATUS = "interlock-status"
"""Metadata that asks a stream to say errors whole; the parameter of a failed response that then carries its google.rpc.Status, as base64."""


@dataclass(slots=True)
class Tensor:
    """One input or output. `data` is an array of the datatype's own type, or its elements as they are on the wire."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: Array | Buffer

    def raw(self) -> Buffer:
        """Row-major little-endian bytes; a view where the array allows one."""
        data = self.data
        if not isinstance(data, np.ndarray):
            return data
        if self.datatype == "BYTES" or data.size == 0:
            return encode_raw(data, self.datatype)
        return np.ascontiguousarray(data, NUMPY_TYPES[self.datatype]).data.cast("B")

    def array(self) -> Array:
        """The elements; a view on the wire bytes where the type allows one."""
        data = self.data
        if isinstance(data, np.ndarray):
            return data
        return decode_raw(data, self.datatype, self.shape)


@dataclass(slots=True)
class InferRequest:
    """What is asked. `parameters` are the protocol's own: `priority`, `timeout` (microseconds), or anything, passed on."""

    model: str
    version: str
    request_id: str
    inputs: list[Tensor]
    outputs: Sequence[str] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class InferAnswer:
    """What was answered, and by whom: see `VERSION` and its neighbours."""

    model: str
    version: str
    request_id: str
    outputs: list[Tensor]
    parameters: Mapping[str, Any]


class Answerer(Protocol):
    """Whoever answers predictions for a face: a data plane in the same process, or a replica at the end of a wire."""

    def begin(
        self, request: InferRequest, timeout: float, traceparent: str
    ) -> InferAnswer | Coroutine[Any, Any, InferAnswer]:
        """Answers at once if it can, else returns what to await, which must be started. Raises InterlockError."""
        ...
