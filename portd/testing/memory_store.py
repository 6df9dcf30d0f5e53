"""A store that forgets with the process, and fails when a test asks for it; for tests that drive the service alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from portd.core.errors import StoreLost, StoreUnavailable
from portd.core.model import Event, Lease, Protocol, decode_lease, encode_lease
from portd.core.transitions import stint_of
from portd.leasing.seams import REVISION_GAP, Loaded


class MemoryStore:
    """Keeps every promise of `LeaseStore` but durability. `failing` says how the next commits fail; `gate` holds them
    up while it is not set."""

    def __init__(self) -> None:
        self.failing: Literal["", "unavailable", "lost", "unknown"] = ""
        self.gate = asyncio.Event()
        self.gate.set()
        self.commit_count = 0
        self._delayed: set[asyncio.Task[None]] = set()
        self._first: int | None = None
        self._bodies: dict[str, bytes] = {}
        self._events: list[tuple[int, str, float, bytes]] = []
        self._moved: list[tuple[float, bytes]] = []
        self._pruned_to = 0

    async def load(self) -> Loaded:
        """Return what a start needs."""
        leases = [decode_lease(body) for body in self._bodies.values()]
        events = [
            Event(revision, kind, at, decode_lease(body))  # type: ignore[arg-type]
            for revision, kind, at, body in self._events
        ]
        newest = self._events[-1][0] if self._events else 0
        first = self._first = 0 if self._first is None else max(self._first, newest) + REVISION_GAP
        ends = _newest(leases)[::-1]
        newest_ends = {
            *{lease.name: lease.id for lease in ends}.values(),
            *{lease.port: lease.id for lease in ends}.values(),
        }
        return Loaded(
            [lease for lease in leases if lease.state != "ended"],
            [lease for lease in ends if lease.id in newest_ends],
            events,
            first,
            self._pruned_to,
            "0123456789abcdef",
        )

    async def commit(self, events: Sequence[Event]) -> None:
        """Keep the events, unless set to fail; `unknown` keeps them and fails all the same, as a lost sync does."""
        if self.gate.is_set() and not self._delayed:
            self._write(events)
            return
        late = asyncio.ensure_future(self._write_delayed(events))
        self._delayed.add(late)
        late.add_done_callback(self._delayed.discard)
        await asyncio.shield(late)  # the disk goes on without its caller

    async def _write_delayed(self, events: Sequence[Event]) -> None:
        await self.gate.wait()
        self._write(events)

    def _write(self, events: Sequence[Event]) -> None:
        self.commit_count += 1
        if self.failing == "unavailable":
            raise StoreUnavailable("the disk is full (simulated)")
        if self.failing != "lost":
            for event in events:
                if (left := stint_of(event)) is not None:
                    self._moved.append((self._since(left), encode_lease(left)))
                body = encode_lease(event.lease)
                self._bodies[event.lease.id] = body
                self._events.append((event.revision, event.type, event.at, body))
        if self.failing in ("lost", "unknown"):
            raise StoreLost("whether it was written is not known (simulated)")

    async def lease(self, lease_id: str) -> Lease | None:
        """Return a lease, or None."""
        body = self._bodies.get(lease_id)
        return None if body is None else decode_lease(body)

    async def history(
        self, port: int, *, protocol: Protocol | None = None, at: float | None = None, limit: int = 100
    ) -> list[Lease]:
        """Return who had the port, newest first."""
        leases = map(decode_lease, reversed(self._bodies.values()))
        all_of_them = [(self._since(lease), lease) for lease in leases]
        all_of_them += [(since, decode_lease(body)) for since, body in self._moved]
        found = [(since, lease) for since, lease in all_of_them if lease.port == port]
        if protocol in ("tcp", "udp"):
            found = [(since, lease) for since, lease in found if lease.protocol in (protocol, "both")]
        if at is not None:
            found = [
                (since, lease)
                for since, lease in found
                if since <= at and (lease.ended_at is None or lease.ended_at > at)
            ]
        return [lease for _, lease in sorted(found, key=lambda each: (-each[0], each[1].id))][:limit]

    def _since(self, lease: Lease) -> float:
        """Return since when the lease has its port: its last move, or its grant."""
        moves = [left.ended_at or 0.0 for _, body in self._moved if (left := decode_lease(body)).id == lease.id]
        return max(moves, default=lease.created_at)

    async def ended(self, service: str | None = None, limit: int = 1000) -> list[Lease]:
        """Return ended leases, newest end first."""
        leases = _newest(list(map(decode_lease, self._bodies.values())))
        return [lease for lease in leases if service in (None, lease.service)][:limit]

    async def prune(self, ended_before: float, events_kept: int) -> int:
        """Forget old leases and events."""
        self._moved = [each for each in self._moved if (decode_lease(each[1]).ended_at or 0.0) >= ended_before]
        old = [
            lease.id
            for lease in _newest(list(map(decode_lease, self._bodies.values())))
            if lease.ended_at is not None and lease.ended_at < ended_before
        ]
        for lease_id in old:
            del self._bodies[lease_id]
        surplus = max(0, len(self._events) - max(1, events_kept))  # the newest carries the revision on
        if surplus:
            self._pruned_to = self._events[surplus - 1][0]
        del self._events[:surplus]
        return len(old) + surplus

    async def close(self) -> None:
        """Do nothing."""


def _newest(leases: list[Lease]) -> list[Lease]:
    ended = [lease for lease in leases if lease.ended_at is not None]
    return sorted(ended, key=lambda lease: -(lease.ended_at or 0.0))
