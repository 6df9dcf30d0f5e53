"""One query in, one answer out, in bytes: what a message must be (RFC 1035, 2308, 6891, 8482) and what it is answered
with. The fast path of a good query: find the name, patch id, flags and the question into the prepared answer.

This module must not know sockets, leases, or where a table of names comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

from dns.rcode import BADVERS, FORMERR, NOERROR, NOTIMP, NXDOMAIN, REFUSED, SERVFAIL, Rcode
from dns.rdatatype import AAAA, ANY, AXFR, HTTPS, IXFR, MX, NS, PTR, SOA, SRV, TXT, A

from portd.adapters.dns.answers import AUTHORITATIVE, RECURSION_DESIRED, Answer, head
from portd.adapters.dns.records import Record

HEADER_BYTES: Final = 12
PLAIN_BYTES: Final = 512
"""What every client accepts over UDP (RFC 1035 section 4.2.1)."""
OFFERED_BYTES: Final = 1232
"""The size that we offer; queries are far smaller. Fits into an unfragmented packet on any IPv6 path."""

RESPONSE, OPCODE, RD = 0x80, 0x78, 0x01
POINTER: Final = 0xC0
ONE: Final = b"\0\1"
IN_CLASS: Final = b"\0\1"
OPT_START: Final = b"\0\0\x29"
OPT_BYTES: Final = 11
DO_BIT: Final = 0x80
OPTS: Final = tuple(OPT_START + OFFERED_BYTES.to_bytes(2) + b"\0\0" + do + b"\0\0\0" for do in (b"\0", b"\x80"))
"""Ours, without and with the DO bit, which is to be copied (RFC 3225 section 3)."""
BADVERS_OPTS: Final = tuple(opt[:5] + b"\1" + opt[6:] for opt in OPTS)

TYPE_NAMES: Final = {int(each): each.name for each in (A, AAAA, SRV, TXT, SOA, NS, ANY, HTTPS, MX, PTR, AXFR, IXFR)}
"""Types that are counted apart; the rest are "other", so that nobody can make as many counters as there are types."""


class Limits(NamedTuple):
    """How large an answer may be, in bytes: to a plain query, and at most to one that offers more by EDNS."""

    plain: int
    edns: int


class Node(Protocol):
    """A name that exists."""

    def answer(self, qtype: int, asked_at: str | None = None) -> Answer | None: ...


class Names(Protocol):
    """The names of a zone. `wire` is its own name in wire format, lower case."""

    @property
    def wire(self) -> bytes: ...
    @property
    def soa(self) -> Record: ...
    def find(self, name: bytes) -> Node | None: ...


class Edns(NamedTuple):
    """The OPT record of a query (RFC 6891 section 6.1)."""

    size_bytes: int
    version: int
    dnssec_ok: bool


class Malformed(Exception):
    """The query is not a DNS message, or asks not exactly one question."""


class Responder:
    """Answers queries from a table. `on_query` is called with the type and the outcome of each."""

    def __init__(self, names: Names, on_query: Callable[[str, str], None] | None = None) -> None:
        self._names = names
        self._on_query = on_query

    def respond(self, query: bytes, limits: Limits, asked_at: str | None = None) -> bytes | None:
        """Return the answer, or None where none is due: to an answer, or to less than a header.

        `asked_at` is the address at which the query came in, None for a loopback one.
        """
        if len(query) < HEADER_BYTES or query[2] & RESPONSE:
            return None
        try:
            if query[2] & OPCODE:
                return self._refuse(query, NOTIMP)
            if query[4:6] != ONE:
                raise Malformed
            return self._answer(query, limits, asked_at)
        except Malformed:
            return self._refuse(query, FORMERR)

    def fail(self, query: bytes) -> bytes:
        """Return the answer to a query that portd itself failed at."""
        return self._refuse(query, SERVFAIL)

    def _answer(self, query: bytes, limits: Limits, asked_at: str | None) -> bytes:
        # A name that is found is well-formed, as the table's are: only others need a walk over their labels.
        end = query.find(0, HEADER_BYTES) + 5
        node = self._names.find(query[HEADER_BYTES : end - 4].lower())
        ours = True
        if node is None:
            end, ours = self._locate(query)
        if end > len(query):
            raise Malformed
        edns = find_edns(query[6:12], query[end:])
        qtype = query[end - 4] << 8 | query[end - 3]
        if edns is not None and edns.version:
            return self._reject(query, end, qtype, BADVERS, BADVERS_OPTS[edns.dnssec_ok])
        opt = b"" if edns is None else OPTS[edns.dnssec_ok]
        if not ours or query[end - 2 : end] != IN_CLASS or qtype in (AXFR, IXFR):
            return self._reject(query, end, qtype, REFUSED, opt)
        if node is None:
            return self._deny(query, end, qtype, NXDOMAIN, opt)
        answer = node.answer(qtype, asked_at)
        if answer is None:
            return self._deny(query, end, qtype, NOERROR, opt)
        if self._on_query is not None:
            self._on_query(TYPE_NAMES.get(qtype, "other"), "NOERROR")
        if edns is None:
            heads, tail = answer.next(limits.plain)
            return query[:2] + heads[query[2] & RD] + query[HEADER_BYTES:end] + tail
        heads, tail = answer.next(min(max(edns.size_bytes, limits.plain), limits.edns) - OPT_BYTES)
        return query[:2] + heads[2 + (query[2] & RD)] + query[HEADER_BYTES:end] + tail + opt

    def _locate(self, query: bytes) -> tuple[int, bool]:
        """Find where the question ends, and whether its name is the zone's or below; raises Malformed."""
        zone = self._names.wire
        at, starts = HEADER_BYTES, []
        while True:
            starts.append(at)
            if at >= len(query) or query[at] >= 64:  # a pointer has nothing to point to before the first name
                raise Malformed
            if not query[at]:
                break
            at += 1 + query[at]
        at += 1
        if at - HEADER_BYTES > 255:
            raise Malformed
        return at + 4, at - len(zone) in starts and query[at - len(zone) : at].lower() == zone

    def _deny(self, query: bytes, end: int, qtype: int, rcode: Rcode, opt: bytes) -> bytes:
        """Say that there is no such name, or (NOERROR) no such record, and who says so (RFC 2308 section 2)."""
        if self._on_query is not None:
            self._on_query(TYPE_NAMES.get(qtype, "other"), rcode.name)
        zone_at = end - 4 - len(self._names.wire)
        if query[zone_at : end - 4].lower() != self._names.wire:  # a reverse name: its zone is not ours to describe
            top = head(AUTHORITATIVE | _desired(query) | rcode, 0, 0, 1 if opt else 0)
            return b"".join((query[:2], top, query[HEADER_BYTES:end], opt))
        top = head(AUTHORITATIVE | _desired(query) | rcode, 0, 1, 1 if opt else 0)
        return b"".join(
            (query[:2], top, query[HEADER_BYTES:end], (zone_at | 0xC000).to_bytes(2), self._names.soa.data, opt)
        )

    def _reject(self, query: bytes, end: int, qtype: int, rcode: Rcode, opt: bytes) -> bytes:
        """Decline a question that is none of ours; the upper bits of `rcode` are in OPT."""
        if self._on_query is not None:
            self._on_query(TYPE_NAMES.get(qtype, "other"), rcode.name)
        top = head(RESPONSE << 8 | _desired(query) | rcode & 15, 0, 0, 1 if opt else 0)
        return query[:2] + top + query[HEADER_BYTES:end] + opt

    def _refuse(self, query: bytes, rcode: Rcode) -> bytes:
        """Refuse a message as a whole: a header, shorter than whatever was asked."""
        if self._on_query is not None:
            self._on_query("other", rcode.name)
        opcode = (query[2] & OPCODE) << 8
        return query[:2] + head(RESPONSE << 8 | opcode | _desired(query) | rcode, 0, 0, 0, questions=0)


