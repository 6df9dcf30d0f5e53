"""Metrics for Prometheus, named by its conventions (base units, `_total` for counters).

Events are counted here in plain numbers, since each grant is one; gauges are read from the daemon. Both become metrics
at the scrape alone. What is rarer is counted as prometheus-client does.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from portd import __version__
from portd.core.model import Event

COMMIT_BUCKETS: Final = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0)
CHECK_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)

Gauges = Callable[[], Iterable[tuple[str, str, tuple[str, ...], Mapping[tuple[str, ...], float]]]]
"""Gives (name, help, label names, value by label values) of every gauge."""


class Metrics:
    """The registry of this daemon; not the process-wide one, so that two daemons in one process don't mix."""

    def __init__(self) -> None:
        self.gauges: Gauges = tuple
        self._registry = CollectorRegistry()
        self._events: Tally[str] = Tally()
        self._ended: Tally[str] = Tally()
        self._commits = Histogram(
            "portd_store_commit_seconds",
            "Time of a commit, the sync included.",
            buckets=COMMIT_BUCKETS,
            registry=self._registry,
        )
        self._committed = Counter("portd_store_committed_events", "Events written.", registry=self._registry)
        self._checks = Counter(
            "portd_checks", "Health checks by kind and result.", ["kind", "result"], registry=self._registry
        )
        self._check_time = Histogram(
            "portd_check_seconds",
            "Time of a health check, by kind.",
            ["kind"],
            buckets=CHECK_BUCKETS,
            registry=self._registry,
        )
        self._queries = Counter(
            "portd_dns_queries", "DNS queries by type and answer.", ["qtype", "rcode"], registry=self._registry
        )
        self._query_counters: dict[tuple[str, str], Any] = {}
        self._registry.register(_Live(lambda: self.gauges(), self._events, self._ended))

    def apply(self, event: Event) -> None:
        """Count an event."""
        self._events[event.type] += 1
        if event.lease.ended_because is not None:
            self._ended[event.lease.ended_because] += 1

    def commit(self, seconds: float, event_count: int) -> None:
        """Count a commit."""
        self._commits.observe(seconds)
        self._committed.inc(event_count)

    def check(self, kind: str, result: str, seconds: float) -> None:
        """Count a health check."""
        self._checks.labels(kind, result).inc()
        if result in ("skipped", "late"):
            return
        self._check_time.labels(kind).observe(seconds)

    def query(self, qtype: str, rcode: str) -> None:
        """Count a DNS query."""
        counter = self._query_counters.get((qtype, rcode))
        if counter is None:
            counter = self._query_counters[qtype, rcode] = self._queries.labels(qtype, rcode)
        counter.inc()

    def render(self) -> bytes:
        """Render the text format."""
        return generate_latest(self._registry)


class _Live:
    """A collector that reads the daemon, and what was counted of its events, at the scrape."""

    def __init__(self, gauges: Gauges, events: Mapping[str, int], ended: Mapping[str, int]) -> None:
        self._gauges = gauges
        self._counts = (
            ("portd_events", "Events by type.", "type", events),
            ("portd_leases_ended", "Leases ended, by why.", "because", ended),
        )

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the registry need not ask the daemon before it runs."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield every counter of events and every gauge."""
        build = GaugeMetricFamily("portd_build_info", "The version that runs.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        for name, text, label, counts in self._counts:
            counter = CounterMetricFamily(name, text, labels=[label])
            for label_value, count in counts.items():
                counter.add_metric([label_value], count)
            yield counter
        for name, text, labels, values in self._gauges():
            family = GaugeMetricFamily(name, text, labels=labels)
            for label_values, value in values.items():
                family.add_metric(label_values, value)
            yield family
