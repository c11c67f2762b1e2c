"""The replica's Prometheus metrics: what every request adds, and gauges read from the registry when somebody scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from interlock.errors import InterlockError
from interlock_inference.slots import Registry, Slot

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LLM_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # REQUIREMENTS O1
MODE = "tensor"


class RequestMetrics:
    """Counts every finished request: the documents' names (REQUIREMENTS O1) and our own per version.

    A trainer publishes versions without end, so a version's own series go when it is released; those per model stay.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "interlock_infer_requests", "Requests by outcome.", ("model", "version", "code"), registry=registry
        )
        self._seconds = Histogram(
            "interlock_infer_seconds",
            "From admission to outputs.",
            ("model", "version"),
            buckets=SECONDS,
            registry=registry,
        )
        self._rows = Histogram(
            "interlock_infer_batch_rows",
            "Rows per run of the engine.",
            ("model", "version"),
            buckets=BATCH_ROWS,
            registry=registry,
        )
        self._llm_requests = Counter(
            "llm_requests", "Requests by outcome.", ("model", "mode", "status"), registry=registry
        )
        self._llm_errors = Counter("llm_errors", "Failed requests.", ("model", "error_type"), registry=registry)
        self._llm_seconds = Histogram(
            "llm_inference_duration_seconds",
            "Inference time.",
            ("model", "mode"),
            buckets=LLM_SECONDS,
            registry=registry,
        )
        self._succeeded: dict[Slot, tuple[Counter, Counter, Histogram, Histogram]] = {}
        self._batches: dict[Slot, Histogram] = {}

    def finished(self, slot: Slot, seconds: float, error: InterlockError | None) -> None:
        """See `dataplane.Observer`."""
        if error is not None:
            self._requests.labels(slot.model, slot.version, error.kind).inc()
            self._llm_requests.labels(slot.model, MODE, "error").inc()
            self._llm_errors.labels(slot.model, error.reason).inc()
            return
        series = self._succeeded.get(slot) or self._first(slot)
        series[0].inc()
        series[1].inc()
        series[2].observe(seconds)
        series[3].observe(seconds)

    def _first(self, slot: Slot) -> tuple[Counter, Counter, Histogram, Histogram]:
        """labels() costs more than the increment: what a success adds is looked up once per slot."""
        series = self._succeeded[slot] = (
            self._requests.labels(slot.model, slot.version, "OK"),
            self._llm_requests.labels(slot.model, MODE, "success"),
            self._seconds.labels(slot.model, slot.version),
            self._llm_seconds.labels(slot.model, MODE),
        )
        return series

    def ran(self, slot: Slot, rows: int) -> None:
        """See `dataplane.Observer`."""
        series = self._batches.get(slot)
        if series is None:
            series = self._batches[slot] = self._rows.labels(slot.model, slot.version)
        series.observe(rows)

    def forget(self, slot: Slot) -> None:
        """Drops the series of a released version."""
        self._succeeded.pop(slot, None)
        self._batches.pop(slot, None)
        labels = {"model": slot.model, "version": slot.version}
        self._requests.remove_by_labels(labels)
        self._seconds.remove_by_labels(labels)
        self._rows.remove_by_labels(labels)


class LoadMetrics:
    """Counts how loads end and how long they were held up."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._loads = Counter("interlock_loads", "Loads by outcome.", ("model", "outcome"), registry=registry)
        self._paused = Counter(
            "interlock_load_paused_seconds",
            "Time that loads were paused because what serves was slow.",
            ("model",),
            registry=registry,
        )
        self._revived = Counter(
            "interlock_engine_restarts",
            "Processes of large versions that were started again.",
            ("model",),
            registry=registry,
        )

    def ended(self, model: str, error: InterlockError | None) -> None:
        """One load has ended."""
        self._loads.labels(model, "loaded" if error is None else error.reason).inc()

    def paused(self, model: str, seconds: float) -> None:
        """A load was held up."""
        self._paused.labels(model).inc(seconds)

    def revived(self, model: str) -> None:
        """A version's process was started again."""
        self._revived.labels(model).inc()


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
            memory.add_metric(
                (model, "rss"), sum(opened.memory_bytes for opened in [s.opened for s in versions.values()] if opened)
            )
            active.add_metric((model,), sum(s.in_flight for s in versions.values()))
            for slot in versions.values():
                slots.add_metric((model, slot.version, slot.state), 1.0)
                in_flight.add_metric((model, slot.version), slot.in_flight)
        epochs = GaugeMetricFamily("interlock_route_epoch", "Epoch of the route in force.", labels=("model",))
        for model, routed in snapshot.routes.items():
            epochs.add_metric((model,), routed.route.epoch)
        queued = GaugeMetricFamily(
            "interlock_infer_queue_depth", "Requests that wait for or occupy a worker thread.", value=self._num_queued()
        )
        yield from (loaded, memory, active, slots, in_flight, epochs, queued)
