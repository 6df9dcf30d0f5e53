"""What this host knows of the others: their entries, as of a revision of the cluster.

The view never shrinks because the cluster can't be reached: it becomes stale, and reports its age. After a read of
everything the difference applies. Where the cluster has another past than the one that the view knows (it was wiped, or
restored from a backup), entries that are missing stay for one ttl: their hosts are about to publish them again. Time
comes in as an argument (seconds of any steady clock). This module must not know what keeps the entries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final, Literal, NamedTuple

from portd.cluster.entries import (
    HOSTS,
    SERVICES,
    Change,
    HostEntry,
    decode_host,
    decode_lease,
    service_prefix,
    split_key,
)
from portd.core.model import Lease

FOLLOW_ALL_MAX_HOSTS: Final = 50
"""Hosts up to which `auto` follows everything: 10,000 instances are read in 0.4 s. Beyond, the cost of a change grows
with the number of hosts, and only services that somebody here asked for are followed."""
FOLLOW_ALL_AGAIN_HOSTS: Final = 40
"""Hosts below which `auto` follows everything again: a host that comes and goes must not switch it each time."""
UNUSED_S: Final = 600.0
"""Seconds after which a service that nobody asks for is followed no longer."""

Follow = Literal["auto", "all", "asked"]


class Position(NamedTuple):
    """A point in the past of a cluster: which one, and its revision there."""

    cluster_id: int
    revision: int


class Seen(NamedTuple):
    """A visible change of another host's lease: with `is_gone`, as it was before."""

    lease: Lease
    is_gone: bool


