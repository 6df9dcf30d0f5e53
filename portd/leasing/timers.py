"""What is due: leases that expire, quarantined ports to poll, holds that could not be restored.

One timer serves all three, set to the earliest. Times are ticks of the lease clock, which stands still while the daemon
does, so a timer that fires early finds nothing due and is set again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final

from portd.core.allocator import Allocator
from portd.core.errors import Refusal
from portd.core.expiry import Deadlines
from portd.core.model import Lease
from portd.core.table import LeaseTable
from portd.leasing.journal import RETRY_S, Journal, end
from portd.leasing.pending import Pending
from portd.leasing.seams import Clock, Holds

HOLD_AGAIN_S: Final = 5.0
"""Seconds between two attempts to hold a port that somebody had bound, and not listened on, when portd started."""


class LeaseClocks:
    """The clocks of ttl leases. Renewals are kept here alone: a crash gives every ttl lease a full period.

    An expiry is a request like any other: it is true once it is durable, so a crash never brings an expired lease back.
    While a renewal is on its way to the disk its lease does not expire.
    """

    def __init__(self, table: LeaseTable, journal: Journal, clock: Clock) -> None:
        self._table = table
        self._journal = journal
        self._clock = clock
        self._deadlines: Deadlines[str] = Deadlines()
        self._renewed: dict[str, float] = {}
        self._paused: Counter[str] = Counter()
        self._overdue: dict[str, float] = {}
        self._expiring: dict[str, Pending] = {}
        self.arm: Callable[[], None] = lambda: None

    def start(self, lease: Lease) -> None:
        """Give a lease that is new to this run its first period."""
        assert lease.ttl is not None
        self._deadlines.set(lease.id, self._clock.now().tick + lease.ttl)
        self.arm()

    def renew(self, lease: Lease, ttl: float | None = None) -> None:
        """Give a lease a full period from now on: `ttl` seconds, else the lease's own."""
        now = self._clock.now()
        self._renewed[lease.id] = now.at
        self._overdue.pop(lease.id, None)
        self._deadlines.set(lease.id, now.tick + (ttl or lease.ttl or 0.0))
        self.arm()

    def pause(self, lease_id: str) -> None:
        """Let the lease not expire until `resume`: a renewal is on its way to the disk."""
        self._paused[lease_id] += 1

    def resume(self, lease_id: str) -> None:
        """End a pause; a lease whose time has run out meanwhile, and that was not renewed, is due at once."""
        self._paused[lease_id] -= 1
        if not self._paused[lease_id]:
            del self._paused[lease_id]
            tick = self._overdue.pop(lease_id, None)
            if tick is not None:
                self._deadlines.set(lease_id, tick)
                self.arm()

    def renew_paused(self, lease: Lease, ttl: float | None = None) -> None:
        """Renew a lease whose renewal is durable now, if it is still live, and end the pause."""
        if self._table.get(lease.id) is not None:
            self.renew(lease, ttl)
        self.resume(lease.id)

    def expiring(self, lease_id: str) -> Pending | None:
        """Return the expiry that is on its way to the disk, or None."""
        return self._expiring.get(lease_id)

    def times(self, lease: Lease) -> tuple[float | None, float | None]:
        """Return when a lease was renewed and when it expires (epoch seconds), None where it has no clock."""
        tick = self._deadlines.at(lease.id)
        if tick is None:
            tick = self._overdue.get(lease.id)
        if tick is None or lease.state == "ended":
            return None, None
        now = self._clock.now()
        return self._renewed.get(lease.id), now.at + (tick - now.tick)

    def forget(self, lease_id: str) -> None:
        """Forget a lease that has ended."""
        self._deadlines.discard(lease_id)
        self._overdue.pop(lease_id, None)
        self._renewed.pop(lease_id, None)

    def next_tick(self) -> float | None:
        """Return the tick of the next expiry, or None."""
        return self._deadlines.next_tick()

    def run_due(self) -> None:
        """Send the expiry of every lease whose time has run out to the disk."""
        now = self._clock.now()
        for lease_id in self._deadlines.pop_due(now.tick):
            self._overdue[lease_id] = now.tick
            if lease_id not in self._paused and lease_id not in self._expiring:
                self._expire(lease_id)

    def _expire(self, lease_id: str) -> None:
        now = self._clock.now()
        change = end(lease_id, "expired", now.at)
        if (renewed_at := self._renewed.get(lease_id)) is not None:
            change.fields["renewed_at"] = renewed_at
        pending = Pending(now)
        pending.changes.append(change)
        pending.reserve(self._expire_later, lease_id)
        self._expiring[lease_id] = pending
        pending.then(partial(self._expiring.pop, lease_id, None))  # type: ignore[arg-type]
        try:
            self._journal.submit(pending, is_internal=True)
        except Refusal as refusal:
            pending.settle(refusal)

    def _expire_later(self, lease_id: str) -> None:
        """Try again: the store took no writes, so the lease lives on; it may be renewed meanwhile."""
        is_overdue = self._overdue.pop(lease_id, None) is not None
        if is_overdue and self._table.get(lease_id) is not None:
            self._deadlines.set(lease_id, self._clock.now().tick + RETRY_S)
            self.arm()


