"""What this host says about itself: services and a host name as records, found by name and by type.

Pure: no sockets, no clock. A name is *claimed* before it is *owned*, and only what is owned is answered with.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from enum import Enum

from msgspec import Struct

from portd.adapters.mdns import wire
from portd.adapters.mdns.interfaces import Interface
from portd.adapters.mdns.wire import DNSRecord
from portd.core.announcing import NAME_BYTES, parse_type


class Service(Struct, frozen=True, kw_only=True):
    """A service to announce. `id` is its lease's; `name` is the wish; `address` is what the owner binds."""

    id: str
    type: str
    name: str
    port: int
    txt: tuple[tuple[str, str], ...] = ()
    address: str = "0.0.0.0"


class Standing(Enum):
    """How far a name has come: on no interface yet, asked for, ours."""

    WAITING = "waiting"
    CLAIMED = "claimed"
    OWNED = "owned"


class Claim(ABC):
    """A name that has to be this host's alone on its links before it is used.

    `attempt` grows whenever probing starts afresh, so that a probe that is under way knows that it has been overtaken;
    `was_asked` tells whether one has been sent in this attempt.
    """

    def __init__(self, name: str) -> None:
        self.wish = self.name = name
        self.standing = Standing.WAITING
        self.attempt = 0
        self.was_asked = False
        self.conflict_count = 0

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
        """Tell whether the name is used on this interface."""

    @abstractmethod
    def unique(self, link: Interface) -> list[DNSRecord]:
        """Return the records that nobody else may have under this name."""

    @abstractmethod
    def rename(self) -> None:
        """Take the next name: after `Orders` comes `Orders (2)`; after `box-portd`, `box-portd-2`."""


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
        self.name = f"{self.wish}-{_next_number(self.name, self.wish, '-')}"


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
        self._records: tuple[str, str, Service, list[DNSRecord], list[DNSRecord]] | None = None

    @property
    def full_name(self) -> str:
        return f"{self.name}.{self.base}"

    def is_on(self, link: Interface) -> bool:
        return link.has(self.service.address)

    def unique(self, link: Interface) -> list[DNSRecord]:
        return self._made()[4]

    def records(self) -> list[DNSRecord]:
        """Return all: what is announced, and what a goodbye takes back."""
        return self.pointers() + self._made()[4]

    def pointers(self) -> list[DNSRecord]:
        """Return the PTRs that lead here: from the type and, where there is one, from the subtype (section 7.1)."""
        return self._made()[3]

    def rename(self) -> None:
        number = _next_number(self.name, self.wish, " (")
        suffix = f" ({number})"
        kept = self.wish.encode()[: NAME_BYTES - len(suffix)].decode(errors="ignore")
        self.name = kept.rstrip() + suffix

    def _made(self) -> tuple[str, str, Service, list[DNSRecord], list[DNSRecord]]:
        made = self._records
        if made is None or made[0] != self.name or made[1] != self._host.name or made[2] is not self.service:
            base, subtype = parse_type(self.service.type)
            name = f"{self.name}.{base}.{wire.DOMAIN}"
            pointers = [wire.pointer(f"{base}.{wire.DOMAIN}", name)]
            if subtype is not None:
                pointers.append(wire.pointer(f"{subtype}._sub.{base}.{wire.DOMAIN}", name))
            unique = [
                wire.service(name, self.service.port, self._host.full_name),
                wire.text(name, wire.encode_txt(self.service.txt)),
            ]
            made = self._records = (self.name, self._host.name, self.service, pointers, unique)
        return made


class Zone:
    """All entries and the host's name, found by the names that questions ask for."""

    def __init__(self, host: HostName) -> None:
        self.host = host
        self.entries: dict[str, Entry] = {}
        self._by_key: dict[str, Claim] = {}
        self._by_pointer: dict[str, dict[str, Entry]] = {}

    def claim(self, key: str) -> Claim | None:
        """Find who uses a name, claimed or owned: `key` is in lower case."""
        return self._by_key.get(key)

    def pointed(self, key: str) -> Iterable[Entry]:
        """Return the entries of a type or subtype."""
        return self._by_pointer.get(key, {}).values()

    def types(self) -> Iterator[str]:
        """Yield the names of the types that something is announced of."""
        yield from {entry.base for entry in self.entries.values() if entry.standing is Standing.OWNED}

    def is_free(self, key: str, claim: Claim) -> bool:
        """Tell whether no other claim of this very host uses the name."""
        return self._by_key.get(key) in (None, claim)

    def add(self, entry: Entry) -> None:
        """Put an entry in; its name has to be free here."""
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
        """Take an entry out."""
        self.unindex(entry)
        self.entries.pop(entry.service.id, None)


def _next_number(name: str, wish: str, before: str) -> int:
    found = re.search(r"(\d+)\)?\Z", name.removeprefix(wish)) if name != wish else None
    return int(found[1]) + 1 if found and before in name else 2
