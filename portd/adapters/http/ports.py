"""Who has which port: the kernel's sockets and the lease table, side by side.

One port is read whole: every socket on the number, whatever its state and address. The list of all ports reads the
listeners alone; calls that come together share one search for their processes, and answers are rendered in slices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from portd.adapters.http.authenticator import user_name
from portd.adapters.http.calls import Answer, Call, Route
from portd.adapters.http.paging import SCAN_SLICE, Rows
from portd.core.bindings import overlaps
from portd.core.errors import InvalidRequest
from portd.core.model import Lease, Listener, Owner, Protocol
from portd.core.ownership import Holder, key_of, shows
from portd.core.rights import Caller, sees_process
from portd.core.views import LeaseView, moment
from portd.leasing.queries import LeaseQueries
from portd.leasing.seams import PortSocket, SocketKind, SocketTable

Verdict = Literal["held", "bound", "conflict", "unmanaged", "taken", "cooling", "declined", "static", "free"]
KernelProtocol = Literal["tcp", "udp"]

CONNECTED_MAX: Final = 100
"""Connections that are listed of one port. Those of a process that listens there are its clients, and left out."""
ENDED_MAX: Final = 50
"""Ended leases of a port among which the one is searched whose process a socket belongs to."""


class SocketView(Struct, frozen=True):
    """A socket on the port and its process; what the kernel hides is null, but never the uid."""

    address: str
    socket: SocketKind
    pid: int | None
    uid: int
    user: str | None
    exe: str | None
    cmdline: tuple[str, ...] | None
    unit: str | None
    started_at: datetime | None


class PortView(Struct, frozen=True):
    """One port number of one protocol.

    `verdict`: `held`, `bound` or `conflict` (leased), `unmanaged` (listened on without a lease), `taken` (bound or
    connected, not listened on), `cooling`, `declined`, `static` or `free`. `left_over_of` is the ended lease whose
    process a socket belongs to; the list of all ports leaves it out.
    """

    port: int
    protocol: KernelProtocol
    verdict: Verdict
    lease: LeaseView | None
    left_over_of: LeaseView | None
    listeners: list[SocketView]


class PortList(Struct, frozen=True):
    """Every port that is leased, static, cooling, declined, or listened on."""

    ports: list[PortView]


class PortQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Without a protocol the one that is in use is shown, TCP first."""

    protocol: KernelProtocol | None = None


class HistoryQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`at` selects one moment (RFC 3339)."""

    protocol: Protocol | None = None
    at: Annotated[datetime, Meta(tz=True)] | None = None
    limit: Annotated[int, Meta(ge=1, le=1_000)] = 100


class History(Struct, frozen=True):
    """Who had a port, newest first."""

    leases: list[LeaseView]


class PortCalls:
    """The handlers of /v1/ports. `sockets` is a table of its own: calls never delay the state watch's."""

    def __init__(self, queries: LeaseQueries, sockets: SocketTable) -> None:
        self._queries = queries
        self._sockets = sockets
        self._owners = OwnerSearch(sockets)

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
        owners = await self._owners.find({one.inode for some in listeners.values() for one in some})
        used = set(listeners)
        for count, lease in enumerate(list(self._queries), 1):
            used.update((lease.port, protocol) for protocol in lease.protocols)
            if count % SCAN_SLICE == 0:
                await asyncio.sleep(0)
        for binding in (
            *(quarantine.binding for quarantine in self._queries.quarantines()),
            *(static.binding for static in self._queries.statics()),
        ):
            used.update((binding.port, protocol) for protocol in _parts(binding.protocol))

        def views() -> Iterator[PortView]:
            for port, protocol in sorted(used):
                sockets = [PortSocket(one, "listening") for one in listeners.get((port, protocol), ())]
                yield from self._views(port, protocol, sockets, owners, call.caller)

        return Answer(Rows(b'{"ports":[', views(), lambda count: b"]}"))

    async def show(self, call: Call) -> Answer:
        """GET /v1/ports/{port}: one view of everything on the number."""
        port = _port(call)
        wanted = call.query.protocol
        protocols: tuple[KernelProtocol, ...] = (wanted,) if wanted else ("tcp", "udp")
        sockets = [each for each in self._sockets.on_port(port) if each.socket.protocol in protocols]
        likely = [lease.owner.pid for lease in self._queries.on_port(port) if lease.owner.pid is not None]
        holders = await self._sockets.holders({each.socket.inode for each in sockets}, likely)
        sockets = without_clients(sockets, holders)
        views = []
        for protocol in protocols:
            of_protocol = [each for each in sockets if each.socket.protocol == protocol]
            ended = await self._left_over(port, protocol, [holders[each.socket.inode] for each in of_protocol])
            views.append(self._view(port, protocol, of_protocol, _owners_of(holders), call.caller, ended))
        return Answer(next((view for view in views if view.verdict != "free"), views[0]))

    async def history(self, call: Call) -> Answer:
        """GET /v1/ports/{port}/history."""
        query: HistoryQuery = call.query
        at = query.at.timestamp() if query.at is not None else None
        leases = await self._queries.history(_port(call), query.protocol, at, query.limit)
        return Answer(History([self._show_lease(lease, call.caller) for lease in leases]))

    # --- views ---

    def _view(
        self,
        port: int,
        protocol: KernelProtocol,
        sockets: Sequence[PortSocket],
        owners: Mapping[int, Owner],
        caller: Caller,
        ended: Lease | None,
    ) -> PortView:
        """Show a port with all of its sockets, and the one of its leases whose state says most."""
        leases = [lease for lease in self._queries.on_port(port) if protocol in lease.protocols]
        lease = min(leases, key=lambda each: _TELLING.index(each.state), default=None)
        return PortView(
            port,
            protocol,
            self._verdict(port, protocol, sockets) if lease is None or lease.state == "ended" else lease.state,
            None if lease is None else self._show_lease(lease, caller),
            None if ended is None else self._show_lease(ended, caller),
            [_show_socket(each, owners, caller) for each in sockets],
        )

    def _views(
        self,
        port: int,
        protocol: KernelProtocol,
        sockets: list[PortSocket],
        owners: Mapping[int, Owner],
        caller: Caller,
    ) -> Iterable[PortView]:
        """Show a port in the list: once, or once for each of the leases on its addresses (own addresses)."""
        leases = [lease for lease in self._queries.on_port(port) if protocol in lease.protocols]
        if len(leases) < 2:
            yield self._view(port, protocol, sockets, owners, caller, None)
            return
        unclaimed = list(sockets)
        for lease in leases:
            own = [each for each in sockets if overlaps(each.socket.address, lease.address, v6only=each.socket.v6only)]
            unclaimed = [each for each in unclaimed if each not in own]
            shown = [_show_socket(each, owners, caller) for each in own]
            if lease.state != "ended":
                yield PortView(port, protocol, lease.state, self._show_lease(lease, caller), None, shown)
        if unclaimed:
            shown = [_show_socket(each, owners, caller) for each in unclaimed]
            yield PortView(port, protocol, self._verdict(port, protocol, unclaimed), None, None, shown)

    def _verdict(self, port: int, protocol: KernelProtocol, sockets: Sequence[PortSocket]) -> Verdict:
        """Judge a port without a lease. A static port is static whoever has it: its sockets are listed."""
        if any(protocol in _parts(static.protocol) for static in self._queries.static_on(port)):
            return "static"
        if any(each.kind == "listening" for each in sockets):
            return "unmanaged"
        if sockets:
            return "taken"
        quarantines = self._queries.quarantines_on(port)
        kinds = {each.kind for each in quarantines if protocol in _parts(each.binding.protocol)}
        if "declined" in kinds:
            return "declined"
        return "cooling" if kinds else "free"

    def _show_lease(self, lease: Lease, caller: Caller) -> LeaseView:
        return self._queries.view(lease, caller)

    async def _left_over(self, port: int, protocol: KernelProtocol, holders: Sequence[Holder]) -> Lease | None:
        """Find the ended lease that a process on the port was the owner of, descends from, or has the token of."""
        if not any(holder.owner is not None for holder in holders):
            return None
        leases = await self._queries.history(port, None, None, ENDED_MAX)
        ended = [lease for lease in leases if lease.ended_because is not None and protocol in lease.protocols]
        return next((lease for lease in ended if any(is_left_over(holder, lease) for holder in holders)), None)


