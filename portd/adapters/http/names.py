"""The call that says whether the gateway serves a name, for certificates on demand."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from portd.adapters.http.calls import Answer, Call, Route
from portd.core.errors import NotFound
from portd.core.hostnames import parse_host
from portd.leasing.queries import LeaseQueries


class AskQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The name that somebody connects to, as TLS names it (SNI)."""

    domain: Annotated[str, Meta(min_length=1, max_length=255, examples=["orders.localhost"])]


class ServedName(Struct, frozen=True):
    """A name that the gateway serves: `instance` is null where any instance answers."""

    domain: str
    service: str
    instance: str | None
    endpoint: str


class NameCalls:
    """The handler of /v1/names/ask."""

    def __init__(self, queries: LeaseQueries) -> None:
        self._queries = queries

    def routes(self) -> list[Route]:
        """Return the routes of this module."""
        return [
            Route(
                "GET",
                "/v1/names/ask",
                self.ask,
                "Say whether the gateway serves a name",
                {200: ServedName},
                query=AskQuery,
                refusals=("not_found",),
            )
        ]

    async def ask(self, call: Call) -> Answer:
        """GET /v1/names/ask. Raises NotFound unless a live lease that HTTP can reach has the name."""
        domain: str = call.query.domain
        for name in parse_host(domain):
            for lease in self._queries.of_service(name.service):
                if (
                    lease.endpoint == name.endpoint
                    and name.instance in (None, lease.instance)
                    and lease.protocol != "udp"
                ):
                    return Answer(ServedName(domain, *name))
        raise NotFound(f"no live lease has the name {domain}: names are SERVICE.localhost, INSTANCE.SERVICE.localhost")
