"""What the routes of swaps and runs share: messages as JSON, server-sent events, the body of a steering verb."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import orjson
from fastapi import Query, Request
from fastapi.responses import StreamingResponse
from google.protobuf.json_format import MessageToDict
from pydantic import BaseModel, ConfigDict, Field

from interlock.errors import InterlockError, InvalidArgument

INT64_MAX = 2**63 - 1
Count = Annotated[int, Query(ge=0, le=INT64_MAX)]
"""A number in a query that goes into an int64 of a message."""


class Steer(BaseModel):
    """Why a swap is steered."""

    model_config = ConfigDict(extra="forbid")

    request_id: str = Field("", max_length=128)
    reason: str = Field("by a person over HTTP", max_length=500)


def plain(message: Any) -> dict[str, Any]:
    """A message as JSON with the field names of the protos, defaults included."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def sse(event: str, document: dict[str, Any], event_id: str = "") -> bytes:
    """One server-sent event."""
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {event}\n".encode() + b"data: " + orjson.dumps(document) + b"\n\n"


def last_event_id(request: Request) -> int | None:
    """Where a client that comes back wants to go on; None when it does not say, or says what no event of ours had as its id.

    Raises:
        InvalidArgument: a number beyond every id.
    """
    text = request.headers.get("last-event-id", "")
    if not (text.isascii() and text.isdigit()):
        return None
    if len(text) > 19 or int(text) > INT64_MAX - 1:
        raise InvalidArgument("Last-Event-ID: is larger than any id", reason="INVALID_REQUEST", field="Last-Event-ID")
    return int(text)


def events(blocks: AsyncIterator[bytes]) -> StreamingResponse:
    """Server-sent events. A room that goes away ends them with an `error` event: the client comes back with its Last-Event-ID."""

    async def guarded() -> AsyncIterator[bytes]:
        try:
            async for block in blocks:
                yield block
        except InterlockError as error:
            yield sse("error", {"reason": error.reason, "detail": error.message})

    return StreamingResponse(guarded(), media_type="text/event-stream")
