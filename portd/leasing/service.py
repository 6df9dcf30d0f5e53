"""LeaseService: the commands on leases. Each decides, commits, and returns the lease as it is then.

It knows the world through the seams alone, and its callers not at all: HTTP, handoff and tests call it alike.
Observations are in `observing`, queries in `queries`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple, TypeGuard

from msgspec import UNSET

from portd.core import health
from portd.core.errors import (
    Busy,
    InvalidRequest,
    LeaseEnded,
    NoClock,
    NotDeclinable,
    PoolExhausted,
    PortTaken,
    QuotaExceeded,
    Refusal,
    ServiceTaken,
)
from portd.core.failpoints import armed, failpoint
from portd.core.model import Lease, ReportCheck
from portd.core.requests import HealthReport, LeaseRequest, PatchRequest
from portd.core.rights import Caller, check_change
from portd.core.table import LeaseTable
from portd.core.transitions import Change
from portd.core.updating import replaced_fields
from portd.leasing.adopting import Adopted, Adopter
from portd.leasing.deciding import NOTHING_ADOPTED, Decider
from portd.leasing.journal import Journal, end
from portd.leasing.owners import Owners
from portd.leasing.passing import Passing, transferred
from portd.leasing.pending import Pending
from portd.leasing.queries import LeaseQueries, live
from portd.leasing.seams import Clock, ReportHealth
from portd.leasing.timers import HoldKeeper, LeaseClocks
from portd.leasing.waiting import Freed

WAIT_MAX_S: Final = 600.0
"""The longest wait for a port, in seconds: proxies and kernels forget idle connections that stay longer."""


Explain = Callable[[PortTaken, Caller], Awaitable[PortTaken]]
"""Names, in a refusal, the foreign process that has the port."""


async def _as_it_is(refusal: PortTaken, caller: Caller) -> PortTaken:
    return refusal


class Granted(NamedTuple):
    """The leases of one call, in its order; a token is None where the lease was there before."""

    leases: list[Lease]
    tokens: list[str | None]

    @property
    def is_new(self) -> bool:
        """Return whether the call granted anything that was not there before."""
        return self.tokens.count(None) < len(self.tokens)


def is_foreign(refusal: Refusal) -> TypeGuard[PortTaken]:
    """Return whether a foreign process has the port of a refused request."""
    return isinstance(refusal, PortTaken) and refusal.foreign is not None


class LeaseService:
    """The commands. They raise a Refusal where they change nothing."""

    def __init__(
        self,
        table: LeaseTable,
        journal: Journal,
        decider: Decider,
        clocks: LeaseClocks,
        keeper: HoldKeeper,
        owners: Owners,
        passing: Passing,
        adopter: Adopter,
        queries: LeaseQueries,
        freed: Freed,
        clock: Clock,
    ) -> None:
        self._table = table
        self._journal = journal
        self._decider = decider
        self._clocks = clocks
        self._keeper = keeper
        self._owners = owners
        self._passing = passing
        self._adopter = adopter
        self._queries = queries
        self._freed = freed
        self._clock = clock
        self.report_to_probes: ReportHealth = lambda lease_id, status, note: None
        self.explain: Explain = _as_it_is
        self._explaining: set[asyncio.Task[None]] = set()

    # --- granting ---

    async def grant(self, requests: Sequence[LeaseRequest], caller: Caller, wait_s: float = 0.0) -> Granted:
        """Grant leases, all or none, durably.

        The same live owner that asks again for a name gets the lease that it has, and no token: that was shown once.
        Waits up to `wait_s` seconds for ports that others have. Raises the refusal of the first request that can't be
        granted, with a pointer into the array when there are several.
        """
        deadline = asyncio.get_running_loop().time() + min(wait_s, WAIT_MAX_S) if wait_s else 0.0
        adopted: dict[int, Adopted] = {}
        for index, each in enumerate(requests):
            if each.adopt:
                adopted[index] = await self._adopter.find(each, caller)
        while True:
            while (unsettled := self.unsettled(requests)) is not None:
                await unsettled.wait()
            try:
                pending = self.decide(requests, caller, adopted)
            except (PortTaken, PoolExhausted, QuotaExceeded, ServiceTaken) as refusal:
                left_s = deadline - asyncio.get_running_loop().time() if wait_s else 0.0
                if left_s <= 0.0 or (refusal.pointer or "").endswith("/instance"):
                    if is_foreign(refusal):
                        raise await self.explain(refusal, caller) from None
                    raise
                await self._freed.wait(left_s)
                continue
            if not pending.is_settled:
                await pending.wait()
            return await self._granted_late(pending)

    def unsettled(self, requests: Sequence[LeaseRequest]) -> Pending | None:
        """Return what to wait for before deciding: a grant of the same name on its way (the caller may be asking
        twice), or its expiry."""
        for each in requests:
            if each.instance is not None:
                lease = self._table.named(each.service, each.instance, each.endpoint)
                if lease is not None:
                    unsettled = self._table.request_of(lease.id) or self._clocks.expiring(lease.id)
                    if unsettled is not None:
                        return unsettled
        return None

    def decide(
        self, requests: Sequence[LeaseRequest], caller: Caller, adopted: Mapping[int, Adopted] = NOTHING_ADOPTED
    ) -> Pending:
        """Decide a call whose names are settled, and send it to the disk. Raises as `grant` does; once it is settled,
        `granted` has the answer."""
        pending = Pending(self._clock.now())
        try:
            self._decider.decide(pending, requests, caller, adopted)
            if armed:
                failpoint("grant.decided")
        except BaseException:
            pending.rollback()
            raise
        if pending.changes:
            self._journal.submit(pending)
        else:
            pending.commit()
            pending.settle()
        return pending

    def refused(self, refusal: PortTaken, caller: Caller) -> Pending:
        """Return a request that is settled with this refusal as soon as the foreign process has been named in it."""
        pending = Pending(self._clock.now())

        async def explain() -> None:
            try:
                pending.settle(await self.explain(refusal, caller))
            finally:
                pending.settle(refusal)

        task = asyncio.create_task(explain())
        self._explaining.add(task)
        task.add_done_callback(self._explaining.discard)
        return pending

    def granted(self, pending: Pending) -> Granted:
        """Return the answer to a call that has just been settled; raises the Refusal that it was settled with."""
        pending.check()
        grants, get = pending.grants, self._table.get
        leases = [get(lease.id) or self._journal.unwritten(lease.id) or lease for lease, _ in grants]
        return Granted(leases, [token for _, token in grants])

    async def _granted_late(self, pending: Pending) -> Granted:
        """Return the answer to a call that was settled some time ago: what ended since then is shown as ended."""
        if pending.refusal is not None:
            raise pending.refusal
        granted = Granted([], [])
        for lease, token in pending.grants:
            granted.leases.append(self._table.get(lease.id) or await self._queries.find(lease.id))
            granted.tokens.append(token)
        return granted

    # --- what owners do ---

    async def renew(self, lease_id: str, caller: Caller, seconds: float | None) -> Lease:
        """Restart the clock of a ttl lease. In memory alone: a crash gives every ttl lease a full period anyway. A new
        period (`seconds`) is durable. Raises NoClock for a lease without a clock."""
        lease = await self._authorized(lease_id, caller)
        while (expiring := self._clocks.expiring(lease_id)) is not None:
            await expiring.wait()
            lease = await self._authorized(lease_id, caller)
        if lease.lifetime != "ttl":
            raise NoClock(
                f"lease {lease.id} ({lease.instance}, port {lease.port}) lasts as long as its process: there is "
                "nothing to renew"
            )
        max_ttl_s = self._decider.policy.max_ttl_s
        if seconds is not None and seconds > max_ttl_s:
            raise InvalidRequest(f"a ttl of more than {max_ttl_s:g} s (max_ttl) is not granted", pointer="/seconds")
        if seconds is None or seconds == lease.ttl:
            self._clocks.renew(lease)
            return lease
        pending = self._pending(Change(lease.id, "updated", {"ttl": seconds}))
        pending.reserve(self._clocks.resume, lease.id)
        self._clocks.pause(lease.id)  # it was renewed in time, however long the disk takes
        pending.on_commit(partial(self._clocks.renew_paused, lease, seconds))
        return await self._submit(pending, lease.id)

    async def decline(self, lease_id: str, caller: Caller) -> Lease:
        """Give the lease another port: somebody else has the one it was granted. Raises NotDeclinable for an exact or
        static one, PoolExhausted when no other is left."""
        lease = await self._authorized(lease_id, caller)
        if lease.exact or lease.lifetime == "static":
            kind = "its port is static" if lease.lifetime == "static" else "exactly this port was requested"
            raise NotDeclinable(
                f"lease {lease.id} can't move from port {lease.port}: {kind}; see 'portd who {lease.port}' for who has "
                "it"
            )
        if self._table.request_of(lease.id) is not None:
            raise Busy(f"lease {lease.id} is being moved from port {lease.port} already")
        pending = Pending(self._clock.now())
        try:
            moved = self._decider.move(lease, pending, is_privileged=caller.admin or lease.own_address)
        except BaseException:
            pending.rollback()
            raise
        fields = {
            "port": moved.port,
            "moved_from": lease.port,
            "foreign": None,
            **health.when_moved(lease, pending.now.at),
        }
        pending.changes.append(Change(lease.id, "declined", fields))
        pending.on_commit(partial(self._keeper.forget, lease.id))
        return await self._submit(pending, lease.id)

    async def transfer(self, lease_id: str, caller: Caller, pid: int) -> Lease:
        """Give a lease to another process: it lasts as long as that one does. Raises what a grant for that process
        raises."""
        lease = await self._authorized(lease_id, caller)
        pending = Pending(self._clock.now())
        try:
            process = self._owners.acquire(pid, caller, pending, is_lifetime=lease.lifetime != "ttl")
        except BaseException:
            pending.rollback()
            raise
        assert process is not None, "a requested process is found, or refused"
        if process.id == lease.process:
            return lease
        pending.reserve(self._passing.give_up, lease, process.id)
        self._passing.begin(lease)
        pending.changes.append(Change(lease.id, "passed", transferred(lease, process)))
        return await self._submit(pending, lease.id)

    async def drain(self, lease_id: str, caller: Caller, drain: bool) -> Lease:
        """Start draining (or stop): the instance leaves every look-up at once, and keeps its port."""
        lease = await self._authorized(lease_id, caller)
        if lease.drain == drain:
            return lease
        change = Change(lease.id, "draining" if drain else "undrained", {"drain": drain})
        return await self._submit(self._pending(change), lease.id)

    async def patch(self, lease_id: str, caller: Caller, patch: PatchRequest) -> Lease:
        """Replace tags, metadata, check or announcement: each that is given, whole."""
        lease = await self._authorized(lease_id, caller)
        if patch.check is not UNSET:
            self._decider.validate_check(patch.check, lease.protocol, lease.uid)
        fields = replaced_fields(lease, patch, self._clock.now().at)
        if not fields:
            return lease
        return await self._submit(self._pending(Change(lease.id, "updated", fields)), lease.id)

    async def report(self, lease_id: str, caller: Caller, report: HealthReport) -> Lease:
        """Apply the result of a `report` check. Raises InvalidRequest for a lease without one."""
        lease = await self._authorized(lease_id, caller)
        if not isinstance(lease.check, ReportCheck):
            raise InvalidRequest(
                f"lease {lease.id} ({lease.instance}) has no check of kind 'report'", pointer="/status"
            )
        self.report_to_probes(lease.id, report.status, report.note)
        return self._table.get(lease.id) or lease

    async def release(self, lease_id: str, caller: Caller) -> None:
        """End a lease, durably. Releasing again does nothing. Raises NotFound for an id that was never given."""
        try:
            lease = await self._authorized(lease_id, caller)
            pending = self._pending(end(lease.id, "released", self._clock.now().at))
            self._journal.submit(pending)
            await pending.wait()
            pending.check()
        except LeaseEnded:
            return

    async def open_lease(self, lease_id: str, caller: Caller) -> Lease:
        """Return a live lease whose sockets the caller may receive; raises the refusal otherwise."""
        self._owners.check_caller(caller)
        return await self._authorized(lease_id, caller)

    # --- parts ---

    async def _authorized(self, lease_id: str, caller: Caller) -> Lease:
        """Return a live lease that the caller may change; raises the refusal otherwise."""
        lease = await self._queries.find(lease_id)
        check_change(caller, lease)
        return live(lease)

    def _pending(self, change: Change) -> Pending:
        pending = Pending(self._clock.now())
        pending.changes.append(change)
        return pending

    async def _submit(self, pending: Pending, lease_id: str) -> Lease:
        """Commit a change of a lease and return the lease as it is then; raises LeaseEnded if it ended meanwhile."""
        self._journal.submit(pending)
        await pending.wait()
        pending.check()
        return live(await self._queries.find(lease_id))
