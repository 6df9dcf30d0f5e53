"""What portd observes: exits, listeners, check results, announcements, and what the start finds out.

An observation is true already: it goes to the journal at once, without a decision. This module also does what must
follow every event, whoever caused it: an ended lease gives back its hold, its port and its owner's watch.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Final, Literal

from msgspec.structs import replace

from portd.core import health
from portd.core.allocator import Allocator
from portd.core.errors import Busy, InvalidRequest
from portd.core.model import Event, EventType, Lease, Owner, ProcessId
from portd.core.names import ServiceNames
from portd.core.ownership import Seen
from portd.core.table import LeaseTable
from portd.core.transitions import Change
from portd.leasing.journal import Journal, end
from portd.leasing.owners import Owners, describe_owner
from portd.leasing.passing import Passing
from portd.leasing.seams import Clock, Holds, Loaded, State, Successor
from portd.leasing.static_holds import StaticHolds
from portd.leasing.timers import HoldKeeper, LeaseClocks, Timer
from portd.leasing.waiting import Freed

logger = logging.getLogger(__name__)

NOTHING_SEEN: Final = Seen()


class Observer:
    """Turns what was observed into changes, and follows the events."""

    def __init__(
        self,
        table: LeaseTable,
        allocator: Allocator,
        names: ServiceNames,
        journal: Journal,
        owners: Owners,
        passing: Passing,
        clocks: LeaseClocks,
        keeper: HoldKeeper,
        statics: StaticHolds,
        timer: Timer,
        freed: Freed,
        holds: Holds,
        clock: Clock,
    ) -> None:
        self._table = table
        self._allocator = allocator
        self._names = names
        self._journal = journal
        self._owners = owners
        self._passing = passing
        self._clocks = clocks
        self._keeper = keeper
        self._statics = statics
        self._timer = timer
        self._freed = freed
        self._holds = holds
        self._clock = clock
        owners.on_exit = self._owner_exited
        journal.subscribe(self._on_event)

    # --- observations ---

    def observe_health(self, lease_id: str, result: Literal["passing", "warning", "critical"], note: str) -> None:
        """Record a check's result, where it changes anything."""
        lease = self._table.get(lease_id)
        if lease is not None and (lease.health, lease.health_note) != (result, note):
            fields = health.changes(lease, result, note, self._clock.now().at)
            self._journal.observe(Change(lease_id, "health", fields))

    def observe_state(self, lease_id: str, state: State, listener: Owner | None, seen: Seen = NOTHING_SEEN) -> None:
        """Apply what the kernel shows of a lease's port: who listens, or nobody."""
        lease = self._table.get(lease_id)
        if lease is None:
            return
        fields: dict[str, Any] = dict(zip(seen._fields, seen, strict=True))
        fields["foreign"] = listener if state == "conflict" else None
        if state == "bound" and listener is not None and listener.pid == lease.owner.pid:
            fields["owner"] = replace(listener, known_by=lease.owner.known_by)  # it may have become another program
        if state == lease.state:
            self._update_observed(lease, fields)
            return
        if state == "held":
            fields |= health.when_unbound(lease, self._clock.now().at)
        elif state == "conflict":
            fields |= health.when_in_conflict(lease, self._clock.now().at)
        event_type: EventType = "unbound" if state == "held" else state
        self._journal.observe(Change(lease_id, event_type, fields))

    def observe_owner(self, process: ProcessId, owner: Owner) -> None:
        """Apply what a process has become by exec or a change of user: its leases show it as it is now."""
        for lease in self._table.of_process(process):
            self._update_observed(lease, {"owner": replace(owner, known_by=lease.owner.known_by)})

    def observe_exit(self, lease: Lease, successor: Successor | None) -> None:
        """Apply who listens on an exited owner's lease: it passes to that process, or ends."""
        self._passing.observe_exit(lease, successor)

    def _update_observed(self, lease: Lease, fields: dict[str, Any]) -> None:
        changed = {name: value for name, value in fields.items() if getattr(lease, name) != value}
        if changed and self._table.get(lease.id) is not None:
            self._journal.observe(Change(lease.id, "updated", changed))

    def observe_announcement(self, lease_id: str, published_as: str | None, problem: str | None) -> None:
        """Record what became of an announcement on the LAN."""
        lease = self._table.get(lease_id)
        if lease is None or lease.announce is None:
            return
        announce = replace(lease.announce, published_as=published_as, problem=problem)
        if announce != lease.announce:
            self._journal.observe(Change(lease_id, "announced", {"announce": announce}))

    def _owner_exited(self, process: ProcessId) -> None:
        """End or pass on the leases that last as long as this process; a grant on its way once it has landed."""
        exited: list[Lease] = []
        for lease in self._table.of_process(process):
            if lease.lifetime == "ttl":
                continue
            if self._table.get(lease.id) is not None:
                exited.append(lease)
            elif (pending := self._table.request_of(lease.id)) is not None:
                pending.on_commit(partial(self._passing.owners_exited, [lease]))
        self._passing.owners_exited(exited)

    # --- events ---

    def _on_event(self, event: Event) -> None:
        if event.type == "ended":
            self._give_back(event.lease)
        elif event.type == "unbound":
            if self._keeper.lacks(event.lease.id):
                self._keeper.restore(event.lease)
        elif event.type == "passed":
            self._passing.on_passed(event)
        elif event.type == "declined":
            self._freed.notify()
            self._timer.arm()

    def _give_back(self, lease: Lease) -> None:
        tick = self._clock.now().tick
        self._holds.drop(lease.id)
        self._allocator.cool(lease, tick)
        if lease.own_address:
            self._allocator.own.release(lease.address)
        if self._table.oldest_of_service(lease.service) is None:
            self._names.release(lease.service, lease.user, tick + self._allocator.cooldown_s)
        self._clocks.forget(lease.id)
        self._keeper.forget(lease.id)
        self._owners.forget(lease.process)
        if lease.port in self._allocator.statics:
            self._statics.hold_all()
        self._freed.notify()
        self._timer.arm()

    # --- the start ---

    def restore(self, loaded: Loaded, boot_id: str) -> None:
        """Restore everything from what the store remembers: leases, clocks, holds, owners, cooldowns, the order of the
        pools. Ends what did not outlive the daemon's absence; whoever watches must have its own past before that."""
        now = self._clock.now()
        self._table.restore(loaded.live, loaded.revision)
        self._journal.start_after(loaded.revision)
        self._allocator.restore_order(loaded.remembered)
        cooldown_s = self._allocator.cooldown_s
        for lease in loaded.remembered:
            age_s = max(0.0, now.at - (lease.ended_at or 0.0))
            if age_s < cooldown_s:
                self._allocator.cool(lease, now.tick, age_s=age_s)
                if self._table.oldest_of_service(lease.service) is None:
                    self._names.release(lease.service, lease.user, now.tick + cooldown_s - age_s)
        for lease in loaded.live:
            if lease.own_address:
                self._allocator.own.use(lease.address, (lease.service, lease.instance, lease.user))
        for lease in loaded.live:
            self._restore_lease(lease, boot_id)
        self._statics.hold_all()
        self._timer.arm()

    def _restore_lease(self, lease: Lease, boot_id: str) -> None:
        if lease.lifetime == "ttl":
            self._clocks.start(lease)
        elif lease.process is None or lease.process.boot_id != boot_id:
            self._journal.observe(end(lease.id, "host_rebooted", self._clock.now().at))
            return
        else:
            try:
                self._owners.watch(lease.process)
            except InvalidRequest:  # it has exited meanwhile
                self._passing.owners_exited([lease])
                if self._table.get(lease.id) is None:
                    return
            except Busy as error:  # rather leak the port until the next start than end a living owner's lease
                logger.error("the exit of %s can't be watched: %s", describe_owner(lease.owner), error.detail)
        self._keeper.restore(lease)
