"""Who has which port: the kernel's word and the lease table, side by side."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct

from portd.adapters.http.authenticator import user_name
from portd.adapters.http.calls import Answer, Call, Route
from portd.core.bindings import overlaps
from portd.core.errors import InvalidRequest
from portd.core.model import Listener, Owner, Protocol
from portd.core.rights import Caller, sees_cmdline
from portd.core.views import LeaseView, moment
from portd.leasing.seams import SocketTable
from portd.leasing.service import LeaseService

Verdict = Literal["held", "bound", "conflict", "unmanaged", "cooling", "declined", "static", "free"]
KernelProtocol = Literal["tcp", "udp"]


class ListenerView(Struct, frozen=True):
    """A listening socket and its process; what the kernel hides from portd is null, but never the uid."""

    address: str
    pid: int | None
    uid: int
    user: str | None
    exe: str | None
    cmdline: tuple[str, ...] | None
    unit: str | None
    started_at: datetime | None


class PortView(Struct, frozen=True):
    """One port number of one protocol."""

    port: int
    protocol: KernelProtocol
    verdict: Verdict
    lease: LeaseView | None
    listeners: list[ListenerView]


class PortList(Struct, frozen=True):
    """Every port that is leased, static, cooling, declined, or listened on."""

    ports: list[PortView]


class PortQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Without a protocol the one that is in use is shown, tcp first."""

    protocol: KernelProtocol | None = None


class HistoryQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`at` asks for one moment (RFC 3339)."""

    protocol: Protocol | None = None
    at: datetime | None = None
    limit: Annotated[int, Meta(ge=1, le=1_000)] = 100


class History(Struct, frozen=True):
    """Who had a port, newest first."""

    leases: list[LeaseView]


class PortCalls:
    """The handlers of /v1/ports."""

    def __init__(self, service: LeaseService, sockets: SocketTable) -> None:
        self._service = service
        self._sockets = sockets

    def routes(self) -> list[Route]:
        """Return the routes of this module."""
        return [
            Route("GET", "/v1/ports", self.listing, "List every port that is in use in any way", {200: PortList}),
            Route("GET", "/v1/ports/{port}", self.show, "Show who has a port", {200: PortView}, query=PortQuery),
            Route(
                "GET",
                "/v1/ports/{port}/history",
                self.history,
                "Show who had a port",
                {200: History},
                query=HistoryQuery,
            ),
        ]

    async def listing(self, call: Call) -> Answer:
        """GET /v1/ports."""
        listeners: dict[tuple[int, KernelProtocol], list[Listener]] = {}
        for listener in self._sockets.listeners():
            listeners.setdefault((listener.port, listener.protocol), []).append(listener)
        places = set(listeners)
        for lease in self._service.table:
            places.update((lease.port, protocol) for protocol in lease.protocols)
        for place in (
            *(q.place for q in self._service.allocator.quarantines()),
            *(static.place for static in self._service.allocator.statics()),
        ):
            places.update((place.port, protocol) for protocol in _parts(place.protocol))
        owners = await self._sockets.owners({one.inode for some in listeners.values() for one in some})
        views = [
            view
            for place in sorted(places)
            for view in self._views(*place, listeners.get(place, []), owners, call.caller)
        ]
        return Answer(PortList(views))

    async def show(self, call: Call) -> Answer:
        """GET /v1/ports/{port}."""
        port = _port(call)
        listeners = self._sockets.listeners(port)
        likely = [lease.owner.pid for lease in self._service.table.on_port(port) if lease.owner.pid is not None]
        owners = await self._sockets.owners({one.inode for one in listeners}, likely)
        wanted = call.query.protocol
        protocols: tuple[KernelProtocol, ...] = (wanted,) if wanted else ("tcp", "udp")
        views = [
            view
            for protocol in protocols
            for view in self._views(
                port, protocol, [one for one in listeners if one.protocol == protocol], owners, call.caller
            )
        ]
        return Answer(next((view for view in views if view.verdict != "free"), views[0]))

    async def history(self, call: Call) -> Answer:
        """GET /v1/ports/{port}/history."""
        query: HistoryQuery = call.query
        at = query.at.timestamp() if query.at is not None else None
        leases = await self._service.history(_port(call), query.protocol, at, query.limit)
        return Answer(
            History([self._service.view(lease, cmdline=sees_cmdline(call.caller, lease.owner.uid)) for lease in leases])
        )

    def _views(
        self, port: int, protocol: KernelProtocol, listeners: list[Listener], owners: dict[int, Owner], caller: Caller
    ) -> Iterable[PortView]:
        """View a port: once for each lease that is on it, on whatever address, and once for listeners of nobody's."""
        leases = [lease for lease in self._service.table.on_port(port) if protocol in lease.protocols]
        unclaimed = list(listeners)
        for lease in leases:
            its_own = [one for one in listeners if overlaps(one.address, lease.address, v6only=one.v6only)]
            unclaimed = [one for one in unclaimed if one not in its_own]
            yield PortView(
                port,
                protocol,
                lease.state if lease.state != "ended" else "free",
                self._service.view(lease, cmdline=sees_cmdline(caller, lease.owner.uid)),
                [_listener_view(one, owners, caller) for one in its_own],
            )
        if unclaimed or not leases:
            verdict = "unmanaged" if unclaimed else self._verdict(port, protocol)
            yield PortView(port, protocol, verdict, None, [_listener_view(one, owners, caller) for one in unclaimed])

    def _verdict(self, port: int, protocol: KernelProtocol) -> Verdict:
        allocator = self._service.allocator
        kinds = {q.kind for q in allocator.quarantines_on(port) if protocol in _parts(q.place.protocol)}
        if "declined" in kinds:
            return "declined"
        if any(static.port == port and protocol in _parts(static.protocol) for static in allocator.statics()):
            return "static"
        return "cooling" if kinds else "free"


def _listener_view(listener: Listener, owners: dict[int, Owner], caller: Caller) -> ListenerView:
    owner = owners.get(listener.inode)
    if owner is None:  # hidden from portd: the socket's uid is all that the kernel tells
        return ListenerView(listener.address, None, listener.uid, user_name(listener.uid), None, None, None, None)
    return ListenerView(
        listener.address,
        owner.pid,
        owner.uid if owner.uid is not None else listener.uid,
        owner.user,
        owner.exe,
        owner.cmdline if sees_cmdline(caller, owner.uid) else None,
        owner.unit,
        moment(owner.started_at),
    )


def _parts(protocol: Protocol) -> tuple[KernelProtocol, ...]:
    return ("tcp", "udp") if protocol == "both" else (protocol,)


def _port(call: Call) -> int:
    text = call.path["port"]
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise InvalidRequest(f"{text[:20]!r} is not a port (1 to 65535)", pointer="/port")
    return int(text)
