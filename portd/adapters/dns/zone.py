"""The table of names that queries are answered from, kept up to date by events. Pure: no sockets, no clock.

A look-up of the names that clients use is one step into a dict. A lease's change costs its own records at once, and the
answers of its service when they are next asked for, so a burst of changes is paid for once. Names below the zone, with
SERVICE, INSTANCE and ENDPOINT as leased, PROTOCOL `tcp` or `udp`, and TAG a tag that is a label:

    SERVICE                       A, AAAA and TXT of the main endpoints
    _SERVICE._PROTOCOL            SRV of the main endpoints
    _ENDPOINT._PROTOCOL.SERVICE   SRV of an endpoint
    INSTANCE.SERVICE              A, AAAA, TXT and SRV of an instance's main endpoint
    ENDPOINT.INSTANCE.SERVICE     the same of another endpoint: it may be bound to another address
    TAG.SERVICE                   A, AAAA, TXT and SRV of the main endpoints with a tag
    _SERVICE._TAG._PROTOCOL       SRV of the main endpoints with a tag
    _all.SERVICE                  A, AAAA, TXT and SRV of the main endpoints, of those that do not serve too
    [ENDPOINT.]INSTANCE._all.SERVICE   one of these

A name exists while a live lease has it, and answers with nothing while none of its leases serves (`core.visibility`).
Outside the zone, the reverse name of an address that is leased has PTR records. TAG and `_all` names, few of which are
asked for, are derived when they are (`derived`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from dns.rdatatype import AAAA, ANY, NS, PTR, SOA, SRV, TXT, A

from portd.adapters.dns.answers import Answer, Expand
from portd.adapters.dns.records import (
    Endpoint,
    Record,
    StartOfAuthority,
    address_records,
    label,
    minimal_any,
    name_server,
    reverse_name,
    txt_strings,
    zone_name,
)
from portd.core.bindings import ANY as ANY_ADDRESS
from portd.core.bindings import ANY_V4
from portd.core.model import MAIN_ENDPOINT, Lease, Protocol
from portd.core.visibility import LOCALHOST, WhenAllCritical, serving

HEADER_BYTES: Final = 12
QUESTION_TAIL_BYTES: Final = 4
NODES_DERIVED: Final = 1024
"""Derived names kept for each service; beyond them they are made anew."""

WhenAllCriticalOf = Callable[[str], WhenAllCritical]
"""What a service gives when all its instances are critical."""


Tagged = tuple[bytes, str]
"""A tag as a label, and a protocol for which a main endpoint has it; "" where any endpoint has it."""


class Source:
    """Something that answers are made from: they are made anew when its version has changed."""

    version = 0


_NOBODY: Final = Source()


class Service(Source):
    """The endpoints of a service's live leases, and the names that they have in common."""

    def __init__(self, name: str, zone: bytes, when_all_critical: WhenAllCriticalOf) -> None:
        self.name = name
        self.wire = label(name) + zone
        self.shared: dict[tuple[str, Protocol], tuple[Node, ...]] = {}  # by endpoint and protocol
        self.derived: dict[bytes, Node] = {}
        self.tags: Counter[Tagged] = Counter()
        self._when_all_critical = when_all_critical
        self._endpoints: dict[str, dict[str, Endpoint]] = {}
        self._serving: dict[str, dict[str, Endpoint]] | None = None

    def put(self, endpoint: Endpoint) -> None:
        """Enter an endpoint, or replace it, or note that its lease has changed."""
        lease = endpoint.lease
        self._endpoints.setdefault(lease.endpoint, {})[lease.instance] = endpoint
        self.change()

    def remove(self, lease: Lease) -> bool:
        """Remove an endpoint; True when the service has none left."""
        instances = self._endpoints[lease.endpoint]
        del instances[lease.instance]
        if not instances:
            del self._endpoints[lease.endpoint]
        self.change()
        return not self._endpoints

    def serving(self, endpoint: str) -> Mapping[str, Endpoint]:
        """Return the instances that callers are given, by name."""
        if self._serving is None:
            self._serving = {}
            leases = (each.lease for instances in self._endpoints.values() for each in instances.values())
            for lease in serving(leases, self._when_all_critical(self.name)):
                shown = self._serving.setdefault(lease.endpoint, {})
                shown[lease.instance] = self._endpoints[lease.endpoint][lease.instance]
        return self._serving.get(endpoint, {})

    def present(self, endpoint: str) -> Mapping[str, Endpoint]:
        """Return the instances that are there, whether they serve or not: their peers must find them before they do."""
        found = self._endpoints.get(endpoint, {})
        return {instance: each for instance, each in found.items() if each.lease.state in ("held", "bound")}

    def has(self, instance: str, endpoint: str) -> bool:
        """Return whether a live lease has this endpoint of an instance."""
        return instance in self._endpoints.get(endpoint, {})

    def has_instance(self, instance: str) -> bool:
        """Return whether a live lease is an endpoint of this instance."""
        return any(instance in instances for instances in self._endpoints.values())

    def change(self) -> None:
        """Note that the service's answers are others now."""
        self._serving = None
        self.version += 1


