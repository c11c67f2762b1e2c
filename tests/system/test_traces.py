"""One trace for the whole story, read back from a real OTLP receiver: who called whom, by the spans' parents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc

import onnx_models
from rooms import running, until

pytestmark = [pytest.mark.system]
TRACE = "0af7651916cd43dd8448eb211c80319c"
ROW = {"model": "policy", "instances": [[0.0, 0.0, 0.0, 0.0]]}


@dataclass(frozen=True)
class Span:
    service: str
    name: str
    trace: str
    span: str
    parent: str


@dataclass
class Receiver(pb_grpc.TraceServiceServicer):
    """Keeps every span that was exported."""

    spans: list[Span] = field(default_factory=list)

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            for scope in resource.scope_spans:
                for s in scope.spans:
                    self.spans.append(Span(service, s.name, s.trace_id.hex(), s.span_id.hex(), s.parent_span_id.hex()))
        return pb.ExportTraceServiceResponse()

    def edges(self, trace: str) -> set[tuple[str, str]]:
        """(parent's service, child's service) of every parent and child in different rooms."""
        by_id = {s.span: s for s in self.spans if s.trace == trace}
        pairs = ((by_id.get(s.parent), s) for s in by_id.values())
        return {(p.service, s.service) for p, s in pairs if p is not None and p.service != s.service}

    def services(self, trace: str) -> set[str]:
        return {s.service for s in self.spans if s.trace == trace}


@contextmanager
def receiver() -> Iterator[tuple[Receiver, str]]:
    server = grpc.server(ThreadPoolExecutor(4))
    servicer = Receiver()
    pb_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield servicer, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def test_a_prediction_and_a_swap_are_each_one_trace(tmp_path: Path) -> None:
    with (
        receiver() as (spans, endpoint),
        running(tmp_path / "home", OTLP_ENDPOINT=endpoint) as rooms,
        rooms.http() as http,
    ):
        path = tmp_path / "model.onnx"
        path.write_bytes(onnx_models.constant(1.0))
        assert http.post("/reload", json={"model": "policy", "model_path": str(path)}).status_code == 200
        receipt = json.loads(
            rooms.cli("swap", "receipt", http.get("/swaps").json()["swaps"][0]["name"], "--json").stdout
        )
        story = receipt["trace_id"]
        assert len(story) == 32
        edge = ("interlock-gateway", "interlock-controller")
        until(lambda: edge in spans.edges(story) and "interlock-inference" in spans.services(story), "the swap's spans")
        assert ("interlock-controller", "interlock-inference") in spans.edges(story)
        names = {s.name for s in spans.spans if s.trace == story}
        assert any("Prepare" in name for name in names) or any("prepare" in name for name in names), names

        answer = http.post("/predict", json=ROW, headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
        assert answer.status_code == 200
        until(lambda: ("interlock-gateway", "interlock-inference") in spans.edges(TRACE), "the prediction's spans")
        root = next(s for s in spans.spans if s.trace == TRACE and s.service == "interlock-gateway")
        assert root.parent == "b7ad6b7169203331"


def test_a_dead_receiver_costs_nothing(tmp_path: Path) -> None:
    with running(tmp_path / "home", OTLP_ENDPOINT="http://127.0.0.1:1") as rooms, rooms.http() as http:
        path = tmp_path / "model.onnx"
        path.write_bytes(onnx_models.constant(1.0))
        assert http.post("/reload", json={"model": "policy", "model_path": str(path)}).status_code == 200
        assert http.post("/predict", json=ROW).status_code == 200
