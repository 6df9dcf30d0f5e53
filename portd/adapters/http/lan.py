"""The call that browses the LAN."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from msgspec import Meta, Struct

from portd.adapters.http.calls import Answer, Call, Route
from portd.core.announcing import LanService


class LanQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`type` is a DNS-SD type like `_http._tcp`; without it every type is listed."""

    type: Annotated[str, Meta(max_length=255)] | None = None


class LanList(Struct, frozen=True):
    """What the LAN offers, ours and others'."""

    services: list[LanService]


class LanCalls:
    """The handler of /v1/lan."""

    def __init__(self, lan: Callable[[str | None], Awaitable[list[LanService]]]) -> None:
        self._lan = lan

    def routes(self) -> list[Route]:
        """Return the routes of this module."""
        return [
            Route("GET", "/v1/lan", self.show, "List DNS-SD services seen on the LAN", {200: LanList}, query=LanQuery)
        ]

    async def show(self, call: Call) -> Answer:
        """GET /v1/lan."""
        return Answer(LanList(await self._lan(call.query.type)))
