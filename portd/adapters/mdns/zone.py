"""The records of this host: services and a host name, found by name and by type.

Pure: no socket, no clock. How a name comes to be this host's is `claims`'s; here it only shows as a claim's state.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from enum import Enum

from msgspec import Struct

from portd.adapters.mdns import wire
from portd.adapters.mdns.interfaces import Interface
from portd.adapters.mdns.wire import DNSPointer, DNSRecord
from portd.core.announcing import NAME_BYTES, parse_type


class Service(Struct, frozen=True, kw_only=True):
    """A service to announce. `id` is its lease's, `name` the requested one, `address` what its owner binds."""

    id: str
    type: str
    name: str
    port: int
    txt: tuple[tuple[str, str], ...] = ()
    address: str = "0.0.0.0"


class State(Enum):
    """How far the claim of a name has come; `claims` has the transitions."""

    WAITING = "waiting"
    """No interface that is up has the address."""
    DEFERRED = "deferred"
    """Probing begins later."""
    PROBING = "probing"
    """Other hosts are asked whether they have the name; it is not used yet."""
    CHECKING = "checking"
    """The name is in use; hosts on an interface that came up are asked whether they have it."""
    ANNOUNCING = "announcing"
    OWNED = "owned"
    GOODBYE = "goodbye"
    """Withdrawn; other hosts are being notified. The claim is in no zone any more."""


WON = frozenset({State.CHECKING, State.ANNOUNCING, State.OWNED})
"""States in which the name is this host's, and queries for it are answered."""


class Claim(ABC):
    """A name that has to be unique on this host's links before it is used.

    Everything but the name belongs to the state machine in `claims`: `step` counts the packets of the present state,
    `due` is when its timer fires (None: never), `links` limits it to some interfaces (None: all), `conflict_count`
    counts conflicts since the name was last owned.
    """

    def __init__(self, name: str) -> None:
        self.requested_name = self.name = name
        self.state = State.WAITING
        self.step = 0
        self.due: float | None = None
        self.links: frozenset[int] | None = None
        self.conflict_count = 0
        self.announced_at = -1e9
        self.published_as: str | None = None

    @property
    def is_won(self) -> bool:
        """Return whether the name is this host's now."""
        return self.state in WON

    @property
    @abstractmethod
    def full_name(self) -> str:
        """Return the name in full, with its final dot."""

    @property
    def key(self) -> str:
        """Return the name as records are compared by: without regard to case."""
        return self.full_name.lower()

    @abstractmethod
    def is_on(self, link: Interface) -> bool:
        """Return whether the name is used on this interface."""

    @abstractmethod
    def unique(self, link: Interface) -> list[DNSRecord]:
        """Return the records that no other host may have under this name."""

    @abstractmethod
    def rename(self) -> None:
        """Switch to the next name: after `Orders` comes `Orders (2)`; after `box-portd`, `box-portd-2`."""


class HostName(Claim):
    """The name that services point to: portd's own, `box-portd.local.`: another responder keeps `box.local.`."""

    def __init__(self, host: str) -> None:
        label = re.sub(r"[^a-z0-9-]+", "-", host.partition(".")[0].lower()).strip("-") or "host"
        super().__init__(f"{label[: NAME_BYTES - 10]}-portd")

    @property
    def full_name(self) -> str:
        return f"{self.name}.{wire.DOMAIN}"

    def is_on(self, link: Interface) -> bool:
        return True

    def unique(self, link: Interface) -> list[DNSRecord]:
        return [wire.address(self.full_name, address.ip.packed) for address in link.addresses]

    def rename(self) -> None:
        self.name = f"{self.requested_name}-{_next_number(self.name, self.requested_name, '-')}"


