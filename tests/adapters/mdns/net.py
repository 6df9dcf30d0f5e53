"""A LAN in memory: hosts with portd's rules for names and answers, real packets, and a clock that a test advances.

No socket, no thread, no waiting: what takes seconds on a network takes milliseconds here.
"""

from __future__ import annotations

import heapq
import random
import socket
from collections.abc import Callable
from ipaddress import IPv4Interface

from portd.adapters.mdns import wire
from portd.adapters.mdns.answering import Answerer
from portd.adapters.mdns.claims import Announcement, Claims, Goodbye, Probe
from portd.adapters.mdns.interfaces import Interface
from portd.adapters.mdns.sockets import PORT, Arrival, Target
from portd.adapters.mdns.wire import DNSIncoming, DNSRecord
from portd.adapters.mdns.zone import Entry, HostName, Service, Zone

LINK = 1
GROUP = Target(socket.AF_INET, LINK)


def service(id_: str, name: str | None = None, port: int = 1, type_: str = "_http._tcp", **fields: object) -> Service:
    """Make a service."""
    return Service(id=id_, type=type_, name=name or id_, port=port, **fields)  # type: ignore[arg-type]


def arrival(data: bytes, source: str, *, port: int = PORT, is_multicast: bool = True) -> Arrival:
    """Make an arrival over IPv4."""
    return Arrival(data, socket.AF_INET, LINK, source, port, is_multicast)


class Net:
    """A clock, hosts, and packets in flight, of which `loss` (0 to 1) get lost. Hosts of different sides are apart."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 1000.0
        self.loss = 0.0
        self.random = random.Random(seed)
        self.hosts: list[NetHost] = []
        self.sent: list[tuple[float, str, Target, DNSIncoming]] = []
        self._in_flight: list[tuple[float, int, NetHost, Arrival]] = []
        self._number = 0

    def host(self, name: str = "") -> NetHost:
        """Add a host with one interface that is up."""
        host = NetHost(self, f"10.9.0.{len(self.hosts) + 1}", name or f"box{len(self.hosts) + 1}")
        self.hosts.append(host)
        return host

    def send(self, sender: NetHost, target: Target, packets: list[bytes]) -> None:
        """Put packets in flight, each for up to 10 ms."""
        for packet in packets:
            message = wire.decode(packet, 1.0)
            assert message is not None
            self.sent.append((self.now, sender.address, target, message))
            for host in self.hosts:
                if host is sender or host.side != sender.side or target.address not in (None, host.address):
                    continue
                if self.random.random() < self.loss:
                    continue
                self._number += 1
                at = self.now + self.random.uniform(0.0001, 0.010)
                is_multicast = target.address is None
                heapq.heappush(
                    self._in_flight,
                    (at, self._number, host, arrival(packet, sender.address, is_multicast=is_multicast)),
                )

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Advance the clock, event by event, for at most so long."""
        end = self.now + seconds
        while not until():
            times = [at for host in self.hosts if (at := host.deadline()) is not None]
            times += [self._in_flight[0][0]] if self._in_flight else []
            if not times or min(times) > end:
                self.now = end
                return
            self.now = max(self.now, min(times))
            while self._in_flight and self._in_flight[0][0] <= self.now:
                _, _, host, packet = heapq.heappop(self._in_flight)
                host.receive(packet)
            for host in self.hosts:
                host.tick()

    def records(self) -> list[DNSRecord]:
        """Return the records of all responses sent so far."""
        return [record for _, _, _, message in self.sent if message.is_response() for record in message.answers()]


class NetHost:
    """A host: its zone, its claims, its answers, and what was reported of its services."""

    def __init__(self, net: Net, address: str, name: str) -> None:
        self.net = net
        self.address = address
        self.side = 0
        self.link = Interface(LINK, "eth0", (IPv4Interface(f"{address}/24"),), ())
        self.zone = Zone(HostName(name))
        self.claims = Claims(self.zone, net.random.uniform)
        self.answerer = Answerer(self.zone, net.random.uniform)
        self.reports: list[tuple[str, str | None, str | None]] = []
        self.set_link(up=True)

    def set_link(self, *, up: bool, interrupted: bool = False) -> None:
        """Bring the interface up or down."""
        self.answerer.links = {LINK: self.link} if up else {}
        self.claims.set_links(self.net.now, self.answerer.links, frozenset({LINK}) if interrupted else frozenset())
        self.settle()

    def publish(self, *services: Service) -> None:
        """Publish services under the names that they request."""
        for one in services:
            self.claims.publish(self.net.now, one, one.name)
        self.settle()

    def withdraw(self, id_: str) -> None:
        """Withdraw a service."""
        self.claims.withdraw(self.net.now, id_)
        self.settle()

    def settle(self) -> None:
        self.reports += [tuple(outcome) for outcome in self.claims.outcomes()]

    def published(self, id_: str) -> str | None:
        """Return the name that a service is published as now."""
        entry = self.zone.entries.get(id_)
        return entry.published_as if entry is not None else None

    def entry(self, id_: str) -> Entry:
        return self.zone.entries[id_]

    def deadline(self) -> float | None:
        return min((at for at in (self.claims.deadline(), self.answerer.deadline()) if at is not None), default=None)

    def tick(self) -> None:
        """Send what is due."""
        now = self.net.now
        for message in self.claims.tick(now):
            match message:
                case Probe(link, claims):
                    packets = wire.encode_probe([(claim.full_name, claim.unique(link)) for claim in claims])
                case Announcement(link, claims):
                    entries = [claim for claim in claims if isinstance(claim, Entry)]
                    records = [record for entry in entries for record in entry.records()]
                    records += self.zone.host.unique(link)
                    packets = wire.encode_response(records)
                    self.answerer.note_multicast(now, GROUP, records)
                case Goodbye(_, records):
                    packets = wire.encode_response([wire.with_ttl(record, 0) for record in records])
            self.net.send(self, GROUP, packets)
        for target, packets in self.answerer.tick(now):
            self.net.send(self, target, packets)
        self.settle()

    def receive(self, packet: Arrival) -> None:
        """Handle a packet, as the responder does."""
        now = self.net.now
        message = wire.decode(packet.data, now * 1000)
        assert message is not None
        if message.is_response():
            self.claims.receive_response(now, packet.link, message.answers())
        else:
            if message.is_probe():
                self.claims.receive_probe(now, packet.link, message.questions, message.answers())
            for target, packets in self.answerer.receive(now, packet, message):
                self.net.send(self, target, packets)
        self.settle()
