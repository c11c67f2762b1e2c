"""What the routes of swaps and runs share: messages as JSON, server-sent events, the body of a steering verb."""

from __future__ import annotations

from typing import Any

import orjson
from google.protobuf.json_format import MessageToDict
from pydantic import BaseModel, ConfigDict, Field


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
