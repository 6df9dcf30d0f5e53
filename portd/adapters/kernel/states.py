"""The state watch: makes what the lease table says of a port true, by what the kernel says.

The kernel tells nobody when a socket begins to listen, so the table of listeners is read a few times a second. That
costs by the number of listeners on this host, 1.4 µs each, and not by the number of leases; only a socket that is new
on a leased port is attributed to a process, which is the dear part.

Judging is synchronous and always on a table that was read this moment: nobody is called a foreign process for what was true
before somebody else's lease began.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final, Literal, NamedTuple

from portd.adapters.kernel import procfs
from portd.core.bindings import overlaps
from portd.core.model import Lease, Listener, Owner
from portd.leasing.seams import ReportState, SocketTable

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 0.25
"""Between two looks: a state is true within this time, and the time that one attribution takes."""
EAGER_S: Final = (0.03, 0.07)
"""Between looks after a grant: somebody is about to listen, and `bound` should feel immediate."""
COST_FACTOR: Final = 10
"""The pause after a look is at least this much longer than reading the table took: a tenth of the loop at the most."""
FRESH_MAX: Final = 1024
"""Sockets that are attributed in one go; the rest in the next."""
AGAIN_S: Final = 0.25
AGAIN_MAX_S: Final = 30.0
"""When a socket that is not the owner's is attributed again, after pauses that double: it may have been passed on since
(SCM_RIGHTS), or be on its way from portd."""
ANCESTORS_MAX: Final = 32
"""How far up a listener's parents are followed to its owner: shells, supervisors and a few forks."""

LeasesOn = Callable[[int], Sequence[Lease]]
Verdict = tuple[Literal["held", "bound", "conflict"], Owner | None]


class Holder(NamedTuple):
    """Who has a socket. `owner` None: hidden from portd; `line` is the process and its ancestors when the socket was
    new, as (pid, start ticks): parents may exit later. `again_at` and `wait_s` are loop seconds."""

    owner: Owner | None
    line: frozenset[tuple[int, int]]
    again_at: float
    wait_s: float

    @property
    def is_portd(self) -> bool:
        """Tell whether only portd has it: it is on its way to its owner (handoff), and nobody listens yet."""
        return self.owner is not None and self.owner.pid == os.getpid()


