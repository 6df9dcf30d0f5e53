"""The embedded responder: wins names, announces what it owns, says goodbye, and defends itself (RFC 6762 sections 8
to 10). Many names share a packet, and packets are paced. Answering is `answering`'s; what to announce is its caller's.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TypeVar

from portd.adapters.mdns import wire
from portd.adapters.mdns.answering import PER_PACKET, Answerer
from portd.adapters.mdns.guard import Guard
from portd.adapters.mdns.interfaces import Interface, Interfaces, InterfaceWatch
from portd.adapters.mdns.responder import Outcome
from portd.adapters.mdns.sockets import Arrival, Sockets
from portd.adapters.mdns.wire import DNSAddress, DNSIncoming, DNSPointer, DNSRecord
from portd.adapters.mdns.zone import Claim, Entry, HostName, Service, Standing, Zone

Hear = Callable[[Arrival, DNSIncoming], None]

T = TypeVar("T")

log = logging.getLogger("portd.mdns")

GATHER_S = 0.010
"""Services that come this close together are probed and announced together."""
PROBES, PROBE_S = 3, 0.25
"""Three probes, 250 ms apart, after a random wait of at most that (section 8.1)."""
ANNOUNCEMENTS, ANNOUNCE_S = 2, 1.0
"""At least two announcements, a second apart (section 8.3)."""
GOODBYE_S = 0.25
"""Until it is said again, though section 10.1 asks for one: a goodbye that is lost leaves a ghost for 75 minutes."""
DEFER_S = 1.0
"""Who loses a tie-break waits this long before it probes again (section 8.2)."""
STORM_CONFLICTS, STORM_S = 15, 5.0
"""After so many lost names one waits, or the link is flooded (section 8.1)."""
NO_LINK = "no network interface to announce on is up"


class EmbeddedResponder:
    """Publishes on this process's own sockets."""

    def __init__(self, host: str, outcome: Outcome, interfaces: Sequence[str] = (), hear: Hear | None = None) -> None:
        self.zone = Zone(HostName(host))
        self.sockets = Sockets(self._receive, unicast=True)
        self._outcome = outcome
        self._hear = hear
        self._watch = InterfaceWatch(interfaces, self._change_links)
        self._answerer = Answerer(self.zone, self.sockets)
        self._guard = Guard(self.sockets)
        self._links: Interfaces = {}
        self._to_claim: dict[Claim, None] = {}
        self._to_announce: dict[Claim, None] = {}
        self._to_withdraw: dict[DNSRecord, str] = {}
        self._gathering: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._published: dict[str, str] = {}
        self._closed = False

    @property
    def host_name(self) -> str:
        return self.zone.host.full_name.removesuffix(".")

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(str(address.ip) for link in self._links.values() for address in link.addresses)

    @property
    def links(self) -> Interfaces:
        """Return the interfaces in use now."""
        return self._links

    async def start(self) -> None:
        """Open sockets, the guardian, and the view of the interfaces; raises OSError, and leaves nothing open then."""
        try:
            self.sockets.open()
            self._watch.start()
            await self._guard.start()
        except BaseException:
            await self.close(takeover=True)
            raise
        self._use_links(self._watch.current)

    async def close(self, *, takeover: bool) -> None:
        """Stop; see Responder."""
        if self._closed:
            return
        self._closed = True
        self._watch.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._gathering is not None:
            self._gathering.cancel()
        self._answerer.close()
        if not takeover:
            await self._take_all_back()
        await self._guard.close()
        self.sockets.close()

    def publish(self, service: Service, name: str) -> None:
        """Publish, or change in place what only has another port or TXT (section 8.4)."""
        entry = self.zone.entries.get(service.id)
        if entry is not None:
            before = entry.service
            if (before.type, before.name, before.address) == (service.type, service.name, service.address):
                if before != service:
                    self._unsay(entry)
                    entry.service = service
                    if entry.standing is Standing.OWNED:
                        self._gather(announce=[entry])
                return
            self.withdraw(service.id)
        entry = Entry(service, name, self.zone.host)
        while not self.zone.is_free(entry.key, entry):
            entry.rename()
        self.zone.add(entry)
        self._start_claim(entry)

    def withdraw(self, service_id: str) -> None:
        """Say goodbye to a service that was announced; one that was only probed for goes in silence."""
        entry = self.zone.entries.get(service_id)
        if entry is None:
            return
        self.zone.remove(entry)
        entry.standing = Standing.WAITING
        entry.attempt += 1
        self._to_claim.pop(entry, None)
        self._to_announce.pop(entry, None)
        self._guard.drop(entry.service.id)
        if self._published.pop(service_id, None) is not None:
            self.repudiate(entry)

    def repudiate(self, entry: Entry) -> None:
        """Say goodbye to what the LAN may still believe of an entry that is not (or no more) in the zone."""
        self._unsay(entry)
        self._to_withdraw.update(dict.fromkeys(entry.records(), entry.service.address))
        self._gather()

    def _unsay(self, entry: Entry) -> None:
        """Answer with the entry's present records no more, whoever has asked already."""
        for record in entry.records():
            self._answerer.forget(record)

    def condition(self) -> dict[str, object]:
        """Tell what status shows."""
        return {
            "responder": "embedded",
            "host_name": self.host_name,
            "interfaces": sorted(link.name for link in self._links.values()),
            "guardian": self._guard.pid,
            "announced": len(self._published),
            "sent_packets": self.sockets.sent_packets,
            "sent_bytes": self.sockets.sent_bytes,
            "failed_packets": self.sockets.failed_packets,
            "problem": self.sockets.problem or (None if self._links else NO_LINK),
        }

    # --- names: claimed, won, lost ---

    def _start_claim(self, claim: Claim, after_s: float = 0.0) -> None:
        claim.attempt += 1
        claim.was_asked = False
        self._to_announce.pop(claim, None)
        if not any(claim.is_on(link) for link in self._links.values()):
            claim.standing = Standing.WAITING
            if isinstance(claim, Entry):
                self._tell(
                    claim,
                    None,
                    NO_LINK
                    if not self._links
                    else f"no network interface that is up has the address {claim.service.address}",
                )
            return
        claim.standing = Standing.CLAIMED
        if after_s:
            self._spawn(self._claim_later(claim, claim.attempt, after_s))
        else:
            self._gather(claim=[claim])

    async def _claim_later(self, claim: Claim, attempt: int, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if claim.attempt == attempt:
            self._gather(claim=[claim])

    async def _win(self, claims: list[Claim]) -> None:
        """Probe for names; those that nobody objects to are ours (section 8.1)."""
        attempts = {claim: claim.attempt for claim in claims}
        await asyncio.sleep(random.uniform(0, PROBE_S))
        for _ in range(PROBES):
            claims = [claim for claim in claims if claim.attempt == attempts[claim]]
            for link in list(self._links.values()):
                await self._probe([claim for claim in claims if claim.is_on(link)], link)
            await asyncio.sleep(PROBE_S)
        won = [claim for claim in claims if claim.attempt == attempts[claim]]
        for claim in won:
            claim.standing = Standing.OWNED
        if self.zone.host in won:  # whatever was won before had no host to point to, or an old one
            won = [self.zone.host, *self._owned_entries()]
        self._gather(announce=won)

    async def _probe(self, claims: list[Claim], link: Interface) -> None:
        for some in _slices(claims, 4 * wire.PROBED_PER_PACKET):
            self.sockets.send(
                wire.encode_probe([(claim.full_name, claim.unique(link)) for claim in some]),
                self.sockets.groups(link.index),
            )
            for claim in some:
                claim.was_asked = True
            await asyncio.sleep(0)

    def _lose(self, claim: Claim) -> None:
        """Somebody else has the name. If we thought that it was ours, find out anew (section 9), else take another."""
        if claim.standing is Standing.OWNED:
            self._start_claim(claim)
            return
        self.zone.unindex(claim)
        if isinstance(claim, Entry):
            self._unsay(claim)
        claim.conflict_count += 1
        claim.rename()
        while not self.zone.is_free(claim.key, claim):
            claim.rename()
        self.zone.index(claim)
        self._start_claim(claim, after_s=STORM_S if claim.conflict_count > STORM_CONFLICTS else 0.0)
        if claim is self.zone.host:
            # Whoever wanted the host's name may have claimed our services' names with the very same data (one port, one
            # host name), which is no conflict to either: what is not announced yet asks again, with the new data.
            for entry in list(self.zone.entries.values()):
                if entry.standing is not Standing.WAITING and entry.service.id not in self._published:
                    self._start_claim(entry)

    # --- what is owned: announced, withdrawn ---

    async def _announce(self, claims: list[Claim], links: Iterable[int] | None = None) -> None:
        """Announce what is owned, twice (section 8.3), and tell its owners at the first time."""
        for count in range(ANNOUNCEMENTS):
            if count:
                await asyncio.sleep(ANNOUNCE_S)
            claims = [claim for claim in claims if claim.standing is Standing.OWNED]
            if self.zone.host.standing is not Standing.OWNED:
                return  # they are announced when the host has its name
            for link in list(self._links.values()):
                if links is None or link.index in links:
                    await self._announce_on(link, [claim for claim in claims if claim.is_on(link)])
            for claim in claims:
                if isinstance(claim, Entry) and claim.standing is Standing.OWNED:
                    self._guard.keep(claim.service.id, claim.records())
                    self._tell(
                        claim,
                        claim.name,
                        None
                        if claim.name == claim.wish
                        else f"{claim.wish!r} is taken on the LAN: published as {claim.name!r}",
                    )

    async def _announce_on(self, link: Interface, claims: list[Claim]) -> None:
        targets, host = self.sockets.groups(link.index), self.zone.host
        for some in _slices(claims, PER_PACKET):
            # A claim may be withdrawn while others are announced: nothing is announced after its goodbye.
            entries = [claim for claim in some if isinstance(claim, Entry) and claim.standing is Standing.OWNED]
            answers = [record for entry in entries for record in entry.records()]
            answers += [wire.pointer(wire.TYPES_NAME, base) for base in sorted({entry.base for entry in entries})]
            answers += host.unique(link)
            self.sockets.send(wire.encode_response(answers), targets)
            self._answerer.said(targets, answers)
            await asyncio.sleep(0)

    async def _take_back(self, withdrawn: dict[DNSRecord, str]) -> None:
        """Say goodbye to records, each with the address its service binds, twice; PTRs first, which browsers live by.

        What is claimed again in between is let be. Avahi's work grows with the square of the records that come within
        half a second: all records at once, a thousand services' goodbyes overflow its socket.
        """
        pointers = [record for record in withdrawn if isinstance(record, DNSPointer)]
        others = [record for record in withdrawn if not isinstance(record, DNSPointer)]
        await self._say_goodbye(pointers, withdrawn)
        await self.sockets.drained()
        await asyncio.sleep(GOODBYE_S)
        pointers.reverse()  # what was lost is the end of a burst: now it comes first
        await self._say_goodbye([record for record in pointers + others if not self._is_claimed(record)], withdrawn)

    async def _say_goodbye(self, records: Sequence[DNSRecord], addresses: Mapping[DNSRecord, str]) -> None:
        for link in list(self._links.values()):
            here = [wire.with_ttl(record, 0) for record in records if link.has(addresses[record])]
            for some in _slices(here, 3 * PER_PACKET):
                self.sockets.send(wire.encode_response(some), self.sockets.groups(link.index))
                await asyncio.sleep(0)

    def _is_claimed(self, record: DNSRecord) -> bool:
        return self.zone.claim(record.alias_key if isinstance(record, DNSPointer) else record.key) is not None

    async def _take_all_back(self) -> None:
        host = self.zone.host
        for service_id in list(self.zone.entries):
            self.withdraw(service_id)
        await self._take_back(self._to_withdraw)
        if host.standing is Standing.OWNED:
            for link in self._links.values():
                self.sockets.send(
                    wire.encode_response([wire.with_ttl(record, 0) for record in host.unique(link)]),
                    self.sockets.groups(link.index),
                )
        await self.sockets.drained()

    def _owned_entries(self) -> list[Claim]:
        return [entry for entry in self.zone.entries.values() if entry.standing is Standing.OWNED]

    def _tell(self, entry: Entry, name: str | None, problem: str | None) -> None:
        if self.zone.entries.get(entry.service.id) is entry and (
            name is None or self._published.get(entry.service.id) != name
        ):
            if name is None:
                self._published.pop(entry.service.id, None)
            else:
                self._published[entry.service.id] = name
            self._outcome(entry.service.id, name, problem)

    # --- what others say ---

    def _receive(self, arrival: Arrival) -> None:
        message = wire.decode(arrival.data, asyncio.get_running_loop().time() * 1000)
        if message is None:
            return
        if message.is_response():
            self._compare(arrival, message.answers())
            if self._hear is not None:
                self._hear(arrival, message)
            return
        if message.is_probe():
            self._break_ties(arrival, message)
        self._answerer.receive(arrival, message)

    def _compare(self, arrival: Arrival, records: list[DNSRecord]) -> None:
        """Find conflicts with what others say (section 9), and defend what they take leave of in our stead."""
        link = self._links.get(arrival.link)
        lost: dict[Claim, None] = {}
        for record in records if link is not None else ():
            assert link is not None
            claim = self.zone.claim(record.key)
            if claim is None or claim.standing is Standing.WAITING or not claim.is_on(link):
                continue
            mine = {own: own for own in claim.unique(link)}
            if record in mine:
                if record.ttl * 2 < mine[record].ttl and claim.standing is Standing.OWNED:
                    self._gather(announce=[claim])
            elif (
                record.ttl > 0
                and record.type in (wire.SRV, wire.TXT, wire.A, wire.AAAA)
                and not self._is_own_address(record)
            ):
                lost[claim] = None
        for claim in lost:
            # Before our first question it is the conflict that made us ask, told again: by its TXT, over IPv6.
            if claim.standing is Standing.OWNED or claim.was_asked:
                self._lose(claim)

    def _is_own_address(self, record: DNSRecord) -> bool:
        """Tell whether it is this host, heard by another of its interfaces or through a reflector."""
        return isinstance(record, DNSAddress) and any(
            address.ip.packed == record.address for link in self._links.values() for address in link.addresses
        )

    def _break_ties(self, arrival: Arrival, message: DNSIncoming) -> None:
        """Two probe for one name at the same moment: the lexicographically later data wins (section 8.2)."""
        link = self._links.get(arrival.link)
        for question in message.questions if link is not None else ():
            assert link is not None
            claim = self.zone.claim(question.key)
            if claim is None or claim.standing is not Standing.CLAIMED:
                continue
            theirs = _comparable(record for record in message.answers() if record.key == claim.key)
            if theirs and _comparable(claim.unique(link)) < theirs:
                self._start_claim(claim, after_s=DEFER_S)

    # --- interfaces ---

    def _change_links(self, links: Interfaces, interrupted: frozenset[int]) -> None:
        fresh = {index for index, link in links.items() if index in interrupted or self._links.get(index) != link}
        for index in interrupted:
            self.sockets.rejoin(index)
        self._use_links(links)
        if fresh:
            self._spawn(self._arrive(fresh))

    def _use_links(self, links: Interfaces) -> None:
        self._links = self._answerer.links = links
        self.sockets.join(links)
        self._guard.aim()
        for entry in list(self.zone.entries.values()):
            is_placed = any(entry.is_on(link) for link in links.values())
            if (entry.standing is Standing.WAITING) == is_placed:
                self._start_claim(entry)

    async def _arrive(self, links: set[int]) -> None:
        """Ask on a link that is new or was down whether our names are ours there too, then announce them there."""
        for _ in range(PROBES):
            for link in [self._links[index] for index in links & self._links.keys()]:
                await self._probe(
                    [
                        claim
                        for claim in [self.zone.host, *self._owned_entries()]
                        if claim.standing is Standing.OWNED and claim.is_on(link)
                    ],
                    link,
                )
            await asyncio.sleep(PROBE_S)
        await self._announce([self.zone.host, *self._owned_entries()], links)

    # --- gathering ---

    def _gather(self, claim: Iterable[Claim] = (), announce: Iterable[Claim] = ()) -> None:
        self._to_claim.update(dict.fromkeys(claim))
        self._to_announce.update(dict.fromkeys(announce))
        if self._gathering is None and not self._closed:
            self._gathering = asyncio.get_running_loop().call_later(GATHER_S, self._act)

    def _act(self) -> None:
        self._gathering = None
        if self._to_withdraw:
            self._spawn(self._take_back(self._to_withdraw))
            self._to_withdraw = {}
        if self._to_claim:
            if self.zone.host.standing is Standing.WAITING:
                self.zone.host.standing = Standing.CLAIMED
                self.zone.host.attempt += 1
                self.zone.index(self.zone.host)
                self._to_claim[self.zone.host] = None
            self._spawn(self._win(list(self._to_claim)))
            self._to_claim.clear()
        if self._to_announce:
            self._spawn(self._announce(list(self._to_announce)))
            self._to_announce.clear()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("announcing failed", exc_info=error)
            self.sockets.problem = f"announcing failed: {error!r}"


def _comparable(records: Iterable[DNSRecord]) -> list[tuple[int, int, bytes]]:
    return sorted((record.class_, record.type, wire.rdata(record)) for record in records)


def _slices(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
