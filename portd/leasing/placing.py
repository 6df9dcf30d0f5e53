"""Placing: which port a drafted lease gets, and the reservation of its hold, name and binding.

Everything here is synchronous. Between reading the table and reserving in it there is no await, so no other grant can
come in between: that, and not a lock, is why a port is never granted twice. This module must not know who may lease
what: that is decided with the draft.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

from msgspec.structs import replace

from portd.core.allocator import Allocator, PortRequest
from portd.core.bindings import Binding
from portd.core.errors import FILE_LIMIT, Busy, InvalidRequest, QuotaExceeded, Refusal
from portd.core.model import Lease
from portd.core.table import LeaseTable
from portd.core.transitions import Change
from portd.leasing.adopting import Adopted
from portd.leasing.drafting import Draft
from portd.leasing.pending import Grant, Pending
from portd.leasing.policy import Policy
from portd.leasing.refusing import Search, no_port
from portd.leasing.seams import Holds
from portd.leasing.timers import HoldKeeper, LeaseClocks

TRIES_MAX: Final = 512
"""Candidates that one grant tries: each costs a bind (10 µs), so a pool full of foreign processes blocks the loop for
5 ms at the most. Their ports go on probation, so the next grant goes on where this one stopped."""


class Placer:
    """Places drafted leases, and moves live ones. `policy` may be replaced while the daemon runs."""

    def __init__(
        self,
        table: LeaseTable,
        allocator: Allocator,
        holds: Holds,
        keeper: HoldKeeper,
        clocks: LeaseClocks,
        policy: Policy,
    ) -> None:
        self._table = table
        self._allocator = allocator
        self._holds = holds
        self._keeper = keeper
        self._clocks = clocks
        self.policy = policy

    def place(self, draft: Draft, pending: Pending) -> Grant:
        """Hold and reserve the first candidate that can be had; raises the refusal that names the cause."""
        search = Search()
        for binding in self._allocator.candidates(draft.ports):
            if self._hold(draft, binding, pending.now.tick, search):
                return self.reserve(draft, binding.port, pending)
        raise self._refusal(draft.ports, search, pending)

    def held_ports(self, draft: Draft, pending: Pending) -> Iterator[int]:
        """Yield the candidates that can be had, best first, each one held: whoever goes on to the next one has dropped
        the last. Raises the refusal that names the cause when there is none left."""
        search = Search()
        for binding in self._allocator.candidates(draft.ports):
            if self._hold(draft, binding, pending.now.tick, search):
                yield binding.port
        raise self._refusal(draft.ports, search, pending)

    def reserve(self, draft: Draft, port: int, pending: Pending) -> Grant:
        """Reserve the lease's name and binding on a port that is held for it; no await since the candidate."""
        lease = Lease(id=draft.id, port=port, **draft.fields)
        if not lease.port_requested and not self._allocator.is_pooled(port):  # the instance's last port, requested once
            lease = replace(lease, port_requested=True)
        pending.reserve(self._withdraw, lease)
        self._table.reserve(lease, pending)
        pending.changes.append(Change(lease.id, "granted", lease=lease))
        if lease.ttl is not None:
            pending.on_commit(partial(self._clocks.start, lease))
        return Grant(lease, draft.token)

    def adopt(self, draft: Draft, adopted: Adopted, pending: Pending) -> Grant:
        """Reserve the port that the process listens on. Nothing is held while its socket conflicts."""
        request = replace(draft.ports, address=adopted.address, is_exact=True)
        (port,) = request.ports
        name, binding = request.name, request.on(port)
        is_reserved = self._allocator.statics.belongs_to_other(name[0], name[2], binding) is not None
        if is_reserved or self._table.conflicting(binding) is not None:
            raise self._refusal(request, Search(), pending)
        draft.fields["address"] = adopted.address
        grant = self.reserve(draft, port, pending)
        pending.changes.append(Change(grant.lease.id, "bound", adopted.seen._asdict()))
        pending.on_commit(partial(self._keeper.restore, grant.lease))  # once its owner's socket no longer conflicts
        return grant

    def move(self, lease: Lease, pending: Pending, *, is_privileged: bool) -> Lease:
        """Reserve another port for a live lease whose port a foreign process has; the old one goes on probation.

        The new hold replaces the old one under the same lease. Raises PoolExhausted when there is none, QuotaExceeded
        when the user has declined its share.
        """
        quota, quarantines = self.policy.quota_per_uid, self._allocator.quarantines
        if quota and self._table.count_of_user(lease.user) + quarantines.count_of(lease.user) >= quota:
            raise QuotaExceeded(
                "leases, declined and cooling ports together have reached the quota: find out who has the ports "
                "('portd who'), or raise quota_per_uid in the configuration",
                retry_after_s=quarantines.next_left_s(lease.user, pending.now.tick),
            )
        self._allocator.decline(Binding(lease.protocol, lease.address, lease.port), pending.now.tick, lease.user)
        ports = PortRequest(lease.name, lease.user, lease.protocol, lease.address, (), lease.pool)
        draft = Draft(lease.id, "", ports, lease.hold, is_privileged, not lease.own_address, {})
        self._holds.drop(lease.id)
        pending.reserve(self._hold_again, lease)
        port = next(self.held_ports(draft, pending))
        moved = replace(lease, port=port, state="held")
        pending.reserve(self._withdraw_move, moved)
        self._table.reserve_move(moved, pending)
        return moved

    # --- parts ---

    def _hold(self, draft: Draft, binding: Binding, tick: float, search: Search) -> bool:
        """Hold the binding for the lease, unless somebody has it; the search records why not."""
        port = binding.port
        if port < self.policy.unprivileged_from and not draft.is_privileged:
            search[port] = "privileged"
            return False
        if self._table.conflicting(binding) is not None:
            search[port] = "leased"
            return False
        search.tries += 1
        if search.tries > TRIES_MAX:
            raise Busy(f"{TRIES_MAX} ports in a row are used by foreign processes; try again")
        taken = self._holds.take(draft.id, binding.protocol, binding.address, port, draft.hold, whole=draft.is_whole)
        if taken == "taken":
            return True
        if taken == "no_address":
            raise InvalidRequest(f"{binding.address} is not an address of this host", pointer="/address")
        if taken == "no_descriptors":
            raise Busy(FILE_LIMIT)
        search[port] = taken
        if taken == "busy" and self._allocator.pool_of(port) is not None and not self._table.on_port(port):
            self._allocator.decline(binding, tick)
        return False

    def _refusal(self, request: PortRequest, search: Search, pending: Pending) -> Refusal:
        return no_port(self._allocator, self._table, request, search, pending.now.tick, self.policy)

    # --- compensations ---

    def _withdraw(self, lease: Lease) -> None:
        """Undo the reservation of a grant that does not happen."""
        self._holds.drop(lease.id)
        self._table.release(lease)
        self._allocator.put_back(lease.port)

    def _withdraw_move(self, moved: Lease) -> None:
        self._holds.drop(moved.id)
        self._table.release_move(moved.id)
        self._allocator.put_back(moved.port)

    def _hold_again(self, lease: Lease) -> None:
        if self._table.get(lease.id) is not None:
            self._keeper.restore(lease)