Key = int | tuple[int, str]
"""What an answer is kept by: the type of a query on loopback, else the type and the address at which it came in."""


class Node:
    """A name, which exists while it has `leases`; this kind has no records of its own, only names below it."""

    __slots__ = ("_answers", "_seen", "_source", "_start", "_turns", "leases", "name")

    def __init__(self, name: bytes, source: Source) -> None:
        self.name = name
        self.leases = 0
        self._start = HEADER_BYTES + len(name) + QUESTION_TAIL_BYTES
        self._source = source
        self._seen = source.version
        self._answers: dict[Key, Answer | None] = {}
        self._turns: dict[Key, dict[int, int]] = {}

    def answer(self, qtype: int, asked_at: str | None = None) -> Answer | None:
        """Return the answer to a question of this type, or None when there is no such record now.

        `asked_at` is the address at which the query came in, None for a loopback one.
        """
        version = self._source.version
        if self._seen != version:
            self._answers.clear()
            self._seen = version
        key: Key = qtype if asked_at is None else (qtype, asked_at)
        try:
            return self._answers[key]
        except KeyError:
            found = (ANY_ANSWER, _itself) if qtype == ANY else self.units(qtype, asked_at)
            if found is None:  # types that this name never has are not kept: there are 65,536 of them
                return None
            units, expand = found
            answer = Answer(units, expand, self._start, self._turns.setdefault(key, {})) if units else None
            self._answers[key] = answer
            return answer

    def units(self, qtype: int, asked_at: str | None) -> tuple[Sequence[Any], Expand] | None:
        """Return the units of the answer and the function that gives their records: none now, or None when this kind of
        name never has such records."""
        return None


ANY_ANSWER: Final = (minimal_any(),)


def _itself(record: Record) -> Sequence[Record]:
    return (record,)


def _txt_of(endpoint: Endpoint) -> Sequence[Record]:
    return endpoint.txt


class _FixedNode(Node):
    """A name with records that leases don't change."""

    __slots__ = ("_records",)

    def __init__(
        self, name: bytes, source: Source, records: Callable[[int, str | None], Sequence[Record] | None]
    ) -> None:
        super().__init__(name, source)
        self._records = records

    def units(self, qtype: int, asked_at: str | None) -> tuple[Sequence[Any], Expand] | None:
        records = self._records(qtype, asked_at)
        return None if records is None else (records, _itself)


class _EndpointsNode(Node):
    """A name of endpoints: where they are, and what they say about themselves. `pick` returns those that it is for;
    `srv` says which SRV records it has: none, those of serving instances, or those of all."""

    __slots__ = ("_pick", "_srv")

    def __init__(
        self, name: bytes, service: Service, pick: Callable[[], Sequence[Endpoint]], srv: str | None = "srv"
    ) -> None:
        super().__init__(name, service)
        self._pick = pick
        self._srv = srv

    def units(self, qtype: int, asked_at: str | None) -> tuple[Sequence[Any], Expand] | None:
        if qtype == TXT:
            reachable = (each for each in self._pick() if any(each.at(asked_at)[:2]))
            return [each for each in reachable if txt_strings(each.lease)], _txt_of
        field = {A: "a", AAAA: "aaaa", SRV: self._srv}.get(qtype)  # type: ignore[call-overload]
        if field is None:
            return None
        records = (record for each in self._pick() for record in getattr(each.at(asked_at), field))
        return list(dict.fromkeys(records)), _itself


