"""A host that runs portd's announcer, driven by events as the service would, and a host that only observes."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from contextlib import suppress
from typing import Any

from msgspec.structs import replace

from portd.adapters.mdns import wire
from portd.adapters.mdns.announcer import Announcer
from portd.adapters.mdns.interfaces import list_interfaces
from portd.adapters.mdns.sockets import Arrival, Sockets
from portd.adapters.mdns.wire import DNSIncoming, DNSRecord
from portd.core.announcing import LanService
from portd.core.model import Announcement, Event, EventType, Lease, Owner, TcpCheck
from tests.adapters.mdns.bed import Host, wait_for

LEASE = Lease(
    id="",
    service="orders",
    instance="",
    endpoint="main",
    protocol="tcp",
    address="0.0.0.0",
    port=0,
    pool="default",
    hold="shared",
    state="bound",
    health="passing",
    check=TcpCheck(),
    lifetime="process",
    owner=Owner(known_by="peercred"),
    host="here",
    created_at=0.0,
)


def lease(
    lease_id: str,
    name: str | None = None,
    type_: str = "_http._tcp",
    port: int = 20000,
    *,
    published_as: str | None = None,
    txt: dict[str, str] | None = None,
    **fields: Any,
) -> Lease:
    """Make a lease that belongs on the LAN."""
    announce = Announcement(type=type_, name=name or lease_id, txt=txt or {}, published_as=published_as)
    return replace(LEASE, **{"id": lease_id, "instance": lease_id, "port": port, "announce": announce, **fields})


class Station:
    """An announcer on a host. Reports go back into the leases, as the service puts them there."""

    def __init__(self, host: Host, name: str = "", **options: Any) -> None:
        self.host = host
        self.leases: dict[str, Lease] = {}
        self.reports: list[tuple[str, str | None, str | None]] = []
        self._revision = 0
        self.announcer: Announcer = host.call(self._make(name or f"box{host.number}", options))
        host.at_close.append(lambda: self.close(takeover=True))

    async def _make(self, name: str, options: dict[str, Any]) -> Announcer:
        return Announcer(name, self._report, **options)

    def start(self, *restored: Lease) -> Station:
        """Start, after a restore where there is something to restore; waits until a responder was chosen."""
        self.host.call(self._start(restored))
        wait_for(lambda: self.condition()["responder"] or self.condition()["problem"], "a responder is chosen")
        return self

    async def _start(self, restored: tuple[Lease, ...]) -> None:
        self.leases |= {lease.id: lease for lease in restored}
        self.announcer.restore(restored)
        await self.announcer.start()

    def _report(self, lease_id: str, published_as: str | None, problem: str | None) -> None:
        self.reports.append((lease_id, published_as, problem))
        held = self.leases[lease_id]
        assert held.announce is not None
        self.leases[lease_id] = replace(
            held, announce=replace(held.announce, published_as=published_as, problem=problem)
        )
        self._happen("announced", self.leases[lease_id])

    def _happen(self, type_: EventType, changed: Lease) -> None:
        self._revision += 1
        self.leases[changed.id] = changed
        self.announcer.apply(Event(self._revision, type_, 0.0, changed))

    def put(self, *leases: Lease, type_: EventType = "bound") -> None:
        """Let leases be as they are given, each by an event."""
        self.host.call(self._put(leases, type_))

    async def _put(self, leases: tuple[Lease, ...], type_: EventType) -> None:
        for one in leases:
            self._happen(type_, one)

    def change(self, lease_id: str, type_: EventType = "updated", **fields: Any) -> None:
        """Change fields of a lease, by an event."""
        self.put(replace(self.leases[lease_id], **fields), type_=type_)

    def published(self, lease_id: str) -> str | None:
        """Return the name that the lease is published as."""
        held = self.leases.get(lease_id)
        announce = held.announce if held is not None else None
        return announce.published_as if announce is not None else None

    def wait_published(self, *lease_ids: str, deadline_s: float = 20.0) -> None:
        """Wait until these leases are published."""
        wait_for(
            lambda: all(self.published(lease_id) for lease_id in lease_ids), f"{lease_ids} are published", deadline_s
        )

    def condition(self) -> dict[str, Any]:
        return self.host.call(_answer(self.announcer.condition))

    def lan(self, type_: str | None = None) -> dict[str, LanService]:
        """List what is seen, by name."""
        return {service.name: service for service in self.host.call(self.announcer.lan(type_))}

    def close(self, *, takeover: bool = False) -> None:
        self.host.call(self.announcer.close(takeover=takeover))


class Observer:
    """Receives everything on a host's link, and sends queries."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.received: list[tuple[float, Arrival, DNSIncoming]] = []
        self.sockets = host.call(self._open())
        host.at_close.append(self.close)

    async def _open(self) -> Sockets:
        sockets = Sockets(self._receive, unicast=True)
        sockets.open()
        sockets.join(list_interfaces())
        return sockets

    def _receive(self, arrival: Arrival) -> None:
        message = wire.decode(arrival.data, 1.0)
        if message is not None:
            self.received.append((time.monotonic(), arrival, message))

    def forget(self) -> None:
        self.received.clear()

    def responses(self) -> list[DNSRecord]:
        """Return all records of all responses so far."""
        return [
            record for _, _, message in list(self.received) if message.is_response() for record in message.answers()
        ]

    def goodbyes(self) -> set[str]:
        """Return the names that a PTR's goodbye was said to."""
        return {record.alias for record in self.responses() if isinstance(record, wire.DNSPointer) and record.ttl == 0}

    def ask(self, *questions: tuple[str, int], unicast: bool = False) -> None:
        """Ask by multicast."""
        self.send(wire.encode_query(questions, unicast=unicast))

    def send(self, packets: list[bytes]) -> None:
        self.host.call(self._send(packets))

    async def _send(self, packets: list[bytes]) -> None:
        self.sockets.send(packets, self.sockets.groups())

    def close(self) -> None:
        self.host.call(_answer(self.sockets.close))


async def _answer(function: Any) -> Any:
    return function()


def ask_directly(host: Host, *queries: tuple[str, bytes]) -> list[list[bytes]]:
    """Send queries to servers, each from a port of its own, as dig does; returns each one's answers within a second."""
    return host.call(_ask_all(queries))


async def _ask_all(queries: tuple[tuple[str, bytes], ...]) -> list[list[bytes]]:
    return await asyncio.gather(*(_ask(server, query) for server, query in queries))


async def _ask(server: str, query: bytes) -> list[bytes]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as asking:
        asking.bind(("", 0))
        asking.sendto(query, (server, 5353))
        return await _replies(asking)


async def _replies(asking: socket.socket) -> list[bytes]:
    answers: list[bytes] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            while True:
                answers.append(await asyncio.get_running_loop().sock_recv(asking, 65535))
    return answers


async def ask_the_group(source: str, interface: str, query: bytes, port: int = 5353) -> list[bytes]:
    """Multicast a query from any address of the host; returns what is sent to that address within a second."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        asking.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(interface))
        asking.bind((source, port))
        asking.sendto(query, ("224.0.0.251", 5353))
        return await _replies(asking)


def legacy_query(name: str, type_: int, number: int = 4711) -> bytes:
    """Encode a query with an id, as a resolver that knows no multicast DNS does."""
    packet = wire.encode_query([(name, type_)])[0]
    return struct.pack(">H", number) + packet[2:]
