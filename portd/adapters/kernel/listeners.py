"""Who listens on this host: the socket table joined with the processes that have the sockets open.

The kernel knows the socket of a descriptor and not the descriptors of a socket: its process is found by reading
/proc/PID/fd, 0.1 ms a process. So likely processes go first (the lease's owner, its children, the last process that had
it); a process counts only when the socket is found in it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Final

from portd.adapters.kernel import procfs
from portd.adapters.kernel.inspection import DIRECT, Inspection
from portd.adapters.kernel.netlink import SocketDiag
from portd.core.model import Listener, Owner
from portd.core.ownership import Holder
from portd.leasing.seams import PortSocket

DESCENDANTS_MAX: Final = 1024
"""Children of likely processes that are searched before all others: beyond it, a walk of /proc costs as little."""
REMEMBERED_MAX: Final = 65_536
"""Sockets whose process is remembered, 10 MB; then all are forgotten, which costs one walk of /proc."""
KEEPERS: Final = frozenset({1, os.getpid()})
"""Init and portd open sockets for others (socket activation, handoff): they have one only where nobody else does."""


HIDDEN: Final = Holder(None)
"""A process that the kernel does not show: another user's, without an inspector."""


class KernelSocketTable:
    """Implements `SocketTable`."""

    def __init__(self, diag: SocketDiag, inspection: Inspection = DIRECT) -> None:
        self._diag = diag
        self._inspection = inspection
        self._remembered: dict[int, int] = {}
        self._searching = asyncio.Lock()

    def listeners(self, port: int | None = None) -> list[Listener]:
        """List listeners of one port, or of all; raises OSError."""
        return self._diag.listeners(port)

    async def find_listeners(self, port: int) -> list[tuple[Listener, Holder]]:
        """Find who listens on a port number, at any address. Raises OSError."""
        listeners = self._diag.listeners(port)
        holders = await self.holders({listener.inode for listener in listeners})
        return [(listener, holders[listener.inode]) for listener in listeners]

    def on_port(self, port: int) -> list[PortSocket]:
        """List every socket of a local port, whatever its state; raises OSError."""
        return self._diag.on_port(port)

    async def owners(self, inodes: Collection[int], likely_pids: Sequence[int] = ()) -> dict[int, Owner]:
        """Find and describe the process of each socket, in a thread; hidden ones are left out. Raises OSError.

        Of several processes that share a socket (a server that forked) a likely one is named, else the eldest; init
        and portd, which open sockets for others, only where nobody else has it.
        """
        if not inodes:
            return {}
        async with self._searching:  # who waits here finds the answers of the walk that it waited for
            return await asyncio.to_thread(self._find, frozenset(inodes), likely_pids)

    async def holders(self, inodes: Collection[int], likely_pids: Sequence[int] = ()) -> dict[int, Holder]:
        """Find the process of each socket as `owners` does, with facts for `core.ownership`. Raises OSError."""
        if not inodes:
            return {}
        async with self._searching:
            return await asyncio.to_thread(self._find_holders, frozenset(inodes), likely_pids)

    def _find(self, inodes: frozenset[int], likely_pids: Sequence[int]) -> dict[int, Owner]:
        found = self._find_pids(inodes, likely_pids)
        owners = {pid: self._describe(pid) for pid in set(found.values())}
        return {inode: owner for inode, pid in found.items() if (owner := owners[pid]) is not None}

    def _find_holders(self, inodes: frozenset[int], likely_pids: Sequence[int]) -> dict[int, Holder]:
        found = self._find_pids(inodes, likely_pids)
        holders = {pid: self._holder(pid) for pid in set(found.values())}
        return {inode: holders[found[inode]] if inode in found else HIDDEN for inode in inodes}

    def _find_pids(self, inodes: frozenset[int], likely_pids: Sequence[int]) -> dict[int, int]:
        # Each guess is made only when those before it left something to search for.
        guesses = chain(likely_pids, _descendants(likely_pids), self._who_had(inodes), _everybody())
        found = self._inspection.find_sockets(inodes, _once(guesses))
        if len(self._remembered) > REMEMBERED_MAX:
            self._remembered.clear()
        self._remembered |= {inode: pid for inode, pid in found.items() if pid not in KEEPERS}
        return found

    def _holder(self, pid: int) -> Holder:
        """Describe the process that has a socket open; one that has exited meanwhile is as good as hidden."""
        owner = self._describe(pid)
        if owner is None:
            return HIDDEN
        is_portd = pid == os.getpid()
        return Holder(owner, procfs.ancestors(pid), () if is_portd else self._inspection.credentials(pid), is_portd)

    def _describe(self, pid: int) -> Owner | None:
        return procfs.describe(pid, "socket", read_exe=self._inspection.exe)

    def _who_had(self, inodes: frozenset[int]) -> Iterator[int]:
        yield from sorted({self._remembered[inode] for inode in inodes if inode in self._remembered})


def _once(pids: Iterable[int]) -> Iterator[int]:
    """Yield each process once, in order."""
    seen: set[int] = set()
    for pid in pids:
        if pid not in seen:
            seen.add(pid)
            yield pid


def _everybody() -> Iterator[int]:
    """Yield all processes, the eldest first, and last those that open sockets for others."""
    yield from sorted(procfs.pids(), key=lambda pid: (pid in KEEPERS, pid))


def _descendants(pids: Iterable[int]) -> Iterator[int]:
    """Yield children and children's children; none where the kernel does not list them (CONFIG_PROC_CHILDREN)."""
    line = list(dict.fromkeys(pids))
    for count, pid in enumerate(line):
        if count >= DESCENDANTS_MAX:
            return
        children = procfs.children(pid)
        line.extend(children)
        yield from children
