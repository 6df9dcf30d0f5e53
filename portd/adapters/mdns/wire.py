"""The wire format of multicast DNS, on zeroconf's reader, writer, record classes and cache.

The only module that depends on zeroconf's internals: `_Message` overrides `DNSOutgoing.write_name`, which uses `names`
and `size`, because zeroconf splits a name at every dot and so can't write an instance name that has dots. Hence the
exact pin in pyproject.toml; tests/adapters/mdns/test_mdns_wire.py fails when these parts change. Both can go when
zeroconf writes `Dr. Who._http._tcp.local.` with three labels before `local`. zeroconf's sockets, responder and browser
are not used. This module must not know who sends what to whom.

Names are written flat, as zeroconf reads them: `Dr. Who._http._tcp.local.`. Which dots part labels follows from the
shape of a DNS-SD name (RFC 6763 section 4.3), so that an instance name with dots is one label on the wire.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from zeroconf import (  # type: ignore[attr-defined]  # not in its __all__, but without an underscore
    DNSAddress,
    DNSCache,
    DNSIncoming,
    DNSNsec,
    DNSOutgoing,
    DNSPointer,
    DNSQuestion,
    DNSRecord,
    DNSService,
    DNSText,
)

__all__ = ["DNSAddress", "DNSCache", "DNSIncoming", "DNSPointer", "DNSQuestion", "DNSRecord", "DNSService", "DNSText"]

A, PTR, TXT, AAAA, SRV, NSEC, ANY = 1, 12, 16, 28, 33, 47, 255
UNIQUE_TYPES = frozenset({A, TXT, AAAA, SRV})
"""Types of records that one host alone may have under a name."""
DOMAIN = "local."
TYPES_NAME = "_services._dns-sd._udp.local."
"""The name whose PTRs are the types that anybody offers (RFC 6763 section 9)."""
PORT = 5353
HOST_TTL = 120
"""Seconds; records that hold a host name or an address (RFC 6762 section 10)."""
OTHER_TTL = 4500
LEGACY_TTL = 10
"""Seconds; the longest that a one-shot resolver may keep a record, since it gets no goodbye (RFC 6762 section 6.7)."""
PROBED_PER_PACKET = 12
"""Names in one probe: with SRV and TXT they fit an Ethernet packet as long as TXT records are short."""

_IN, _UNIQUE = 0x0001, 0x8001
_QUERY, _RESPONSE, _TRUNCATED = 0x0000, 0x8400, 0x02
_INSTANCE = re.compile(r"(?P<instance>.+)\.(?P<type>_[^.]+\._(?:tcp|udp)\.local\.)\Z", re.IGNORECASE | re.DOTALL)


def split_instance(name: str) -> tuple[str, str] | None:
    """Split `Dr. Who._http._tcp.local.` into instance and type; None for any other name, subtypes included."""
    match = _INSTANCE.match(name)
    if match is None or match["instance"].lower().endswith("._sub"):
        return None
    return match["instance"], match["type"]


def pointer(name: str, target: str) -> DNSRecord:
    """Make a PTR: shared by all who offer the type, so never with cache-flush (RFC 6762 section 10.2)."""
    return DNSPointer(name, PTR, _IN, OTHER_TTL, target)


def service(name: str, port: int, host: str) -> DNSRecord:
    """Make an SRV."""
    return DNSService(name, SRV, _UNIQUE, HOST_TTL, 0, 0, port, host)


def text(name: str, data: bytes) -> DNSRecord:
    """Make a TXT; see `encode_txt`."""
    return DNSText(name, TXT, _UNIQUE, OTHER_TTL, data)


def address(name: str, packed: bytes) -> DNSRecord:
    """Make an A (4 bytes) or AAAA (16 bytes)."""
    return DNSAddress(name, A if len(packed) == 4 else AAAA, _UNIQUE, HOST_TTL, packed)


def denial(name: str, types: Sequence[int]) -> DNSRecord:
    """Make the NSEC that says: of this name there are these types and no others (RFC 6762 section 6.1)."""
    return DNSNsec(name, NSEC, _UNIQUE, HOST_TTL, name, list(types))


def with_ttl(record: DNSRecord, ttl: int) -> DNSRecord:
    """Copy a record of one of the types above with another TTL (seconds); 0 makes it a goodbye (RFC 6762 10.1).

    The copy was created when the record was. Raises TypeError for any other type.
    """
    head = record.name, record.type, _UNIQUE if record.unique else _IN, ttl
    match record:
        case DNSPointer():
            return DNSPointer(*head, record.alias, record.created)
        case DNSService():
            return DNSService(*head, record.priority, record.weight, record.port, record.server, record.created)
        case DNSText():
            return DNSText(*head, record.text, record.created)
        case DNSAddress():
            return DNSAddress(*head, record.address, record.scope_id, record.created)
        case DNSNsec():
            return DNSNsec(*head, record.next_name, record.rdtypes, record.created)
    raise TypeError(f"portd does not use records like {record!r}")


def rdata(record: DNSRecord) -> bytes:
    """Return the record's data without compression, as tie-breaks compare it (RFC 6762 section 8.2.1)."""
    out = _Message(_QUERY)
    record.write(out)
    return b"".join(out.data)


