"""The hot path's histograms show what prometheus_client's own would."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import HistogramMetricFamily

from interlock.runtime.tally import Distribution

BOUNDS = (0.1, 0.25, 1.0, 2.0, 5.0)
SOME = (0.1, 1.0, 5.0)
values = st.lists(st.floats(0, 10) | st.sampled_from(BOUNDS), max_size=30)


@given(first=values, second=values)
def test_the_same_buckets_counts_and_sums(first: list[float], second: list[float]) -> None:
    registry = CollectorRegistry()
    theirs = Histogram("h", "doc", ("a",), buckets=SOME, registry=registry).labels("x")
    ours, other = Distribution(BOUNDS), Distribution(BOUNDS)
    for value in first:
        theirs.observe(value)
        ours.observe(value)
    for value in second:
        theirs.observe(value)
        other.observe(value)
    ours.take_in(other)
    family = HistogramMetricFamily("h", "doc", labels=("a",))
    ours.show(family, ("x",), SOME)
    expected = {(s.name, s.labels.get("le")): s.value for m in registry.collect() for s in m.samples}
    shown = {(s.name, s.labels.get("le")): s.value for s in family.samples}
    assert shown == {key: value for key, value in expected.items() if not key[0].endswith("_created")} or all(
        abs(shown[key] - expected[key]) < 1e-9 for key in shown
    )
    assert ours.count == len(first) + len(second)
