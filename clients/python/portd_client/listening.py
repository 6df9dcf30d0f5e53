"""From a lease to its sockets: passed by the starter, handed over by the daemon, or bound here."""

from __future__ import annotations

import errno
import os
import socket

from . import handoff
from .errors import PortTaken
from .steps import DECLINES_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from .endpoints import Endpoint
    from .errors import DaemonUnavailable
    from .leasing import Lease
    from .state import LeaseState

TYPES = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
FIRST_FD = 3
"""sd_listen_fds(3), SD_LISTEN_FDS_START."""


_taken: set[int] = set()
"""Passed descriptors that somebody has by now: once closed, their numbers may be anything's."""


class LeasedSocket(socket.socket):
    """A socket that gives its lease back when it is closed.

    A copy of it in a forked child does not, nor does one on a port that the lease has left.
    """

    __slots__ = ("lease",)

    def __init__(self, lease: Lease, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self.lease = lease

    def close(self) -> None:
        """Close the socket and release the lease; it is drained before, if it is to be."""
        has_the_lease = self.fileno() >= 0 and self.getsockname()[1] == self.lease.port
        if has_the_lease:
            self.lease.drain_out()
        super().close()
        if has_the_lease:
            self.lease.release()


def open_sockets(lease: Lease, backlog: int, reserved: socket.socket | None = None) -> list[LeasedSocket]:
    """Open the lease's sockets, TCP before UDP, TCP listening. `reserved` is bound already."""
    opened = [reserved] if reserved is not None else passed(lease)
    declines = 0
    while not opened:
        try:
            opened = acquired(lease.client.endpoint, lease, backlog)
        except (OSError, PortTaken) as error:
            declines += 1
            if not is_taken(error) or declines > DECLINES_MAX:
                raise
            lease.decline()
    return [LeasedSocket(lease, one.detach()) for one in ready(opened, backlog)]


def is_taken(error: Exception) -> bool:
    """Tell whether somebody else has the port, by the kernel's word or the daemon's."""
    return isinstance(error, PortTaken) or (isinstance(error, OSError) and error.errno == errno.EADDRINUSE)


def ready(sockets: list[socket.socket], backlog: int) -> list[socket.socket]:
    """Make sockets block, and TCP ones listen (a second listen() only sets the backlog); TCP before UDP."""
    for one in sockets:
        one.setblocking(True)  # the flag travels with a handed socket, and Python would not know of it
        if one.type == socket.SOCK_STREAM:
            one.listen(backlog)
    return sorted(sockets, key=lambda one: one.type != socket.SOCK_STREAM)


def passed(lease: LeaseState) -> list[socket.socket]:
    """Take what `portd run --socket` laid from descriptor 3 on, by name; only if it is meant for this very process, and
    for this very lease: a service of another name has a port of its own."""
    environ = os.environ
    if not lease.is_adopted or environ.get("LISTEN_PID") != str(os.getpid()) or "PORTD_LEASE" not in environ:
        return []
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    wanted = {fd for fd, name in enumerate(names, FIRST_FD) if name == lease.endpoint} - _taken
    _taken.update(wanted)
    lease.is_passed = bool(wanted)
    for fd in wanted:
        os.set_inheritable(fd, False)
    return [socket.socket(fileno=fd) for fd in sorted(wanted)]


def acquired(place: Endpoint, lease: LeaseState, backlog: int) -> list[socket.socket]:
    """Have the sockets handed over, and bind those that are not: UDP's of a `shared` hold, or all without a handoff."""
    made = _handed(place, lease, backlog)
    types = {one.type for one in made}
    try:
        return made + bound([name for name in lease.protocols if TYPES[name] not in types], lease.address, lease.port)
    except BaseException:
        for one in made:
            one.close()
        raise


def _handed(place: Endpoint, lease: LeaseState, backlog: int) -> list[socket.socket]:
    """Have the sockets handed over; nothing where the daemon does not do that here."""
    if not lease.id:
        return []
    try:
        lease.document, descriptors = handoff.receive(place, {"lease": lease.id, "listen": True, "backlog": backlog})
    except handoff.NoHandoff:
        return []
    lease.is_passed = bool(descriptors)
    return [socket.socket(fileno=descriptor) for descriptor in descriptors]


def bound(protocols: Sequence[Literal["tcp", "udp"]], address: str, port: int) -> list[socket.socket]:
    """Bind a port for all protocols, TCP listening: of two that bound over one hold, the second to listen fails."""
    made: list[socket.socket] = []
    try:
        for protocol in protocols:
            made.append(bind(address, port, protocol))  # noqa: PERF401 - what was made must be closed on an error
        if "tcp" in protocols:
            made[0].listen()
    except BaseException:
        for one in made:
            one.close()
        raise
    return made


def ephemeral(lease: LeaseState, error: DaemonUnavailable) -> socket.socket:
    """Bind a port of the kernel's choice for a lease that no daemon gives; raises `error` where that can't be."""
    if lease.address == "own" or lease.protocol == "both":
        raise error
    made = bind(lease.address, 0, lease.protocols[0])
    lease.document["port"] = made.getsockname()[1]
    return made


def bind(address: str, port: int, protocol: Literal["tcp", "udp"]) -> socket.socket:
    """Bind as servers do: TCP with SO_REUSEADDR, which a shared hold lets in."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, TYPES[protocol])
    try:
        if protocol == "tcp":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
    except BaseException:
        made.close()
        raise
    return made
