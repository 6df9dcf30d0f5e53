"""Holds: bound, never listening sockets, so that nobody gets a leased port by accident.

The kernel's rules (socket(7), tried in the tests): a bound socket without SO_REUSEADDR keeps everybody off. With it,
whoever sets it too may bind and listen, of any user, and all others stay off, the kernel's own choice of ports as
well. The option takes effect on a bound socket at once, so one descriptor is lock and open door in turn; it is kept,
because a second bind fails once the owner listens.

A port is first bound *without* the option: that alone proves that nobody has it.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final, Literal

from portd.core.addresses import overlaps
from portd.core.model import HoldKind, Listener, Protocol
from portd.seams import Taken

BoundSockets = Callable[[Literal["tcp", "udp"], int], Collection[Listener]]
"""Gives what is bound to a port without a connection (`SocketDiag.bound`)."""

_TYPES: Final = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_REFUSALS: Final[dict[int, Taken]] = {
    errno.EADDRINUSE: "busy", errno.EADDRNOTAVAIL: "no_address", errno.EAFNOSUPPORT: "no_address",
    errno.EACCES: "forbidden", errno.EPERM: "forbidden", errno.EMFILE: "no_descriptors", errno.ENFILE: "no_descriptors",
    errno.EINVAL: "no_address", errno.ENODEV: "no_address", errno.ENOBUFS: "no_descriptors",
}

Sockets = dict[Literal["tcp", "udp"], socket.socket]


class KernelHolds:
    """Implements `Holds` with real sockets. 10 µs and 4 KB of kernel memory each."""

    def __init__(self, bound_sockets: BoundSockets) -> None:
        self._bound_sockets = bound_sockets
        self._held: dict[str, Sockets] = {}
        self._inodes: set[int] = set()

    # --- the seam ---

    def take(self, lease_id: str, protocol: Protocol, address: str, port: int, kind: HoldKind) -> Taken:
        """Bind the port for the lease, all of its protocols or none; with `none` it is only tested."""
        assert lease_id not in self._held, f"lease {lease_id} has a hold"
        sockets: Sockets = {}
        try:
            for part in _parts(protocol):
                sockets[part] = self._bind_alone(part, address, port)
        except OSError as error:
            _close(sockets.values())
            return _refusal(error)
        self._keep(lease_id, sockets, kind)
        return "taken"

    def restore(self, lease_id: str, protocol: Protocol, address: str, port: int, kind: HoldKind) -> bool:
        """Take a hold back; False while the owner's own socket is in the way."""
        if lease_id in self._held or kind == "none":
            return True
        return self.take(lease_id, protocol, address, port, kind) == "taken"

    def drop(self, lease_id: str) -> None:
        """Close the lease's hold."""
        sockets = self._held.pop(lease_id, {})
        for held in sockets.values():
            self._inodes.discard(_inode(held))
        _close(sockets.values())

    def is_free(self, protocol: Protocol, address: str, port: int) -> bool:
        """Tell whether nobody has the port bound. What can't be tried (no descriptors left) does not count as free."""
        sockets: list[socket.socket] = []
        try:
            sockets.extend(self._bind_alone(part, address, port) for part in _parts(protocol))
        except OSError as error:
            return _refusal(error) == "no_address"  # an address that has left this host leaves nothing to wait for
        finally:
            _close(sockets)
        return True

    # --- for the handoff, and for what outlives the daemon ---

    def sockets(self, lease_id: str) -> Mapping[Literal["tcp", "udp"], socket.socket]:
        """Return the lease's held sockets; they stay the holds'."""
        return self._held.get(lease_id, {})

    def door(self, lease_id: str, *, is_open: bool) -> None:
        """Let others that set SO_REUSEADDR bind over the lease's TCP hold, or nobody."""
        held = self._held.get(lease_id, {}).get("tcp")
        if held is not None:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, is_open)

    def adopt(self, lease_id: str, sockets: Iterable[socket.socket]) -> None:
        """Take over descriptors that outlived another daemon; they are bound already."""
        assert lease_id not in self._held, f"lease {lease_id} has a hold"
        parts: Sockets = {"udp" if adopted.type == socket.SOCK_DGRAM else "tcp": adopted for adopted in sockets}
        self._register(lease_id, parts)

    def held(self) -> Iterator[tuple[str, Mapping[Literal["tcp", "udp"], socket.socket]]]:
        """Yield every lease id with its held sockets."""
        yield from self._held.items()

    def inodes(self) -> set[int]:
        """Return the inodes of all held sockets: they are nobody's listeners."""
        return self._inodes

    def close(self) -> None:
        """Close every hold."""
        for lease_id in list(self._held):
            self.drop(lease_id)

    # --- parts ---

    def _keep(self, lease_id: str, sockets: Sockets, kind: HoldKind) -> None:
        kept: Sockets = {}
        for part, bound in sockets.items():
            # A UDP hold that others may bind over would get their datagrams: there is only the lock, or nothing.
            if kind == "none" or (kind == "shared" and part == "udp"):
                bound.close()
                continue
            if part == "tcp":
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == "shared")
            kept[part] = bound
        if kept:
            self._register(lease_id, kept)

    def _register(self, lease_id: str, sockets: Sockets) -> None:
        self._held[lease_id] = sockets
        self._inodes.update(map(_inode, sockets.values()))

    def _bind_alone(self, part: Literal["tcp", "udp"], address: str, port: int) -> socket.socket:
        """Bind a port that nobody else has bound; raises OSError(EADDRINUSE) when somebody has.

        Connections of a dead owner, in TIME_WAIT or orphaned, forbid a plain bind. Then the socket binds with
        SO_REUSEADDR, which only a listener forbids, and the socket table says whether somebody is bound there without
        listening.
        """
        try:
            return _bind(part, address, port, reuse=False)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or part == "udp":
                raise
        bound = _bind(part, address, port, reuse=True)
        own = {_inode(bound), *self._inodes}  # whether two leases are in each other's way, the lease table has judged
        if any(other.inode not in own and overlaps(_bound_address(other), address)
               for other in self._bound_sockets("tcp", port)):
            bound.close()
            raise OSError(errno.EADDRINUSE, "another socket is bound there")
        return bound


def _bind(part: Literal["tcp", "udp"], address: str, port: int, *, reuse: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    bound = socket.socket(family, _TYPES[part] | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address != "::")
        if reuse:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        bound.bind((address, port))
    except BaseException:
        bound.close()
        raise
    return bound


def _bound_address(listener: Listener) -> str:
    """Return the address that a socket excludes others from: `::` with v6only excludes no IPv4."""
    return "::1" if listener.address == "::" and listener.v6only else listener.address


def _parts(protocol: Protocol) -> tuple[Literal["tcp", "udp"], ...]:
    return ("tcp", "udp") if protocol == "both" else (protocol,)


def _refusal(error: OSError) -> Taken:
    refusal = _REFUSALS.get(error.errno or 0)
    if refusal is None:
        raise error
    return refusal


def _inode(bound: socket.socket) -> int:
    return os.fstat(bound.fileno()).st_ino


def _close(sockets: Iterable[socket.socket]) -> None:
    for one in sockets:
        one.close()
