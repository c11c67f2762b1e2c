"""The HTTP port of a gRPC room: `/metrics` for Prometheus and `/health`, `/health/live`, `/health/ready` for probes. Read only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

Body = dict[str, Any]
Probe = Callable[[], tuple[bool, Body]]
"""Says whether the room is ready, and more about it."""


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class's name
        """Logs nothing: probes come every few seconds."""


def _application(probe: Probe, registry: CollectorRegistry) -> Callable[..., Iterable[bytes]]:
    def answer(path: str) -> tuple[str, str, bytes]:
        if path == "/metrics":
            return "200 OK", CONTENT_TYPE_LATEST, generate_latest(registry)
        if path == "/health/live":
            return "200 OK", "application/json", b'{"status":"alive"}'
        if path in {"/health", "/health/ready"}:
            ready, body = probe()
            return ("200 OK" if ready else "503 Service Unavailable"), "application/json", orjson.dumps(body)
        return (
            "404 Not Found",
            "application/json",
            b'{"error":"/metrics, /health, /health/live and /health/ready are served here"}',
        )

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        status, content_type, body = answer(environ["PATH_INFO"])
        start_response(status, [("Content-Type", content_type), ("Content-Length", str(len(body)))])
        return [body]

    return application


@contextmanager
def metrics_server(host: str, port: int, probe: Probe, registry: CollectorRegistry = REGISTRY) -> Iterator[int]:
    """Serves until the block ends, in a thread of its own; yields the port.

    Raises:
        OSError: the address is taken, saying which.
    """
    try:
        server = make_server(host, port, _application(probe, registry), WSGIServer, _Quiet)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} for metrics: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
