"""Who is at the other end of a connection, by the kernel's word."""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import socket
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from portd.adapters.kernel import procfs
from portd.seams import Peer

SO_PEERGROUPS: Final = 59
"""Linux 4.13; not in Python's socket module."""
GROUPS_MAX: Final = 256
"""Python reads options of 1,024 bytes at the most; whoever is in more groups is looked up instead."""
_UCRED = struct.Struct("=iII")

Exact = Callable[[tuple[str, int], tuple[str, int]], tuple[int, int] | None]
"""Gives (uid, inode) of the other end of a loopback connection (`SocketDiag.exact`)."""


class KernelPeers:
    """Implements `Peers`."""

    def __init__(self, exact: Exact) -> None:
        self._exact = exact

    def of_unix(self, connection: socket.socket) -> Peer:
        """Read the credentials of whoever called connect(); a pid of another pid namespace reads as 0, here None."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, gid = _UCRED.unpack(credentials)
        groups = {gid}
        try:
            found = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * GROUPS_MAX)
            groups.update(struct.unpack(f"={len(found) // 4}I", found))
        except OSError as error:
            if error.errno == errno.ERANGE:
                groups |= _groups_of(uid)
            elif error.errno not in (errno.ENOPROTOOPT, errno.ENODATA):
                raise
        return Peer(uid, pid or None, frozenset(groups), "peercred")

    def of_tcp(self, local: tuple[str, int], remote: tuple[str, int]) -> Peer | None:
        """Ask the socket table who owns the other end; None when it is nobody's (an orphan, or another host's)."""
        found = self._exact(local, remote)
        if found is None:
            return None
        uid, inode = found
        return Peer(uid, None, _groups_of(uid), "socket", inode)

    async def with_pid(self, peer: Peer) -> Peer:
        """Find the process that has the peer's socket open, in a thread: it may walk all of /proc."""
        if peer.inode == 0:
            return peer
        return peer._replace(pid=await asyncio.to_thread(_process_with, peer.inode))


def _process_with(inode: int) -> int | None:
    own = os.getpid()
    return next((pid for pid in procfs.pids() if pid != own and inode in procfs.socket_inodes(pid)), None)


@lru_cache(maxsize=256)
def _groups_of(uid: int) -> frozenset[int]:
    try:
        user = pwd.getpwuid(uid)
        return frozenset(os.getgrouplist(user.pw_name, user.pw_gid))
    except KeyError:
        return frozenset()
