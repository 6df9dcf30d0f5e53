"""The records of one lease, and of the zone itself, packed when they change, never at a query.

A record is kept from its type on, without its owner's name, so that an answer can be put together by joining. Packed
by hand: dnspython takes 45 µs a lease, about as long as the grant, and the layouts are a line each. It is the oracle of
the tests instead. This room must not know which leases are shown, or where in a message a record ends up.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import dns.exception
import dns.name
from dns.rdataclass import IN
from dns.rdatatype import AAAA, HINFO, NS, SOA, SRV, TXT, A

from portd.core.addresses import ANY, ANY_V4
from portd.core.model import MAIN_ENDPOINT, Lease

LABEL_MAX_BYTES: Final = 63
ZONE_MAX_BYTES: Final = 63
"""A zone's name in wire format: three labels of 63 (an endpoint, an instance, a service) fit before it in 255."""
STRING_MAX_BYTES: Final = 255
"""One string of a TXT record (RFC 1035 section 3.3)."""
PRIORITY: Final = 0
WEIGHT: Final = 1
"""All alike. Not 0: with only zeros some clients (Go's) take the first record always, not a random one."""
REFRESH_S, RETRY_S, EXPIRE_S = 3600, 600, 86400
"""What a secondary server would go by; there is none, as the zone is not transferred."""
ANY_TTL_S: Final = 3600
"""How long "no" to an ANY query may be kept: it never changes."""


class Record(NamedTuple):
    """A record without its owner: type, class, TTL, length and data (RFC 1035 section 3.2.1).

    What it points to ends `data`, uncompressed (RFC 2782 forbids it), and the address records of that name come along
    to be added to the answer.
    """

    data: bytes
    target: bytes = b""
    addresses: tuple[bytes, ...] = ()


class Endpoint:
    """A lease as DNS shows it."""

    __slots__ = ("a", "aaaa", "lease", "srv", "txt")

    def __init__(self, lease: Lease, zone: bytes, ttl: int, hosts: Sequence[str]) -> None:
        self.lease = lease
        self.a, self.aaaa = address_records(stands_for(lease.address, hosts), ttl)
        target = label(lease.instance) + label(lease.service) + zone
        if lease.endpoint != MAIN_ENDPOINT:
            target = label(lease.endpoint) + target
        self.srv = pointing(SRV, struct.pack("!HHH", PRIORITY, WEIGHT, lease.port), target, (*self.a, *self.aaaa), ttl)
        strings = b"".join(bytes((len(string),)) + string for string in txt_strings(lease))
        self.txt = (Record(_pack(TXT, ttl, strings)),) if strings else ()

    def follow(self, lease: Lease) -> bool:
        """Take the lease's next version over; False, and nothing is done, where its records must be packed anew."""
        before = self.lease
        if (lease.address, lease.port, lease.tags, lease.metadata, lease.name, lease.protocol) != \
                (before.address, before.port, before.tags, before.metadata, before.name, before.protocol):
            return False
        self.lease = lease
        return True


class StartOfAuthority:
    """The zone's SOA record, which negative answers carry: all but its serial is fixed."""

    def __init__(self, zone: bytes, server: bytes, ttl: int) -> None:
        # RFC 2308 section 4: "no" is kept for the lesser of the record's own TTL and its last number, so for `ttl`.
        numbers = struct.pack("!IIIII", 0, REFRESH_S, RETRY_S, EXPIRE_S, ttl)
        record = _pack(SOA, ttl, server + label("hostmaster") + zone + numbers)
        self._before, self._after = record[:-20], record[-16:]

    def at(self, revision: int) -> Record:
        """Return the record with the revision as its serial (modulo 2^32, as RFC 1982 compares them)."""
        return Record(self._before + (revision & 0xFFFFFFFF).to_bytes(4) + self._after)


def name_server(target: bytes, addresses: Iterable[Record], ttl: int) -> Record:
    """Pack who serves the zone."""
    return pointing(NS, b"", target, addresses, ttl)


def minimal_any() -> Record:
    """Pack what an ANY query is told instead of everything (RFC 8482 section 4.2)."""
    return Record(_pack(HINFO, ANY_TTL_S, b"\7RFC8482\0"))


def pointing(rdtype: int, data: bytes, target: bytes, addresses: Iterable[Record], ttl: int) -> Record:
    """Pack a record that ends in the name `target`, which these are the address records of."""
    return Record(_pack(rdtype, ttl, data + target), target, tuple(record.data for record in addresses))


def address_records(addresses: Iterable[str], ttl: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Pack A and AAAA records; raises OSError for what is no address."""
    a: list[Record] = []
    aaaa: list[Record] = []
    for address in addresses:
        if ":" in address:
            aaaa.append(Record(_pack(AAAA, ttl, socket.inet_pton(socket.AF_INET6, address))))
        else:
            a.append(Record(_pack(A, ttl, socket.inet_pton(socket.AF_INET, address))))
    return tuple(a), tuple(aaaa)


def stands_for(address: str, hosts: Sequence[str]) -> Sequence[str]:
    """Return the addresses a lease is reached at: its own, or the host's where it is bound to all of them."""
    if address == ANY:
        return hosts
    if address == ANY_V4:
        return [host for host in hosts if ":" not in host]
    return (address,)


def txt_strings(lease: Lease) -> list[bytes]:
    """Return `tag=` and `KEY=VALUE` strings. One that is too long for a TXT record is left out: cut, it would lie."""
    texts = [*(f"tag={tag}" for tag in lease.tags), *(f"{key}={value}" for key, value in lease.metadata.items())]
    return [string for text in texts if len(string := text.encode()) <= STRING_MAX_BYTES]


def label(text: str) -> bytes:
    """Pack a label; empty when it is too long: an underscore before 63 letters has no place in DNS."""
    octets = text.encode()
    return bytes((len(octets),)) + octets if len(octets) <= LABEL_MAX_BYTES else b""


def zone_name(text: str) -> bytes:
    """Pack a zone's name, lower case, with or without its final dot; raises ValueError with the reason."""
    try:
        name = dns.name.from_text(text.lower())
    except (dns.exception.DNSException, UnicodeError) as error:
        raise ValueError(f"dns zone {text!r} is not a domain name: {error}") from error
    wire = name.to_wire()
    assert wire is not None
    if not 1 < len(wire) <= ZONE_MAX_BYTES:
        raise ValueError(f"dns zone {text!r} must be a name of 1 to {ZONE_MAX_BYTES - 2} characters")
    return wire


def _pack(rdtype: int, ttl: int, data: bytes) -> bytes:
    return struct.pack("!HHIH", rdtype, IN, ttl, len(data)) + data
