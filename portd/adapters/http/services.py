"""The calls of those who look for a service: names, instances with long polls, targets for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from portd.adapters.http.calls import Answer, Call, Route
from portd.core.announcing import LanService
from portd.core.model import MAIN_ENDPOINT, Label, Lease
from portd.core.requests import Tag
from portd.core.rights import sees_cmdline
from portd.core.views import LeaseView, OwnerView, moment
from portd.core.visibility import serving
from portd.leasing.feed import Feed
from portd.leasing.service import LeaseService

WAIT_MAX_S: Final = 600.0
"""The longest long poll, in seconds: proxies and kernels forget idle connections that stay longer."""

LanLookup = Callable[[str | None], Awaitable[Sequence[LanService]]]
"""Gives what the LAN offers, of one DNS-SD type or of all."""


class ServiceCount(Struct, frozen=True):
    """A service's name, and how its main endpoints are."""

    name: str
    instances: int
    passing: int
    warning: int
    critical: int
    unknown: int


class ServiceList(Struct, frozen=True):
    """All services with live leases."""

    services: list[ServiceCount]


class ServiceQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`passing=true` leaves only instances that callers should use. `after` and `wait` make a long poll."""

    passing: bool = False
    tag: tuple[Tag, ...] = ()
    endpoint: Label = MAIN_ENDPOINT
    scope: Literal["local", "cluster", "lan", "all"] = "local"
    after: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    wait: Annotated[float, Meta(ge=0, le=WAIT_MAX_S)] = 0.0


class Instances(Struct, frozen=True):
    """The instances of a service, as of a revision."""

    service: str
    revision: int
    instances: list[LeaseView]


class TargetQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which endpoints Prometheus scrapes."""

    tag: tuple[Tag, ...] = ()
    endpoint: Label | None = None


class Target(Struct, frozen=True):
    """A target of Prometheus' http_sd_configs."""

    targets: list[str]
    labels: dict[str, str]


class ServiceCalls:
    """The handlers of /v1/services and /v1/prometheus."""

    def __init__(self, service: LeaseService, feed: Feed, lan: LanLookup) -> None:
        self._service = service
        self._feed = feed
        self._lan = lan

    def routes(self) -> list[Route]:
        """Return the routes of this module."""
        return [
            Route("GET", "/v1/services", self.names, "List services with counts by health", {200: ServiceList}),
            Route(
                "GET",
                "/v1/services/{name}",
                self.show,
                "Show a service's instances, or wait for a change of it",
                {200: Instances},
                query=ServiceQuery,
            ),
            Route(
                "GET",
                "/v1/prometheus",
                self.targets,
                "List targets for Prometheus' http_sd_configs",
                {200: list[Target]},
                query=TargetQuery,
            ),
        ]

    async def names(self, call: Call) -> Answer:
        """GET /v1/services."""
        table = self._service.table
        counts = []
        for name in sorted(table.services()):
            health = Counter(
                lease.health for lease in table.of_service(name).values() if lease.endpoint == MAIN_ENDPOINT
            )
            instances = len({lease.instance for lease in table.of_service(name).values()})
            counts.append(
                ServiceCount(
                    name, instances, health["passing"], health["warning"], health["critical"], health["unknown"]
                )
            )
        return Answer(ServiceList(counts))

    async def show(self, call: Call) -> Answer:
        """GET /v1/services/{name}."""
        query: ServiceQuery = call.query
        name = call.path["name"]
        if query.after is not None:
            await self._feed.wait(name, query.after, query.wait)
        views: list[LeaseView] = []
        if query.scope != "lan":
            views += [
                self._service.view(lease, cmdline=sees_cmdline(call.caller, lease.owner.uid))
                for lease in self._select(name, query)
            ]
        if query.scope in ("lan", "all") and query.endpoint == MAIN_ENDPOINT and not query.tag:
            now = self._service.clock.now().at
            views += [
                _view_lan(seen, name, now)
                for seen in await self._lan(None)
                if seen.txt.get("service") == name and not (seen.ours and query.scope == "all")
            ]
        return Answer(Instances(name, self._feed.revision, views))

    def _select(self, name: str, query: ServiceQuery) -> list[Lease]:
        leases = list(self._service.table.of_service(name).values())
        if query.passing:
            leases = serving(leases)
        leases = [
            lease
            for lease in leases
            if lease.endpoint == query.endpoint and all(tag in lease.tags for tag in query.tag)
        ]
        return sorted(leases, key=lambda lease: (lease.instance, lease.id))

    async def targets(self, call: Call) -> Answer:
        """GET /v1/prometheus: the whole list each time; unhealthy ones too, which Prometheus should see as such."""
        query: TargetQuery = call.query
        chosen = [
            lease
            for lease in self._service.table
            if lease.protocol != "udp"
            and not lease.drain
            and lease.state != "conflict"
            and query.endpoint in (None, lease.endpoint)
            and all(tag in lease.tags for tag in query.tag)
        ]
        return Answer([_target(lease) for lease in sorted(chosen, key=lambda lease: lease.name)])


def _view_lan(seen: LanService, service: str, now: float) -> LeaseView:
    """Show what another host announces as an instance: it is announced, so it is bound and not critical there; of its
    owner nothing is known here."""
    owner = OwnerView(
        pid=None, uid=None, user=None, exe=None, cmdline=None, unit=None, started_at=None, known_by="token"
    )
    at: Any = moment(now)
    return LeaseView(
        id=f"lan:{seen.name}.{seen.type}",
        service=service,
        instance=seen.txt.get("instance", seen.name),
        endpoint=MAIN_ENDPOINT,
        protocol="udp" if seen.type.endswith("._udp") else "tcp",
        address=seen.addresses[0] if seen.addresses else seen.host,
        port=seen.port,
        pool="",
        hold="none",
        listening=(),
        vouched_by=None,
        elsewhere=(),
        state="bound",
        health="passing",
        health_note="",
        health_since=None,
        checked_at=None,
        drain=False,
        lifetime="ttl",
        owner=owner,
        uid=None,
        tags=(),
        metadata=dict(seen.txt),
        weight=1,
        priority=0,
        check=None,
        announce=None,
        host=seen.host.removesuffix(".local."),
        created_at=at,
        renewed_at=None,
        expires_at=None,
        ended_at=None,
        ended_because=None,
        revision=0,
    )


def reachable_host(lease: Lease) -> str:
    """Return the address that a caller on this host reaches a lease at: a wildcard listens on loopback as well."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(lease.address, lease.address)


def _target(lease: Lease) -> Target:
    host = reachable_host(lease)
    labels = {
        "__meta_portd_service": lease.service,
        "__meta_portd_instance": lease.instance,
        "__meta_portd_endpoint": lease.endpoint,
        "__meta_portd_health": lease.health,
        "__meta_portd_tags": "," + ",".join(lease.tags) + "," if lease.tags else "",
        "__meta_portd_host": lease.host,
    }
    for key, value in lease.metadata.items():
        safe = "".join(char if char.isascii() and (char.isalnum() or char == "_") else "_" for char in key)
        labels[f"__meta_portd_metadata_{safe}"] = value
    return Target([f"[{host}]:{lease.port}" if ":" in host else f"{host}:{lease.port}"], labels)
