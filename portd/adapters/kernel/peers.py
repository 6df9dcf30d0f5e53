"""The process at the other end of a connection, as the kernel reports it.

Over a unix socket the kernel recorded it at connect(); over loopback TCP the socket table names the creator of the
other end, and the process is whoever has that socket open. This module must not know what the peer may do.
"""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Set
from typing import Final

from portd.adapters.kernel import procfs
from portd.adapters.kernel.inspection import DIRECT, Inspection
from portd.leasing.seams import Peer

SO_PEERGROUPS: Final = 59
"""Linux 4.13 (socket(7)); Python's socket module has no name for it."""
GROUPS_MAX: Final = 256
"""Python reads at most 1 KB of an option. A user with more groups is read from the group database."""
RECENT_MAX: Final = 32
"""Processes that called last: each is searched before all of /proc, for 30 µs."""
SO_NETNS_COOKIE: Final = 71
"""Linux 5.14. A unix socket that accept() returned is in the network namespace of the socket that connected."""
_UCRED: Final = struct.Struct("=iII")

Exact = Callable[[tuple[str, int], tuple[str, int]], tuple[int, int] | None]
"""Gives (uid, inode) of the other end of a loopback connection (`SocketDiag.exact`)."""


class KernelPeers:
    """Implements `Peers`."""

    def __init__(self, exact: Exact, inspection: Inspection = DIRECT) -> None:
        self._exact = exact
        self._inspection = inspection
        self._network = procfs.network_namespace("self")
        self._users = procfs.user_map("self")
        with socket.socket(socket.AF_UNIX) as own:
            self._cookie = _network_cookie(own)
        self._recent: dict[int, None] = {}
        self._wanted: set[int] | None = None
        self._search: asyncio.Task[dict[int, int]] | None = None

    def of_unix(self, connection: socket.socket) -> Peer:
        """Read who called connect(): SO_PEERCRED and SO_PEERGROUPS (unix(7)). Costs 2 µs.

        `pid` is None for a process of a pid namespace that cannot be seen from here, which reads as 0.
        """
        pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return Peer(
            uid,
            pid or None,
            frozenset({gid, *_groups_at_connect(connection, uid)}),
            "peercred",
            other_network=self._is_other_network(connection, pid),
            other_users=uid == 0 and self._is_other_users(pid),
        )

    def _is_other_network(self, connection: socket.socket, pid: int) -> bool:
        """Return whether a unix peer's socket or process is in another network namespace, or neither is known."""
        cookie = _network_cookie(connection)
        if cookie != self._cookie or (cookie is None and not pid):
            return True
        return bool(pid) and procfs.network_namespace(pid) != self._network

    def _is_other_users(self, pid: int | None) -> bool:
        """Return whether a process is in another user namespace, or that is not known."""
        return not pid or procfs.user_map(pid) != self._users

    def of_tcp(self, local: tuple[str, int], remote: tuple[str, int]) -> Peer | None:
        """Ask the socket table who owns the other end; None when it is nobody's (an orphan, or another host's).

        The groups are those of the uid's user in the group database, read each time: a right that was taken
        away is gone with the next connection.
        """
        found = self._exact(local, remote)
        if found is None or found[1] == 0:  # an orphan or TIME_WAIT answers uid 0: it would read as root
            return None
        uid, inode = found
        return Peer(uid, None, _groups_of_user(uid), "socket", inode, other_users=uid == 0)

    async def with_pid(self, peer: Peer) -> Peer:
        """Find the process that has the peer's socket open, in a thread: it may walk all of /proc.

        Calls that come while a search is under way share the next one: hundreds may come at once, and each search
        reads the same processes.
        """
        if not peer.inode:
            return peer
        if self._wanted is None:
            self._wanted = set()
            self._search = asyncio.create_task(self._search_after(self._search))
        assert self._search is not None
        self._wanted.add(peer.inode)
        found = await asyncio.shield(self._search)
        pid = found.get(peer.inode)
        return peer._replace(pid=pid, other_users=peer.uid == 0 and self._is_other_users(pid))

    async def _search_after(self, before: asyncio.Task[dict[int, int]] | None) -> dict[int, int]:
        """Find the process of each wanted inode once the search before has ended."""
        if before is not None and not before.done():
            await asyncio.wait([before])
        wanted, self._wanted = self._wanted or set(), None
        found = await asyncio.to_thread(_processes_with, wanted, tuple(self._recent), self._inspection)
        for pid in found.values():
            self._recent.pop(pid, None)
            self._recent[pid] = None
        for pid in tuple(self._recent)[:-RECENT_MAX]:
            del self._recent[pid]
        return found


def _network_cookie(connection: socket.socket) -> int | None:
    """Return the id of the network namespace that a socket is in, or None before Linux 5.14."""
    try:
        return int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), sys.byteorder)
    except OSError:
        return None


def _groups_at_connect(connection: socket.socket, uid: int) -> Iterable[int]:
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * GROUPS_MAX)
    except OSError as error:
        if error.errno == errno.ERANGE:
            return _groups_of_user(uid)
        if error.errno == errno.ENOPROTOOPT:  # an older kernel: the primary group is all that it reports
            return ()
        raise
    return struct.unpack(f"={len(packed) // 4}I", packed)


def _groups_of_user(uid: int) -> frozenset[int]:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return frozenset()
    return frozenset(os.getgrouplist(user.pw_name, user.pw_gid))


def _processes_with(inodes: Set[int], likely_pids: tuple[int, ...], inspection: Inspection) -> dict[int, int]:
    """Find a process that has each of these sockets open: likely ones first, then the newest ones."""
    own = os.getpid()  # last of all: its thousands of holds are slow to search
    everybody = dict.fromkeys([*likely_pids, *(pid for pid in procfs.pids() if pid != own), own])
    sharing: dict[int, set[int]] = {}
    for inode, pid in inspection.find_sockets(inodes, everybody).items():
        sharing.setdefault(pid, set()).add(inode)
    found: dict[int, int] = {}
    for pid, shared in sharing.items():
        found |= _eldest_with(shared, pid, inspection)
    return found


def _eldest_with(inodes: Set[int], pid: int, inspection: Inspection) -> dict[int, int]:
    """Find, of a family that inherited these sockets, the eldest that has each: who forked has connected."""
    found: dict[int, int] = {}
    member: int | None = pid
    while member and inodes:
        found |= dict.fromkeys(inodes, member)
        member = procfs.parent(member)
        inodes = inspection.find_sockets(inodes, [member]).keys() if member else inodes
    return found
