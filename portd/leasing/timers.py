"""What is due: leases whose time runs out, quarantined ports that want a look, holds that could not be taken back.

One timer serves all three, set to the earliest. Times are ticks of the lease clock, which stands still while the daemon
does, so a timer that fires early finds nothing due and is set anew.
"""

from __future__ import annotations

import asyncio
from typing import Final

from portd.core.allocator import Allocator
from portd.core.expiry import Deadlines
from portd.core.model import Lease, Now
from portd.core.table import LeaseTable
from portd.leasing.journal import Journal, end
from portd.leasing.seams import Clock, Holds

HOLD_AGAIN_S: Final = 5.0
"""Seconds between two tries to hold a port that somebody had bound, and not listened on, when portd started."""


class LeaseClocks:
    """The clocks of leases and ports. Renewals are kept here alone: a crash gives every ttl lease a full period."""

    def __init__(self, table: LeaseTable, allocator: Allocator, journal: Journal, holds: Holds, clock: Clock) -> None:
        self._table = table
        self._allocator = allocator
        self._journal = journal
        self._holds = holds
        self._clock = clock
        self._deadlines: Deadlines[str] = Deadlines()
        self._renewed: dict[str, float] = {}
        self._without_hold: set[str] = set()
        self._hold_again_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = 0.0

    def restart(self, lease: Lease, now: Now) -> None:
        """Give a ttl lease a full period from now on."""
        assert lease.ttl is not None
        if lease.id in self._deadlines:
            self._renewed[lease.id] = now.at
        self._deadlines.set(lease.id, now.tick + lease.ttl)
        self.arm()

    def times(self, lease: Lease) -> tuple[float | None, float | None]:
        """Return when a lease was renewed and when it expires (epoch seconds), None where it has no clock."""
        tick = self._deadlines.at(lease.id)
        if tick is None or lease.state == "ended":
            return None, None
        now = self._clock.now()
        return self._renewed.get(lease.id), now.at + (tick - now.tick)

    def hold_again(self, lease: Lease) -> None:
        """Take a hold back; where somebody's socket is in the way (the owner's own, mostly) it is tried again later."""
        if self._holds.restore(lease.id, lease.protocol, lease.address, lease.port, lease.hold):
            self._without_hold.discard(lease.id)
        else:
            self._without_hold.add(lease.id)

    def lacks_hold(self, lease_id: str) -> bool:
        """Tell whether the lease should have a hold and has none."""
        return lease_id in self._without_hold

    @property
    def without_hold_count(self) -> int:
        """Return how many leases should have a hold and have none."""
        return len(self._without_hold)

    def forget(self, lease_id: str) -> None:
        """Forget a lease that has ended, or moved to a port where it is held."""
        self._deadlines.discard(lease_id)
        self._renewed.pop(lease_id, None)
        self._without_hold.discard(lease_id)

    def has_moved(self, lease_id: str) -> None:
        """Take note that a lease is held on another port now."""
        self._without_hold.discard(lease_id)
        self.arm()

    def run_due(self) -> None:
        """Do what is due; may be called at any time."""
        self.close()  # else a timer that has fired a hair too early (uvloop rounds to milliseconds) counts as set
        now = self._clock.now()
        for lease_id in self._deadlines.pop_due(now.tick):
            change = end(lease_id, "expired", now.at)
            renewed_at = self._renewed.get(lease_id)
            if renewed_at is not None:
                change.fields["renewed_at"] = renewed_at
            self._journal.observe(change)
        for quarantine in self._allocator.due_looks(now.tick):
            self._allocator.seen(
                quarantine, self._holds.is_free(*quarantine.place, whole=quarantine.kind == "declined"), now.tick
            )
        if now.tick >= self._hold_again_at:
            self._hold_again_at = now.tick + HOLD_AGAIN_S
            for lease_id in tuple(self._without_hold):
                lease = self._table.get(lease_id)
                if lease is not None and lease.state == "held":  # one that is bound is safe
                    self.hold_again(lease)
        self.arm()

    def arm(self) -> None:
        """Set the timer to what is due next."""
        hold_again_at = self._hold_again_at if self._without_hold else None
        due = (self._deadlines.next_tick(), self._allocator.next_look(), hold_again_at)
        first = min((tick for tick in due if tick is not None), default=None)
        if first is None or (self._timer is not None and self._fires_at <= first):
            return  # a timer that is set fires early enough, and arms itself anew
        self.close()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, first - self._clock.now().tick), self.run_due)
        self._fires_at = first

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
