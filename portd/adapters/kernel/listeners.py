"""Who listens on this host: the socket table joined with the processes that have the sockets open."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from portd.adapters.kernel import procfs
from portd.adapters.kernel.netlink import SocketDiag
from portd.core.model import Listener, Owner


class KernelSocketTable:
    """Implements `SocketTable`."""

    def __init__(self, diag: SocketDiag) -> None:
        self._diag = diag

    def listeners(self, port: int | None = None) -> list[Listener]:
        """List listeners of one port, or of all."""
        return self._diag.listeners(port)

    async def owners(self, inodes: Collection[int], likely_pids: Sequence[int] = ()) -> dict[int, Owner]:
        """Find the process of each socket: likely ones first and here, then all of /proc in a thread.

        Of several processes that share a socket (a server that forked) the lowest pid is named: the eldest.
        """
        found = _search(dict.fromkeys(likely_pids), frozenset(inodes))
        missing = frozenset(inodes) - found.keys()
        if missing:
            found |= await asyncio.to_thread(_search_all, missing)
        described = {pid: procfs.describe(pid, "socket") for pid in set(found.values())}
        return {inode: owner for inode, pid in found.items() if (owner := described[pid]) is not None}


def _search(pids: Collection[int], inodes: frozenset[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for pid in pids:
        for inode in inodes.intersection(procfs.socket_inodes(pid)):
            found[inode] = min(pid, found.get(inode, pid))
        if len(found) == len(inodes):
            break
    return found


def _search_all(inodes: frozenset[int]) -> dict[int, int]:
    return _search(procfs.pids()[::-1], inodes)  # the eldest first, so that the search may end early
