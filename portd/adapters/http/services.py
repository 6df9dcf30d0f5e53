"""Service discovery: names, instances with long polls, targets for Prometheus."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Annotated, Any, Final, Literal
from zlib import crc32

from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from portd.adapters.http.calls import Answer, Call, Route, encode
from portd.adapters.http.hosts import stale_header
from portd.adapters.http.paging import Cursor, Limit, Rows, decode_cursor, in_order, page
from portd.adapters.http.revisions import After, Revisions
from portd.core.announcing import LanService
from portd.core.model import MAIN_ENDPOINT, Health, Label, Lease
from portd.core.requests import Tag
from portd.core.shares import Shares
from portd.core.views import LeaseView, OwnerView, moment, view_lease
from portd.core.visibility import WhenAllCritical, is_loopback, reachable_at, serving
from portd.leasing.feed import Feed
from portd.leasing.queries import LeaseQueries
from portd.leasing.seams import OtherHosts

WAIT_MAX_S: Final = 600.0
"""The longest long poll, in seconds: proxies and kernels forget idle connections that stay longer."""

POLLS_MAX: Final = 4_096
USER_POLLS_MAX: Final = 2_048
"""Long polls at once, of all callers and of one user. Each costs a connection and about 10 KB."""

LanLookup = Callable[[str | None], Awaitable[Sequence[LanService]]]
"""Gives what the LAN offers, of one DNS-SD type or of all."""


class ServiceCount(Struct, frozen=True):
    """A service's name, whose leases it has, its instances, those that serve, and its main endpoints by health."""

    name: str
    users: list[str]
    instances: int
    serving: int
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
    """`serving=true` (or `passing=true`) leaves only instances that callers are given, `health` those with this health;
    `held=true` adds those that nobody listens for yet. `after` and `wait` make a long poll, `min` and `wait` wait until
    so many instances serve."""

    serving: bool = False
    passing: bool = False
    health: Health | None = None
    held: bool = False
    tag: tuple[Tag, ...] = ()
    endpoint: Label = MAIN_ENDPOINT
    scope: Literal["local", "cluster", "lan", "all"] | None = None
    after: After | None = None
    min: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    wait: Annotated[float, Meta(ge=0, le=WAIT_MAX_S)] = 0.0
    limit: Limit = 10_000
    cursor: Cursor | None = None


class Instances(Struct, frozen=True):
    """The instances of a service, as of a revision; those of other hosts as they were `stale` seconds ago."""

    service: str
    revision: int
    instances: list[LeaseView]
    next: str | None
    stale: float | UnsetType = UNSET


class TargetQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which endpoints Prometheus scrapes."""

    tag: tuple[Tag, ...] = ()
    endpoint: Label | None = None
    scope: Literal["local", "cluster"] | None = None


class Target(Struct, frozen=True):
    """A target of Prometheus' http_sd_configs."""

    targets: list[str]
    labels: dict[str, str]


