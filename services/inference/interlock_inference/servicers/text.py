"""`interlock.api.inference.v1.TextService`: part of the contract; there is no text engine yet, and it says so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from interlock.api.inference.v1 import text_service_pb2 as pb
from interlock.api.inference.v1 import text_service_pb2_grpc as pb_grpc
from interlock.errors import Unimplemented


def _planned() -> Unimplemented:
    return Unimplemented("text engines are planned; tensors are served by inference.GRPCInferenceService/ModelInfer")


class TextServicer(pb_grpc.TextServiceServicer):
    """Refuses with what is planned."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        """Planned."""
        for nothing in list[pb.GenerateResponse]():  # makes it a stream
            yield nothing
        raise _planned()

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        """Planned."""
        raise _planned()
