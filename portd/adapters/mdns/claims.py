"""How this host claims names on the LAN and defends them: a state machine (RFC 6762 sections 8 to 10).

Pure: no socket, no timer, no random source of its own. The responder passes in the time, the interfaces and what other
hosts send; `tick` returns what to send, and `deadline` when to call it again. `STEPS` is the timer's column of the
state table, `TABLE` the rest of it. Packets, pace and answers to queries are not known here.

A name is probed for three times, announced twice and then owned. A conflict before it is won costs the name: the claim
switches to the next one. A conflict afterwards costs nothing yet: both hosts probe again, and one of them loses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from portd.adapters.mdns import wire
from portd.adapters.mdns.agenda import Agenda
from portd.adapters.mdns.answering import Random
from portd.adapters.mdns.interfaces import Interface, Interfaces
from portd.adapters.mdns.wire import DNSAddress, DNSPointer, DNSQuestion, DNSRecord
from portd.adapters.mdns.zone import WON, Claim, Entry, Service, State, Zone

GATHER_S = 0.010
"""Claims that begin this close together probe together, and share packets."""
START_S = 0.25
"""Longest random wait before the first probe, so that hosts that start together don't probe together (section 8.1)."""
DEFER_S = 1.0
"""Wait of a claim that lost a tie-break, before it probes again (section 8.2)."""
STORM_CONFLICTS, STORM_S = 15, 5.0
"""After so many conflicts a claim waits before each further probe, or it floods the link (section 8.1)."""
REPEAT_S = 1.0
"""Least time between two announcements of a record (section 6)."""
CLAIMS_AT_ONCE = 64
"""Claims that one tick advances: about 2 ms of encoding before the event loop gets its turn."""
NO_LINK = "no network interface to announce on is up"


class Step(NamedTuple):
    """What the timer does in a state: send this many packets, one each `interval_s`, then enter `then` (None: gone)."""

    packets: int
    interval_s: float
    then: State | None


STEPS = {
    State.DEFERRED: Step(0, 0.0, State.PROBING),
    State.PROBING: Step(3, 0.25, State.ANNOUNCING),  # section 8.1
    State.CHECKING: Step(3, 0.25, State.ANNOUNCING),
    State.ANNOUNCING: Step(2, 1.0, State.OWNED),  # section 8.3
    State.GOODBYE: Step(2, 0.25, None),  # section 10.1 asks for one: one that is lost leaves a ghost for 75 minutes
}


class Input(Enum):
    """What happens to a claim, besides time."""

    LINKED = "an interface that is up has its address"
    UNLINKED = "no interface has its address any more"
    NEW_LINK = "one more interface has its address, or one was down in between"
    CONFLICT = "another host has the name with other data"
    LOST_TIE = "another host probes for the name at the same time, with greater data"
    CHANGED = "its records have changed"
    RESCUE = "another host sent a goodbye for one of its records"


class Move(NamedTuple):
    """The state to enter, after how long, at which step, and whether the name is given up."""

    state: State
    after_s: float = 0.0
    step: int = 0
    renames: bool = False


_AGAIN = Move(State.DEFERRED)
TABLE: dict[tuple[State, Input], Move] = {
    (State.WAITING, Input.LINKED): _AGAIN,
    (State.PROBING, Input.NEW_LINK): _AGAIN,
    (State.PROBING, Input.CONFLICT): Move(State.DEFERRED, renames=True),
    (State.PROBING, Input.LOST_TIE): Move(State.DEFERRED, after_s=DEFER_S),
    **{(state, Input.CONFLICT): _AGAIN for state in WON},
    **{(state, Input.NEW_LINK): Move(State.CHECKING) for state in WON},
    (State.CHECKING, Input.CHANGED): Move(State.CHECKING),
    (State.ANNOUNCING, Input.CHANGED): Move(State.ANNOUNCING),
    (State.OWNED, Input.CHANGED): Move(State.ANNOUNCING),
    (State.ANNOUNCING, Input.RESCUE): Move(State.ANNOUNCING, step=1),
    (State.OWNED, Input.RESCUE): Move(State.ANNOUNCING, step=1),
    **{(state, Input.UNLINKED): Move(State.WAITING) for state in State if state not in (State.WAITING, State.GOODBYE)},
}
"""State and input to move; a pair that is not here changes nothing. In DEFERRED a conflict is the one that made the
claim probe again, reported once more (by another record, over IPv6): the next probe decides."""


