"""Who is at the other end of a connection, by the kernel's word.

Over a unix socket the kernel noted it at connect(); over loopback TCP the socket table names the creator of the other
end, and the process is whoever has that socket open. This room must not know what the peer may do.
"""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Final

from portd.adapters.kernel import procfs
from portd.seams import Peer

SO_PEERGROUPS: Final = 59
"""Linux 4.13 (socket(7)); Python's socket module has no name for it."""
GROUPS_MAX: Final = 256
"""Python reads at most 1 KB of an option. Whoever has more groups is looked up in the group database."""
RECENT_MAX: Final = 32
"""Processes that called last: each is looked at before all of /proc, for 30 µs."""
_UCRED: Final = struct.Struct("=iII")

Exact = Callable[[tuple[str, int], tuple[str, int]], tuple[int, int] | None]
"""Gives (uid, inode) of the other end of a loopback connection (`SocketDiag.exact`)."""


class KernelPeers:
    """Implements `Peers`."""

    def __init__(self, exact: Exact) -> None:
        self._exact = exact
        self._recent: dict[int, None] = {}

    def of_unix(self, connection: socket.socket) -> Peer:
        """Read who called connect(): SO_PEERCRED and SO_PEERGROUPS (unix(7)). Costs 2 µs.

        `pid` is None for a process of a pid namespace that cannot be seen from here, which reads as 0.
        """
        pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return Peer(uid, pid or None, frozenset({gid, *_groups_at_connect(connection, uid)}), "peercred")

    def of_tcp(self, local: tuple[str, int], remote: tuple[str, int]) -> Peer | None:
        """Ask the socket table who owns the other end; None when it is nobody's (an orphan, or another host's).

        The groups are those of the uid's user in the group database, asked anew each time: a right that was taken
        away is gone with the next connection.
        """
        found = self._exact(local, remote)
        if found is None or found[1] == 0:  # an orphan or TIME_WAIT answers uid 0: it would read as root
            return None
        uid, inode = found
        return Peer(uid, None, _groups_of_user(uid), "socket", inode)

    async def with_pid(self, peer: Peer) -> Peer:
        """Find the process that has the peer's socket open, in a thread: it may walk all of /proc."""
        if not peer.inode:
            return peer
        pid = await asyncio.to_thread(_process_with, peer.inode, tuple(self._recent))
        if pid is not None:
            self._recent.pop(pid, None)
            self._recent[pid] = None
            if len(self._recent) > RECENT_MAX:
                del self._recent[next(iter(self._recent))]
        return peer._replace(pid=pid)


def _groups_at_connect(connection: socket.socket, uid: int) -> Iterable[int]:
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * GROUPS_MAX)
    except OSError as error:
        if error.errno == errno.ERANGE:
            return _groups_of_user(uid)
        if error.errno == errno.ENOPROTOOPT:  # an older kernel: the primary group is all that it tells
            return ()
        raise
    return struct.unpack(f"={len(packed) // 4}I", packed)


def _groups_of_user(uid: int) -> frozenset[int]:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return frozenset()
    return frozenset(os.getgrouplist(user.pw_name, user.pw_gid))


def _process_with(inode: int, likely_pids: tuple[int, ...]) -> int | None:
    """Find a process that has the socket open: likely ones first, then the newest ones.

    Of a family that inherited the socket it is the eldest: who forked has connected.
    """
    own = os.getpid()  # last of all: its thousands of holds are slow to look through
    for pid in (*likely_pids, *(pid for pid in procfs.pids() if pid != own), own):
        if inode in procfs.socket_inodes(pid):
            return _eldest_with(inode, pid)
    return None


def _eldest_with(inode: int, pid: int) -> int:
    above = procfs.parent(pid)
    while above and inode in procfs.socket_inodes(above):
        pid, above = above, procfs.parent(above)
    return pid