class View:
    """The other hosts' entries. `host` is this host, whose own entries are left out: its lease table is the truth."""

    def __init__(self, host: str, ttl_s: float, follow: Follow = "auto") -> None:
        self.host = host
        self.position: Position | None = None
        self.heard_at: float | None = None
        self.malformed_count = 0
        self._ttl_s = ttl_s
        self._follow = follow
        self._follows_all = follow != "asked"
        self._hosts: dict[str, HostEntry] = {}
        self._services: dict[str, dict[str, Lease]] = {}  # by service, then key
        self._missing: dict[str, float] = {}  # key: when it goes unless it is published again
        self._asked: dict[str, float] = {}
        self._synced: dict[str, int] = {}  # the revision up to which a prefix is known

    # --- what is followed ---

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Return the prefixes of keys that are followed."""
        if self._follows_all:
            return (HOSTS, SERVICES)
        return (HOSTS, *(service_prefix(service) for service in self._asked))

    @property
    def unsynced(self) -> tuple[str, ...]:
        """Return the prefixes that are followed and have not been read yet."""
        return tuple(prefix for prefix in self.prefixes if prefix not in self._synced)

    @property
    def next_revisions(self) -> dict[str, int]:
        """Return the first revision that is not known yet, of each prefix that has been read."""
        return {prefix: self._synced[prefix] + 1 for prefix in self.prefixes if prefix in self._synced}

    def is_known(self, service: str) -> bool:
        """Return whether a look-up of this service has an answer: its entries have been read."""
        return SERVICES in self._synced or service_prefix(service) in self._synced

    def ask(self, service: str, now: float) -> bool:
        """Note that somebody asks for a service; returns whether it has yet to be read."""
        if self._follow != "all":
            self._asked[service] = now
        return not self.is_known(service)

    def review(self, now: float) -> list[Seen]:
        """Remove what has been missing for a ttl, and stop following services that nobody asks for."""
        seen: list[Seen] = []
        for key in [key for key, until in self._missing.items() if now >= until]:
            seen += self._set(key, None)
        for service in [service for service, asked_at in self._asked.items() if now - asked_at > UNUSED_S]:
            del self._asked[service]
        if self._follow == "auto":
            most = FOLLOW_ALL_MAX_HOSTS if self._follows_all else FOLLOW_ALL_AGAIN_HOSTS
            self._follows_all = len(self._hosts) <= most
        followed = self.prefixes
        if dropped := [prefix for prefix in self._synced if prefix not in followed]:
            for prefix in dropped:
                del self._synced[prefix]
            for service in list(self._services):
                if not any(service_prefix(service).startswith(prefix) for prefix in followed):
                    seen += [Seen(lease, is_gone=True) for lease in self._services.pop(service).values()]
                    for key in [key for key in self._missing if key.startswith(service_prefix(service))]:
                        del self._missing[key]
        return seen

    # --- what is heard ---

    def is_other_past(self, position: Position) -> bool:
        """Return whether a cluster at this position is not a later state of the one that is known."""
        known = self.position
        return known is not None and (position.cluster_id != known.cluster_id or position.revision < known.revision)

    def resync(
        self, prefix: str, found: Mapping[str, bytes], position: Position, now: float, *, is_other_past: bool = False
    ) -> list[Seen]:
        """Apply all entries of a prefix, as of a position; `is_other_past` keeps those that are missing for one ttl."""
        seen: list[Seen] = []
        for key in [key for key in self._keys(prefix) if key not in found]:
            if is_other_past:
                self._missing.setdefault(key, now + self._ttl_s)
            elif key not in self._missing:
                seen += self._set(key, None)
        for key, value in found.items():
            seen += self._set(key, value)
        self._synced[prefix] = position.revision
        self.position = position if is_other_past else self._later(position)
        self.heard_at = now
        return seen

    def apply(self, prefix: str, changes: Iterable[Change], revision: int, now: float) -> list[Seen]:
        """Apply changes under a prefix, up to a revision; those that the view has already are ignored."""
        self.heard_at = now
        if revision <= self._synced.get(prefix, revision):
            return []
        assert self.position is not None, "a prefix was read"
        self._synced[prefix] = revision
        self.position = self._later(self.position._replace(revision=revision))
        return [seen for key, value in changes for seen in self._set(key, value)]

    def hear(self, position: Position, now: float) -> None:
        """Note that the cluster has answered at this position: the view is as of now."""
        self.position = self._later(position)
        self.heard_at = now

    def forget_revisions(self) -> None:
        """Have every prefix read again: the cluster has another past, or has compacted the changes since."""
        self._synced.clear()

    def _later(self, position: Position) -> Position:
        known = self.position
        return position if known is None or position.revision >= known.revision else known

    # --- what is known ---

    def stale_s(self, now: float) -> float | None:
        """Return the age of the view in seconds; None before anything was heard."""
        return None if self.heard_at is None else max(0.0, now - self.heard_at)

    def of_service(self, service: str) -> Collection[Lease]:
        """Return the other hosts' leases of a service."""
        return self._services.get(service, {}).values()

    def services(self) -> Collection[str]:
        """Return the names of services that other hosts have, those that are not followed too."""
        return set(self._services).union(*(entry.services for entry in self._hosts.values()))

    def leases(self) -> list[Lease]:
        """Return every lease of other hosts that is known."""
        return [lease for leases in self._services.values() for lease in leases.values()]

    @property
    def hosts(self) -> Mapping[str, HostEntry]:
        """Return the other hosts."""
        return self._hosts

    def _keys(self, prefix: str) -> list[str]:
        if prefix == HOSTS:
            return [HOSTS + host for host in self._hosts]
        if prefix == SERVICES:
            return [key for leases in self._services.values() for key in leases]
        return list(self._services.get(prefix.removeprefix(SERVICES).rstrip("/"), ()))

    def _set(self, key: str, value: bytes | None) -> list[Seen]:
        """Enter or remove an entry; returns the visible change, if it is one."""
        self._missing.pop(key, None)
        if key.startswith(HOSTS):
            self._set_host(key.removeprefix(HOSTS), value)
            return []
        name = split_key(key)
        if name is None or name.host == self.host:
            return []
        lease = None if value is None else decode_lease(name, value)
        self.malformed_count += lease is None and value is not None
        leases = self._services.setdefault(name.service, {})
        before = leases.get(key)
        if lease is None:
            leases.pop(key, None)
            if not leases:
                del self._services[name.service]
            return [] if before is None else [Seen(before, is_gone=True)]
        leases[key] = lease
        return [] if lease == before else [Seen(lease, is_gone=False)]

    def _set_host(self, host: str, value: bytes | None) -> None:
        entry = None if value is None else decode_host(value)
        self.malformed_count += entry is None and value is not None
        if entry is None:
            self._hosts.pop(host, None)
        elif host != self.host:
            self._hosts[host] = entry
