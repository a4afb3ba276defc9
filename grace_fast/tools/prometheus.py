"""Counters of editors for Prometheus: `pip install 'grace_fast[prometheus]'`.

    from grace_fast.tools import prometheus
    prometheus.register(grace)  # beside prometheus_client.start_http_server(8000), say

Nothing is computed until somebody scrapes; then `Grace.counters` of each editor is read.

    grace_fast_lookups_total            look-ups that were answered, of a batch each
    grace_fast_queries_total            their queries
    grace_fast_hits_total               queries that got a value
    grace_fast_certified_misses_total   queries proved outside every ball without reading a key
    grace_fast_rechecks_total           keys read whole
    grace_fast_failures_total           calls left unedited for an error; with the label `error`
    grace_fast_versions_total           versions published of the codebook
    grace_fast_keys                     keys there are
    grace_fast_lookup_seconds           a histogram of how long look-ups took

Each has the labels `name` (of `attach`, empty without) and `layer`. What a back end does not tell
is left out. See `grace_fast.hook.counters` for what exactly is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from grace_fast import errors
from grace_fast.editor.grace import Grace

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    raise errors.missing("the exporter", "prometheus_client") from error

_COUNTS = {
    "lookups": ("calls", "Look-ups that were answered, of a batch each."),
    "queries": ("queries", "Queries looked up."),
    "hits": ("hits", "Queries that got a value."),
    "certified_misses": (
        "certified_misses",
        "Queries proved outside every ball without reading a key.",
    ),
    "rechecks": ("rechecks", "Keys read whole, once for each query."),
    "versions": ("versions", "Versions published of the codebook."),
}


class EditorCollector(Collector):
    """The counters of some editors as metrics; `register` makes it."""

    def __init__(self, editors: tuple[Grace, ...], labels: Mapping[str, str]) -> None:
        self._names = ("name", "layer", *labels)
        self._editors = {
            (grace.name or "", grace.settings.layer, *labels.values()): grace for grace in editors
        }
        if len(self._editors) < len(editors):
            raise ValueError(
                "two of the editors have the same name and layer; give them names in attach(), or "
                "register them apart, with labels that differ"
            )

    def describe(self) -> list[Metric]:
        """Return nothing: so several collectors may have metrics of the same names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, read now."""
        read = {labels: grace.counters for labels, grace in self._editors.items()}
        for name, (field, said) in _COUNTS.items():
            family = CounterMetricFamily(f"grace_fast_{name}", said, labels=self._names)
            for labels, counters in read.items():
                if (count := getattr(counters, field)) is not None:
                    family.add_metric(labels, count)
            yield family
        failures = CounterMetricFamily(
            "grace_fast_failures",
            "Calls left unedited for an error of the look-up.",
            labels=(*self._names, "error"),
        )
        keys = GaugeMetricFamily("grace_fast_keys", "Keys of the codebook.", labels=self._names)
        seconds = HistogramMetricFamily(
            "grace_fast_lookup_seconds", "How long a look-up took.", labels=self._names
        )
        for labels, counters in read.items():
            for kind, count in counters.failures.items():
                failures.add_metric((*labels, kind), count)
            keys.add_metric(labels, counters.keys)
            latency = counters.latency
            ends = (*map(repr, latency.bounds), "+Inf")
            buckets = list(zip(ends, accumulate(latency.counts), strict=True))
            seconds.add_metric(labels, buckets, latency.seconds)
        yield from (failures, keys, seconds)


def register(
    *editors: Grace,
    labels: Mapping[str, str] | None = None,
    registry: CollectorRegistry = REGISTRY,
) -> EditorCollector:
    """Let a registry serve the counters of some editors; `registry.unregister` ends that.

    labels: further labels of all of them, {"model": "a"} say, where one process serves several
        models; a registry that is asked twice for the same name and layer serves both.

    Raises: ValueError for two editors of the same name and layer.
    """
    collector = EditorCollector(editors, labels or {})
    registry.register(collector)
    return collector
