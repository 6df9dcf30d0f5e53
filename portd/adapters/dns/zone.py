"""The table of names that queries are answered from, kept up to date by events. Pure: no sockets, no clock.

A look-up is one step into a dict. A lease's change costs its own records at once, and the answers of its service when
they are next asked for, so a burst of changes is paid for once. Names below the zone, with SERVICE, INSTANCE and
ENDPOINT as leased, and PROTOCOL `tcp` or `udp`:

    SERVICE                       A, AAAA and TXT of the main endpoints
    _SERVICE._PROTOCOL            SRV of the main endpoints
    _ENDPOINT._PROTOCOL.SERVICE   SRV of an endpoint
    INSTANCE.SERVICE              A, AAAA, TXT and SRV of an instance's main endpoint
    ENDPOINT.INSTANCE.SERVICE     the same of another endpoint: it may be bound to another address

A name exists while a live lease has it, and answers with nothing while none of its leases serves (`core.lookup`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from dns.rdatatype import AAAA, ANY, NS, SOA, SRV, TXT, A

from portd.adapters.dns.answers import Answer
from portd.adapters.dns.records import (
    Endpoint,
    Record,
    StartOfAuthority,
    address_records,
    label,
    minimal_any,
    name_server,
    zone_name,
)
from portd.core.model import MAIN_ENDPOINT, Lease, Protocol
from portd.core.visibility import serving

HEADER_BYTES: Final = 12
QUESTION_TAIL_BYTES: Final = 4

_ANY_ANSWER: Final = (minimal_any(),)
_OF_TYPE: Final[dict[int, Callable[[Endpoint], Sequence[Record]]]] = {
    A: lambda endpoint: endpoint.a,
    AAAA: lambda endpoint: endpoint.aaaa,
    TXT: lambda endpoint: endpoint.txt,
    SRV: lambda endpoint: (endpoint.srv,),
}


class Source:
    """Something that answers are made from: they are made anew when its version has changed."""

    version = 0


_NOBODY: Final = Source()


class Service(Source):
    """The endpoints of a service's live leases, and the names that they have in common."""

    def __init__(self, name: str, zone: bytes) -> None:
        self.wire = label(name) + zone
        self.shared: dict[tuple[str, Protocol], tuple[Node, ...]] = {}  # by endpoint and protocol
        self._endpoints: dict[str, dict[str, Endpoint]] = {}
        self._serving: dict[str, dict[str, Endpoint]] = {}

    def put(self, endpoint: Endpoint) -> None:
        """Enter an endpoint, or replace it, or tell that its lease has changed."""
        lease = endpoint.lease
        self._endpoints.setdefault(lease.endpoint, {})[lease.instance] = endpoint
        self._change(lease.endpoint)

    def remove(self, lease: Lease) -> bool:
        """Take an endpoint out; True when the service has none left."""
        instances = self._endpoints[lease.endpoint]
        del instances[lease.instance]
        if not instances:
            del self._endpoints[lease.endpoint]
        self._change(lease.endpoint)
        return not self._endpoints

    def serving(self, endpoint: str) -> dict[str, Endpoint]:
        """Return the instances to send callers to, by name."""
        found = self._serving.get(endpoint)
        if found is None:
            all_of_them = self._endpoints.get(endpoint, {})
            leases = serving(each.lease for instances in self._endpoints.values() for each in instances.values())
            found = self._serving[endpoint] = {
                lease.instance: all_of_them[lease.instance] for lease in leases if lease.endpoint == endpoint
            }
        return found

    def _change(self, endpoint: str) -> None:
        self._serving.clear()
        self.version += 1


