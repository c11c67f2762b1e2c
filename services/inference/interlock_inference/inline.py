"""The inline form: a replica inside the gateway's process, asked without a wire. The gateway finds `replica` by name; neither room imports the other.

What it gives is what the gateway otherwise has of a replica at the end of a channel: someone who answers predictions, and the stubs of its
two services. A gRPC listener beside it is optional.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
from prometheus_client import CollectorRegistry

from interlock.errors import DeadlineExceeded
from interlock.runtime.access import Keys
from interlock.runtime.images import IMAGE
from interlock.runtime.infer import MEMBERS, InferAnswer, InferRequest, Tensor
from interlock.runtime.settings import Settings
from interlock_inference import audit, tensors
from interlock_inference.dataplane import DataPlane, Reply
from interlock_inference.engines import Array
from interlock_inference.listener import listening
from interlock_inference.parts import assembled
from interlock_inference.servicers.codec import identity, member_names, whole_priority, with_images
from interlock_inference.slots import Slot
from interlock_inference.tensors import Described

_log = structlog.get_logger(__name__)


class _Call:
    """A request as the data plane takes it."""

    __slots__ = ("_request", "deadline", "has_images", "model", "outputs", "priority", "request_id", "version")

    def __init__(self, request: InferRequest, deadline: float) -> None:
        self._request = request
        self.model = request.model
        self.version = request.version
        self.request_id = request.request_id
        self.outputs: Sequence[str] = request.outputs
        self.has_images = False
        for tensor in request.inputs:
            if tensor.name == IMAGE and tensor.datatype == "BYTES":
                self.has_images = True
        self.deadline: float | None = deadline
        self.priority = whole_priority(request.parameters["priority"]) if "priority" in request.parameters else 0

    def decode(self, slot: Slot) -> dict[str, Array]:
        """The inputs by name, checked against the slot's signature; views on the request's bytes where they came raw."""
        inputs = self._request.inputs
        described = tuple([Described(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in inputs])
        if self.has_images:
            given = {tensor.name: self._array(described[index], index) for index, tensor in enumerate(inputs)}
            return with_images(slot, described, given)
        slot.check(described)
        return {tensor.name: self._array(described[index], index) for index, tensor in enumerate(inputs)}

    def _array(self, described: Described, index: int) -> Array:
        data = self._request.inputs[index].data
        return data if isinstance(data, np.ndarray) else tensors.decode_raw(described, data, index)


class Near:
    """Answers predictions by the data plane of this process; see `interlock.runtime.infer.Answerer`."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._identities: dict[tuple[Slot, int], dict[str, str | int]] = {}

    def begin(
        self, request: InferRequest, timeout: float, traceparent: str
    ) -> InferAnswer | Coroutine[Any, Any, InferAnswer]:
        """Answers at once when the run is short."""
        asked = request.parameters.get("timeout", 0)
        if isinstance(asked, int) and asked > 0:
            timeout = min(timeout, asked / 1e6)
        begun = self._plane.begin(_Call(request, time.monotonic() + timeout))
        return self._answer(request, begun) if isinstance(begun, Reply) else self._later(request, begun)

    async def _later(self, request: InferRequest, begun: Coroutine[Any, Any, Reply]) -> InferAnswer:
        return self._answer(request, await begun)

    def _answer(self, request: InferRequest, reply: Reply) -> InferAnswer:
        slot = reply.slot
        key = (slot, reply.epoch)
        known = self._identities.get(key)
        if known is None:
            if len(self._identities) > 64:
                self._identities.clear()
            known = self._identities[key] = identity(slot, reply.epoch)
        if reply.members:
            known = {**known, MEMBERS: member_names(reply)}
        specs = slot.output_specs
        outputs = [
            Tensor(name, specs[name].datatype, array.shape, array)
            for name, array in zip(reply.names, reply.outputs, strict=True)
        ]
        return InferAnswer(slot.model, slot.version, request.request_id, outputs, known)


@dataclass(frozen=True, slots=True)
class _Context:
    """What a servicer asks of a call's context, when there is no call."""

    timeout: float | None
    metadata: Sequence[tuple[str, str]]

    def time_remaining(self) -> float | None:
        """Of the caller's timeout, which has only just begun."""
        return self.timeout

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """What a stub's caller sent along."""
        return self.metadata


class _Stub:
    """A servicer's unary methods as a stub's."""

    def __init__(self, servicer: Any) -> None:
        self._servicer = servicer

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._servicer, name)

        async def call(request: Any, *, timeout: float | None = None, metadata: Sequence[tuple[str, str]] = ()) -> Any:
            try:
                async with asyncio.timeout(timeout):
                    return await method(request, _Context(timeout, metadata))
            except TimeoutError:
                raise DeadlineExceeded(f"{name} did not finish in time") from None

        return call


@dataclass(frozen=True, slots=True)
class Inline:
    """A replica of this process, as the gateway uses it. `alone`: no controller decides what it serves."""

    answerer: Near
    inference: _Stub
    runtime: _Stub
    metrics: CollectorRegistry
    alone: bool


def lock() -> None:
    """The serving process never unpickles; for the process's life."""
    audit.install()


@asynccontextmanager
async def replica(config: Settings, keys: Keys, stopping: asyncio.Event) -> AsyncIterator[Inline]:
    """A replica until the block ends, by which time `stopping` must be set and the gateway's requests be answered.

    Raises:
        ValueError: nothing could ever tell it what to serve.
    """
    own = config.inference
    if not own.standalone and not own.listen:
        raise ValueError(
            "the inline form without a gRPC listener (inference.listen) needs inference.repository or inference.models"
        )
    async with assembled(config, keys, stopping) as parts, asyncio.TaskGroup() as tasks:
        if own.listen:
            room = await tasks.create_task(_listen(config, keys, stopping, parts, tasks))
            _log.info("listening", address=f"{config.host}:{room}", protocol="grpc")
        starting = tasks.create_task(parts.start())
        yield Inline(Near(parts.plane), _Stub(parts.oip), _Stub(parts.commands), parts.metrics, own.standalone)
        starting.cancel()


async def _listen(config: Settings, keys: Keys, stopping: asyncio.Event, parts: Any, tasks: asyncio.TaskGroup) -> int:
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        async with listening(config, parts, keys, stopping) as room:
            started.set_result(room.port)
            await room.run(
                probe_interval_seconds=config.probe_interval_seconds, drain_seconds=config.inference.drain_seconds
            )

    tasks.create_task(run())
    return await started
