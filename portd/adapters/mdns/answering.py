"""Answers questions out of the zone: at the right moment, by the right way, and never more than needed (RFC 6762
sections 5 to 7). Knows neither how names are won nor who wants them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from ipaddress import ip_address

from portd.adapters.mdns import wire
from portd.adapters.mdns.interfaces import Interface, Interfaces
from portd.adapters.mdns.sockets import PORT, Arrival, Sockets, Target
from portd.adapters.mdns.wire import DNSIncoming, DNSPointer, DNSQuestion, DNSRecord, DNSService
from portd.adapters.mdns.zone import Entry, HostName, Standing, Zone

SHARED_DELAY_S = (0.020, 0.120)
"""Answers that others may give too wait a random while, so that they don't collide (section 6)."""
REPEAT_S = 1.0
"""A record is not multicast again on a link sooner than this (section 6)…"""
DEFENCE_S = 0.25
"""…unless a probe asks (section 6), which can't wait."""
MORE_KNOWN_S = (0.400, 0.500)
"""How long to wait for the rest of the known answers after a truncated query (section 7.2)."""
HELD_QUERIES = 64
AT_ONCE = 64
"""Answers encoded before the loop gets its turn, about 2 ms."""
PER_PACKET = 16
"""Services whose PTR, SRV and TXT share a packet with the host's addresses."""
LEGACY_ANSWERS = 32


