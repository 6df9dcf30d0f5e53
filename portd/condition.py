"""What the daemon reports of itself: the condition of its parts, facts, warnings, and gauges for metrics.

It only reads; the HTTP module decides how it is shown.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from portd.adapters.availability import Availability
from portd.adapters.clock import LeaseClock
from portd.adapters.consul.server import ConsulServer
from portd.adapters.dns.server import DnsServer
from portd.adapters.etcd.session import EtcdSession
from portd.adapters.http.events import EventCalls
from portd.adapters.http.server import HttpServer
from portd.adapters.http.status import pool_status
from portd.adapters.kernel import descriptors
from portd.adapters.kernel.inspection import Inspection
from portd.adapters.kernel.processes import KernelProcesses
from portd.adapters.mdns.announcer import Announcer
from portd.adapters.portserver.grpc import GrpcPortServer
from portd.adapters.portserver.portpicker import PortpickerServer
from portd.adapters.probes.prober import Prober
from portd.adapters.sqlite.store import SqliteStore
from portd.config import Settings
from portd.leasing.journal import Journal
from portd.leasing.queries import LeaseQueries

Gauge = tuple[str, str, tuple[str, ...], Mapping[tuple[str, ...], float]]
NO_LABELS: tuple[str, ...] = ()


class Condition(NamedTuple):
    """The parts that are reported on. `started_at` is a reading of time.monotonic()."""

    settings: Settings
    started_at: float
    store: SqliteStore
    journal: Journal
    queries: LeaseQueries
    clock: LeaseClock
    processes: KernelProcesses
    inspection: Inspection
    http: HttpServer
    events: EventCalls
    announcer: Announcer
    dns: DnsServer
    prober: Prober
    availability: Availability
    compat: Sequence[PortpickerServer | GrpcPortServer | ConsulServer]
    cluster: EtcdSession | None

    def conditions(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Return a function for each part; each gives a dict whose `problem` is None or a sentence."""
        return {
            "store": self._store,
            "mdns": self._mdns,
            "dns": self._dns,
            "cluster": lambda: {"enabled": False} if self.cluster is None else self.cluster.condition(),
        }

    def facts(self) -> dict[str, Any]:
        """Return the pid, the uptime in seconds, and counts beyond those of leases."""
        return {
            "pid": os.getpid(),
            "uptime": round(time.monotonic() - self.started_at, 3),
            "counts": {
                "connections": self.http.connection_count,
                "followers": self.events.stream_count,
                "processes": self.processes.watched_count,
            },
        }

    def warnings(self) -> list[str]:
        """Return what an operator should know, a sentence each."""
        found = list(self.store.notes)
        found += [f"[compat] {server.problem}" for server in self.compat if server.problem]
        if self.cluster is not None:
            found += self.cluster.warnings()
        if descriptors.are_short():
            found.append(
                "portd is at its file limit: new leases are refused, some ports may have no hold; raise LimitNOFILE of "
                "its unit (see 'portd doctor')"
            )
        if lost_s := self.clock.lost_s:
            found.append(f"portd was suspended for {lost_s:.1f} s in total; ttl leases were extended by as much")
        self.inspection.check()
        if self.inspection.problem is not None:
            found.append(self.inspection.problem)
        if self.prober.is_late:
            found.append(
                f"health checks are late: {self.prober.waiting_count} wait for a slot; fix or end services that do not "
                "answer, or raise [health] concurrency"
            )
        return found

    def gauges(self) -> Iterable[tuple[str, str, tuple[str, ...], Mapping[tuple[str, ...], float]]]:
        """Return (name, help, label names, value by label values) of every gauge."""
        states = Counter((lease.state,) for lease in self.queries)
        pools: dict[tuple[str, ...], float] = {
            (name, part): float(getattr(pool, part))
            for name, pool in pool_status(self.queries).items()
            for part in ("used", "held", "cooling", "declined", "free")
        }
        plain = {
            "portd_revision": ("The newest revision.", self.queries.revision),
            "portd_watched_processes": ("Owners whose exit is waited for.", self.processes.watched_count),
            "portd_http_connections": ("Open connections.", self.http.connection_count),
            "portd_http_wrong_tokens": ("Requests with a wrong token so far.", self.http.wrong_token_count),
            "portd_event_followers": ("Followers of the event stream.", self.events.stream_count),
            "portd_checks_waiting": ("Checks that wait for a slot.", self.prober.waiting_count),
            "portd_checks_running": ("Checks under way.", self.prober.running_count),
            "portd_checks_late": ("1 while checks wait too long for a slot.", self.prober.is_late),
            "portd_uptime_seconds": ("Since the start.", time.monotonic() - self.started_at),
        }
        return [
            ("portd_leases", "Live leases by state.", ("state",), {key: float(n) for key, n in states.items()}),
            ("portd_pool_ports", "Ports of a pool by what they are used for.", ("pool", "use"), pools),
            (
                "portd_check_oldest_result_seconds",
                "Age of the oldest last result among checks of a kind.",
                ("kind",),
                {(kind,): age for kind, age in self.prober.oldest_result_ages().items()},
            ),
            *(() if self.cluster is None else self._cluster_gauges(self.cluster)),
            *self.availability.gauges(self.clock.now().at),
            *((name, text, NO_LABELS, {NO_LABELS: float(value)}) for name, (text, value) in plain.items()),
        ]

    @staticmethod
    def _cluster_gauges(cluster: EtcdSession) -> Iterable[Gauge]:
        plain = {
            "portd_cluster_hosts": ("Hosts of the cluster, this one included.", len(cluster.view.hosts) + 1),
            "portd_cluster_instances": ("Endpoints of other hosts.", len(cluster.leases())),
            "portd_cluster_stale_seconds": ("0 while etcd answers.", cluster.stale_s() or 0),
            "portd_cluster_claimed": (
                "1 while this host's name is its own.",
                float(cluster.publisher.state == "claimed"),
            ),
            "portd_cluster_unwritten": ("Changes that wait for etcd.", cluster.publisher.waiting_count),
        }
        return [(name, text, NO_LABELS, {NO_LABELS: float(value)}) for name, (text, value) in plain.items()]

    def _store(self) -> dict[str, Any]:
        condition = self.store.condition()
        return {**condition, "problem": self.journal.problem or condition["problem"]}

    def _mdns(self) -> dict[str, Any]:
        return {"enabled": True, **self.announcer.condition()} if self.settings.mdns.enabled else {"enabled": False}

    def _dns(self) -> dict[str, Any]:
        return {"enabled": True, **self.dns.condition()} if self.settings.dns.listen else {"enabled": False}