class Node:
    """A name, which exists while it has `leases`; this kind has no records of its own, only names below it."""

    __slots__ = ("_answers", "_seen", "_source", "_start", "leases", "name")

    def __init__(self, name: bytes, source: Source) -> None:
        self.name = name
        self.leases = 0
        self._start = HEADER_BYTES + len(name) + QUESTION_TAIL_BYTES
        self._source = source
        self._seen = source.version
        self._answers: dict[int, Answer | None] = {}

    def answer(self, qtype: int) -> Answer | None:
        """Return the answer to a question of this type, or None when there is no such record now."""
        version = self._source.version
        if self._seen != version:
            self._answers.clear()
            self._seen = version
        try:
            return self._answers[qtype]
        except KeyError:
            records = _ANY_ANSWER if qtype == ANY else self.records(qtype)
            found = Answer(records, self._start, version) if records else None
            if records is not None:  # types that this name never has are not kept: there are 65,536 of them
                self._answers[qtype] = found
            return found

    def records(self, qtype: int) -> Sequence[Record] | None:
        """Return the records of a type: none now, or None when this kind of name never has any."""
        return None


class _FixedNode(Node):
    """A name with records that leases don't change."""

    __slots__ = ("_fixed",)

    def __init__(self, name: bytes, fixed: dict[int, Sequence[Record]]) -> None:
        super().__init__(name, _NOBODY)
        self._fixed = fixed

    def records(self, qtype: int) -> Sequence[Record] | None:
        return self._fixed.get(qtype)


class _ApexNode(Node):
    """The zone's own name."""

    __slots__ = ("_zone",)

    def __init__(self, zone: Zone) -> None:
        super().__init__(zone.wire, zone)
        self._zone = zone

    def records(self, qtype: int) -> Sequence[Record] | None:
        if qtype == SOA:
            return (self._zone.soa,)
        return (self._zone.ns,) if qtype == NS else None


class _ServiceNode(Node):
    """A service's or an instance's name: where it is, and what is said about it."""

    __slots__ = ("_endpoint", "_instance", "_service")

    def __init__(self, name: bytes, service: Service, endpoint: str, instance: str | None) -> None:
        super().__init__(name, service)
        self._service = service
        self._endpoint = endpoint
        self._instance = instance

    def records(self, qtype: int) -> Sequence[Record] | None:
        pick = _OF_TYPE.get(qtype)
        if pick is None or (qtype == SRV and self._instance is None):
            return None
        shown = self._service.serving(self._endpoint)
        if self._instance is None:
            return _unique(record for each in shown.values() for record in pick(each))
        endpoint = shown.get(self._instance)
        return pick(endpoint) if endpoint is not None else ()


class _PortNode(Node):
    """A name that the ports of an endpoint are found under (RFC 2782)."""

    __slots__ = ("_endpoint", "_protocol", "_service")

    def __init__(self, name: bytes, service: Service, endpoint: str, protocol: str) -> None:
        super().__init__(name, service)
        self._service = service
        self._endpoint = endpoint
        self._protocol = protocol

    def records(self, qtype: int) -> Sequence[Record] | None:
        if qtype != SRV:
            return None
        shown = self._service.serving(self._endpoint).values()
        return [each.srv for each in shown if self._protocol in each.lease.protocols]