class Answerer:
    """Gives the zone's records to who asks. Call `said` for what was multicast otherwise."""

    def __init__(self, zone: Zone, sockets: Sockets) -> None:
        self._zone = zone
        self._sockets = sockets
        self.links: Interfaces = {}
        self._due: dict[Target, dict[DNSRecord, float]] = {}
        self._said: dict[Target, dict[DNSRecord, float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = 0.0
        self._held: dict[str, _HeldQuery] = {}
        self._now = asyncio.get_running_loop().time

    def close(self) -> None:
        """Answer nothing any more; may be called twice."""
        if self._timer is not None:
            self._timer.cancel()
        for held in self._held.values():
            held.timer.cancel()
        self._held.clear()
        self._due.clear()

    def receive(self, arrival: Arrival, message: DNSIncoming) -> None:
        """Take a query in. One that was sent to this host alone counts only from a neighbour (section 5.5, 11)."""
        link = self.links.get(arrival.link)
        if link is None or not (arrival.is_multicast or _is_neighbour(link, arrival.source)):
            return
        if arrival.port != PORT:
            if message.questions:
                self._answer_legacy(arrival, link, message)
            return
        held = self._held.get(arrival.source)
        if held is not None:
            held.questions += message.questions
            held.known.update((record, record) for record in message.answers())
            return
        known = {record: record for record in message.answers()}
        if message.truncated and len(self._held) < HELD_QUERIES:
            timer = asyncio.get_running_loop().call_later(random.uniform(*MORE_KNOWN_S), self._release, arrival, link)
            self._held[arrival.source] = _HeldQuery(list(message.questions), known, timer)
            return
        self._answer(arrival, link, message.questions, known, is_probe=message.is_probe())

    def said(self, targets: Iterable[Target], records: Iterable[DNSRecord]) -> None:
        """Take note of what has just been multicast."""
        now = self._now()
        records = list(records)
        for target in targets:
            said = self._said.setdefault(target, {})
            if len(said) > 64 and len(said) > 8 * len(self._zone.entries):  # most are of services long gone
                said = self._said[target] = {record: at for record, at in said.items() if now - at < wire.OTHER_TTL / 4}
            said.update(dict.fromkeys(records, now))

    def forget(self, record: DNSRecord) -> None:
        """Say a record no more, whoever asked for it."""
        for due in self._due.values():
            due.pop(record, None)
        for said in self._said.values():
            said.pop(record, None)

    def _release(self, arrival: Arrival, link: Interface) -> None:
        held = self._held.pop(arrival.source)
        self._answer(arrival, link, held.questions, held.known, is_probe=False)

    def _answer(
        self,
        arrival: Arrival,
        link: Interface,
        questions: list[DNSQuestion],
        known: dict[DNSRecord, DNSRecord],
        *,
        is_probe: bool,
    ) -> None:
        target = Target(arrival.family, arrival.link)
        said = self._said.get(target, {})
        now = self._now()
        direct: list[DNSRecord] = []
        for question in questions:
            for record, is_shared in self._records(question, link):
                heard = known.get(record)
                if heard is not None and heard.ttl * 2 >= record.ttl and not is_probe:
                    continue
                last = said.get(record, -1e9)
                if is_probe:
                    self._plan(target, record, max(now, last + DEFENCE_S))
                elif (question.unicast or not arrival.is_multicast) and now - last < record.ttl / 4:
                    direct.append(record)
                else:
                    delay = random.uniform(*SHARED_DELAY_S) if is_shared else 0.0
                    self._plan(target, record, max(now + delay, last + REPEAT_S))
        for start in range(0, len(direct), PER_PACKET):
            answers = direct[start : start + PER_PACKET]
            self._sockets.send(
                wire.encode_response(answers, self._additionals(answers, link)),
                [Target(arrival.family, arrival.link, arrival.source, arrival.port)],
            )

    def _answer_legacy(self, arrival: Arrival, link: Interface, message: DNSIncoming) -> None:
        answers = [record for question in message.questions[:4] for record, _ in self._records(question, link)]
        if answers:
            cut = answers[:LEGACY_ANSWERS]
            packet = wire.encode_legacy(message, cut, self._additionals(cut, link))
            if len(cut) < len(answers):
                packet = packet[:2] + bytes([packet[2] | 0x02]) + packet[3:]
            self._sockets.send([packet], [Target(arrival.family, arrival.link, arrival.source, arrival.port)])

    def _records(self, question: DNSQuestion, link: Interface) -> list[tuple[DNSRecord, bool]]:
        """Find the answers to a question, and whether others may have more of them."""
        key, type_ = question.key, question.type
        if key == wire.TYPES_NAME:
            return (
                [(wire.pointer(wire.TYPES_NAME, base), True) for base in self._zone.types()]
                if type_ in (wire.PTR, wire.ANY)
                else []
            )
        claim = self._zone.claim(key)
        if claim is not None:
            if claim.standing is not Standing.OWNED or not claim.is_on(link):
                return []
            records = claim.unique(link)
            found = [record for record in records if type_ in (record.type, wire.ANY)]
            if not found and records:
                found = [wire.denial(claim.full_name, sorted({record.type for record in records}))]
            return [(record, False) for record in found]
        if type_ not in (wire.PTR, wire.ANY):
            return []
        return [
            (record, True)
            for entry in self._zone.pointed(key)
            if entry.standing is Standing.OWNED and entry.is_on(link)
            for record in entry.pointers()
            if record.key == key
        ]

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
        host: HostName = self._zone.host
        if needs_host and host.standing is Standing.OWNED:
            more.update(dict.fromkeys(host.unique(link)))
        for record in answers:
            more.pop(record, None)
        return list(more)

    def _plan(self, target: Target, record: DNSRecord, due: float) -> None:
        planned = self._due.setdefault(target, {})
        planned[record] = min(due, planned.get(record, due))
        self._wake(due)

    def _wake(self, at: float) -> None:
        if self._timer is not None:
            if self._wakes_at <= at:
                return
            self._timer.cancel()
        self._wakes_at = at
        self._timer = asyncio.get_running_loop().call_at(at, self._flush)

    def _flush(self) -> None:
        self._timer = None
        now, budget = self._now(), AT_ONCE
        for target, planned in self._due.items():
            link = self.links.get(target.link)
            ripe = [record for record, due in planned.items() if due <= now + 0.005][:budget]
            budget -= len(ripe)
            for record in ripe:
                del planned[record]
            for start in range(0, len(ripe) if link else 0, PER_PACKET):
                assert link is not None
                answers = ripe[start : start + PER_PACKET]
                additionals = self._additionals(answers, link)
                self._sockets.send(wire.encode_response(answers, additionals), [target])
                self.said([target], answers + additionals)
        rest = [due for planned in self._due.values() for due in planned.values()]
        if rest:
            self._wake(max(min(rest), now))


class _HeldQuery:
    """A query whose known answers go on in further packets."""

    def __init__(
        self, questions: list[DNSQuestion], known: dict[DNSRecord, DNSRecord], timer: asyncio.TimerHandle
    ) -> None:
        self.questions = questions
        self.known = known
        self.timer = timer


def _is_neighbour(link: Interface, source: str) -> bool:
    address = ip_address(source)
    if address.is_link_local:
        return True
    return any(address in own.network for own in link.addresses)