class ServiceCalls:
    """The handlers of /v1/services and /v1/prometheus."""

    def __init__(
        self,
        queries: LeaseQueries,
        feed: Feed,
        lan: LanLookup,
        revisions: Revisions,
        when_all_critical: Callable[[str], WhenAllCritical] = lambda service: "none",
        others: OtherHosts | None = None,
    ) -> None:
        self._others = others
        self._when_all_critical = when_all_critical
        self._revisions = revisions
        self._polls = Shares("long polls", total=POLLS_MAX, per_user=USER_POLLS_MAX)
        self._queries = queries
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
        queries = self._queries
        revision = queries.revision
        found = await in_order(queries.services(), lambda name: (name,), after, lambda name: True)
        leases = ((key, some) for key, name in found if (some := list(queries.of_service(name))))
        return Answer(page("services", leases, query.limit, _count, encode), revision=revision)

    async def show(self, call: Call) -> Answer:
        """GET /v1/services/{name}."""
        query: ServiceQuery = call.query
        name = call.path["name"]
        after = decode_cursor(query.cursor, size=3)
        others = self._others if query.scope in (None, "cluster", "all") else None
        if others is not None:
            await others.ask(name)
        await self._wait(name, query, call)
        from_lan: list[LanService] = []
        if query.scope in ("lan", "all") and query.endpoint == MAIN_ENDPOINT and not query.tag:
            from_lan = [
                seen
                for seen in await self._lan(None)
                if seen.txt.get("service") == name and not (seen.ours and query.scope == "all")
            ]
        now, revision = self._queries.now().at, self._feed.revision
        asked_at = asked_address(call)
        leases = [(one, at) for one in self._select(name, query) if (at := reachable_at(one, asked_at))]
        addresses = {lease.id: at[0] for lease, at in leases}
        seen: list[Lease | LanService] = [*(lease for lease, _ in leases), *from_lan]

        def show(one: Lease | LanService) -> LeaseView:
            if isinstance(one, LanService):
                return _view_lan(one, name, now)
            is_here = self._queries.get(one.id) is not None
            view = self._queries.view(one, call.caller) if is_here else view_lease(one, call.caller)
            return view if view.address == addresses[one.id] else replace(view, address=addresses[one.id])

        found = await in_order(seen, self._order, after, lambda one: True)
        head = b'"service":%s,"revision":%d,' % (encode(name), revision)
        if others is not None and (stale_s := others.stale_s()) is not None:
            head += b'"stale":%.1f,' % stale_s
        rows = page("instances", found, query.limit, show, encode, head)
        return Answer(rows, revision=revision, headers=stale_header(others))

    async def _wait(self, name: str, query: ServiceQuery, call: Call) -> None:
        """Wait for what the query waits for, `wait` seconds at most: a change of the service, or enough instances."""
        if query.after is None and query.min is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + query.wait
        with self._polls.use(call.caller.user):
            if query.after is not None:
                await self._feed.wait(name, self._revisions.parse(query.after, "after"), query.wait)
            while query.min is not None and len(self._serving(name, query)) < query.min:
                left_s = deadline - loop.time()
                if left_s <= 0 or not await self._feed.wait(name, self._feed.revision, left_s):
                    return

    def _serving(self, name: str, query: ServiceQuery) -> list[Lease]:
        given = serving(self._leases(name, query), self._when_all_critical(name))
        return [lease for lease in given if _matches(lease, query)]

    def _leases(self, name: str, query: ServiceQuery) -> Collection[Lease]:
        """Return the leases of the hosts that the query asks about."""
        here = self._queries.of_service(name)
        if self._others is None or query.scope in ("local", "lan"):
            return here
        return [*here, *self._others.of_service(name)]

    def _order(self, seen: Lease | LanService) -> tuple[str, ...]:
        """Return the position in a listing: this host's leases, then the cluster's, then what the LAN announces."""
        if isinstance(seen, LanService):
            return ("lan", seen.name, seen.type)
        return ("" if self._queries.get(seen.id) is not None else "cluster", seen.instance, f"{seen.host}/{seen.id}")

    def _select(self, name: str, query: ServiceQuery) -> list[Lease]:
        if query.scope == "lan":
            return []
        if query.serving or query.passing:
            found = self._serving(name, query)
        else:
            leases = self._leases(name, query)
            found = [lease for lease in leases if _matches(lease, query) and (query.held or lease.state != "held")]
        return [lease for lease in found if query.health in (None, lease.health)]

    async def targets(self, call: Call) -> Answer:
        """GET /v1/prometheus: the whole list each time, of what listens. Sick and draining ones too: Prometheus should
        see them as such, and scrape the last minutes of those that drain."""
        query: TargetQuery = call.query
        asked_at = asked_address(call)

        def matches(lease: Lease) -> bool:
            return (
                lease.protocol != "udp"
                and lease.state == "bound"
                and bool(reachable_at(lease, asked_at))
                and query.endpoint in (None, lease.endpoint)
                and all(tag in lease.tags for tag in query.tag)
            )

        revision = self._queries.revision
        others = None if query.scope == "local" else self._others
        leases = self._queries if others is None else [*self._queries, *others.leases()]
        found = await in_order(leases, lambda lease: (*lease.name, lease.host), None, matches)
        rows = Rows(b"[", (_target(lease, asked_at) for _, lease in found), lambda count: b"]")
        return Answer(rows, revision=revision, headers=stale_header(others))


def asked_address(call: Call) -> str | None:
    """Return the address at which a call came in; None for the unix socket and for loopback: the caller is on this
    host."""
    transport = call.request.transport
    name = None if transport is None else transport.get_extra_info("sockname")
    if not isinstance(name, tuple):
        return None
    address = str(name[0]).partition("%")[0]
    return None if is_loopback(address) else address


def _matches(lease: Lease, query: ServiceQuery) -> bool:
    return lease.endpoint == query.endpoint and all(tag in lease.tags for tag in query.tag)


def _count(leases: list[Lease]) -> ServiceCount:
    health = Counter(lease.health for lease in leases if lease.endpoint == MAIN_ENDPOINT)
    return ServiceCount(
        leases[0].service,
        sorted({_user_of(lease) for lease in leases}),
        len({lease.instance for lease in leases}),
        len({lease.instance for lease in serving(leases)}),
        health["passing"],
        health["warning"],
        health["critical"],
        health["unknown"],
    )


def _user_of(lease: Lease) -> str:
    """Return whose a lease is as people write it: a user's name, a uid without one, or token:NAME."""
    if isinstance(lease.user, str):
        return lease.user
    return lease.owner.user if lease.owner.user and lease.owner.uid == lease.uid else str(lease.uid)


def _view_lan(seen: LanService, service: str, now: float) -> LeaseView:
    """Show what another host announces as an instance: it is announced, so it serves there; of its health and its owner
    nothing more is known here."""
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
        health="unknown",
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


def _target(lease: Lease, asked_at: str | None) -> Target:
    host = reachable_at(lease, asked_at)[0]
    labels = {
        "__meta_portd_service": lease.service,
        "__meta_portd_instance": lease.instance,
        "__meta_portd_endpoint": lease.endpoint,
        "__meta_portd_health": lease.health,
        "__meta_portd_drain": "true" if lease.drain else "false",
        "__meta_portd_tags": "," + ",".join(lease.tags) + "," if lease.tags else "",
        "__meta_portd_host": lease.host,
        **metadata_labels(lease.metadata),
    }
    return Target([f"[{host}]:{lease.port}" if ":" in host else f"{host}:{lease.port}"], labels)


def metadata_labels(metadata: dict[str, str]) -> dict[str, str]:
    """Return a label for each key. Where several keys make the same label name, a key that is one already keeps it, and
    the others get a checksum of the key as a suffix."""
    names = {key: "".join(char if char.isascii() and char.isalnum() else "_" for char in key) for key in metadata}
    count = Counter(names.values())
    return {
        "__meta_portd_metadata_"
        + (name if count[name] == 1 or name == key else f"{name}_{crc32(key.encode()):08x}"): metadata[key]
        for key, name in names.items()
    }
