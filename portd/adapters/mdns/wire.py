"""The wire format of multicast DNS, on zeroconf's parts: the only room that knows them from inside.

Pinned to zeroconf 0.154.0: `DNSOutgoing.write_name`, `names` and `size` are used below its public face, and
tests/adapters/mdns/test_mdns_wire.py fails when they change. What is taken: the compiled reader and writer, the record
classes and the cache. What is not: its sockets, its responder, its browser. This module must not know who sends what to
whom.

Names are written flat, as zeroconf reads them: `Dr. Who._http._tcp.local.`. Which dots part labels follows from the
shape of a DNS-SD name (RFC 6763 section 4.3), so that an instance name with dots is one label on the wire.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from zeroconf._cache import DNSCache
from zeroconf._dns import DNSAddress, DNSNsec, DNSPointer, DNSQuestion, DNSRecord, DNSService, DNSText
from zeroconf._protocol.incoming import DNSIncoming
from zeroconf._protocol.outgoing import DNSOutgoing

__all__ = ["DNSAddress", "DNSCache", "DNSIncoming", "DNSPointer", "DNSQuestion", "DNSRecord", "DNSService", "DNSText"]

A, PTR, TXT, AAAA, SRV, ANY = 1, 12, 16, 28, 33, 255
DOMAIN = "local."
TYPES_NAME = "_services._dns-sd._udp.local."
"""The name whose PTRs are the types that anybody offers (RFC 6763 section 9)."""
PORT = 5353
HOST_TTL = 120
"""Seconds; records that hold a host name or an address (RFC 6762 section 10)."""
OTHER_TTL = 4500
LEGACY_TTL = 10
"""Seconds; the most that a one-shot resolver may keep, since it hears no goodbye (RFC 6762 section 6.7)."""
PROBED_PER_PACKET = 12
"""Names in one probe: with SRV and TXT they fit an Ethernet packet as long as TXT records are short."""

_IN, _UNIQUE = 0x0001, 0x8001
_QUERY, _RESPONSE, _TRUNCATED = 0x0000, 0x8400, 0x02
_INSTANCE = re.compile(r"(?P<instance>.+)\.(?P<type>_[^.]+\._(?:tcp|udp)\.local\.)\Z", re.IGNORECASE | re.DOTALL)


def split_instance(name: str) -> tuple[str, str] | None:
    """Take `Dr. Who._http._tcp.local.` apart into instance and type; None for any other name, subtypes included."""
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
    return DNSNsec(name, 47, _UNIQUE, HOST_TTL, name, list(types))


def with_ttl(record: DNSRecord, ttl: int) -> DNSRecord:
    """Copy a record with another TTL (seconds); 0 makes it a goodbye (RFC 6762 section 10.1)."""
    class_ = _UNIQUE if record.unique else _IN
    match record:
        case DNSPointer():
            return DNSPointer(record.name, record.type, class_, ttl, record.alias)
        case DNSService():
            return DNSService(
                record.name, record.type, class_, ttl, record.priority, record.weight, record.port, record.server
            )
        case DNSText():
            return DNSText(record.name, record.type, class_, ttl, record.text)
        case DNSAddress():
            return DNSAddress(record.name, record.type, class_, ttl, record.address)
        case DNSNsec():
            return DNSNsec(record.name, record.type, class_, ttl, record.next_name, record.rdtypes)
    raise TypeError(f"{record!r} is no record that portd sends")


def rdata(record: DNSRecord) -> bytes:
    """Return the record's data without compression, as tie-breaks compare it (RFC 6762 section 8.2.1)."""
    out = _Message(_QUERY)
    record.write(out)
    return b"".join(out.data)


def take_leave(cache: DNSCache, record: DNSRecord, now_ms: float) -> bool:
    """Let a cached record go in a second, as a goodbye asks (section 10.1): somebody may contradict it till then.

    Tells whether the record was there.
    """
    known = cache.get(record)
    if known is not None:
        cache._async_set_created_ttl(known, now_ms, 1)
    return known is not None


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
    """Encode questions with what is known already, so that nobody says it again (RFC 6762 section 7.1, 7.2)."""
    out = _Message(_QUERY)
    for name, type_ in questions:
        out.add_question(DNSQuestion(name, type_, _UNIQUE if unicast else _IN))
    for record in known:
        out.add_answer_at_time(record, now_ms)
    return out.packets()


def encode_legacy(query: DNSIncoming, answers: Iterable[DNSRecord], additionals: Iterable[DNSRecord]) -> bytes:
    """Encode the answer to a one-shot resolver: its id and questions again, short TTLs, no cache-flush (section 6.7).

    One packet however many answers there are, with TC when it was cut: a forged question must not be amplified.
    """
    out = _Message(_RESPONSE, multicast=False, id_=query.id)
    for question in query.questions:
        out.add_question(question)
    for record in answers:
        out.add_answer_at_time(with_ttl(record, min(record.ttl, LEGACY_TTL)), 0)
    for record in additionals:
        out.add_additional_answer(with_ttl(record, min(record.ttl, LEGACY_TTL)))
    first, *rest = out.packets()
    return first if not rest else first[:2] + bytes([first[2] | _TRUNCATED]) + first[3:]


def decode(data: bytes, now_ms: float) -> DNSIncoming | None:
    """Read a packet; None when it is none. `answers()` of the result holds all three record sections in order."""
    message = DNSIncoming(data, now=now_ms)
    return message if message.valid and not message.flags & 0x7800 else None


class _Message(DNSOutgoing):
    """zeroconf's writer, taught that an instance name is one label, whatever dots it holds."""

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