_TELLING: Final = ("conflict", "bound", "held", "ended")


class OwnerSearch:
    """Searches for the processes of sockets, once for all calls that come while a search is under way."""

    def __init__(self, sockets: SocketTable) -> None:
        self._sockets = sockets
        self._wanted: set[int] | None = None
        self._search: asyncio.Task[dict[int, Owner]] | None = None

    async def find(self, inodes: Collection[int]) -> Mapping[int, Owner]:
        """Find and describe the process of each socket; hidden ones are left out."""
        if self._wanted is None:
            self._wanted = set()
            self._search = asyncio.create_task(self._search_after(self._search))
        assert self._search is not None
        self._wanted.update(inodes)
        return await asyncio.shield(self._search)

    async def _search_after(self, before: asyncio.Task[dict[int, Owner]] | None) -> dict[int, Owner]:
        if before is not None and not before.done():
            await asyncio.wait([before])
        wanted, self._wanted = self._wanted or set(), None
        return await self._sockets.owners(wanted)


def is_left_over(holder: Holder, ended: Lease) -> bool:
    """Return whether a process is an ended lease's: its owner, a descendant of it, or a bearer of its token."""
    known = {*ended.kin} | (set() if ended.process is None else {key_of(ended.process)})
    return any(ancestor in known for ancestor in holder.ancestors) or any(
        shows(credential, ended) for credential in holder.credentials
    )


def without_clients(sockets: Sequence[PortSocket], holders: Mapping[int, Holder]) -> list[PortSocket]:
    """Leave out the connections that a listener on the port has accepted, and all but the first of the others."""
    listening = {_pid(holders[each.socket.inode]) for each in sockets if each.kind == "listening"}
    kept = [each for each in sockets if each.kind != "connected"]
    connected = [
        each for each in sockets if each.kind == "connected" and _pid(holders[each.socket.inode]) not in listening
    ]
    return kept + connected[:CONNECTED_MAX]


def _pid(holder: Holder) -> int | None:
    return None if holder.owner is None else holder.owner.pid


def _owners_of(holders: Mapping[int, Holder]) -> dict[int, Owner]:
    return {inode: holder.owner for inode, holder in holders.items() if holder.owner is not None}


def _show_socket(each: PortSocket, owners: Mapping[int, Owner], caller: Caller) -> SocketView:
    """Show a socket. The program of another user's process may hold secrets as its command line does: the kernel shows
    its path to that user alone."""
    found, owner = each.socket, owners.get(each.socket.inode)
    if owner is None:  # hidden from portd: the socket's uid is all that the kernel shows
        return SocketView(found.address, each.kind, None, found.uid, user_name(found.uid), None, None, None, None)
    is_shown = sees_process(caller, owner.uid)
    return SocketView(
        found.address,
        each.kind,
        owner.pid,
        owner.uid if owner.uid is not None else found.uid,
        owner.user,
        owner.exe if is_shown else None,
        owner.cmdline if is_shown else None,
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
