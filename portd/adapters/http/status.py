"""The daemon's condition: status for people, healthz for supervisors, metrics for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from portd import __version__
from portd.adapters.http.calls import Answer, Call, Route
from portd.leasing.queries import LeaseQueries


class PoolStatus(Struct, frozen=True):
    """A pool's numbers: size = used (bound) + held (granted, nobody listens) + cooling + declined + free."""

    size: int
    used: int
    held: int
    cooling: int
    declined: int
    free: int
    ranges: tuple[str, ...] = ()


class StoreStatus(Struct, frozen=True):
    """The condition of the database."""

    id: str
    path: str
    durability: str
    size_bytes: int
    wal_bytes: int
    last_commit_ms: float
    problem: str | None


class MdnsStatus(Struct, frozen=True):
    """The condition of multicast DNS; nothing but `enabled` where it is off. A responder adds figures of its own."""

    enabled: bool
    responder: str | UnsetType | None = UNSET
    why: str | UnsetType = UNSET
    announced: int | UnsetType = UNSET
    wanted: int | UnsetType = UNSET
    damped: int | UnsetType = UNSET
    browsing: bool | UnsetType = UNSET
    problem: str | UnsetType | None = UNSET


class DnsStatus(Struct, frozen=True):
    """The condition of the DNS server; nothing but `enabled` where it is off."""

    enabled: bool
    listen: list[str] | UnsetType = UNSET
    zone: str | UnsetType = UNSET
    ttl: float | UnsetType = UNSET
    services: int | UnsetType = UNSET
    names: int | UnsetType = UNSET
    connections: int | UnsetType = UNSET
    failed_queries: int | UnsetType = UNSET
    problem: str | UnsetType | None = UNSET


class ClusterStatus(Struct, frozen=True):
    """The condition of the cluster; nothing but `enabled` where none is configured."""

    enabled: bool
    engine: str | UnsetType = UNSET
    node: str | UnsetType = UNSET
    member: str | UnsetType | None = UNSET
    lease: str | UnsetType | None = UNSET
    ttl: int | UnsetType = UNSET
    state: str | UnsetType = UNSET
    published: int | UnsetType = UNSET
    waiting: int | UnsetType = UNSET
    hosts: int | UnsetType = UNSET
    instances: int | UnsetType = UNSET
    revision: int | UnsetType = UNSET
    follows: str | UnsetType = UNSET
    stale: float | UnsetType | None = UNSET
    moved: int | UnsetType = UNSET
    malformed: int | UnsetType = UNSET
    etcd_version: str | UnsetType | None = UNSET
    db_size_bytes: int | UnsetType = UNSET
    problem: str | UnsetType | None = UNSET


class Status(Struct, frozen=True):
    """The daemon's condition."""

    version: str
    host: str
    pid: int
    uptime: float
    revision: int
    pools: dict[str, PoolStatus]
    counts: dict[str, int]
    store: StoreStatus
    mdns: MdnsStatus
    dns: DnsStatus
    cluster: ClusterStatus
    warnings: list[str]


class Healthy(Struct, frozen=True):
    """Leases can be granted."""

    status: str = "ok"


class Unhealthy(Struct, frozen=True):
    """Why no lease can be granted."""

    reasons: list[str]
    status: str = "unhealthy"


Conditions = Mapping[str, Callable[[], dict[str, Any]]]


class StatusCalls:
    """The handlers of /v1/status, /healthz and /metrics.

    `conditions` gives the condition of store, mdns, dns and cluster: a dict, with a `problem` that is None or a
    sentence. `facts` gives pid, uptime and counts beyond those of leases. `ranges` are
    the ports of each pool.
    """

    def __init__(
        self,
        queries: LeaseQueries,
        conditions: Conditions,
        facts: Callable[[], dict[str, Any]],
        metrics: Callable[[], bytes],
        extra_warnings: Callable[[], list[str]],
        ranges: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    ) -> None:
        self._queries = queries
        self._conditions = conditions
        self._facts = facts
        self._metrics = metrics
        self._extra_warnings = extra_warnings
        self._ranges = ranges

    def routes(self) -> list[Route]:
        """Return the routes of this module."""
        return [
            Route("GET", "/v1/status", self.status, "Show the daemon's condition", {200: Status}),
            Route(
                "GET",
                "/healthz",
                self.healthz,
                "Check whether leases can be granted",
                {200: Healthy, 503: Unhealthy},
                access="anybody",
            ),
            Route(
                "GET",
                "/metrics",
                self.metrics,
                "Show metrics for Prometheus",
                {200: str},
                access="anybody",
                media_type="text/plain",
            ),
        ]

    async def status(self, call: Call) -> Answer:
        """GET /v1/status."""
        facts = self._facts()
        queries = self._queries
        states = Counter(lease.state for lease in queries)
        counts = {
            "leases": len(queries),
            "services": sum(1 for _ in queries.services()),
            **{state: states[state] for state in ("held", "bound", "conflict")},
            **facts["counts"],
        }
        # Plain dicts in the shape of the section types, which describe them: a part may add figures of its own.
        found: dict[str, Any] = {name: condition() for name, condition in self._conditions.items()}
        return Answer(
            Status(
                version=__version__,
                host=queries.host,
                revision=queries.revision,
                pools=pool_status(queries, self._ranges),
                counts=counts,
                warnings=self._warnings(found),
                pid=facts["pid"],
                uptime=facts["uptime"],
                store=found["store"],
                mdns=found["mdns"],
                dns=found["dns"],
                cluster=found["cluster"],
            )
        )

    async def healthz(self, call: Call) -> Answer:
        """GET /healthz: 503 when grants can't be made."""
        reasons = [
            f"{name}: {problem}"
            for name, condition in self._conditions.items()
            if name == "store" and (problem := condition().get("problem"))
        ]
        return Answer(Unhealthy(reasons), 503) if reasons else Answer(Healthy())

    async def metrics(self, call: Call) -> Answer:
        """GET /metrics."""
        return Answer(self._metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    def _warnings(self, found: dict[str, dict[str, Any]]) -> list[str]:
        warnings = [f"{name}: {condition['problem']}" for name, condition in found.items() if condition.get("problem")]
        return [*warnings, *self._queries.warnings(), *self._extra_warnings()]


def pool_status(
    queries: LeaseQueries, ranges: Mapping[str, tuple[str, ...]] = MappingProxyType({})
) -> dict[str, PoolStatus]:
    """Count every pool's numbers; `ranges` are the pools' ports, "FIRST-LAST" each."""
    return {
        name: PoolStatus(
            count.size, count.used - held, held, count.cooling, count.declined, count.free, ranges.get(name, ())
        )
        for name, (count, held) in queries.pools().items()
    }
