"""The state watch: makes what the lease table says of a port true, by what the kernel says.

The kernel tells nobody when a socket begins to listen, so the table of listeners is read a few times a second. That
costs by the number of listeners on this host, a microsecond each, and not by the number of leases; only a socket that
was not there before is attributed to a process, which is the dear part.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal

from portd.adapters.kernel import procfs
from portd.core.addresses import overlaps
from portd.core.model import Lease, Listener, Owner
from portd.seams import ReportState, SocketTable

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 0.25
"""Between two looks: a state is true within this time. Two thousand listeners cost 9 ms, 4 % of a core."""
EAGER_S: Final = (0.02, 0.05, 0.1)
"""After a grant somebody is about to listen: looks at these delays make `bound` feel immediate."""
ANCESTORS_MAX: Final = 16
"""How far up a listener's parents are followed to its owner: a shell, a supervisor and a few forks."""

LeasesOn = Callable[[int], Sequence[Lease]]
Verdict = tuple[Literal["held", "bound", "conflict"], Owner | None]


class StateWatch:
    """Compares listeners with leases, and reports each lease whose state is no longer what it was."""

    def __init__(self, table: SocketTable, leases_on: LeasesOn, live_count: Callable[[], int],
                 report: ReportState) -> None:
        self._table = table
        self._leases_on = leases_on
        self._live_count = live_count
        self._report = report
        self._owners: dict[int, Owner | None] = {}
        self._listening: dict[str, set[int]] = {}
        self._eager: list[float] = []
        self._nudged = asyncio.Event()
        self._failing = False
        self._looking = asyncio.Lock()

    def restore(self, leases: Iterable[Lease]) -> None:
        """Take up what was listened on before a restart: it may have stopped meanwhile."""
        self._listening = {lease.id: set() for lease in leases if lease.state in ("bound", "conflict")}

    def nudge(self) -> None:
        """Look soon: somebody was granted a port and will listen on it."""
        self._eager = list(EAGER_S)
        self._nudged.set()

    async def run(self) -> None:
        """Look for ever; asleep while there is no lease."""
        while True:
            if not self._live_count() and not self._listening:
                await self._nudged.wait()
            self._nudged.clear()
            await asyncio.sleep(self._eager.pop(0) if self._eager else INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        """Look once."""
        async with self._looking:
            try:
                listeners = self._table.listeners()
            except OSError as error:
                if not self._failing:
                    logger.error("the socket table can't be read, states of leases stand still: %s", error)
                self._failing = True
                return
            self._failing = False
            await self._judge(listeners)

    async def _judge(self, listeners: list[Listener]) -> None:
        found: dict[str, tuple[Lease, list[Listener]]] = {}
        for listener in listeners:
            for lease in self._leases_on(listener.port):
                if listener.protocol in lease.protocols and overlaps(excluded(listener), lease.address):
                    found.setdefault(lease.id, (lease, []))[1].append(listener)
        await self._attribute(found)
        for lease, its_listeners in found.values():
            state, owner = self._verdict(lease, its_listeners)
            if state != lease.state:
                self._report(lease.id, state, owner)
        for lease_id in self._listening.keys() - found.keys():
            self._report(lease_id, "held", None)
        self._listening = {lease_id: {one.inode for one in theirs} for lease_id, (_, theirs) in found.items()}

    async def _attribute(self, found: dict[str, tuple[Lease, list[Listener]]]) -> None:
        """Find the processes of sockets that were not there before."""
        known = {one.inode for _, theirs in found.values() for one in theirs}
        self._owners = {inode: owner for inode, owner in self._owners.items() if inode in known}
        fresh = known - self._owners.keys()
        if not fresh:
            return
        likely = [lease.owner.pid for lease, theirs in found.values()
                  if lease.owner.pid is not None and any(one.inode in fresh for one in theirs)]
        owners = await self._table.owners(fresh, likely)
        for inode in fresh:
            self._owners[inode] = owners.get(inode)

    def _verdict(self, lease: Lease, listeners: list[Listener]) -> Verdict:
        strangers = []
        for listener in listeners:
            owner = self._owners.get(listener.inode)
            if belongs(listener, owner, lease):
                return "bound", owner
            strangers.append(owner or Owner(uid=listener.uid, user=procfs.user_name(listener.uid), known_by="socket"))
        return "conflict", strangers[0]


def excluded(listener: Listener) -> str:
    """Return the address that a listener stands for in the overlap rules: `::` with v6only is no dual stack."""
    return "::1" if listener.address == "::" and listener.v6only else listener.address


def belongs(listener: Listener, owner: Owner | None, lease: Lease) -> bool:
    """Tell whether a listener is the lease's: its owner's, a descendant's, or its unit's.

    Where a lease has no process any more (a ttl lease that a command line took, a token's) the user must do, and where
    it has no user either, anybody is taken for it.
    """
    if lease.owner.pid is None or (lease.lifetime == "ttl" and procfs.start_ticks(lease.owner.pid) is None):
        return lease.owner.uid in (None, listener.uid)
    if owner is None or owner.pid is None:
        return lease.owner.uid == listener.uid  # hidden from us: the uid is all that can be compared
    if owner.unit is not None and owner.unit == lease.owner.unit and owner.unit.endswith(".service") \
            and not owner.unit.startswith("user@"):
        return True
    pid: int | None = owner.pid
    for _ in range(ANCESTORS_MAX):
        if pid == lease.owner.pid:
            return True
        if pid is None or pid <= 1:
            break
        pid = procfs.parent(pid)
    return False
