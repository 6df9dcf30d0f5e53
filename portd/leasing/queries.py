"""LeaseQueries: the queries about leases, ports and pools. Nothing here changes anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from msgspec import UNSET

from portd.core.allocator import Allocator, PoolCount
from portd.core.bindings import Binding
from portd.core.errors import LeaseEnded, NotFound
from portd.core.model import Lease, Now, ProcessId, Protocol
from portd.core.quarantine import Quarantine
from portd.core.rights import Caller
from portd.core.static_ports import StaticPort
from portd.core.table import LeaseTable
from portd.core.views import LeaseView, view_lease
from portd.leasing.journal import Journal
from portd.leasing.policy import Policy
from portd.leasing.seams import Clock, FindLastResult, LeaseStore
from portd.leasing.timers import HoldKeeper, LeaseClocks


class LeaseQueries:
    """Live leases from the table, ended ones from the store, ports and pools from the allocator."""

    def __init__(
        self,
        table: LeaseTable,
        allocator: Allocator,
        journal: Journal,
        clocks: LeaseClocks,
        keeper: HoldKeeper,
        store: LeaseStore,
        clock: Clock,
        policy: Callable[[], Policy],
    ) -> None:
        self._table = table
        self._allocator = allocator
        self._journal = journal
        self._clocks = clocks
        self._keeper = keeper
        self._store = store
        self._clock = clock
        self._policy = policy
        self.last_result: FindLastResult = lambda lease_id: None

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Lease]:
        """Yield the live leases."""
        return iter(self._table)

    @property
    def revision(self) -> int:
        """Return the newest revision."""
        return self._table.revision

    @property
    def host(self) -> str:
        """Return the name of this host."""
        return self._policy().host

    def now(self) -> Now:
        """Return the time."""
        return self._clock.now()

    # --- leases ---

    def get(self, lease_id: str) -> Lease | None:
        """Return a live lease, or None."""
        return self._table.get(lease_id)

    async def find(self, lease_id: str) -> Lease:
        """Return a lease, an ended one too while it is remembered; raises NotFound."""
        lease = self._in_memory(lease_id) or await self._store.lease(lease_id)
        if lease is None:
            raise NotFound(f"there is no lease {lease_id}, nor is one remembered")
        return self._in_memory(lease_id) or lease

    def on_port(self, port: int) -> list[Lease]:
        """Return the live leases of a port number."""
        return self._table.on_port(port)

    def of_service(self, service: str) -> Collection[Lease]:
        """Return the live leases of a service."""
        return self._table.of_service(service).values()

    def of_process(self, process: ProcessId) -> list[Lease]:
        """Return the leases of a process, those on their way too."""
        return self._table.of_process(process)

    def services(self) -> Collection[str]:
        """Return the names of services with live leases."""
        return self._table.services()

    async def ended(self, service: str | None = None) -> list[Lease]:
        """Return ended leases that are remembered, newest first, a bounded number."""
        fresh = {lease.id: lease for lease in self._journal.unwritten_ends() if service in (None, lease.service)}
        return [*fresh.values(), *(lease for lease in await self._store.ended(service) if lease.id not in fresh)]

    async def history(self, port: int, protocol: Protocol | None, at: float | None, limit: int) -> list[Lease]:
        """Return who had the port, newest first; live leases as they are now. The time that a lease had the port before
        it moved to another one is an ended lease without a reason."""
        leases = await self._store.history(port, protocol=protocol, at=at, limit=limit)
        return [lease if lease.is_stint else self._in_memory(lease.id) or lease for lease in leases]

    def view(self, lease: Lease, caller: Caller, *, token: str | None = None) -> LeaseView:
        """Show a lease with its running clock to a caller."""
        if lease.is_stint:
            return view_lease(lease, caller)  # the clock and the check are those of the port that it has now
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

    # --- ports and pools ---

    def statics(self) -> Iterable[StaticPort]:
        """Return every static port."""
        return self._allocator.statics

    def static_on(self, port: int) -> list[StaticPort]:
        """Return the static ports with this number."""
        return self._allocator.statics.on_port(port)

    def quarantines(self) -> Iterable[Quarantine]:
        """Return every quarantine."""
        return self._allocator.quarantines

    def quarantines_on(self, port: int) -> list[Quarantine]:
        """Return the quarantines of one port number."""
        return self._allocator.quarantines.on_port(port)

    def pools(self) -> Mapping[str, tuple[PoolCount, int]]:
        """Count every pool's numbers, and those of them that leases have on which nobody listens. Walks all pools."""
        held = Counter(
            self._allocator.pool_of(port) for port in {lease.port for lease in self._table if lease.state == "held"}
        )
        return {pool: (self._allocator.count(pool), held[pool]) for pool in self._allocator.pools()}

    @property
    def without_hold_count(self) -> int:
        """Return how many leases have no hold because a socket conflicted with it at the start."""
        return len(self._keeper.missing)

    def warnings(self) -> list[str]:
        """Return what is wrong with leases, one sentence each."""
        warnings = []
        if count := self.without_hold_count:
            warnings.append(
                f"{count} leases have no hold: their owners listened already when portd started or adopted them; each "
                "is held as soon as its owner stops listening"
            )
        misplaced = [(lease, reason) for lease in self._table if (reason := self._allocator.misplaced(lease))]
        warnings += [
            f"{lease.instance} (endpoint {lease.endpoint}) keeps port {lease.port} until it ends: {reason}"
            for lease, reason in misplaced[:10]
        ]
        if len(misplaced) > 10:
            warnings.append(f"{len(misplaced) - 10} more leases have what the configuration would not give them now")
        return warnings

    def conflicting(self, binding: Binding) -> Lease | None:
        """Return a lease that the binding would conflict with, or None."""
        return self._table.conflicting(binding)

    def _in_memory(self, lease_id: str) -> Lease | None:
        """Return a lease that is live, or whose end the disk does not have yet."""
        return self._table.get(lease_id) or self._journal.unwritten(lease_id)


def live(lease: Lease) -> Lease:
    """Return a lease that is live; raises LeaseEnded for one that is not."""
    if lease.state == "ended":
        raise LeaseEnded(f"lease {lease.id} on port {lease.port} has ended ({lease.ended_because}); ask for a new one")
    return lease