class HoldKeeper:
    """The holds that are missing because a socket conflicted at the start, mostly the owner's own."""

    def __init__(self, holds: Holds) -> None:
        self._holds = holds
        self._missing: dict[str, Lease] = {}

    def restore(self, lease: Lease) -> None:
        """Hold a lease's port again; where that fails it is tried again later."""
        if self._holds.restore(lease.id, lease.protocol, lease.address, lease.port, lease.hold):
            self._missing.pop(lease.id, None)
        else:
            self._missing[lease.id] = lease

    def lacks(self, lease_id: str) -> bool:
        """Return whether the lease should have a hold and has none."""
        return lease_id in self._missing

    @property
    def missing(self) -> dict[str, Lease]:
        """Return the leases that should have a hold and have none, by id."""
        return self._missing

    def forget(self, lease_id: str) -> None:
        """Forget a lease that has ended, or is held on another port now."""
        self._missing.pop(lease_id, None)

    def retry(self, live: Callable[[str], Lease | None]) -> None:
        """Try again for every lease that nobody listens on: one that is bound is safe."""
        for lease_id in tuple(self._missing):
            lease = live(lease_id)
            if lease is not None and lease.state == "held":
                self.restore(lease)


class Timer:
    """One timer of the event loop for everything that is due."""

    def __init__(
        self,
        clocks: LeaseClocks,
        keeper: HoldKeeper,
        allocator: Allocator,
        holds: Holds,
        clock: Clock,
        live: Callable[[str], Lease | None],
    ) -> None:
        self._clocks = clocks
        self._keeper = keeper
        self._allocator = allocator
        self._holds = holds
        self._clock = clock
        self._live = live
        self._hold_again_at = 0.0
        self._handle: asyncio.TimerHandle | None = None
        self._fires_at = 0.0
        self.on_freed: Callable[[], None] = lambda: None
        clocks.arm = self.arm

    def run_due(self) -> None:
        """Do what is due; may be called at any time."""
        self.close()  # else a timer that has fired a hair too early (uvloop rounds to milliseconds) counts as set
        now = self._clock.now()
        self._clocks.run_due()
        due = self._allocator.quarantines.pop_due(now.tick)
        for quarantine in due:
            self._allocator.polled(
                quarantine, self._holds.is_free(*quarantine.binding, whole=quarantine.kind == "declined"), now.tick
            )
        if due:
            self.on_freed()
        if now.tick >= self._hold_again_at:
            self._hold_again_at = now.tick + HOLD_AGAIN_S
            self._keeper.retry(self._live)
        self.arm()

    def arm(self) -> None:
        """Set the timer to what is due next."""
        hold_again_at = self._hold_again_at if self._keeper.missing else None
        due = (self._clocks.next_tick(), self._allocator.quarantines.next_tick(), hold_again_at)
        first = min((tick for tick in due if tick is not None), default=None)
        if first is None or (self._handle is not None and self._fires_at <= first):
            return  # a timer that is set fires early enough, and arms itself anew
        self.close()
        loop = asyncio.get_running_loop()
        self._handle = loop.call_later(max(0.0, first - self._clock.now().tick), self.run_due)
        self._fires_at = first

    def close(self) -> None:
        """Stop the timer."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