class _PortNode(_EndpointsNode):
    """A name that the ports of an endpoint are found under (RFC 2782)."""

    __slots__ = ()

    def units(self, qtype: int, asked_at: str | None) -> tuple[Sequence[Any], Expand] | None:
        return super().units(qtype, asked_at) if qtype == SRV else None


class _ReverseNode(Node):
    """The reverse name of an address."""

    __slots__ = ("endpoints",)

    def __init__(self, name: bytes) -> None:
        super().__init__(name, Source())
        self.endpoints: dict[str, Endpoint] = {}

    def change(self) -> None:
        """Note that the leases of the address have changed."""
        self._source.version += 1

    def units(self, qtype: int, asked_at: str | None) -> tuple[Sequence[Any], Expand] | None:
        if qtype != PTR:
            return None
        return list(dict.fromkeys(each.pointer for each in self.endpoints.values())), _itself


class Zone(Source):
    """All names of the zone. `ttl` is in seconds; `hosts` are the addresses of the server itself.

    Raises ValueError when the name can't be a zone's.
    """

    def __init__(
        self,
        name: str,
        ttl: int,
        hosts: Sequence[str],
        when_all_critical: WhenAllCriticalOf = lambda service: "none",
    ) -> None:
        self.wire = zone_name(name)
        self._ttl = ttl
        self._hosts = hosts
        self._when_all_critical = when_all_critical
        self._server = label("ns") + self.wire
        self._authority = StartOfAuthority(self.wire, self._server, ttl)
        self._soa = (0, self._authority.at(0))
        self._services: dict[str, Service] = {}
        self._endpoints: dict[str, Endpoint] = {}
        self._nodes: dict[bytes, Node] = {}
        self._reverse: dict[bytes, _ReverseNode] = {}
        self._tags: Counter[Tagged] = Counter()
        self._below = {protocol: Node(label(f"_{protocol}") + self.wire, _NOBODY) for protocol in ("tcp", "udp")}
        # A service named ns comes before the name that NS points to: its callers are many, and this name's are none.
        self._fixed: dict[bytes, Node] = {
            self.wire: _FixedNode(self.wire, self, self._apex),
            self._server: _FixedNode(self._server, _NOBODY, self._server_addresses),
        }

    def __len__(self) -> int:
        return len(self._nodes) + len(self._fixed)

    def __contains__(self, lease_id: str) -> bool:
        """Return whether a lease is known."""
        return lease_id in self._endpoints

    @property
    def service_count(self) -> int:
        """Return how many services have a live lease."""
        return len(self._services)

    def find(self, name: bytes) -> Node | None:
        """Return a name's node, or None when there is no such name. `name` is in wire format, lower case."""
        return self._nodes.get(name) or self._fixed.get(name) or self._reverse.get(name) or self._derive(name)

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
        """Follow a change of a lease. Raises ValueError for an address that is none, and changes nothing then."""
        before = self._endpoints.get(lease.id)
        if lease.state == "ended":
            if before is not None:
                self._leave(before)
        elif before is not None and before.follow(lease):
            self._services[lease.service].put(before)
        else:
            endpoint = Endpoint(lease, self.wire, self._ttl)
            if before is not None:
                self._leave(before)
            self._enter(endpoint)

    def forget_answers(self) -> None:
        """Make every answer anew: the configuration of services has changed."""
        for service in self._services.values():
            service.change()

    # --- the zone's own names ---

    def _apex(self, qtype: int, asked_at: str | None) -> Sequence[Record] | None:
        if qtype == SOA:
            return (self.soa,)
        if qtype != NS:
            return None
        a, aaaa = address_records([asked_at] if asked_at else self._hosts, self._ttl)
        return (name_server(self._server, (*a, *aaaa), self._ttl),)

    def _server_addresses(self, qtype: int, asked_at: str | None) -> Sequence[Record] | None:
        if qtype not in (A, AAAA):
            return None
        return address_records([asked_at] if asked_at else self._hosts, self._ttl)[qtype == AAAA]

    # --- leases ---

    def _enter(self, endpoint: Endpoint) -> None:
        lease = endpoint.lease
        service = self._services.get(lease.service)
        if service is None:
            service = self._services[lease.service] = Service(lease.service, self.wire, self._when_all_critical)
        service.put(endpoint)
        self._endpoints[lease.id] = endpoint
        for node in self._nodes_of(service, lease):
            if not node.leases:
                self._nodes[node.name] = node
            node.leases += 1
        tags = _tagged(lease)
        service.tags.update(tags)
        self._tags.update(tags)
        if lease.address not in (ANY_ADDRESS, ANY_V4, LOCALHOST):
            name = reverse_name(lease.address)
            node = self._reverse.setdefault(name, _ReverseNode(name))
            node.endpoints[lease.id] = endpoint
            node.change()

    def _leave(self, endpoint: Endpoint) -> None:
        lease = endpoint.lease
        service = self._services[lease.service]
        if service.remove(lease):
            del self._services[lease.service]
        del self._endpoints[lease.id]
        for node in self._nodes_of(service, lease):
            node.leases -= 1
            if not node.leases:
                del self._nodes[node.name]
        for tag in _tagged(lease):
            for tags in (service.tags, self._tags):
                tags[tag] -= 1
                if not tags[tag]:
                    del tags[tag]
        if lease.address not in (ANY_ADDRESS, ANY_V4, LOCALHOST):
            reverse = self._reverse[reverse_name(lease.address)]
            del reverse.endpoints[lease.id]
            reverse.change()
            if not reverse.endpoints:
                del self._reverse[reverse.name]

    def _nodes_of(self, service: Service, lease: Lease) -> list[Node]:
        """Return every name that exists because of a lease, once."""
        kind = lease.endpoint, lease.protocol
        shared = service.shared.get(kind)
        if shared is None:
            shared = service.shared[kind] = tuple(self._shared(service, lease))
        instance = label(lease.instance) + service.wire
        nodes = [*shared, self._nodes.get(instance) or _one(instance, service, lease.instance, MAIN_ENDPOINT)]
        if lease.endpoint != MAIN_ENDPOINT:
            name = label(lease.endpoint) + instance
            nodes.append(self._nodes.get(name) or _one(name, service, lease.instance, lease.endpoint))
        return nodes

    def _shared(self, service: Service, lease: Lease) -> Iterator[Node]:
        """Yield the names that all leases of this service, endpoint and protocol have."""
        known = {node.name: node for nodes in service.shared.values() for node in nodes}
        main = _some(service, MAIN_ENDPOINT)
        yield known.get(service.wire) or _EndpointsNode(service.wire, service, main, srv=None)
        for protocol in lease.protocols:
            below = label(f"_{protocol}") + service.wire
            if name := label(f"_{lease.endpoint}"):
                yield known.get(below) or Node(below, _NOBODY)
                name += below
                yield known.get(name) or _PortNode(name, service, _some(service, lease.endpoint, protocol))
            if lease.endpoint == MAIN_ENDPOINT and (name := label(f"_{lease.service}")):
                yield self._below[protocol]
                name += self._below[protocol].name
                yield known.get(name) or _PortNode(name, service, _some(service, MAIN_ENDPOINT, protocol))

    # --- derived names ---

    def _derive(self, name: bytes) -> Node | None:
        """Return the node of a tag's or an `_all` name, where the leases have it now."""
        if not name.endswith(self.wire):
            return None
        labels = _labels(name[: -len(self.wire)])
        if not labels or not 2 <= len(labels) <= 4:
            return None
        if labels[-1] in ("_tcp", "_udp"):
            return self._derive_port(name, labels)
        service = self._services.get(labels[-1])
        if service is None:
            return None
        if labels[-2] == "_all":
            return self._derive_all(name, service, labels[:-2])
        tag = labels[0].encode()
        if len(labels) != 2 or (tag, "") not in service.tags:
            return None
        return _kept(service, name, lambda: _EndpointsNode(name, service, _some(service, MAIN_ENDPOINT, tag=tag)))

    def _derive_port(self, name: bytes, labels: list[str]) -> Node | None:
        """Return the node of `[_SERVICE.]_TAG._PROTOCOL`."""
        tag, protocol = labels[-2].removeprefix("_").encode(), labels[-1].removeprefix("_")
        if not labels[-2].startswith("_") or (tag, protocol) not in self._tags:
            return None
        if len(labels) == 2:
            return Node(name, _NOBODY)
        service = self._services.get(labels[0].removeprefix("_"))
        if len(labels) != 3 or service is None or not labels[0].startswith("_") or (tag, protocol) not in service.tags:
            return None
        pick = _some(service, MAIN_ENDPOINT, protocol, tag)
        return _kept(service, name, lambda: _PortNode(name, service, pick))

    def _derive_all(self, name: bytes, service: Service, labels: list[str]) -> Node | None:
        """Return the node of `[[ENDPOINT.]INSTANCE.]_all.SERVICE`."""
        if not labels:
            return _kept(
                service,
                name,
                lambda: _EndpointsNode(
                    name, service, lambda: list(service.present(MAIN_ENDPOINT).values()), "srv_of_all"
                ),
            )
        instance = labels[-1]
        endpoint = labels[0] if len(labels) == 2 else MAIN_ENDPOINT
        if len(labels) == 2:
            exists = endpoint != MAIN_ENDPOINT and service.has(instance, endpoint)
        else:
            exists = service.has_instance(instance)
        if not exists:
            return None

        def pick() -> Sequence[Endpoint]:
            found = service.present(endpoint).get(instance)
            return () if found is None else (found,)

        return _kept(service, name, lambda: _EndpointsNode(name, service, pick, "srv_of_all"))