class Probe(NamedTuple):
    """Ask on a link whether anybody has these names."""

    link: Interface
    claims: list[Claim]


class Announcement(NamedTuple):
    """Announce on a link the records of these claims."""

    link: Interface
    claims: list[Claim]


class Goodbye(NamedTuple):
    """Withdraw records from a link; PTRs come first, since browsers go by them."""

    link: Interface
    records: list[DNSRecord]


class Outcome(NamedTuple):
    """What became of a service: the name it is published as (None: it is not), and a problem in one sentence."""

    service_id: str
    name: str | None
    problem: str | None


class Claims:
    """All names that this host wants or has. Call `tick` at `deadline`, and `outcomes` after every other call."""

    def __init__(self, zone: Zone, random: Random) -> None:
        self._zone = zone
        self._random = random
        self._links: Interfaces = {}
        self._agenda = Agenda()
        self._start_at = -1.0
        self._outcomes: list[Outcome] = []

    def deadline(self) -> float | None:
        """Return when `tick` has something to do, None when there is nothing."""
        return self._agenda.first

    def outcomes(self) -> list[Outcome]:
        """Return what became of services since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    # --- what is wanted ---

    def publish(self, now: float, service: Service, name: str) -> None:
        """Claim `name`, else the next free one; a service that differs only in port or TXT changes in place."""
        entry = self._zone.entries.get(service.id)
        if entry is not None:
            before = entry.service
            if (before.type, before.name, before.address) == (service.type, service.name, service.address):
                if before != service:
                    entry.service = service
                    self._apply(now, entry, Input.CHANGED)
                return
            self.withdraw(now, service.id)
        entry = Entry(service, name, self._zone.host)
        self._find_free_name(entry)
        self._zone.add(entry)
        if self._is_linked(entry):
            self._apply(now, self._zone.host, Input.LINKED)
            self._apply(now, entry, Input.LINKED)
        else:
            self._report(entry, None, self._no_link(entry))

    def withdraw(self, now: float, service_id: str) -> None:
        """Send goodbyes for a service that was announced; one that was only probed for goes in silence."""
        entry = self._zone.entries.get(service_id)
        if entry is None:
            return
        self._zone.remove(entry)
        if entry.published_as == entry.name:
            self._enter(now, entry, Move(State.GOODBYE))
        else:
            self._agenda.set(entry, None)

    def withdraw_all(self, now: float) -> None:
        """Send goodbyes for everything, the host's name included."""
        for service_id in list(self._zone.entries):
            self.withdraw(now, service_id)
        host = self._zone.host
        self._zone.unindex(host)
        if host.is_won:
            self._enter(now, host, Move(State.GOODBYE))
        else:
            self._agenda.set(host, None)

    def retract(self, now: float, service: Service) -> None:
        """Send goodbyes for a service announced before a restart, unless its name is in use again."""
        entry = Entry(service, service.name, self._zone.host)
        if self._zone.claim(entry.key) is None:
            self._enter(now, entry, Move(State.GOODBYE))

    def set_links(self, now: float, links: Interfaces, interrupted: frozenset[int] = frozenset()) -> None:
        """Use these interfaces from now on; `interrupted` are those that were down in between."""
        fresh = {index for index, link in links.items() if index in interrupted or self._links.get(index) != link}
        self._links = links
        for claim in [self._zone.host, *self._zone.entries.values()]:
            joined = frozenset(index for index in fresh if claim.is_on(links[index]))
            if not self._is_linked(claim):
                self._apply(now, claim, Input.UNLINKED)
            elif joined:
                self._apply(now, claim, Input.NEW_LINK, joined)
                if self._zone.entries:  # without a service the host's name is not used
                    self._apply(now, claim, Input.LINKED)

    # --- what other hosts send ---

    def receive_response(self, now: float, link_index: int, records: Iterable[DNSRecord]) -> None:
        """Find conflicts with other hosts' records (section 9), and rescue records that they withdraw."""
        link = self._links.get(link_index)
        if link is None:
            return
        inputs: dict[Claim, Input] = {}
        for record in records:
            claim = self._zone.claim(record.key)
            if claim is None or not claim.is_on(link):
                continue
            input_ = self._judge(record, claim, link)
            if input_ is Input.CONFLICT or (input_ is not None and claim not in inputs):
                inputs[claim] = input_
        for claim, input_ in inputs.items():
            self._apply(now, claim, input_)

    def _judge(self, record: DNSRecord, claim: Claim, link: Interface) -> Input | None:
        """Return what another host's record means to the claim of its name."""
        for own in claim.unique(link):
            if own == record:
                return Input.RESCUE if record.ttl * 2 < own.ttl else None
        is_unique = record.ttl > 0 and record.type in wire.UNIQUE_TYPES
        return Input.CONFLICT if is_unique and not self._is_own_address(record) else None

    def receive_probe(
        self, now: float, link_index: int, questions: Iterable[DNSQuestion], proposed: Sequence[DNSRecord]
    ) -> None:
        """Break ties between simultaneous probes: the lexicographically greater data wins (section 8.2)."""
        link = self._links.get(link_index)
        if link is None:
            return
        for key in {question.key for question in questions}:
            claim = self._zone.claim(key)
            if claim is None or claim.state is not State.PROBING:
                continue
            theirs = _comparable(record for record in proposed if record.key == key)
            if theirs and _comparable(claim.unique(link)) < theirs:
                self._apply(now, claim, Input.LOST_TIE)

    # --- time ---

    def tick(self, now: float) -> list[Probe | Announcement | Goodbye]:
        """Advance the claims whose timers have fired; returns what to send, in this order."""
        probes: dict[int, Probe] = {}
        announcements: dict[int, Announcement] = {}
        goodbyes: dict[int, Goodbye] = {}
        for claim in self._agenda.pop(now, CLAIMS_AT_ONCE):
            for link in self._links_of(claim) if self._advance(now, claim) else ():
                match claim.state:
                    case State.GOODBYE:
                        goodbyes.setdefault(link.index, Goodbye(link, [])).records.extend(self._withdrawn(claim, link))
                    case State.ANNOUNCING:
                        announcements.setdefault(link.index, Announcement(link, [])).claims.append(claim)
                    case _:
                        probes.setdefault(link.index, Probe(link, [])).claims.append(claim)
        for goodbye in goodbyes.values():
            goodbye.records.sort(key=lambda record: not isinstance(record, DNSPointer))
        return [*probes.values(), *announcements.values(), *goodbyes.values()]

    def _advance(self, now: float, claim: Claim) -> bool:
        """Take a claim to its next step or state; returns whether that sends something."""
        if claim.step >= STEPS[claim.state].packets:
            self._leave(now, claim)
        step = STEPS.get(claim.state)
        if step is None or claim.step >= step.packets:
            return False
        if claim.state is State.ANNOUNCING:
            if not self._zone.host.is_won:
                return False  # goes on when the host's name is won
            claim.announced_at = now
            if isinstance(claim, Entry):
                self._report_published(claim)
        claim.step += 1
        is_last_goodbye = step.then is None and claim.step == step.packets
        self._agenda.set(claim, None if is_last_goodbye else now + step.interval_s)
        return True

    def _leave(self, now: float, claim: Claim) -> None:
        """Enter the state that follows once all packets of the present one are sent."""
        following = STEPS[claim.state].then
        if following is None:
            return
        if claim is self._zone.host and claim.state is State.PROBING:
            for entry in self._zone.entries.values():  # they had no host to point to, or another one
                self._apply(now, entry, Input.CHANGED)
        claim.state, claim.step = following, 0
        if following is State.OWNED:
            claim.conflict_count, claim.links = 0, None

    # --- moves ---

    def _apply(self, now: float, claim: Claim, input_: Input, links: frozenset[int] | None = None) -> None:
        """Make the move that the table has for an input, if any."""
        move = TABLE.get((claim.state, input_))
        if move is None:
            return
        if input_ is Input.CONFLICT:
            claim.conflict_count += 1
            if claim.conflict_count > STORM_CONFLICTS:
                move = move._replace(after_s=STORM_S)
        if move.renames:
            self._rename(now, claim)
        if move.state is State.CHECKING:
            links = _widened(claim, links)
        self._enter(now, claim, move, links)

    def _enter(self, now: float, claim: Claim, move: Move, links: frozenset[int] | None = None) -> None:
        was_waiting = claim.state is State.WAITING
        claim.state, claim.step, claim.links = move.state, move.step, links
        match move.state:
            case State.WAITING:
                self._agenda.set(claim, None)
                if isinstance(claim, Entry):
                    self._report(claim, None, self._no_link(claim))
            case State.DEFERRED:
                if was_waiting and claim is self._zone.host:
                    self._zone.index(claim)
                self._agenda.set(claim, now + move.after_s if move.after_s else self._next_start(now))
            case State.ANNOUNCING:
                self._agenda.set(claim, max(now + GATHER_S, claim.announced_at + REPEAT_S))
            case _:
                self._agenda.set(claim, now + GATHER_S)

    def _rename(self, now: float, claim: Claim) -> None:
        """Give a name up for the next one that is free on this host."""
        self._zone.unindex(claim)
        claim.rename()
        self._find_free_name(claim)
        self._zone.index(claim)
        if claim is self._zone.host:
            # Another host may have claimed our services' names with the very same data (one port, one host name), which
            # is no conflict to either: what is not announced yet probes again, with the new data.
            for entry in self._zone.entries.values():
                if entry.published_as is None and (entry.is_won or entry.state is State.PROBING):
                    self._enter(now, entry, _AGAIN)

    def _find_free_name(self, claim: Claim) -> None:
        while not self._zone.is_free(claim.key, claim):
            claim.rename()

    def _next_start(self, now: float) -> float:
        """Return when claims that begin now probe first: all that wait for it start together."""
        if self._start_at <= now:
            self._start_at = now + GATHER_S + self._random(0.0, START_S)
        return self._start_at

    # --- outcomes ---

    def _report_published(self, entry: Entry) -> None:
        if entry.published_as == entry.name:
            return
        requested = entry.requested_name
        is_other = entry.name != requested
        self._report(
            entry,
            entry.name,
            f"{requested!r} is in use on the LAN: published as {entry.name!r}" if is_other else None,
        )

    def _report(self, entry: Entry, name: str | None, problem: str | None) -> None:
        entry.published_as = name
        self._outcomes.append(Outcome(entry.service.id, name, problem))

    def _no_link(self, claim: Entry) -> str:
        if not self._links:
            return NO_LINK
        return f"no network interface that is up has the address {claim.service.address}"

    # --- links and records ---

    def _is_linked(self, claim: Claim) -> bool:
        return any(claim.is_on(link) for link in self._links.values())

    def _links_of(self, claim: Claim) -> list[Interface]:
        """Return the interfaces that the claim's packets go to."""
        return [
            link
            for index, link in self._links.items()
            if claim.is_on(link) and (claim.links is None or index in claim.links)
        ]

    def _is_own_address(self, record: DNSRecord) -> bool:
        """Return whether it is this host, received over another of its interfaces or through a reflector."""
        return isinstance(record, DNSAddress) and any(
            address.ip.packed == record.address for link in self._links.values() for address in link.addresses
        )

    def _withdrawn(self, claim: Claim, link: Interface) -> list[DNSRecord]:
        """Return the records of a goodbye: PTRs, and at its second step all. Names in use again are left out then.

        Avahi's work grows with the square of the records that come within half a second: with all records at once, a
        thousand services' goodbyes overflow its socket.
        """
        records = claim.records() if isinstance(claim, Entry) else claim.unique(link)
        if claim.step == 1:
            return [record for record in records if isinstance(record, DNSPointer)]
        return [] if self._zone.claim(claim.key) is not None else records


def _widened(claim: Claim, links: frozenset[int] | None) -> frozenset[int] | None:
    """Return the interfaces to check a name on: the new ones alone only if the name is owned on the others."""
    if links is None or claim.state is State.OWNED:
        return links
    if claim.state is State.CHECKING and claim.links is not None:
        return claim.links | links
    return None


def _comparable(records: Iterable[DNSRecord]) -> list[tuple[int, int, bytes]]:
    return sorted((record.class_, record.type, wire.rdata(record)) for record in records)
