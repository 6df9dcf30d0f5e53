"""The calls on leases: grant, list, renew, decline, drain, change, report, release."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import Annotated, Any, Final, TypeAlias

from msgspec import Meta, Struct

from portd.adapters.http.calls import Answer, Call, Route, encode
from portd.adapters.http.paging import Cursor, Limit, decode_cursor, in_order, page
from portd.core.model import Health, Label, Lease, PortNumber, Protocol, State
from portd.core.requests import (
    DrainRequest,
    HealthReport,
    LeaseRequest,
    PatchRequest,
    RenewRequest,
    Tag,
    TransferRequest,
)
from portd.core.rights import Caller
from portd.core.shares import Shares
from portd.core.views import LeaseView
from portd.leasing.queries import LeaseQueries
from portd.leasing.service import WAIT_MAX_S, Granted, LeaseService

GRANT_MAX: Final = 256
"""Requests in one call; all or none of them are granted."""
WAITING_MAX: Final = 1_024
USER_WAITING_MAX: Final = 128
"""Requests that wait for a port at once, of all callers and of one user."""
GrantBody: TypeAlias = LeaseRequest | Annotated[list[LeaseRequest], Meta(min_length=1, max_length=GRANT_MAX)]


_FIELDS: Final[dict[str, Callable[[Lease], Any]]] = {
    **{
        name: attrgetter(name)
        for name in ("service", "instance", "endpoint", "protocol", "port", "uid", "pool", "state", "health")
    },
    "pid": attrgetter("owner.pid"),
}
"""What reads the field of a lease that a filter compares."""


class LeaseQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of a listing: all that are given apply; `tag` may be repeated, and then all tags must be there."""

    service: Label | None = None
    instance: Label | None = None
    endpoint: Label | None = None
    protocol: Protocol | None = None
    port: PortNumber | None = None
    pid: Annotated[int, Meta(ge=1, le=4_194_304)] | None = None
    uid: Annotated[int, Meta(ge=0, le=4_294_967_295)] | None = None
    pool: Annotated[str, Meta(max_length=63)] | None = None
    state: State | None = None
    health: Health | None = None
    tag: tuple[Tag, ...] = ()
    limit: Limit = 1_000
    cursor: Cursor | None = None


class GrantQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """How long a grant may wait for its port."""

    wait: Annotated[
        float,
        Meta(
            ge=0, le=WAIT_MAX_S, description="Seconds to wait for a port that is taken, or for a free one of the pool."
        ),
    ] = 0.0


class LeaseList(Struct, frozen=True):
    """One page of leases; `next` is the cursor of the next one, or null."""

    leases: list[LeaseView]
    next: str | None


def as_requests(body: GrantBody) -> list[LeaseRequest]:
    """Return the requests in the body of a call for leases: one or an array."""
    return body if isinstance(body, list) else [body]