def _desired(query: bytes) -> int:
    return RECURSION_DESIRED if query[2] & RD else 0


@lru_cache(maxsize=64)  # clients say the same thing with every query, but for those that send cookies
def find_edns(counts: bytes, records: bytes) -> Edns | None:
    """Find OPT among the records behind the question, given the header's counts of them.

    Raises Malformed, for a second OPT and for trailing bytes too.
    """
    found: Edns | None = None
    additional = int.from_bytes(counts[4:])
    count = int.from_bytes(counts[:2]) + int.from_bytes(counts[2:4]) + additional
    at = 0
    for left in range(count, 0, -1):
        owner_at, at = at, _skip_name(records, at)
        if at + 10 > len(records):
            raise Malformed
        if left <= additional and records[owner_at : owner_at + 3] == OPT_START:
            if found is not None:
                raise Malformed
            found = Edns(records[at + 2] << 8 | records[at + 3], records[at + 5], bool(records[at + 6] & DO_BIT))
        at += 10 + (records[at + 8] << 8 | records[at + 9])
    if at != len(records):
        raise Malformed
    return found


def _skip_name(records: bytes, at: int) -> int:
    while at < len(records):
        length = records[at]
        if not length:
            return at + 1
        if length >= POINTER:
            return at + 2
        at += 1 + length
    raise Malformed
