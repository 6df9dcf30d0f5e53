"""LeaseService: the only place where effects are ordered: decide, hold, commit, apply, answer.

Every call here is one thing that somebody wants of a lease, or one thing that portd has seen about it. It knows the
world through the seams alone, and its callers not at all: HTTP, handoff and tests call it alike.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from msgspec import UNSET
from msgspec.structs import replace

from portd.core import announcing, health
from portd.core.allocator import Allocator
from portd.core.errors import (
    FILE_LIMIT,
    Busy,
    InvalidRequest,
    LeaseEnded,
    NoClock,
    NotDeclinable,
    NotFound,
    PortTaken,
    Refusal,
)
from portd.core.failpoints import failpoint
from portd.core.model import Event, EventType, Lease, Now, Owner, ProcessId, Protocol, ReportCheck
from portd.core.ownership import Seen
from portd.core.requests import HealthReport, LeaseRequest, PatchRequest
from portd.core.rights import Caller, check_change
from portd.core.table import LeaseTable
from portd.core.transitions import Change
from portd.core.views import LeaseView, view_lease
from portd.leasing.adopting import Adopted, Adopter
from portd.leasing.deciding import Grant, Granter
from portd.leasing.journal import Entry, Journal, end
from portd.leasing.passing import Passing, transferred
from portd.leasing.seams import (
    Clock,
    FindLastResult,
    Holds,
    LeaseStore,
    Loaded,
    Process,
    Processes,
    ProcessGone,
    ReportHealth,
    State,
    Successor,
)
from portd.leasing.timers import LeaseClocks

logger = logging.getLogger(__name__)

NOTHING_SEEN: Final = Seen()
NOTHING_ADOPTED: Final[Mapping[int, Adopted]] = {}


class Granted(NamedTuple):
    """The leases of one call, in its order; a token is None where the lease was there before."""

    leases: list[Lease]
    tokens: list[str | None]

    @property
    def is_new(self) -> bool:
        """Tell whether the call granted anything that was not there before."""
        return self.tokens.count(None) < len(self.tokens)


class Decision(NamedTuple):
    """A call for leases that has been decided, and is on its way to the disk: `entry`, None where nothing changes."""

    leases: list[Lease]
    tokens: list[str | None]
    entry: Entry | None


class LeaseService:
    """All that can be done with leases. Methods raise a Refusal where they don't do it; then nothing has changed."""

    def __init__(
        self,
        table: LeaseTable,
        allocator: Allocator,
        journal: Journal,
        granter: Granter,
        store: LeaseStore,
        holds: Holds,
        processes: Processes,
        clock: Clock,
    ) -> None:
        self.table = table
        self.allocator = allocator
        self.journal = journal
        self.granter = granter
        self._store = store
        self._holds = holds
        self._processes = processes
        self.clock = clock
        self._clocks = LeaseClocks(table, allocator, journal, holds, clock)
        self.passing = Passing(
            table, allocator, journal, processes, self._clocks, clock, self._watch, self._forget_process
        )
        self.adopter = Adopter(processes, granter.check_caller)
        self._granting: dict[str, Entry] = {}
        self._moving: dict[str, Lease] = {}
        self._exited: set[ProcessId] = set()
        self._adopted: set[str] = set()
        self.report_to_probes: ReportHealth = lambda lease_id, status, note: None
        self.last_result: FindLastResult = lambda lease_id: None
        journal.subscribe(self._on_event)

    # --- granting ---

    async def grant(self, requests: Sequence[LeaseRequest], caller: Caller) -> Granted:
        """Grant leases, all or none, durably.

        The same live owner that asks again for a name gets the lease that it has, and no token: that was shown once.
        Raises the refusal of the first request that can't be granted, with a pointer into the array when there are
        several.
        """
        adopted = {index: await self.adopter.find(each, caller) for index, each in enumerate(requests) if each.adopt}
        while (unsettled := self.unsettled(requests)) is not None:
            await unsettled.wait()
        decision = self.decide(requests, caller, adopted)
        if decision.entry is not None:
            await decision.entry.wait()
        return self.granted(decision)

    def unsettled(self, requests: Sequence[LeaseRequest]) -> Entry | None:
        """Return what to wait for before deciding: a grant of the same name on its way. The caller may be asking
        twice."""
        for each in requests:
            if each.instance is not None:
                claim = self.table.named(each.service, each.instance, each.endpoint)
                if claim is not None and claim.id in self._granting:
                    return self._granting[claim.id]
        return None

    def decide(
        self, requests: Sequence[LeaseRequest], caller: Caller, adopted: Mapping[int, Adopted] = NOTHING_ADOPTED
    ) -> Decision:
        """Decide a call whose names are settled, and send it to the disk. Raises as `grant` does; once the entry is
        settled, `granted` has the answer."""
        now = self.clock.now()
        grants: list[Grant] = []
        changes: list[Change] = []
        leases: list[Lease] = []
        tokens: list[str | None] = []
        try:
            for index, request in enumerate(requests):
                try:
                    lease, token = self._grant_one(request, caller, now, grants, changes, adopted.get(index))
                except Refusal as refusal:
                    if len(requests) > 1:
                        refusal.pointer = f"/{index}{refusal.pointer or ''}"
                    raise
                leases.append(lease)
                tokens.append(token)
            failpoint("grant.decided")
            entry = self.journal.commit(changes, lambda: self._undo(grants)) if changes else None
        except BaseException:
            self._undo(grants)
            raise
        if entry is not None:
            for grant in grants:
                self._granting[grant.lease.id] = entry
        return Decision(leases, tokens, entry)

    def granted(self, decision: Decision) -> Granted:
        """Return what came of a decision whose entry is settled; raises the Refusal that it ended with."""
        if decision.entry is not None:
            decision.entry.result()
        return Granted([self.table.get(lease.id) or lease for lease in decision.leases], decision.tokens)

    def _grant_one(
        self,
        request: LeaseRequest,
        caller: Caller,
        now: Now,
        grants: list[Grant],
        changes: list[Change],
        adopted: Adopted | None,
    ) -> tuple[Lease, str | None]:
        process = (
            adopted.process
            if adopted is not None
            else self.granter.process(request.pid, caller, required=request.ttl is None)
        )
        if request.instance is not None:
            existing = self.table.named(request.service, request.instance, request.endpoint)
            if existing is not None:
                changes.extend(self._again(existing, request, caller, process, now))
                return existing, None
            self._check_instance(request, caller, process)
        shared = dict.fromkeys(g.lease.instance for g in grants if g.lease.service == request.service) if grants else ()
        grant = self.granter.grant(request, caller, process, now, shared, adopted)
        grants.append(grant)
        if request.ttl is None and process is not None:
            self._watch(process.id)
        changes.append(Change(grant.lease.id, "granted", lease=grant.lease))
        if adopted is not None:
            changes.append(Change(grant.lease.id, "bound", adopted.seen._asdict()))
            self._adopted.add(grant.lease.id)
        return grant.lease, grant.token

    def _again(
        self, lease: Lease, request: LeaseRequest, caller: Caller, process: Process | None, now: Now
    ) -> list[Change]:
        """Judge a request for a name that is leased: the same owner has it already; a user's new process takes a
        ttl lease over from the one that died; anybody else is refused."""
        identity = None if process is None else process.id
        same_uid = caller.uid is not None and caller.uid == lease.uid
        if lease.process is not None and identity == lease.process:
            if lease.lifetime == "ttl":
                self._clocks.restart(lease, now)
            return []
        orphaned = lease.lifetime == "ttl" and (lease.process is None or not self._processes.is_alive(lease.process))
        shows_token = caller.token_hash is not None and caller.token_hash == lease.token_hash
        if request.ttl is not None and orphaned and (same_uid or shows_token):
            self._clocks.restart(lease, now)
            if process is None:
                return []
            return [Change(lease.id, "updated", {"owner": process.owner, "process": process.id})]
        raise PortTaken(
            f"{lease.instance} (endpoint {lease.endpoint}) has port {lease.port} already, for "
            f"{describe(lease.owner)}: take another instance name, or none",
            pointer="/instance",
        )

    def _check_instance(self, request: LeaseRequest, caller: Caller, process: Process | None) -> None:
        """Refuse an endpoint of another user's instance: it would speak in its name, on an address of its own too."""
        assert request.instance is not None
        oldest = self.table.oldest_of_instance(request.service, request.instance)
        uid = caller.uid if process is None else process.owner.uid
        if oldest is not None and oldest.uid != uid and not caller.admin:
            raise PortTaken(
                f"{request.instance} is an instance of {describe(oldest.owner)}: take another instance name, or none",
                pointer="/instance",
            )

    def _undo_move(self, lease: Lease, moved: Lease) -> None:
        self._moving.pop(lease.id, None)
        self.granter.undo_move(lease, moved, is_live=self.table.get(lease.id) is not None)

    def _undo(self, grants: list[Grant]) -> None:
        for grant in grants:
            self._granting.pop(grant.lease.id, None)
            self._adopted.discard(grant.lease.id)
            self.granter.undo(grant.lease)
            self._forget_process(grant.lease.process)
        grants.clear()

    # --- what owners do ---

    async def renew(self, lease_id: str, caller: Caller, seconds: float | None) -> Lease:
        """Restart the clock of a ttl lease. In memory alone: a crash gives every ttl lease a full period anyway. A new
        period (`seconds`) is durable. Raises NoClock for a lease without a clock."""
        lease = await self._mine(lease_id, caller)
        if lease.lifetime != "ttl":
            raise NoClock(
                f"lease {lease.id} ({lease.instance}, port {lease.port}) lasts as long as its process: there "
                "is nothing to renew"
            )
        if seconds is not None and seconds > self.granter.policy.max_ttl_s:
            raise InvalidRequest(
                f"a ttl of more than {self.granter.policy.max_ttl_s:g} s (max_ttl) is not granted", pointer="/seconds"
            )
        if seconds is not None and seconds != lease.ttl:
            lease = await self._commit(Change(lease.id, "updated", {"ttl": seconds}))
        self._clocks.restart(lease, self.clock.now())
        return lease

    async def decline(self, lease_id: str, caller: Caller) -> Lease:
        """Give the lease another port: somebody else has the one it was granted. Raises NotDeclinable for an exact or
        static one, PoolExhausted when no other is left."""
        lease = await self._mine(lease_id, caller)
        if lease.exact or lease.lifetime == "static":
            kind = "exactly this port was asked for" if lease.exact else "its port is static"
            raise NotDeclinable(
                f"lease {lease.id} can't move from port {lease.port}: {kind}; see 'portd who "
                f"{lease.port}' for who has it"
            )
        if lease.id in self._moving:
            raise Busy(f"lease {lease.id} is being moved from port {lease.port} already")
        moved = self.granter.move(lease, self.clock.now(), privileged=caller.admin or lease.own_address)
        self._moving[lease.id] = lease
        now = self.clock.now()
        change = Change(lease.id, "declined", {"port": moved.port, "foreign": None, **health.when_moved(lease, now.at)})
        return await self._commit(change, undo=lambda: self._undo_move(lease, moved))

    async def transfer(self, lease_id: str, caller: Caller, pid: int) -> Lease:
        """Give a lease to another process: it lasts as long as that one does. Raises what a grant for that process
        raises."""
        lease = await self._mine(lease_id, caller)
        process = self.granter.process(pid, caller, required=True)
        assert process is not None, "a process is required"
        if process.id == lease.process:
            return lease
        if lease.lifetime != "ttl":
            self._watch(process.id)
        self.passing.begin(lease)
        change = Change(lease.id, "passed", transferred(lease, process))
        return await self._commit(change, undo=lambda: self.passing.give_up(lease, process.id))

    async def drain(self, lease_id: str, caller: Caller, drain: bool) -> Lease:
        """Start draining (or stop): the instance leaves every look-up at once, and keeps its port."""
        lease = await self._mine(lease_id, caller)
        if lease.drain == drain:
            return lease
        return await self._commit(Change(lease.id, "draining" if drain else "undrained", {"drain": drain}))

    async def patch(self, lease_id: str, caller: Caller, patch: PatchRequest) -> Lease:
        """Replace tags, metadata, check or announcement: each that is given, whole."""
        lease = await self._mine(lease_id, caller)
        fields: dict[str, Any] = {}
        if patch.tags is not UNSET:
            fields["tags"] = patch.tags
        if patch.metadata is not UNSET:
            fields["metadata"] = patch.metadata
        if patch.check is not UNSET:
            self.granter.check_check(patch.check, lease.protocol, lease.uid)
            fields["check"] = patch.check
            if patch.check != lease.check:
                fields |= health.when_check_changes(lease, patch.check, self.clock.now().at)
        if patch.announce is not UNSET:
            fields["announce"] = announcing.resolve(
                patch.announce,
                service=lease.service,
                instance=lease.instance,
                endpoint=lease.endpoint,
                protocol=lease.protocol,
                address=lease.address,
                check=fields.get("check", lease.check),
            )
        changed = {name: value for name, value in fields.items() if getattr(lease, name) != value}
        return await self._commit(Change(lease.id, "updated", changed)) if changed else lease

    async def report(self, lease_id: str, caller: Caller, report: HealthReport) -> Lease:
        """Take the service's own word for its health. Raises InvalidRequest for a lease without a `report` check."""
        lease = await self._mine(lease_id, caller)
        if not isinstance(lease.check, ReportCheck):
            raise InvalidRequest(
                f"lease {lease.id} ({lease.instance}) has no check of kind 'report'", pointer="/status"
            )
        self.report_to_probes(lease.id, report.status, report.note)
        return self.table.get(lease.id) or lease

    async def release(self, lease_id: str, caller: Caller) -> None:
        """End a lease, durably. Releasing again does nothing. Raises NotFound for an id that was never given."""
        try:
            lease = await self._mine(lease_id, caller)
            await self._commit(end(lease.id, "released", self.clock.now().at))
        except LeaseEnded:
            return

    # --- what portd sees ---

    def observe_health(self, lease_id: str, result: Literal["passing", "warning", "critical"], note: str) -> None:
        """Apply a check's result, where it changes anything."""
        lease = self.table.get(lease_id)
        if lease is not None and (lease.health, lease.health_note) != (result, note):
            fields = health.changes(lease, result, note, self.clock.now().at)
            self.journal.observe(Change(lease_id, "health", fields))

    def observe_state(self, lease_id: str, state: State, listener: Owner | None, seen: Seen = NOTHING_SEEN) -> None:
        """Apply what the kernel shows of a lease's port: who listens, or nobody."""
        lease = self.table.get(lease_id)
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
            fields |= health.when_unbound(lease, self.clock.now().at)
        elif state == "conflict":
            fields |= health.when_in_conflict(lease, self.clock.now().at)
        event_type: EventType = "unbound" if state == "held" else state
        self.journal.observe(Change(lease_id, event_type, fields))

    def observe_owner(self, process: ProcessId, owner: Owner) -> None:
        """Apply what a process has become by exec or a change of user: its leases show it as it is now."""
        for lease in self.table.of_process(process):
            self._update_observed(lease, {"owner": replace(owner, known_by=lease.owner.known_by)})

    def observe_exit(self, lease: Lease, successor: Successor | None) -> None:
        """Apply who listens on an exited owner's lease: it passes to that process, or ends."""
        self.passing.observe_exit(lease, successor)

    def _update_observed(self, lease: Lease, fields: dict[str, Any]) -> None:
        changed = {name: value for name, value in fields.items() if getattr(lease, name) != value}
        if changed and self.table.get(lease.id) is not None:
            self.journal.observe(Change(lease.id, "updated", changed))

    def observe_announcement(self, lease_id: str, published_as: str | None, problem: str | None) -> None:
        """Take what became of an announcement on the LAN."""
        lease = self.table.get(lease_id)
        if lease is None or lease.announce is None:
            return
        announce = replace(lease.announce, published_as=published_as, problem=problem)
        if announce != lease.announce:
            self.journal.observe(Change(lease_id, "announced", {"announce": announce}))

    def _on_exit(self, process: ProcessId) -> None:
        exited: list[Lease] = []
        for lease in self.table.of_process(process):
            if lease.id in self._granting:
                self._exited.add(process)  # it ends as soon as its grant has landed
            elif lease.lifetime != "ttl" and self.table.get(lease.id) is not None:
                exited.append(lease)
        self.passing.owners_exited(exited)

    def _on_event(self, event: Event) -> None:
        lease = event.lease
        if event.type == "granted":
            self._granting.pop(lease.id, None)
            if lease.id in self._adopted:
                self._adopted.discard(lease.id)
                self._clocks.hold_again(lease)  # as soon as its owner's socket is not in the way
            if lease.ttl is not None:
                self._clocks.restart(lease, self.clock.now())
            elif lease.process in self._exited:
                self.passing.owners_exited([lease])
        elif event.type == "passed":
            self.passing.on_passed(event)
        elif event.type == "declined":
            self.allocator.vacate(self._moving.pop(lease.id))
            self._clocks.has_moved(lease.id)
        elif event.type == "unbound" and self._clocks.lacks_hold(lease.id):
            self._clocks.hold_again(lease)
        elif event.type == "ended":
            self._holds.drop(lease.id)
            self.allocator.cool(lease, self.clock.now().tick)
            self._clocks.forget(lease.id)
            self._forget_process(lease.process)
            self._clocks.arm()

    # --- clocks ---

    def view(self, lease: Lease, caller: Caller, *, token: str | None = None) -> LeaseView:
        """Show a lease with its running clock to a caller."""
        renewed_at, expires_at = self._clocks.times(lease)
        last = self.last_result(lease.id)
        return view_lease(
            lease,
            caller,
            renewed_at=renewed_at,
            expires_at=expires_at,
            health_note=None if last is None else last.note,
            checked_at=None if last is None else last.at,
            token=UNSET if token is None else token,
        )

    def run_due(self) -> None:
        """Do what is due: end leases whose time has run out, look at quarantined ports. May be called at any time."""
        self._clocks.run_due()

    # --- start and stop ---

    def restore(self, loaded: Loaded, boot_id: str) -> None:
        """Take everything up as the store remembers it: leases, clocks, holds, owners, cooldowns, the order of the
        pools. Ends what did not outlive the daemon's absence."""
        now = self.clock.now()
        self.table.restore(loaded.live, loaded.revision)
        self.journal.start_after(loaded.revision)
        self.allocator.restore_line(loaded.remembered)
        for lease in loaded.remembered:
            age_s = max(0.0, now.at - (lease.ended_at or 0.0))
            if age_s < self.allocator.cooldown_s:
                self.allocator.restore_cooling(lease, now.tick, age_s=age_s)
        for lease in loaded.live:  # after the cooldowns: one that took its port back ends them
            self.allocator.use(lease)
        for lease in loaded.live:
            self._restore_lease(lease, boot_id, now)
        self._clocks.arm()

    def _restore_lease(self, lease: Lease, boot_id: str, now: Now) -> None:
        if lease.lifetime == "ttl":
            self._clocks.restart(lease, now)
        elif lease.process is None or lease.process.boot_id != boot_id:
            self.journal.observe(end(lease.id, "host_rebooted", now.at))
            return
        else:
            try:
                self._watch(lease.process)
            except InvalidRequest:  # it has exited meanwhile
                self.passing.owners_exited([lease])
                if self.table.get(lease.id) is None:
                    return
            except Busy as error:  # rather leak the port until the next start than end a living owner's lease
                logger.error("the exit of %s can't be waited for: %s", describe(lease.owner), error.detail)
        self._clocks.hold_again(lease)

    def close(self) -> None:
        """Stop the timer; leases stay for the next start."""
        self._clocks.close()

    @property
    def without_hold_count(self) -> int:
        """Return how many leases have no hold because somebody's socket was in the way at the start."""
        return self._clocks.without_hold_count

    # --- parts ---

    async def find(self, lease_id: str) -> Lease:
        """Return a lease, an ended one too while it is remembered; raises NotFound."""
        lease = self._in_memory(lease_id) or await self._store.lease(lease_id)
        if lease is None:
            raise NotFound(f"there is no lease {lease_id}, nor is one remembered")
        return self._in_memory(lease_id) or lease

    def _in_memory(self, lease_id: str) -> Lease | None:
        """Return a lease that is live, or whose end the disk does not have yet."""
        return self.table.get(lease_id) or self.journal.unwritten(lease_id)

    async def ended(self, service: str | None = None) -> list[Lease]:
        """Return ended leases that are remembered, newest first, a bounded number."""
        fresh = {lease.id: lease for lease in self.journal.unwritten_ends() if service in (None, lease.service)}
        return [*fresh.values(), *(lease for lease in await self._store.ended(service) if lease.id not in fresh)]

    async def history(self, port: int, protocol: Protocol | None, at: float | None, limit: int) -> list[Lease]:
        """Return who had the port, newest first; live leases as they are now."""
        leases = await self._store.history(port, protocol=protocol, at=at, limit=limit)
        return [self._in_memory(lease.id) or lease for lease in leases]

    @staticmethod
    def live(lease: Lease) -> Lease:
        """Return a lease that is live; raises LeaseEnded for one that is not."""
        if lease.state == "ended":
            raise LeaseEnded(
                f"lease {lease.id} on port {lease.port} has ended ({lease.ended_because}); ask for a new one"
            )
        return lease

    async def _mine(self, lease_id: str, caller: Caller) -> Lease:
        """Return a live lease that the caller may change; raises what stands against it."""
        lease = await self.find(lease_id)
        check_change(caller, lease)
        return self.live(lease)

    async def _commit(self, change: Change, undo: Any = lambda: None) -> Lease:
        try:
            entry = self.journal.commit([change], undo)
        except Refusal:
            undo()
            raise
        await entry.wait()
        return entry.result()[0]

    def _watch(self, process: ProcessId) -> None:
        try:
            self._processes.watch(process, self._on_exit)
        except ProcessGone as error:
            raise InvalidRequest(f"process {process.pid} has exited", pointer="/pid") from error
        except OSError as error:
            raise Busy(FILE_LIMIT) from error

    def _forget_process(self, process: ProcessId | None) -> None:
        if process is not None and not self.table.is_owner(process):
            self._exited.discard(process)
            self._processes.unwatch(process)


def describe(owner: Owner) -> str:
    """Say who an owner is, in a few words."""
    who = f"pid {owner.pid}" if owner.pid else "an unknown process"
    return f"{who} of {owner.user or owner.uid}" if owner.uid is not None else who
