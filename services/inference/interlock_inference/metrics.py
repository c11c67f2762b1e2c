"""The replica's Prometheus metrics: what every request adds, and gauges read from the registry when somebody scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from interlock.errors import InterlockError
from interlock_inference.slots import Registry, Slot

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LLM_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # REQUIREMENTS O1
MODE = "tensor"


class RequestMetrics:
    """Counts every finished request: the documents' names (REQUIREMENTS O1) and our own per version."""

    def __init__(self, registry: CollectorRegistry) -> None:
        requests = Counter(
            "interlock_infer_requests", "Requests by outcome.", ("model", "version", "code"), registry=registry
        )
        seconds = Histogram(
            "interlock_infer_seconds",
            "From admission to outputs.",
            ("model", "version"),
            buckets=SECONDS,
            registry=registry,
        )
        llm_requests = Counter("llm_requests", "Requests by outcome.", ("model", "mode", "status"), registry=registry)
        llm_errors = Counter("llm_errors", "Failed requests.", ("model", "error_type"), registry=registry)
        llm_seconds = Histogram(
            "llm_inference_duration_seconds",
            "Inference time.",
            ("model", "mode"),
            buckets=LLM_SECONDS,
            registry=registry,
        )
        # labels() costs more than the increment: the children are kept per version
        self._requests = lru_cache(4096)(requests.labels)
        self._seconds = lru_cache(1024)(seconds.labels)
        self._llm_requests = lru_cache(1024)(llm_requests.labels)
        self._llm_errors = lru_cache(1024)(llm_errors.labels)
        self._llm_seconds = lru_cache(1024)(llm_seconds.labels)

    def finished(self, slot: Slot, seconds: float, error: InterlockError | None) -> None:
        """See `dataplane.Observer`."""
        self._requests(slot.model, slot.version, "OK" if error is None else error.kind).inc()
        self._llm_requests(slot.model, MODE, "success" if error is None else "error").inc()
        if error is None:
            self._seconds(slot.model, slot.version).observe(seconds)
            self._llm_seconds(slot.model, MODE).observe(seconds)
        else:
            self._llm_errors(slot.model, error.reason).inc()


class StateMetrics(Collector):
    """Gauges, read from one snapshot at each scrape. Runs in the metrics thread: it only looks."""

    def __init__(self, registry: Registry, num_queued: Callable[[], int]) -> None:
        self._registry = registry
        self._num_queued = num_queued

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges of now."""
        snapshot = self._registry.snapshot
        loaded = GaugeMetricFamily("llm_model_loaded", "1 when the model can answer.", labels=("model",))
        memory = GaugeMetricFamily(
            "llm_model_memory_bytes", "Measured growth while loading.", labels=("model", "memory_type")
        )
        active = GaugeMetricFamily("llm_active_requests", "Requests being answered.", labels=("model",))
        slots = GaugeMetricFamily(
            "interlock_slot_state", "1 for the state the slot is in.", labels=("model", "version", "state")
        )
        in_flight = GaugeMetricFamily(
            "interlock_slot_in_flight", "Requests that hold the version.", labels=("model", "version")
        )
        for model, versions in snapshot.slots.items():
            routed = snapshot.routes.get(model)
            loaded.add_metric((model,), 1.0 if routed and routed.slots else 0.0)
            memory.add_metric((model, "rss"), sum(s.opened.memory_bytes for s in versions.values() if s.opened))
            active.add_metric((model,), sum(s.in_flight for s in versions.values()))
            for slot in versions.values():
                slots.add_metric((model, slot.version, slot.state), 1.0)
                in_flight.add_metric((model, slot.version), slot.in_flight)
        epochs = GaugeMetricFamily("interlock_route_epoch", "Epoch of the route in force.", labels=("model",))
        for model, routed in snapshot.routes.items():
            epochs.add_metric((model,), routed.route.epoch)
        queued = GaugeMetricFamily(
            "interlock_infer_queue_depth", "Runs that wait for or occupy a worker thread.", value=self._num_queued()
        )
        yield from (loaded, memory, active, slots, in_flight, epochs, queued)
