"""Decides what to answer to multicast DNS queries, when, and by which way (RFC 6762 sections 5 to 7, 11).

Pure: no socket, no timer; the responder passes in the time and the queries, and sends what comes out. Nobody is used to
flood somebody else: answers to one host's address go to neighbours only and are bounded in bytes a second, a record is
multicast at most once a second, and what one query may ask for is bounded. How names are won is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import ip_address
from typing import NamedTuple, TypeVar

from portd.adapters.mdns import wire
from portd.adapters.mdns.interfaces import Interface, Interfaces
from portd.adapters.mdns.sockets import PORT, Arrival, Target
from portd.adapters.mdns.wire import DNSIncoming, DNSPointer, DNSQuestion, DNSRecord, DNSService
from portd.adapters.mdns.zone import Entry, Zone

SHARED_DELAY_S = (0.020, 0.120)
"""Random delay of an answer that other hosts may give too, so that answers don't collide (section 6)."""
REPEAT_S = 1.0
"""Least time between two multicasts of a record on a link (section 6)."""
DEFENCE_S = 0.25
"""The same for the answer to a probe, which can't wait (section 6)."""
MORE_KNOWN_S = (0.400, 0.500)
"""How long to wait for the rest of the known answers after a truncated query (section 7.2)."""
HELD_QUERIES = 64
"""Truncated queries kept at once; further ones are answered without their known answers."""
QUESTIONS = 128
"""Different questions of one query that are answered. Browsers ask for a few dozen; each costs up to the whole zone."""
KNOWN_ANSWERS = 4096
"""Known answers of one truncated query that are remembered."""
ANSWERS_AT_ONCE = 64
"""Answers encoded in one call, about 2 ms."""
PER_PACKET = 16
"""Services whose PTR, SRV and TXT share a packet with the host's addresses."""
LEGACY_ANSWERS = 32
"""Answers offered to a resolver that knows no multicast; one packet has no room for more."""
DIRECT_BYTES, DIRECT_BYTES_IN_ALL = 32_768, 262_144
"""Bytes a second sent to one address, and to all together. Beyond them queries are answered by multicast, which a
forged source address can't multiply, and legacy queries not at all."""

T = TypeVar("T")
Random = Callable[[float, float], float]
"""Returns a number between two others: `random.uniform`, or a test's own."""


class Sending(NamedTuple):
    """Packets and where they go."""

    target: Target
    packets: list[bytes]


