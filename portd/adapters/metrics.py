"""Metrics for Prometheus, named by its conventions (base units, `_total` for counters).

Counters live here and are fed by what happens; gauges are read from the daemon at the scrape, so that nothing on the
way of a grant keeps a second set of books.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from portd import __version__
from portd.core.model import Event

COMMIT_BUCKETS: Final = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0)
CHECK_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)

Gauges = Callable[[], Iterable[tuple[str, str, tuple[str, ...], Mapping[tuple[str, ...], float]]]]
"""Gives (name, help, label names, value by label values) of every gauge."""


class Metrics:
    """The registry of this daemon; not the process-wide one, so that two daemons in one process don't mix."""

    def __init__(self, gauges: Gauges) -> None:
        self._registry = CollectorRegistry()
        self._gauges = gauges
        self._events = Counter("portd_events", "Events by type.", ["type"], registry=self._registry)
        self._ended = Counter("portd_leases_ended", "Leases ended, by why.", ["because"], registry=self._registry)
        self._commits = Histogram("portd_store_commit_seconds", "Time of a commit, the sync included.",
                                  buckets=COMMIT_BUCKETS, registry=self._registry)
        self._committed = Counter("portd_store_committed_events", "Events written.", registry=self._registry)
        self._checks = Counter("portd_checks", "Health checks by kind and result.", ["kind", "result"],
                               registry=self._registry)
        self._check_time = Histogram("portd_check_seconds", "Time of a health check, by kind.", ["kind"],
                                     buckets=CHECK_BUCKETS, registry=self._registry)
        self._queries = Counter("portd_dns_queries", "DNS queries by type and answer.", ["qtype", "rcode"],
                                registry=self._registry)
        self._event_counters: dict[str, Any] = {}
        self._query_counters: dict[tuple[str, str], Any] = {}
        self._registry.register(_Live(gauges))

    def apply(self, event: Event) -> None:
        """Count an event."""
        self._count(self._events, event.type)
        if event.lease.ended_because is not None:
            self._count(self._ended, event.lease.ended_because)

    def _count(self, family: Counter, value: str) -> None:
        counter = self._event_counters.get(value)  # no type of event is a reason to end as well
        if counter is None:
            counter = self._event_counters[value] = family.labels(value)
        counter.inc()

    def commit(self, seconds: float, event_count: int) -> None:
        """Count a commit."""
        self._commits.observe(seconds)
        self._committed.inc(event_count)

    def check(self, kind: str, result: str, seconds: float) -> None:
        """Count a health check."""
        self._checks.labels(kind, result).inc()
        if result == "skipped":
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
    """A collector that reads the daemon at the scrape."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def describe(self) -> Iterable[Any]:
        """Return nothing: the registry need not ask the daemon before it runs."""
        return ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield every gauge."""
        build = GaugeMetricFamily("portd_build_info", "The version that runs.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        for name, text, labels, values in self._gauges():
            family = GaugeMetricFamily(name, text, labels=labels)
            for label_values, value in values.items():
                family.add_metric(label_values, value)
            yield family
