"""The records of one lease, and of the zone itself, rendered once for all the queries that follow, never for each.

dnspython renders them. That takes 45 µs a lease, about as long as a grant, so it happens when somebody first asks after
a change, and nobody waits for it who only wants a port. A record is kept from its type on, without its owner's name, so
that an answer can be put together by joining. This module must not know which leases are shown, or where in a message a
record ends up.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Final, NamedTuple

import dns.exception
import dns.name
import dns.rdata
from dns.rdataclass import IN
from dns.rdatatype import AAAA, HINFO, NS, SOA, SRV, TXT, A, RdataType

from portd.core.bindings import ANY, ANY_V4
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
    """A lease as DNS shows it; each kind of record is rendered when it is first asked for.

    Raises OSError for an address that is none.
    """

    def __init__(self, lease: Lease, zone: bytes, ttl: int, hosts: Sequence[str]) -> None:
        self.lease = lease
        self._zone = zone
        self._ttl = ttl
        self._at = stands_for(lease.address, hosts)
        for address in self._at:  # what can't be shown is known now, not at a query
            socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)

    @cached_property
    def a(self) -> tuple[Record, ...]:
        """Return the A records."""
        return self._addresses[0]

    @cached_property
    def aaaa(self) -> tuple[Record, ...]:
        """Return the AAAA records."""
        return self._addresses[1]

    @cached_property
    def srv(self) -> Record:
        """Return the SRV record."""
        lease = self.lease
        target = label(lease.instance) + label(lease.service) + self._zone
        if lease.endpoint != MAIN_ENDPOINT:
            target = label(lease.endpoint) + target
        text = f"{PRIORITY} {WEIGHT} {lease.port} {_text(target)}"
        return _pointing(SRV, text, target, (*self.a, *self.aaaa), self._ttl)

    @cached_property
    def txt(self) -> tuple[Record, ...]:
        """Return a TXT record for each tag and each key: Go's LookupTXT joins the strings of one record."""
        strings = txt_strings(self.lease)
        return tuple(Record(_packed(TXT, bytes((len(string),)) + string, self._ttl)) for string in strings)

    @cached_property
    def _addresses(self) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
        return address_records(self._at, self._ttl)

    def follow(self, lease: Lease) -> bool:
        """Take the lease's next version over; False, and nothing is done, where its records must be packed anew."""
        before = self.lease
        if (lease.address, lease.port, lease.tags, lease.metadata, lease.name, lease.protocol) != (
            before.address,
            before.port,
            before.tags,
            before.metadata,
            before.name,
            before.protocol,
        ):
            return False
        self.lease = lease
        return True


class StartOfAuthority:
    """The zone's SOA record, which negative answers carry: all but its serial is fixed."""

    def __init__(self, zone: bytes, server: bytes, ttl: int) -> None:
        # RFC 2308 section 4: "no" is kept for the lesser of the record's own TTL and its last number, so for `ttl`.
        text = f"{_text(server)} {_text(label('hostmaster') + zone)} 0 {REFRESH_S} {RETRY_S} {EXPIRE_S} {ttl}"
        record = _render(SOA, text, ttl)
        self._before, self._after = record[:-20], record[-16:]

    def at(self, revision: int) -> Record:
        """Return the record with the revision as its serial (modulo 2^32, as RFC 1982 compares them)."""
        return Record(self._before + (revision & 0xFFFFFFFF).to_bytes(4) + self._after)


def name_server(target: bytes, addresses: Iterable[Record], ttl: int) -> Record:
    """Render who serves the zone."""
    return _pointing(NS, _text(target), target, addresses, ttl)


def minimal_any() -> Record:
    """Render what an ANY query is told instead of everything (RFC 8482 section 4.2)."""
    return Record(_render(HINFO, 'RFC8482 ""', ANY_TTL_S))


def address_records(addresses: Sequence[str], ttl: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Render A and AAAA records; raises dns.exception.SyntaxError for what is no address."""
    return (
        tuple(Record(_render(A, address, ttl)) for address in addresses if ":" not in address),
        tuple(Record(_render(AAAA, address, ttl)) for address in addresses if ":" in address),
    )


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


def _pointing(rdtype: RdataType, text: str, target: bytes, addresses: Iterable[Record], ttl: int) -> Record:
    """Render a record that ends in the name `target`, which these are the address records of."""
    return Record(_render(rdtype, text, ttl), target, tuple(record.data for record in addresses))


def _render(rdtype: RdataType, text: str, ttl: int) -> bytes:
    """Render a record's data from its presentation format, behind its type, class, TTL and length."""
    wire = dns.rdata.from_text(IN, rdtype, text).to_wire()
    assert wire is not None  # it is None only where a file is given to write to
    return _packed(rdtype, wire, ttl)


def _packed(rdtype: RdataType, wire: bytes, ttl: int) -> bytes:
    return struct.pack("!HHIH", rdtype, IN, ttl, len(wire)) + wire


def _text(name: bytes) -> str:
    """Return a packed name in its presentation format."""
    return dns.name.from_wire(name, 0)[0].to_text()
