"""The calls of those who look for a service: names, instances with long polls, targets for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from portd.adapters.http.calls import Answer, Call, Route, encode
from portd.adapters.http.paging import Cursor, Limit, Rows, decode_cursor, in_order, page
from portd.adapters.http.revisions import After, Revisions
from portd.core.announcing import LanService
from portd.core.model import MAIN_ENDPOINT, Label, Lease
from portd.core.requests import Tag
from portd.core.shares import Shares
from portd.core.views import LeaseView, OwnerView, moment
from portd.core.visibility import serving
from portd.leasing.feed import Feed
from portd.leasing.service import LeaseService

WAIT_MAX_S: Final = 600.0
"""The longest long poll, in seconds: proxies and kernels forget idle connections that stay longer."""

POLLS_MAX: Final = 4_096
USER_POLLS_MAX: Final = 2_048
"""Long polls at once, of all callers and of one user. Each costs a connection and about 10 KB."""

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
    """One page of the services with live leases; `next` is the cursor of the next one, or null."""

    services: list[ServiceCount]
    next: str | None


class ServiceListQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which page of the services is shown."""

    limit: Limit = 1_000
    cursor: Cursor | None = None


class ServiceQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`passing=true` leaves only instances that callers should use. `after` and `wait` make a long poll."""

    passing: bool = False
    tag: tuple[Tag, ...] = ()
    endpoint: Label = MAIN_ENDPOINT
    scope: Literal["local", "cluster", "lan", "all"] = "local"
    after: After | None = None
    limit: Limit = 10_000
    cursor: Cursor | None = None
    wait: Annotated[float, Meta(ge=0, le=WAIT_MAX_S)] = 0.0


class Instances(Struct, frozen=True):
    """The instances of a service, as of a revision."""

    service: str
    revision: int
    instances: list[LeaseView]
    next: str | None


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

    def __init__(self, service: LeaseService, feed: Feed, lan: LanLookup, revisions: Revisions) -> None:
        self._revisions = revisions
        self._polls = Shares("long polls", total=POLLS_MAX, per_user=USER_POLLS_MAX)
        self._service = service
        self._feed = feed
        self._lan = lan

    def routes(self) -> list[Route]:
        """Return the routes of this module."""
        return [
            Route(
                "GET",
                "/v1/services",
                self.names,
                "List services with counts by health",
                {200: ServiceList},
                query=ServiceListQuery,
            ),
            Route(
                "GET",
                "/v1/services/{name}",
                self.show,
                "Show a service's instances, or wait for a change of it",
                {200: Instances},
                query=ServiceQuery,
                refusals=("revision_gone", "busy"),
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
        query: ServiceListQuery = call.query
        after = decode_cursor(query.cursor, size=1)
        table = self._service.table
        revision = table.revision
        found = await in_order(table.services(), lambda name: (name,), after, lambda name: True)
        leases = ((key, some) for key, name in found if (some := list(table.of_service(name).values())))
        return Answer(page("services", leases, query.limit, _count, encode), revision=revision)

    async def show(self, call: Call) -> Answer:
        """GET /v1/services/{name}."""
        query: ServiceQuery = call.query
        name = call.path["name"]
        after = decode_cursor(query.cursor, size=3)
        if query.after is not None:
            revision = self._revisions.parse(query.after, "after")
            with self._polls.use(call.caller.user):
                await self._feed.wait(name, revision, query.wait)
        from_lan: list[LanService] = []
        if query.scope in ("lan", "all") and query.endpoint == MAIN_ENDPOINT and not query.tag:
            from_lan = [
                seen
                for seen in await self._lan(None)
                if seen.txt.get("service") == name and not (seen.ours and query.scope == "all")
            ]
        now, revision = self._service.clock.now().at, self._feed.revision
        seen: list[Lease | LanService] = [*self._select(name, query), *from_lan]

        def show(one: Lease | LanService) -> LeaseView:
            if isinstance(one, LanService):
                return _view_lan(one, name, now)
            return self._service.view(one, call.caller)

        found = await in_order(seen, _order, after, lambda one: True)
        head = b'"service":%s,"revision":%d,' % (encode(name), revision)
        return Answer(page("instances", found, query.limit, show, encode, head), revision=revision)

    def _select(self, name: str, query: ServiceQuery) -> list[Lease]:
        if query.scope == "lan":
            return []
        leases = list(self._service.table.of_service(name).values())
        if query.passing:
            leases = serving(leases)
        return [
            lease
            for lease in leases
            if lease.endpoint == query.endpoint and all(tag in lease.tags for tag in query.tag)
        ]

    async def targets(self, call: Call) -> Answer:
        """GET /v1/prometheus: the whole list each time; unhealthy ones too, which Prometheus should see as such."""
        query: TargetQuery = call.query

        def matches(lease: Lease) -> bool:
            return (
                lease.protocol != "udp"
                and not lease.drain
                and lease.state != "conflict"
                and query.endpoint in (None, lease.endpoint)
                and all(tag in lease.tags for tag in query.tag)
            )

        revision = self._service.table.revision
        found = await in_order(self._service.table, lambda lease: lease.name, None, matches)
        return Answer(Rows(b"[", (_target(lease) for _, lease in found), lambda count: b"]"), revision=revision)


def _count(leases: list[Lease]) -> ServiceCount:
    health = Counter(lease.health for lease in leases if lease.endpoint == MAIN_ENDPOINT)
    instances = len({lease.instance for lease in leases})
    name = leases[0].service
    return ServiceCount(name, instances, health["passing"], health["warning"], health["critical"], health["unknown"])


def _order(seen: Lease | LanService) -> tuple[str, ...]:
    """Return the place in a listing: this host's leases before what other hosts announce."""
    if isinstance(seen, LanService):
        return ("lan", seen.name, seen.type)
    return ("", seen.instance, seen.id)


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
