"""The embedded responder: connects sockets and interfaces to the rules for names (`claims`) and answers (`answering`).

It owns the one timer of both, decodes packets, and encodes what both send into shared, paced packets. Which name is
whose, and what to answer, must not be decided here.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

from portd.adapters.mdns import wire
from portd.adapters.mdns.answering import PER_PACKET, Answerer, Sending, slices
from portd.adapters.mdns.claims import NO_LINK, Announcement, Claims, Goodbye, Probe
from portd.adapters.mdns.guardian_client import GuardianClient
from portd.adapters.mdns.interfaces import Interface, Interfaces, InterfaceWatch
from portd.adapters.mdns.responder import ReportOutcome
from portd.adapters.mdns.sockets import Arrival, Sockets
from portd.adapters.mdns.wire import DNSIncoming, DNSRecord
from portd.adapters.mdns.zone import Claim, Entry, HostName, Service, Zone

OnResponse = Callable[[Arrival, DNSIncoming], None]

log = logging.getLogger("portd.mdns")

GOODBYES_PER_PACKET = 3 * PER_PACKET
"""Records, not services: a goodbye is mostly one PTR."""


class EmbeddedResponder:
    """Publishes on this process's own sockets."""

    def __init__(
        self,
        host: str,
        report: ReportOutcome,
        interfaces: Sequence[str] = (),
        on_response: OnResponse | None = None,
    ) -> None:
        self._zone = Zone(HostName(host))
        self.sockets = Sockets(self._receive, unicast=True)
        self._report = report
        self._on_response = on_response
        self._watch = InterfaceWatch(interfaces, self._change_links)
        self._claims = Claims(self._zone, random.uniform)
        self._answerer = Answerer(self._zone, random.uniform)
        self._guardian = GuardianClient(self.sockets)
        self._now = asyncio.get_running_loop().time
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = 0.0
        self._closed = False

    @property
    def host_name(self) -> str:
        return self._zone.host.full_name.removesuffix(".")

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(str(address.ip) for link in self.links.values() for address in link.addresses)

    @property
    def links(self) -> Interfaces:
        """Return the interfaces in use now."""
        return self._answerer.links

    async def start(self) -> None:
        """Open sockets, the guardian, and the list of interfaces; raises OSError, and leaves nothing open then."""
        try:
            self.sockets.open()
            self._watch.start()
            await self._guardian.start()
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
        if self._timer is not None:
            self._timer.cancel()
        if not takeover:
            await self._withdraw_all()
        await self._guardian.close()
        self.sockets.close()

    def publish(self, service: Service, name: str) -> None:
        """Publish, or change in place what only has another port or TXT (section 8.4)."""
        self._claims.publish(self._now(), service, name)
        self._settle()

    def withdraw(self, service_id: str) -> None:
        """Send goodbyes for a service that was announced."""
        self._guardian.drop(service_id)
        self._claims.withdraw(self._now(), service_id)
        self._settle()

    def retract(self, service: Service) -> None:
        """Send goodbyes for a service that only the LAN still knows, under the name in `service`."""
        self._claims.retract(self._now(), service)
        self._settle()

    def condition(self) -> dict[str, object]:
        """Return what status shows."""
        return {
            "responder": "embedded",
            "host_name": self.host_name,
            "interfaces": sorted(link.name for link in self.links.values()),
            "guardian": self._guardian.pid,
            "announced": sum(entry.published_as is not None for entry in self._zone.entries.values()),
            "sent_packets": self.sockets.sent_packets,
            "sent_bytes": self.sockets.sent_bytes,
            "failed_packets": self.sockets.failed_packets,
            "problem": self.sockets.problem or (None if self.links else NO_LINK),
        }

    # --- time ---

    def _settle(self) -> None:
        """Report what became of services, and set the timer for what is due next."""
        for outcome in self._claims.outcomes():
            entry = self._zone.entries.get(outcome.service_id)
            if entry is not None:
                self._report(*outcome)
        if self._closed:
            return
        times = [at for at in (self._claims.deadline(), self._answerer.deadline()) if at is not None]
        if not times or (self._timer is not None and self._fires_at <= min(times)):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._fires_at = max(min(times), self._now())
        self._timer = asyncio.get_running_loop().call_at(self._fires_at, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._send_due(max(self._now(), self._fires_at))  # a timer may fire within its clock's resolution early
        self._settle()

    def _send_due(self, now: float) -> None:
        for message in self._claims.tick(now):
            match message:
                case Probe(link, claims):
                    self._probe(link, claims)
                case Announcement(link, claims):
                    self._announce(now, link, claims)
                case Goodbye(link, records):
                    self._say_goodbye(link, records)
        self._send(self._answerer.tick(now))

    async def _withdraw_all(self) -> None:
        """Send all goodbyes, however long it takes to send them at a pace that receivers can follow."""
        self._answerer.links = {}  # nothing is answered any more
        self._claims.withdraw_all(self._now())
        while (due := self._claims.deadline()) is not None:
            await asyncio.sleep(max(0.0, due - self._now()))
            self._send_due(max(self._now(), due))
        await self.sockets.drained()

    # --- packets ---

    def _probe(self, link: Interface, claims: list[Claim]) -> None:
        probed = [(claim.full_name, claim.unique(link)) for claim in claims]
        self.sockets.send(wire.encode_probe(probed), self.sockets.groups(link.index))

    def _announce(self, now: float, link: Interface, claims: list[Claim]) -> None:
        targets, host = self.sockets.groups(link.index), self._zone.host
        for group in slices(claims, PER_PACKET):
            entries = [claim for claim in group if isinstance(claim, Entry)]
            answers = [record for entry in entries for record in entry.records()]
            answers += [wire.pointer(wire.TYPES_NAME, base) for base in sorted({entry.base for entry in entries})]
            answers += host.unique(link)
            self.sockets.send(wire.encode_response(answers), targets)
            for target in targets:
                self._answerer.note_multicast(now, target, answers)
            for entry in entries:
                self._guardian.keep(entry.service.id, entry.records())

    def _say_goodbye(self, link: Interface, records: list[DNSRecord]) -> None:
        for group in slices([wire.with_ttl(record, 0) for record in records], GOODBYES_PER_PACKET):
            self.sockets.send(wire.encode_response(group), self.sockets.groups(link.index))

    def _send(self, sendings: list[Sending]) -> None:
        for target, packets in sendings:
            self.sockets.send(packets, [target])

    # --- what arrives ---

    def _receive(self, arrival: Arrival) -> None:
        now = self._now()
        message = wire.decode(arrival.data, now * 1000)
        if message is None:
            return
        if message.is_response():
            self._claims.receive_response(now, arrival.link, message.answers())
            if self._on_response is not None:
                self._on_response(arrival, message)
        else:
            if message.is_probe():
                self._claims.receive_probe(now, arrival.link, message.questions, message.answers())
            self._send(self._answerer.receive(now, arrival, message))
        self._settle()

    def _change_links(self, links: Interfaces, interrupted: frozenset[int]) -> None:
        for index in interrupted:
            self.sockets.rejoin(index)
        self._use_links(links, interrupted)

    def _use_links(self, links: Interfaces, interrupted: frozenset[int] = frozenset()) -> None:
        self._answerer.links = links
        self.sockets.join(links)
        self._guardian.set_targets()
        self._claims.set_links(self._now(), links, interrupted)
        self._settle()