class Answerer:
    """Gives the zone's records to whoever asks. Call `note_multicast` for what was multicast by others of portd's."""

    def __init__(self, zone: Zone, random: Random) -> None:
        self._zone = zone
        self._random = random
        self.links: Interfaces = {}
        self._planned: dict[Target, dict[DNSRecord, float]] = {}
        self._sent_at: dict[Target, dict[DNSRecord, float]] = {}
        self._held: dict[str, _HeldQuery] = {}
        self._direct = _Budget()

    def receive(self, now: float, arrival: Arrival, message: DNSIncoming) -> list[Sending]:
        """Plan the answers to a query; returns those that go out at once.

        A query that was sent to this host alone, or from another port than 5353, counts only if it comes from a
        neighbour (sections 5.5, 6.7 and 11).
        """
        link = self.links.get(arrival.link)
        if link is None:
            return []
        is_neighbour = _is_neighbour(link, arrival.source)
        if not is_neighbour and (not arrival.is_multicast or arrival.port != PORT):
            return []
        if arrival.port != PORT:
            return self._answer_legacy(now, arrival, link, message)
        held = self._held.get(arrival.source)
        if held is not None:
            held.add(message)
            return []
        query = _HeldQuery(arrival, now, is_neighbour)
        query.add(message)
        if message.truncated and len(self._held) < HELD_QUERIES:
            query.due = now + self._random(*MORE_KNOWN_S)
            self._held[arrival.source] = query
            return []
        return self._answer(now, query, link, is_probe=message.is_probe())

    def tick(self, now: float) -> list[Sending]:
        """Return what is due at `now`; call again at `deadline`."""
        out: list[Sending] = []
        for source in [source for source, query in self._held.items() if query.due <= now]:
            query = self._held.pop(source)
            link = self.links.get(query.arrival.link)
            if link is not None:
                out += self._answer(now, query, link, is_probe=False)
        budget = ANSWERS_AT_ONCE
        for target, planned in list(self._planned.items()):
            due = [record for record, at in planned.items() if at <= now][:budget]
            budget -= len(due)
            for record in due:
                del planned[record]
            if not planned:
                del self._planned[target]
            out += self._multicast(now, target, due)
        return out

    def deadline(self) -> float | None:
        """Return when `tick` has something to do, None when there is nothing."""
        times = [at for planned in self._planned.values() for at in planned.values()]
        times += [query.due for query in self._held.values()]
        return min(times, default=None)

    def note_multicast(self, now: float, target: Target, records: Iterable[DNSRecord]) -> None:
        """Remember what was multicast, so that it is not repeated within a second."""
        sent_at = self._sent_at.setdefault(target, {})
        if len(sent_at) > 64 and len(sent_at) > 8 * len(self._zone.entries):  # most are of services long gone
            sent_at = self._sent_at[target] = {
                record: at for record, at in sent_at.items() if now - at < wire.OTHER_TTL / 4
            }
        sent_at.update(dict.fromkeys(records, now))

    # --- answers ---

    def _answer(self, now: float, query: _HeldQuery, link: Interface, *, is_probe: bool) -> list[Sending]:
        arrival = query.arrival
        target = Target(arrival.family, arrival.link)
        sent_at = self._sent_at.get(target, {})
        direct: list[DNSRecord] = []
        for question in query.questions.values():
            is_direct = query.is_neighbour and (question.unicast or not arrival.is_multicast)
            for record, is_shared in self._find(question, link):
                last = sent_at.get(record, -1e9)
                if is_probe:
                    self._plan(target, record, max(now, last + DEFENCE_S))
                elif query.knows(record):
                    continue
                elif is_direct and now - last < record.ttl / 4:
                    direct.append(record)
                else:
                    delay = self._random(*SHARED_DELAY_S) if is_shared else 0.0
                    self._plan(target, record, max(now + delay, last + REPEAT_S))
        return self._answer_directly(now, arrival, link, direct)

    def _answer_directly(
        self, now: float, arrival: Arrival, link: Interface, records: list[DNSRecord]
    ) -> list[Sending]:
        """Send records to the asker's address as long as its budget lasts, and the rest by multicast."""
        out: list[Sending] = []
        group = Target(arrival.family, arrival.link)
        for answers in slices(records, PER_PACKET):
            if not self._direct.is_left(now, arrival.source):
                last = self._sent_at.get(group, {})
                for record in answers:
                    self._plan(group, record, max(now, last.get(record, -1e9) + REPEAT_S))
                continue
            packets = wire.encode_response(answers, self._additionals(answers, link))
            self._direct.spend(arrival.source, sum(map(len, packets)))
            out.append(Sending(Target(arrival.family, arrival.link, arrival.source, arrival.port), packets))
        return out

    def _answer_legacy(self, now: float, arrival: Arrival, link: Interface, message: DNSIncoming) -> list[Sending]:
        """Answer a resolver that knows no multicast: in one packet, with TC if it holds not all (section 6.7)."""
        if not self._direct.is_left(now, arrival.source):
            return []
        questions = {_question_key(question): question for question in message.questions[:QUESTIONS]}
        answers = [record for question in questions.values() for record, _ in self._find(question, link)]
        if not answers:
            return []
        cut = answers[:LEGACY_ANSWERS]
        packet = wire.encode_legacy(message, cut, self._additionals(cut, link), is_cut=len(cut) < len(answers))
        self._direct.spend(arrival.source, len(packet))
        return [Sending(Target(arrival.family, arrival.link, arrival.source, arrival.port), [packet])]

    def _multicast(self, now: float, target: Target, records: list[DNSRecord]) -> Iterator[Sending]:
        """Encode records that are still true for the group."""
        link = self.links.get(target.link)
        if link is None:
            return
        for answers in slices([record for record in records if self._zone.has(record, link)], PER_PACKET):
            sent_at = self._sent_at.get(target, {})
            additionals = [
                record for record in self._additionals(answers, link) if now - sent_at.get(record, -1e9) >= REPEAT_S
            ]
            self.note_multicast(now, target, [*answers, *additionals])
            yield Sending(target, wire.encode_response(answers, additionals))

    def _plan(self, target: Target, record: DNSRecord, due: float) -> None:
        planned = self._planned.setdefault(target, {})
        planned[record] = min(due, planned.get(record, due))

    # --- records ---

    def _find(self, question: DNSQuestion, link: Interface) -> list[tuple[DNSRecord, bool]]:
        """Return the answers to a question, and whether other hosts may have more of them."""
        if self._zone.claim(question.key) is not None:
            return [(record, False) for record in self._unique(question, link)]
        if question.type not in (wire.PTR, wire.ANY):
            return []
        return [(record, True) for record in self._pointers(question.key, link)]

    def _pointers(self, key: str, link: Interface) -> list[DNSRecord]:
        """Return the PTRs of a type or subtype, or those of all types."""
        if key == wire.TYPES_NAME:
            return [wire.pointer(wire.TYPES_NAME, base) for base in sorted(self._zone.types())]
        entries = [entry for entry in self._zone.pointed(key) if entry.is_won and entry.is_on(link)]
        return [record for entry in entries for record in entry.pointers() if record.key == key]

    def _unique(self, question: DNSQuestion, link: Interface) -> list[DNSRecord]:
        """Return the records of a name of ours, or the NSEC that denies the type asked for (section 6.1)."""
        claim = self._zone.claim(question.key)
        if claim is None or not claim.is_won or not claim.is_on(link):
            return []
        records = claim.unique(link)
        found = [record for record in records if question.type in (record.type, wire.ANY)]
        if not found and records:
            return [wire.denial(claim.full_name, sorted({record.type for record in records}))]
        return found

    def _additionals(self, answers: Iterable[DNSRecord], link: Interface) -> list[DNSRecord]:
        """Add what the asker would ask next: SRV and TXT to a PTR, the addresses to an SRV (RFC 6763 section 12)."""
        more: dict[DNSRecord, None] = {}
        needs_host = False
        for record in answers:
            if isinstance(record, DNSPointer):
                claim = self._zone.claim(record.alias_key)
                if isinstance(claim, Entry):
                    needs_host = True
                    more.update(dict.fromkeys(claim.unique(link)))
            needs_host |= isinstance(record, DNSService)
        if needs_host and self._zone.host.is_won:
            more.update(dict.fromkeys(self._zone.host.unique(link)))
        for record in answers:
            more.pop(record, None)
        return list(more)


