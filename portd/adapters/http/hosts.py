"""The hosts of the cluster: the call that lists them, and how an answer says that its view of them is old."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

from msgspec import Struct

from portd import __version__
from portd.adapters.http.calls import Answer, Call, Route
from portd.core.views import moment
from portd.leasing.queries import LeaseQueries
from portd.leasing.seams import OtherHosts


class Host(Struct, frozen=True):
    """A host of the cluster, or this one."""

    host: str
    address: str
    version: str
    services: int
    instances: int
    seen: datetime | None
    self: bool


class HostCalls:
    """The handler of /v1/hosts. `others` is None where no cluster is configured."""

    def __init__(self, queries: LeaseQueries, others: OtherHosts | None) -> None:
        self._queries = queries
        self._others = others

    def routes(self) -> list[Route]:
        """Return the routes of this module."""
        return [Route("GET", "/v1/hosts", self.list_hosts, "List the hosts of the cluster", {200: list[Host]})]

    async def list_hosts(self, call: Call) -> Answer:
        """GET /v1/hosts."""
        now = self._queries.now().at
        if self._others is None:
            names = {(lease.service, lease.instance) for lease in self._queries}
            services = len({service for service, _ in names})
            at: Any = moment(now)
            return Answer([Host(self._queries.host, "", __version__, services, len(names), at, True)])
        found = [
            Host(
                one.host,
                one.address,
                one.version,
                len(one.services),
                sum(one.services.values()),
                None if one.age_s is None else moment(now - one.age_s),
                not number,
            )
            for number, one in enumerate(self._others.hosts())
        ]
        return Answer(found, headers=stale_header(self._others))


def stale_header(others: OtherHosts | None) -> dict[str, str]:
    """Return the header that says how old a cluster-wide answer is; none while it is fresh."""
    stale_s = None if others is None else others.stale_s()
    return {} if stale_s is None else {"X-Portd-Stale": str(math.ceil(stale_s))}