class LeaseCalls:
    """The handlers of /v1/leases."""

    def __init__(self, service: LeaseService, queries: LeaseQueries) -> None:
        self._service = service
        self._waiting = Shares("waiting requests", total=WAITING_MAX, per_user=USER_WAITING_MAX)
        self._queries = queries

    def routes(self) -> list[Route]:
        """Return the routes of this module."""
        one = {200: LeaseView}
        mine = ("unauthenticated", "not_owner", "not_found", "lease_ended", "store_unavailable", "busy")
        lease = "/v1/leases/{id}"
        return [
            Route(
                "POST",
                "/v1/leases",
                self.grant,
                "Grant one lease, or several: all or none",
                {201: LeaseView | list[LeaseView], 200: LeaseView | list[LeaseView]},
                query=GrantQuery,
                body=GrantBody,
                refusals=(
                    "unauthenticated",
                    "not_owner",
                    "service_taken",
                    "lease_differs",
                    "port_taken",
                    "port_reserved",
                    "other_network",
                    "announce_unreachable",
                    "quota_exceeded",
                    "pool_exhausted",
                    "busy",
                    "store_unavailable",
                ),
            ),
            Route("GET", "/v1/leases", self.listing, "List leases", {200: LeaseList}, query=LeaseQuery),
            Route(
                "GET",
                lease,
                self.show,
                "Show one lease, an ended one too while it is remembered",
                one,
                refusals=("not_found",),
            ),
            Route(
                "POST",
                f"{lease}/renew",
                self.renew,
                "Restart the clock of a ttl lease",
                one,
                body=RenewRequest,
                body_required=False,
                refusals=(*mine, "no_clock"),
                access="lease",
            ),
            Route(
                "POST",
                f"{lease}/decline",
                self.decline,
                "Report that another process has the port, and get another one",
                one,
                refusals=(*mine, "not_declinable", "pool_exhausted"),
                access="lease",
            ),
            Route(
                "POST",
                f"{lease}/transfer",
                self.transfer,
                "Give the lease to another process",
                one,
                body=TransferRequest,
                refusals=(*mine, "other_network"),
                access="lease",
            ),
            Route(
                "POST",
                f"{lease}/drain",
                self.drain,
                "Start or end draining",
                one,
                body=DrainRequest,
                body_required=False,
                refusals=mine,
                access="lease",
            ),
            Route(
                "PATCH",
                lease,
                self.patch,
                "Replace tags, metadata, check or announcement",
                one,
                body=PatchRequest,
                refusals=(*mine, "announce_unreachable"),
                access="lease",
            ),
            Route(
                "PUT",
                f"{lease}/health",
                self.report,
                "Report the result of a 'report' check",
                one,
                body=HealthReport,
                refusals=mine,
                access="lease",
            ),
            Route(
                "DELETE",
                lease,
                self.release,
                "Release a lease",
                {204: None},
                refusals=tuple(code for code in mine if code != "lease_ended"),
                access="lease",
            ),
        ]

    async def grant(self, call: Call) -> Answer:
        """POST /v1/leases."""
        requests, wait_s = as_requests(call.body), call.query.wait
        with self._waiting.use(call.caller.user) if wait_s else nullcontext():
            granted = await self._service.grant(requests, call.caller, wait_s)
        return self.show_granted(granted, call.body, call.caller)

    def show_granted(self, granted: Granted, body: GrantBody, caller: Caller) -> Answer:
        """Show the outcome of a grant: one lease, or an array where the request was one."""
        views = [
            self._queries.view(lease, caller, token=token)
            for lease, token in zip(granted.leases, granted.tokens, strict=True)
        ]
        return Answer(views if isinstance(body, list) else views[0], 201 if granted.is_new else 200)

    async def listing(self, call: Call) -> Answer:
        """GET /v1/leases, in the order of (service, instance, endpoint)."""
        query: LeaseQuery = call.query
        after = decode_cursor(query.cursor, size=4)
        leases = await self._candidates(query)
        revision = self._queries.revision
        found = await in_order(leases, _order, after, partial(_matches, filters=_filters(query), tags=query.tag))
        show = partial(self._view, caller=call.caller)
        return Answer(page("leases", found, query.limit, show, encode), revision=revision)

    async def show(self, call: Call) -> Answer:
        """GET /v1/leases/{id}."""
        return self._answer(await self._queries.find(call.path["id"]), call)

    async def renew(self, call: Call) -> Answer:
        """POST /v1/leases/{id}/renew."""
        return self._answer(await self._service.renew(call.path["id"], call.caller, call.body.seconds), call)

    async def decline(self, call: Call) -> Answer:
        """POST /v1/leases/{id}/decline."""
        return self._answer(await self._service.decline(call.path["id"], call.caller), call)

    async def transfer(self, call: Call) -> Answer:
        """POST /v1/leases/{id}/transfer."""
        return self._answer(await self._service.transfer(call.path["id"], call.caller, call.body.pid), call)

    async def drain(self, call: Call) -> Answer:
        """POST /v1/leases/{id}/drain."""
        return self._answer(await self._service.drain(call.path["id"], call.caller, call.body.drain), call)

    async def patch(self, call: Call) -> Answer:
        """PATCH /v1/leases/{id}."""
        return self._answer(await self._service.patch(call.path["id"], call.caller, call.body), call)

    async def report(self, call: Call) -> Answer:
        """PUT /v1/leases/{id}/health."""
        return self._answer(await self._service.report(call.path["id"], call.caller, call.body), call)

    async def release(self, call: Call) -> Answer:
        """DELETE /v1/leases/{id}."""
        await self._service.release(call.path["id"], call.caller)
        return Answer(None, 204)

    async def _candidates(self, query: LeaseQuery) -> Any:
        if query.state == "ended":
            return await self._queries.ended(query.service)
        if query.service is not None:
            return self._queries.of_service(query.service)
        if query.port is not None:
            return self._queries.on_port(query.port)
        return self._queries

    def _answer(self, lease: Lease, call: Call) -> Answer:
        return Answer(self._view(lease, call.caller))

    def _view(self, lease: Lease, caller: Caller) -> LeaseView:
        return self._queries.view(lease, caller)


def _filters(query: LeaseQuery) -> list[tuple[Callable[[Lease], Any], Any]]:
    """Return what reads the field of each filter that is given, and the value that it must have."""
    return [(get, value) for name, get in _FIELDS.items() if (value := getattr(query, name)) is not None]


def _matches(lease: Lease, filters: list[tuple[Callable[[Lease], Any], Any]], tags: tuple[str, ...]) -> bool:
    return all(get(lease) == value for get, value in filters) and all(tag in lease.tags for tag in tags)


def _order(lease: Lease) -> tuple[str, str, str, str]:
    return (lease.service, lease.instance, lease.endpoint, lease.id)
