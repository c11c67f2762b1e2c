"""The gateway's metrics, under the names of REQUIREMENTS O1."""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BYTES = (100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)

API_REQUESTS = Counter("api_request", "Requests by route template", ("endpoint", "method", "status"))
API_LATENCY = Histogram(
    "api_request_latency_seconds", "Latency by route template", ("endpoint", "method"), buckets=_SECONDS
)
HTTP_REQUESTS = Counter("http_requests", "HTTP requests", ("method", "status"))
HTTP_DURATION = Histogram("http_request_duration_seconds", "HTTP request duration", ("method",), buckets=_SECONDS)
HTTP_REQUEST_BYTES = Histogram("http_request_size_bytes", "HTTP request body size", ("method",), buckets=_BYTES)
HTTP_RESPONSE_BYTES = Histogram("http_response_size_bytes", "HTTP response body size", ("method",), buckets=_BYTES)


@cache  # bounded: route templates x methods x statuses; labels() costs more than what it counts
def _series(endpoint: str, method: str, status: int) -> tuple[tuple[Counter, Counter], tuple[Histogram, ...]]:
    counters = (API_REQUESTS.labels(endpoint, method, str(status)), HTTP_REQUESTS.labels(method, str(status)))
    sizes = (HTTP_REQUEST_BYTES.labels(method), HTTP_RESPONSE_BYTES.labels(method))
    return counters, (API_LATENCY.labels(endpoint, method), HTTP_DURATION.labels(method), *sizes)


def observe(endpoint: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int) -> None:
    """Counts one finished request. `endpoint` is a route template, never a path: paths would be labels without bound."""
    (api_requests, http_requests), (latency, duration, asked, answered) = _series(endpoint, method, status)
    api_requests.inc()
    http_requests.inc()
    latency.observe(seconds)
    duration.observe(seconds)
    asked.observe(request_bytes)
    answered.observe(response_bytes)