class Entry(Claim):
    """A service with its records, which follow from its name, its port, its TXT and the host's name.

    `base` is its type's name without a subtype; a service never changes its type, it becomes another one.
    """

    def __init__(self, service: Service, name: str, host: HostName) -> None:
        super().__init__(service.name)
        self.name = name
        self.service = service
        self.base = f"{parse_type(service.type).base}.{wire.DOMAIN}"
        self._host = host
        self._made_for: tuple[str, str, Service] | None = None
        self._pointers: list[DNSRecord] = []
        self._unique: list[DNSRecord] = []

    @property
    def full_name(self) -> str:
        return f"{self.name}.{self.base}"

    def is_on(self, link: Interface) -> bool:
        return link.has(self.service.address)

    def unique(self, link: Interface) -> list[DNSRecord]:
        self._make()
        return self._unique

    def records(self) -> list[DNSRecord]:
        """Return all: what is announced, and what a goodbye withdraws."""
        self._make()
        return self._pointers + self._unique

    def pointers(self) -> list[DNSRecord]:
        """Return the PTRs that lead here: from the type and, where there is one, from the subtype (section 7.1)."""
        self._make()
        return self._pointers

    def rename(self) -> None:
        suffix = f" ({_next_number(self.name, self.requested_name, ' (')})"
        kept = self.requested_name.encode()[: NAME_BYTES - len(suffix)].decode(errors="ignore")
        self.name = kept.rstrip() + suffix

    def _make(self) -> None:
        """Make the records again if what they follow from has changed."""
        made_for = (self.name, self._host.name, self.service)
        if self._made_for == made_for:
            return
        self._made_for = made_for
        base, subtype = parse_type(self.service.type)
        name = f"{self.name}.{base}.{wire.DOMAIN}"
        self._pointers = [wire.pointer(f"{base}.{wire.DOMAIN}", name)]
        if subtype is not None:
            self._pointers.append(wire.pointer(f"{subtype}._sub.{base}.{wire.DOMAIN}", name))
        self._unique = [
            wire.service(name, self.service.port, self._host.full_name),
            wire.text(name, wire.encode_txt(self.service.txt)),
        ]


class Zone:
    """All entries and the host's name, found by the names that questions ask for."""

    def __init__(self, host: HostName) -> None:
        self.host = host
        self.entries: dict[str, Entry] = {}
        self._by_key: dict[str, Claim] = {}
        self._by_pointer: dict[str, dict[str, Entry]] = {}

    def claim(self, key: str) -> Claim | None:
        """Find the claim of a name, won or not: `key` is in lower case."""
        return self._by_key.get(key)

    def pointed(self, key: str) -> Iterable[Entry]:
        """Return the entries of a type or subtype."""
        return self._by_pointer.get(key, {}).values()

    def types(self) -> Iterator[str]:
        """Yield the names of the types of which something is announced."""
        yield from {entry.base for entry in self.entries.values() if entry.is_won}

    def has(self, record: DNSRecord, link: Interface) -> bool:
        """Return whether a record is still true on a link: its name won, its data as it was."""
        if record.key == wire.TYPES_NAME and isinstance(record, DNSPointer):
            return any(entry.is_won for entry in self.pointed(record.alias_key))
        claim = self.claim(record.alias_key if isinstance(record, DNSPointer) else record.key)
        if claim is None or not claim.is_won or not claim.is_on(link):
            return False
        if isinstance(record, DNSPointer):
            return isinstance(claim, Entry) and record in claim.pointers()
        return record.type == wire.NSEC or record in claim.unique(link)

    def is_free(self, key: str, claim: Claim) -> bool:
        """Return whether no other claim of this very host uses the name."""
        return self._by_key.get(key) in (None, claim)

    def add(self, entry: Entry) -> None:
        """Add an entry; its name has to be free here."""
        self.entries[entry.service.id] = entry
        self.index(entry)

    def index(self, claim: Claim) -> None:
        """Make a claim found by its present name; see `unindex`."""
        assert self.is_free(claim.key, claim), f"{claim.full_name} is used twice on this host"
        self._by_key[claim.key] = claim
        if isinstance(claim, Entry):
            for record in claim.pointers():
                self._by_pointer.setdefault(record.key, {})[claim.service.id] = claim

    def unindex(self, claim: Claim) -> None:
        """Forget a claim's present name, before it changes."""
        if self._by_key.get(claim.key) is claim:
            del self._by_key[claim.key]
        if isinstance(claim, Entry):
            for record in claim.pointers():
                entries = self._by_pointer.get(record.key, {})
                entries.pop(claim.service.id, None)
                if not entries:
                    self._by_pointer.pop(record.key, None)

    def remove(self, entry: Entry) -> None:
        """Remove an entry."""
        self.unindex(entry)
        self.entries.pop(entry.service.id, None)


def _next_number(name: str, requested_name: str, before: str) -> int:
    found = re.search(r"(\d+)\)?\Z", name.removeprefix(requested_name)) if name != requested_name else None
    return int(found[1]) + 1 if found and before in name else 2