class _HeldQuery:
    """A query, perhaps of several packets: what it asks for, and what the asker knows already."""

    def __init__(self, arrival: Arrival, due: float, is_neighbour: bool) -> None:
        self.arrival = arrival
        self.due = due
        self.is_neighbour = is_neighbour
        self.questions: dict[tuple[str, int, bool], DNSQuestion] = {}
        self._known: dict[DNSRecord, int] = {}

    def add(self, message: DNSIncoming) -> None:
        """Add a packet of the query; beyond the bounds it is dropped."""
        for question in message.questions:
            if len(self.questions) < QUESTIONS:
                self.questions.setdefault(_question_key(question), question)
        for record in message.answers():
            if len(self._known) < KNOWN_ANSWERS:
                self._known[record] = record.ttl

    def knows(self, record: DNSRecord) -> bool:
        """Return whether the asker has the record, for at least half of its time still (section 7.1)."""
        return self._known.get(record, 0) * 2 >= record.ttl


class _Budget:
    """Bytes sent to single addresses within the present second."""

    def __init__(self) -> None:
        self._second = 0
        self._spent: dict[str, int] = {}

    def is_left(self, now: float, source: str) -> bool:
        if int(now) != self._second:
            self._second = int(now)
            self._spent.clear()
        return self._spent.get(source, 0) < DIRECT_BYTES and sum(self._spent.values()) < DIRECT_BYTES_IN_ALL

    def spend(self, source: str, size_bytes: int) -> None:
        self._spent[source] = self._spent.get(source, 0) + size_bytes


def slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the items in groups of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _question_key(question: DNSQuestion) -> tuple[str, int, bool]:
    return question.key, question.type, question.unicast


def _is_neighbour(link: Interface, source: str) -> bool:
    address = ip_address(source)
    return address.is_link_local or any(address in own.network for own in link.addresses)