class Zone(Source):
    """All names of the zone. `ttl` is in seconds; `hosts` are the addresses that leases of all addresses answer with.

    Raises ValueError when the name can't be a zone's.
    """

    def __init__(self, name: str, ttl: int, hosts: Sequence[str]) -> None:
        self.wire = zone_name(name)
        self._ttl = ttl
        self._hosts = hosts
        server = label("ns") + self.wire
        self._authority = StartOfAuthority(self.wire, server, ttl)
        self._soa = (0, self._authority.at(0))
        a, aaaa = address_records(hosts, ttl)
        self.ns = name_server(server, (*a, *aaaa), ttl)
        self._services: dict[str, Service] = {}
        self._endpoints: dict[str, Endpoint] = {}
        self._nodes: dict[bytes, Node] = {}
        self._below = {protocol: Node(label(f"_{protocol}") + self.wire, _NOBODY) for protocol in ("tcp", "udp")}
        # A service named ns comes before the name that NS points to: its callers are many, and this name's are none.
        self._fixed: dict[bytes, Node] = {self.wire: _ApexNode(self), server: _FixedNode(server, {A: a, AAAA: aaaa})}

    def __len__(self) -> int:
        return len(self._nodes) + len(self._fixed)

    def __contains__(self, lease_id: str) -> bool:
        """Tell whether a lease is known."""
        return lease_id in self._endpoints

    @property
    def service_count(self) -> int:
        """Return how many services have a live lease."""
        return len(self._services)

    def find(self, name: bytes) -> Node | None:
        """Return a name's node, or None when there is no such name. `name` is in wire format, lower case."""
        return self._nodes.get(name) or self._fixed.get(name)

    @property
    def soa(self) -> Record:
        """Return the zone's SOA record, with the newest revision as its serial."""
        if self._soa[0] != self.version:
            self._soa = (self.version, self._authority.at(self.version))
        return self._soa[1]

    def renumber(self, revision: int) -> None:
        """Make the revision the zone's serial."""
        self.version = revision

    def apply(self, lease: Lease) -> None:
        """Take over what a lease has become. Raises OSError for an address that is none, and changes nothing then."""
        before = self._endpoints.get(lease.id)
        if lease.state == "ended":
            if before is not None:
                self._leave(before.lease)
        elif before is not None and before.follow(lease):
            self._services[lease.service].put(before)
        else:
            endpoint = Endpoint(lease, self.wire, self._ttl, self._hosts)
            if before is not None:
                self._leave(before.lease)
            self._enter(endpoint)

    def _enter(self, endpoint: Endpoint) -> None:
        lease = endpoint.lease
        service = self._services.get(lease.service)
        if service is None:
            service = self._services[lease.service] = Service(lease.service, self.wire)
        service.put(endpoint)
        self._endpoints[lease.id] = endpoint
        for node in self._nodes_of(service, lease):
            if not node.leases:
                self._nodes[node.name] = node
            node.leases += 1

    def _leave(self, lease: Lease) -> None:
        service = self._services[lease.service]
        if service.remove(lease):
            del self._services[lease.service]
        del self._endpoints[lease.id]
        for node in self._nodes_of(service, lease):
            node.leases -= 1
            if not node.leases:
                del self._nodes[node.name]

    def _nodes_of(self, service: Service, lease: Lease) -> list[Node]:
        """Return every name that exists because of a lease, once."""
        kind = lease.endpoint, lease.protocol
        shared = service.shared.get(kind)
        if shared is None:
            shared = service.shared[kind] = tuple(self._shared(service, lease))
        instance = label(lease.instance) + service.wire
        nodes = [*shared, self._nodes.get(instance) or _ServiceNode(instance, service, MAIN_ENDPOINT, lease.instance)]
        if lease.endpoint != MAIN_ENDPOINT:
            name = label(lease.endpoint) + instance
            nodes.append(self._nodes.get(name) or _ServiceNode(name, service, lease.endpoint, lease.instance))
        return nodes

    def _shared(self, service: Service, lease: Lease) -> Iterator[Node]:
        """Yield the names that all leases of this service, endpoint and protocol have."""
        known = {node.name: node for nodes in service.shared.values() for node in nodes}
        yield known.get(service.wire) or _ServiceNode(service.wire, service, MAIN_ENDPOINT, None)
        for protocol in lease.protocols:
            below = label(f"_{protocol}") + service.wire
            if name := label(f"_{lease.endpoint}"):
                yield known.get(below) or Node(below, _NOBODY)
                name += below
                yield known.get(name) or _PortNode(name, service, lease.endpoint, protocol)
            if lease.endpoint == MAIN_ENDPOINT and (name := label(f"_{lease.service}")):
                yield self._below[protocol]
                name += self._below[protocol].name
                yield known.get(name) or _PortNode(name, service, MAIN_ENDPOINT, protocol)


def _unique(records: Iterable[Record]) -> list[Record]:
    return list(dict.fromkeys(records))