class StateWatch:
    """Compares listeners with leases, and reports each lease whose state is not what the kernel says."""

    def __init__(
        self,
        sockets: SocketTable,
        leases_on: LeasesOn,
        live_count: Callable[[], int],
        report: ReportState,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._sockets = sockets
        self._leases_on = leases_on
        self._live_count = live_count
        self._report = report
        self._interval_s = interval_s
        self._holders: dict[int, Holder] = {}
        self._occupied: dict[str, int] = {}
        self._eager: list[float] = []
        self._due = 0.0
        self._woken = asyncio.Event()
        self._cost_s = 0.0
        self.problem: str | None = None
        """Why states stand still, None while they don't."""

    def restore(self, leases: Iterable[Lease]) -> None:
        """Take up which leases were listened on before a restart: that may have ended meanwhile."""
        self._occupied = {lease.id: lease.port for lease in leases if lease.state != "held"}

    def wake(self) -> None:
        """Look soon: somebody was granted a port and will listen on it. Cheap, however often it is called."""
        if len(self._eager) == len(EAGER_S) - 1:
            return  # nudged since the last look: the next one comes no later for it
        self._eager = list(EAGER_S[1:])
        due = asyncio.get_running_loop().time() + max(EAGER_S[0], COST_FACTOR * self._cost_s)
        if due < self._due:
            self._due = due
            self._woken.set()

    async def run(self) -> None:
        """Look for ever; asleep while there is no lease."""
        loop = asyncio.get_running_loop()
        while True:
            await self.look()
            pause_s = self._eager.pop(0) if self._eager else self._interval_s
            pause_s = max(pause_s, COST_FACTOR * self._cost_s) if self._live_count() else math.inf
            self._due = loop.time() + pause_s
            while (left_s := self._due - loop.time()) > 0:
                self._woken.clear()
                try:
                    async with asyncio.timeout(left_s if left_s < math.inf else None):
                        await self._woken.wait()
                except TimeoutError:
                    break

    async def look(self) -> None:
        """Look once, and once more when new sockets had to be attributed. A failure is told once and stands in
        `problem`; the next look tries again."""
        try:
            for _ in range(2):
                fresh = self._judge(self._read())
                if not fresh:
                    break
                await self._attribute(fresh)
        except OSError as error:
            if self.problem is None:
                logger.error("the kernel's socket table can't be read, states of leases stand still: %s", error)
            self.problem = f"the kernel's socket table can't be read: {error}"
        else:
            self.problem = None

    def _read(self) -> list[Listener]:
        began = time.monotonic()
        listeners = self._sockets.listeners()
        self._cost_s = time.monotonic() - began
        return listeners

    # --- judging ---

    def _judge(self, listeners: list[Listener]) -> dict[int, set[int]]:
        """Report what has changed; returns the sockets that must be attributed first, with their likely pids."""
        listened = self._listened(listeners)
        seen = {listener.inode for _, theirs in listened.values() for listener in theirs}
        self._holders = {inode: holder for inode, holder in self._holders.items() if inode in seen}
        now = asyncio.get_running_loop().time()
        fresh: dict[int, set[int]] = {}
        for lease, theirs in listened.values():
            verdict = self._verdict(lease, theirs)
            if verdict is None or verdict[0] != "bound":
                likely = () if lease.process is None else (lease.process.pid,)
                for listener in theirs:
                    holder = self._holders.get(listener.inode)
                    if holder is None or holder.again_at <= now:
                        fresh.setdefault(listener.inode, set()).update(likely)
            if verdict is not None and verdict[0] != lease.state:
                self._report(lease.id, *verdict)
        self._leave(listened.keys())
        self._occupied |= {lease.id: lease.port for lease, _ in listened.values()}
        return fresh

    def _listened(self, listeners: list[Listener]) -> dict[str, tuple[Lease, list[Listener]]]:
        """Find the leases that somebody listens on."""
        listened: dict[str, tuple[Lease, list[Listener]]] = {}
        for listener in listeners:
            for lease in self._leases_on(listener.port):
                if listener.protocol in lease.protocols and overlaps(
                    listener.address, lease.address, v6only=listener.v6only
                ):
                    listened.setdefault(lease.id, (lease, []))[1].append(listener)
        return listened

    def _verdict(self, lease: Lease, listeners: list[Listener]) -> Verdict | None:
        """Judge a lease by those who listen on it: its owner, beside others too; a foreign process; None: not known yet."""
        foreign: list[Owner] = []
        for listener in listeners:
            holder = self._holders.get(listener.inode)
            if holder is None:
                continue
            if belongs(listener, holder, lease):
                return "bound", holder.owner
            if not holder.is_portd:
                foreign.append(holder.owner or hidden(listener))
        if any(listener.inode not in self._holders for listener in listeners):
            return None
        return ("conflict", foreign[0]) if foreign else ("held", None)

    def _leave(self, listened: Iterable[str]) -> None:
        """Report the leases that nobody listens on any more; keeps those whose report has not come true yet."""
        kept: dict[str, int] = {}
        for lease_id, port in self._occupied.items():
            if lease_id not in listened:
                lease = next((lease for lease in self._leases_on(port) if lease.id == lease_id), None)
                if lease is not None and lease.state != "held":
                    kept[lease_id] = port
                    self._report(lease_id, "held", None)
        self._occupied = kept

    # --- attributing ---

    async def _attribute(self, fresh: dict[int, set[int]]) -> None:
        """Find the processes of sockets, and where those come from."""
        inodes = list(fresh)[:FRESH_MAX]
        owners = await self._sockets.owners(inodes, sorted(set().union(*(fresh[inode] for inode in inodes))))
        pids = {owner.pid for owner in owners.values() if owner.pid is not None}
        lines = await asyncio.to_thread(lambda: {pid: lineage(pid) for pid in pids})
        now = asyncio.get_running_loop().time()
        for inode in inodes:
            owner, before = owners.get(inode), self._holders.get(inode)
            line = lines[owner.pid] if owner is not None and owner.pid is not None else frozenset()
            wait_s = AGAIN_S if before is None else min(2 * before.wait_s, AGAIN_MAX_S)
            self._holders[inode] = Holder(owner, line, now + wait_s, wait_s)


def belongs(listener: Listener, holder: Holder, lease: Lease) -> bool:
    """Tell whether a listener is the lease's: its owner's, a descendant's, or its service's.

    Where the kernel hides the listener's process, or the lease has none any more (a token's; a ttl lease of a command
    that has exited), the socket's uid must do; where the lease has no uid either, anybody is taken for its owner.
    """
    process, owner = lease.process, lease.owner
    if holder.is_portd:
        return False
    if process is not None and holder.owner is not None:
        if (process.pid, process.start_ticks) in holder.line:
            return True
        if vouches(owner.unit) and owner.unit == holder.owner.unit and lease.uid in (0, holder.owner.uid):
            return True
        if lease.lifetime == "process" or procfs.start_ticks(process.pid) == process.start_ticks:
            return False
    return lease.uid in (None, listener.uid)


def vouches(unit: str | None) -> bool:
    """Tell whether all processes of a systemd unit are one service.

    A scope is not: it is a login session, a terminal or a container, with whatever was started there. Nor is the
    user's manager, nor the unit that portd itself was started in together with others.
    """
    return unit is not None and unit.endswith(".service") and not unit.startswith("user@") and unit != own_unit()


@functools.cache
def own_unit() -> str | None:
    """Return the unit that portd runs in."""
    own = procfs.describe(os.getpid(), "socket")
    return None if own is None else own.unit


def hidden(listener: Listener) -> Owner:
    """Describe a listener whose process portd may not see: its uid is all there is."""
    return Owner(uid=listener.uid, user=procfs.user_name(listener.uid), known_by="socket")


def lineage(pid: int) -> frozenset[tuple[int, int]]:
    """Return a process and its ancestors, as (pid, start ticks)."""
    line: set[tuple[int, int]] = set()
    with suppress(OSError):  # it is gone, and what it came from can't be known any more
        while pid > 0 and len(line) < ANCESTORS_MAX:
            stat = procfs.stat(pid)
            line.add((pid, stat.start_ticks))
            pid = stat.parent
    return frozenset(line)
