"""The replica's Prometheus metrics: what every request adds, and gauges read from the registry when somebody scrapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from interlock.errors import InterlockError
from interlock.runtime.tally import Distribution
from interlock_inference.slots import Registry, Slot

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LLM_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # REQUIREMENTS O1
MODE = "tensor"


_FINE = tuple(sorted({*SECONDS, *LLM_SECONDS}))
"""One distribution has the bounds of both metrics that are made of it."""


class _Tally:
    """The requests of one version, or of versions that are gone."""

    __slots__ = ("codes", "reasons", "rows", "seconds")

    def __init__(self) -> None:
        self.seconds = Distribution(_FINE)
        self.rows = Distribution(BATCH_ROWS)
        self.codes: defaultdict[str, int] = defaultdict(int)
        self.reasons: defaultdict[str, int] = defaultdict(int)

    def take_in(self, other: _Tally) -> None:
        """Adds what another one has counted."""
        self.seconds.take_in(other.seconds)
        for mine, theirs in ((self.codes, other.codes), (self.reasons, other.reasons)):
            for name, count in list(theirs.items()):
                mine[name] += count


class RequestMetrics(Collector):
    """Counts every finished request: the documents' names (REQUIREMENTS O1) and our own per version.

    A trainer publishes versions without end, so a version's own series go when it is released; those per model stay.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._slots: defaultdict[Slot, _Tally] = defaultdict(_Tally)
        self._gone: defaultdict[str, _Tally] = defaultdict(_Tally)
        registry.register(self)

    def finished(self, slot: Slot, seconds: float, error: InterlockError | None) -> None:
        """See `dataplane.Observer`."""
        tally = self._slots[slot]
        if error is None:
            tally.seconds.observe(seconds)
        else:
            tally.codes[error.kind] += 1
            tally.reasons[error.reason] += 1

    def ran(self, slot: Slot, rows: int) -> None:
        """See `dataplane.Observer`."""
        self._slots[slot].rows.observe(rows)

    def forget(self, slot: Slot) -> None:
        """Drops the series of a released version."""
        tally = self._slots.pop(slot, None)
        if tally is not None:
            self._gone[slot.model].take_in(tally)

    def collect(self) -> Iterator[Metric]:
        """The families of now."""
        labels = ("model", "version")
        requests = CounterMetricFamily("interlock_infer_requests", "Requests by outcome.", labels=(*labels, "code"))
        seconds = HistogramMetricFamily("interlock_infer_seconds", "From admission to outputs.", labels=labels)
        rows = HistogramMetricFamily("interlock_infer_batch_rows", "Rows per run of the engine.", labels=labels)
        models: defaultdict[str, _Tally] = defaultdict(_Tally)
        for model, tally in list(self._gone.items()):
            models[model].take_in(tally)
        for slot, tally in list(self._slots.items()):
            models[slot.model].take_in(tally)
            outcomes = {"OK": tally.seconds.count, **tally.codes}
            for code, count in outcomes.items():
                if count:
                    requests.add_metric((slot.model, slot.version, code), count)
            tally.seconds.show(seconds, (slot.model, slot.version), SECONDS)
            tally.rows.show(rows, (slot.model, slot.version))
        yield from (requests, seconds, rows, *_of_models(models))


def _of_models(models: Mapping[str, _Tally]) -> Iterator[Metric]:
    requests = CounterMetricFamily("llm_requests", "Requests by outcome.", labels=("model", "mode", "status"))
    errors = CounterMetricFamily("llm_errors", "Failed requests.", labels=("model", "error_type"))
    seconds = HistogramMetricFamily("llm_inference_duration_seconds", "Inference time.", labels=("model", "mode"))
    for model, tally in models.items():
        for status, count in (("success", tally.seconds.count), ("error", sum(tally.codes.values()))):
            if count:
                requests.add_metric((model, MODE, status), count)
        for reason, count in tally.reasons.items():
            errors.add_metric((model, reason), count)
        tally.seconds.show(seconds, (model, MODE), LLM_SECONDS)
    yield from (requests, errors, seconds)


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
