"""The records of one lease, and of the zone itself, packed once for all the queries that follow, never for each.

A record is packed when it is first asked for after a change. It is kept from its type on, without its owner's name, so
that an answer can be put together by joining. This module must not know which leases are shown, or where in a message a
record ends up.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import dns.exception
import dns.name
import dns.rdata
from dns.rdataclass import IN
from dns.rdatatype import AAAA, HINFO, NS, PTR, SOA, SRV, TXT, A, RdataType

from portd.core.model import MAIN_ENDPOINT, Lease
from portd.core.visibility import reachable_at

LABEL_MAX_BYTES: Final = 63
ZONE_MAX_BYTES: Final = 63
"""A zone's name in wire format: three labels of 63 (an endpoint, an instance, a service) fit before it in 255."""
NAME_MAX_BYTES: Final = 255
STRING_MAX_BYTES: Final = 255
"""One string of a TXT record (RFC 1035 section 3.3)."""
REFRESH_S, RETRY_S, EXPIRE_S = 3600, 600, 86400
"""What a secondary server would go by; there is none, as the zone is not transferred."""
ANY_TTL_S: Final = 3600
"""How long "no" to an ANY query may be kept: it never changes."""

RENDERED: Final = ("address", "port", "tags", "metadata", "name", "protocol", "weight", "priority", "listening")
"""The fields of a lease that its records are made of."""


class Record(NamedTuple):
    """A record without its owner: type, class, TTL, length and data (RFC 1035 section 3.2.1).

    What it points to ends `data`, uncompressed (RFC 2782 forbids it), and the address records of that name are added to
    the answer.
    """

    data: bytes
    target: bytes = b""
    addresses: tuple[bytes, ...] = ()


class Shown(NamedTuple):
    """The records of an endpoint that depend on the address at which the query came in."""

    a: tuple[Record, ...]
    aaaa: tuple[Record, ...]
    srv: tuple[Record, ...]
    srv_of_all: tuple[Record, ...]


class Endpoint:
    """A lease as DNS shows it. Raises ValueError for an address that is none."""

    __slots__ = ("_shown", "_ttl", "_zone", "lease")

    def __init__(self, lease: Lease, zone: bytes, ttl: int) -> None:
        self.lease = lease
        self._zone = zone
        self._ttl = ttl
        self._shown: dict[str | None, Shown] = {}
        for address in reachable_at(lease):  # what can't be shown is known now, not at a query
            pack_address(address)

    def at(self, asked_at: str | None) -> Shown:
        """Return the records for callers who asked at this address (None: a loopback one); without addresses none."""
        shown = self._shown.get(asked_at)
        if shown is None:
            shown = self._shown[asked_at] = self._show(asked_at)
        return shown

    @property
    def txt(self) -> list[Record]:
        """Return a TXT record for each tag and each key: Go's LookupTXT joins the strings of one record.

        They are not kept: they are large, and seldom asked for.
        """
        return [Record(_packed(TXT, bytes((len(string),)) + string, self._ttl)) for string in txt_strings(self.lease)]

    @property
    def pointer(self) -> Record:
        """Return the PTR record that leads to the instance."""
        return Record(_packed(PTR, self._target(b""), self._ttl))

    def follow(self, lease: Lease) -> bool:
        """Replace the lease by its next version; False, and nothing is done, where its records are others."""
        if any(getattr(lease, field) != getattr(self.lease, field) for field in RENDERED):
            return False
        self.lease = lease
        return True

    def _show(self, asked_at: str | None) -> Shown:
        a, aaaa = address_records(reachable_at(self.lease, asked_at), self._ttl)
        addresses = tuple(record.data for record in (*a, *aaaa))
        if not addresses:
            return Shown((), (), (), ())
        return Shown(a, aaaa, self._srv(b"", addresses), self._srv(ALL, addresses))

    def _srv(self, selection: bytes, addresses: tuple[bytes, ...]) -> tuple[Record, ...]:
        lease, target = self.lease, self._target(selection)
        data = struct.pack("!HHH", lease.priority, lease.weight, lease.port) + target
        return (Record(_packed(SRV, data, self._ttl), target, addresses),) if len(target) <= NAME_MAX_BYTES else ()

    def _target(self, selection: bytes) -> bytes:
        lease = self.lease
        target = label(lease.instance) + selection + label(lease.service) + self._zone
        return target if lease.endpoint == MAIN_ENDPOINT else label(lease.endpoint) + target


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
    """Pack who serves the zone."""
    return Record(_packed(NS, target, ttl), target, tuple(record.data for record in addresses))


def minimal_any() -> Record:
    """Render the answer to an ANY query that stands for everything (RFC 8482 section 4.2)."""
    return Record(_render(HINFO, 'RFC8482 ""', ANY_TTL_S))


def address_records(addresses: Sequence[str], ttl: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Pack A and AAAA records; raises ValueError for what is no address."""
    return (
        tuple(Record(_packed(A, pack_address(address), ttl)) for address in addresses if ":" not in address),
        tuple(Record(_packed(AAAA, pack_address(address), ttl)) for address in addresses if ":" in address),
    )


@lru_cache(maxsize=4096)
def pack_address(address: str) -> bytes:
    """Pack an address; raises ValueError for what is none."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except OSError:
        raise ValueError(f"{address!r} is not an IP address") from None


def reverse_name(address: str) -> bytes:
    """Pack the name that an address is looked up under in reverse (RFC 1035 section 3.5, RFC 3596 section 2.5)."""
    return b"".join(label(each) for each in ipaddress.ip_address(address).reverse_pointer.split(".")) + b"\0"


def txt_strings(lease: Lease) -> list[bytes]:
    """Return `tag=` and `KEY=VALUE` strings. One that is too long for a TXT record is left out: cut, it would lie."""
    texts = [*(f"tag={tag}" for tag in lease.tags), *(f"{key}={value}" for key, value in lease.metadata.items())]
    return [string for text in texts if len(string := text.encode()) <= STRING_MAX_BYTES]


def label(text: str) -> bytes:
    """Pack a label; empty when it is too long: an underscore before 63 letters is no label."""
    octets = text.encode()
    return bytes((len(octets),)) + octets if len(octets) <= LABEL_MAX_BYTES else b""


ALL: Final = label("_all")
"""The label that selects the instances that do not serve too."""


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
