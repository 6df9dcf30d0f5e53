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

_used: set[int] = set()
"""Passed descriptors that were returned before: once closed, their numbers may be anything's."""


class LeasedSocket(socket.socket):
    """A socket that releases its lease when it is closed.

    A copy of it in a forked child does not, nor does one on a port that the lease has left.
    """

    __slots__ = ("lease",)

    def __init__(self, lease: Lease, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self.lease = lease

    def close(self) -> None:
        """Close the socket and release the lease, after draining it.

        Blocks for the lease's `drain_s` seconds, and at most 2 more for the release.
        """
        has_the_lease = self.fileno() >= 0 and self.getsockname()[1] == self.lease.port
        if has_the_lease:
            self.lease._drain_out()
        super().close()
        if has_the_lease:
            self.lease.release()


def open_once(endpoint: Endpoint, lease: LeaseState, backlog: int) -> list[socket.socket]:
    """Open the lease's sockets: passed by `portd run`, handed over by the daemon, or bound here."""
    return passed(lease) or acquired(endpoint, lease, backlog)


def retry_after(error: Exception, declines: int) -> None:
    """Return where another port may be tried: somebody else has this one. Raises `error` otherwise."""
    is_taken = isinstance(error, PortTaken) or (isinstance(error, OSError) and error.errno == errno.EADDRINUSE)
    if not is_taken or declines > DECLINES_MAX:
        raise error


def ready(sockets: list[socket.socket], backlog: int) -> list[socket.socket]:
    """Make sockets block, and TCP ones listen (a second listen() only sets the backlog); TCP before UDP."""
    for one in sockets:
        one.setblocking(True)  # the flag travels with a handed socket, and Python would not know of it
        if one.type == socket.SOCK_STREAM:
            one.listen(backlog)
    return sorted(sockets, key=lambda one: one.type != socket.SOCK_STREAM)


def passed(lease: LeaseState) -> list[socket.socket]:
    """Return the sockets that `portd run --socket` passed from descriptor 3 on, by name, each once.

    Only if they are meant for this very process and lease: a service of another name has a port of its own.
    """
    environ = os.environ
    if not lease.is_adopted or environ.get("LISTEN_PID") != str(os.getpid()) or "PORTD_LEASE" not in environ:
        return []
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    wanted = {fd for fd, name in enumerate(names, FIRST_FD) if name == lease.document["endpoint"]} - _used
    _used.update(wanted)
    lease.is_passed = bool(wanted)
    for fd in wanted:
        os.set_inheritable(fd, False)
    return [socket.socket(fileno=fd) for fd in sorted(wanted)]


def acquired(endpoint: Endpoint, lease: LeaseState, backlog: int) -> list[socket.socket]:
    """Receive the sockets from the daemon, and bind those that it does not hand over."""
    made = _handed(endpoint, lease, backlog)
    types = {one.type for one in made}
    try:
        return made + bound([name for name in lease.protocols if TYPES[name] not in types], lease.address, lease.port)
    except BaseException:
        for one in made:
            one.close()
        raise


def _handed(endpoint: Endpoint, lease: LeaseState, backlog: int) -> list[socket.socket]:
    """Receive the sockets from the daemon; none where it does not hand over here."""
    if not lease.id:
        return []
    try:
        lease.document, descriptors = handoff.receive(endpoint, {"lease": lease.id, "listen": True, "backlog": backlog})
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
    """Bind a port of the kernel's choice instead of a lease; raises `error` where that is impossible."""
    if lease.address == "own" or len(lease.protocols) > 1:
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
