"""The gateway's metrics, under the names of REQUIREMENTS O1. Each request is counted once, by route template and method; the rest is summed when scraped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from interlock.runtime.tally import Distribution

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BYTES = (100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)


class _Series:
    """The requests of one route template and method."""

    __slots__ = ("answered", "asked", "seconds", "statuses")

    def __init__(self) -> None:
        self.statuses: defaultdict[int, int] = defaultdict(int)
        self.seconds = Distribution(_SECONDS)
        self.asked = Distribution(_BYTES)
        self.answered = Distribution(_BYTES)


class _Requests(Collector):
    def __init__(self) -> None:
        self.series: defaultdict[tuple[str, str], _Series] = defaultdict(_Series)

    def collect(self) -> Iterator[Metric]:
        """The families of now."""
        seen = list(self.series.items())
        requests = CounterMetricFamily(
            "api_request", "Requests by route template", labels=("endpoint", "method", "status")
        )
        latency = HistogramMetricFamily("api_request_latency_seconds", "Latency by route template", labels=("endpoint", "method"))  # fmt: skip
        by_status: defaultdict[tuple[str, str], int] = defaultdict(int)
        by_method: defaultdict[str, _Series] = defaultdict(_Series)
        for (endpoint, method), series in seen:
            for status, count in list(series.statuses.items()):
                requests.add_metric((endpoint, method, str(status)), count)
                by_status[method, str(status)] += count
            series.seconds.show(latency, (endpoint, method))
            whole = by_method[method]
            whole.seconds.take_in(series.seconds)
            whole.asked.take_in(series.asked)
            whole.answered.take_in(series.answered)
        yield from (requests, latency, *_by_method(by_status, by_method))


def _by_method(by_status: dict[tuple[str, str], int], by_method: dict[str, _Series]) -> Iterator[Metric]:
    http = CounterMetricFamily("http_requests", "HTTP requests", labels=("method", "status"))
    for labels, count in by_status.items():
        http.add_metric(labels, count)
    duration = HistogramMetricFamily("http_request_duration_seconds", "HTTP request duration", labels=("method",))
    asked = HistogramMetricFamily("http_request_size_bytes", "HTTP request body size", labels=("method",))
    answered = HistogramMetricFamily("http_response_size_bytes", "HTTP response body size", labels=("method",))
    for method, series in by_method.items():
        series.seconds.show(duration, (method,))
        series.asked.show(asked, (method,))
        series.answered.show(answered, (method,))
    yield from (http, duration, asked, answered)


_REQUESTS = _Requests()
REGISTRY.register(_REQUESTS)


def observe(endpoint: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int) -> None:
    """Counts one finished request. `endpoint` is a route template, never a path: paths would be labels without bound."""
    series = _REQUESTS.series[endpoint, method]
    series.statuses[status] += 1
    series.seconds.observe(seconds)
    series.asked.observe(request_bytes)
    series.answered.observe(response_bytes)