def _some(
    service: Service, endpoint: str, protocol: str | None = None, tag: bytes | None = None
) -> Callable[[], list[Endpoint]]:
    """Return a function that picks the serving instances of an endpoint, of a protocol or with a tag where given."""

    def pick() -> list[Endpoint]:
        return [
            each
            for each in service.serving(endpoint).values()
            if (protocol is None or protocol in each.lease.protocols)
            and (tag is None or tag in _tag_labels(each.lease))
        ]

    return pick


def _one(name: bytes, service: Service, instance: str, endpoint: str) -> Node:
    """Return the node of one endpoint of an instance."""

    def pick() -> Sequence[Endpoint]:
        found = service.serving(endpoint).get(instance)
        return () if found is None else (found,)

    return _EndpointsNode(name, service, pick)


def _kept(service: Service, name: bytes, make: Callable[[], Node]) -> Node:
    node = service.derived.get(name)
    if node is None:
        if len(service.derived) >= NODES_DERIVED:
            service.derived.clear()
        node = service.derived[name] = make()
    return node


def _tag_labels(lease: Lease) -> set[bytes]:
    """Return the tags that can be labels of a name, in lower case: names are matched so (RFC 4343)."""
    return {tag.lower().encode() for tag in lease.tags if len(label(f"_{tag}")) > 1 and "." not in tag}


def _tagged(lease: Lease) -> list[Tagged]:
    """Return what of `_SERVICE._TAG._PROTOCOL` and `TAG.SERVICE` exists because of a lease."""
    has_port_name = lease.endpoint == MAIN_ENDPOINT and label(f"_{lease.service}")
    protocols = ("", *lease.protocols) if has_port_name else ("",)
    return [(tag, protocol) for tag in _tag_labels(lease) for protocol in protocols]


def _labels(name: bytes) -> list[str] | None:
    """Split a name into labels; None for one that is malformed or not UTF-8."""
    found = []
    at = 0
    while at < len(name):
        length = name[at]
        found.append(name[at + 1 : at + 1 + length])
        at += 1 + length
    try:
        return [each.decode() for each in found] if at == len(name) else None
    except UnicodeDecodeError:
        return None