def apply_goodbye(cache: DNSCache, record: DNSRecord) -> bool:
    """Expire a cached record after one second (section 10.1), so that another responder can rescue it.

    Returns whether the record was cached.
    """
    if cache.get(record) is None:
        return False
    cache.async_add_records([with_ttl(record, 1)])
    return True


def encode_txt(pairs: Iterable[tuple[str, str]]) -> bytes:
    """Encode key=value strings; a TXT is never empty (RFC 6763 section 6.1)."""
    strings = [f"{key}={value}".encode() for key, value in pairs]
    return b"".join(bytes([len(string)]) + string for string in strings) or b"\0"


def decode_txt(data: bytes) -> dict[str, str]:
    """Decode key=value strings; the first of equal keys counts, one without `=` has an empty value (section 6.4)."""
    pairs: dict[str, str] = {}
    at = 0
    while at < len(data):
        end = at + 1 + data[at]
        key, _, value = data[at + 1 : end].decode("utf-8", "replace").partition("=")
        if key:
            pairs.setdefault(key, value)
        at = end
    return pairs


def encode_probe(claims: Iterable[tuple[str, Sequence[DNSRecord]]]) -> list[bytes]:
    """Encode probes: a question of type ANY per name, the proposed records in the authority section (section 8.1)."""
    claims = list(claims)
    packets: list[bytes] = []
    for start in range(0, len(claims), PROBED_PER_PACKET):
        packets += _encode_probe(claims[start : start + PROBED_PER_PACKET])
    return packets


def _encode_probe(claims: list[tuple[str, Sequence[DNSRecord]]]) -> list[bytes]:
    out = _Message(_QUERY)
    for name, records in claims:
        out.add_question(DNSQuestion(name, ANY, _UNIQUE))  # the same bit asks for a unicast answer here
        out.authorities.extend(records)  # type: ignore[arg-type]  # typed for PTR alone, written for all
    packets = out.packets()
    if len(packets) > 1 and len(claims) > 1:  # long TXTs: a question and its proposal belong into one packet
        half = len(claims) // 2
        return _encode_probe(claims[:half]) + _encode_probe(claims[half:])
    return packets


def encode_response(answers: Iterable[DNSRecord], additionals: Iterable[DNSRecord] = ()) -> list[bytes]:
    """Encode a multicast response, in as many packets as it takes."""
    out = _Message(_RESPONSE)
    for record in answers:
        out.add_answer_at_time(record, 0)
    for record in additionals:
        out.add_additional_answer(record)
    return out.packets()


def encode_query(
    questions: Iterable[tuple[str, int]], known: Iterable[DNSRecord] = (), *, now_ms: float = 0.0, unicast: bool = False
) -> list[bytes]:
    """Encode questions, with the known answers that nobody need repeat (RFC 6762 sections 7.1 and 7.2)."""
    out = _Message(_QUERY)
    for name, type_ in questions:
        out.add_question(DNSQuestion(name, type_, _UNIQUE if unicast else _IN))
    for record in known:
        out.add_answer_at_time(record, now_ms)
    return out.packets()


def encode_legacy(
    query: DNSIncoming, answers: Iterable[DNSRecord], additionals: Iterable[DNSRecord], *, is_cut: bool = False
) -> bytes:
    """Encode the answer to a one-shot resolver: its id and questions again, short TTLs, no cache-flush (section 6.7).

    One packet however many answers there are, with TC if it does not hold all or if `is_cut`: more would make portd an
    amplifier.
    """
    out = _Message(_RESPONSE, multicast=False, id_=query.id)
    for question in query.questions:
        out.add_question(question)
    for record in answers:
        out.add_answer_at_time(with_ttl(record, min(record.ttl, LEGACY_TTL)), 0)
    for record in additionals:
        out.add_additional_answer(with_ttl(record, min(record.ttl, LEGACY_TTL)))
    first, *rest = out.packets()
    return first[:2] + bytes([first[2] | _TRUNCATED]) + first[3:] if rest or is_cut else first


def decode(data: bytes, now_ms: float) -> DNSIncoming | None:
    """Decode a packet; None for what is no query or response. `answers()` holds all three record sections in order."""
    message = DNSIncoming(data, now=now_ms)
    return message if message.valid and not message.flags & 0x7800 else None


class _Message(DNSOutgoing):
    """zeroconf's writer, except that an instance name is one label, whatever dots it has."""

    def write_name(self, name: str) -> None:
        split = split_instance(name) if "." in name else None
        if split is None or "." not in split[0]:
            DNSOutgoing.write_name(self, name)
            return
        flat = name.removesuffix(".")
        offset = self.names.get(flat)
        if offset is not None:
            self.write_short(0xC000 | offset)
            return
        self.names[flat] = self.size
        self.write_character_string(split[0].encode())
        DNSOutgoing.write_name(self, split[1])
