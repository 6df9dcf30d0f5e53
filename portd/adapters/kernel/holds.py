"""Holds: bound, never listening sockets, so that nobody gets a leased port by accident.

The kernel's rules (socket(7); each is tried in the tests): a bound socket without SO_REUSEADDR keeps everybody off.
With it, whoever sets it too may bind and listen, of any user, and all others stay off, the kernel's own choice of ports
as well. The option takes effect on a bound socket at once, so one descriptor is a lock and an open hold in turn. It is
kept, never bound again: a second bind fails once the owner listens.

A port is first bound *without* the option: that alone proves that nobody has it. A number that portd chooses is free at
every address of the host: a bind of dual-stack `::` finds all of them. This module must not know owners.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final, Literal

from portd.adapters.kernel import descriptors
from portd.core.bindings import ANY, ANY_V4, addresses_of, overlaps
from portd.core.model import HoldKind, Listener, Protocol
from portd.leasing.seams import Taken

Part = Literal["tcp", "udp"]
"""What the kernel binds: `both` is one of each."""
Slot = Literal["tcp", "udp", "tcp6", "udp6"]
"""The sockets of a hold: `localhost` has two of each part, on 127.0.0.1 and on ::1."""
Sockets = dict[Slot, socket.socket]

BoundSockets = Callable[[Part, int], Collection[Listener]]
"""Gives what is bound to a port without a connection, listening or not, portd's own too (`SocketDiag.bound`)."""

_FLAGS: Final = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_TYPES: Final[dict[Part, int]] = {"tcp": socket.SOCK_STREAM | _FLAGS, "udp": socket.SOCK_DGRAM | _FLAGS}
_SLOTS: Final[dict[Part, tuple[Slot, Slot]]] = {"tcp": ("tcp", "tcp6"), "udp": ("udp", "udp6")}
_PART_OF: Final[dict[Slot, Part]] = {"tcp": "tcp", "tcp6": "tcp", "udp": "udp", "udp6": "udp"}
_PARTS: Final[dict[Protocol, tuple[Part, ...]]] = {"tcp": ("tcp",), "udp": ("udp",), "both": ("tcp", "udp")}
_REFUSALS: Final[dict[int | None, Taken]] = {
    errno.EADDRINUSE: "busy",
    errno.EADDRNOTAVAIL: "no_address",
    errno.EAFNOSUPPORT: "no_address",  # no IPv6 on this host
    errno.EINVAL: "no_address",  # a link-local address without its interface
    errno.ENODEV: "no_address",
    errno.EACCES: "forbidden",  # a port below 1024, or a security module
    errno.EPERM: "forbidden",  # systemd's SocketBindDeny=
    errno.EMFILE: "no_descriptors",
    errno.ENFILE: "no_descriptors",
    errno.ENOBUFS: "no_descriptors",  # out of kernel memory: as little to be done about
    errno.ENOMEM: "no_descriptors",
}


class KernelHolds:
    """Implements `Holds` with real sockets: 10 µs and 4 KB of kernel memory each."""

    def __init__(self, bound_sockets: BoundSockets) -> None:
        self._bound_sockets = bound_sockets
        self._held: dict[str, Sockets] = {}
        self._inodes: set[int] = set()

    # --- the seam ---

    def take(
        self, lease_id: str, protocol: Protocol, address: str, port: int, kind: HoldKind, *, whole: bool = False
    ) -> Taken:
        """Bind the port for the lease, all of its protocols or none; with `none` it is only tested.

        `whole`: the number must be free at every address of the host.
        """
        assert lease_id not in self._held, f"lease {lease_id} has a hold"
        parts, kept = _PARTS[protocol], _kept_parts(protocol, kind)
        try:
            if whole and address != ANY:  # a bind of `::` proves it by itself
                self._test_number(parts, port)
            sockets = self._bind_all(parts, address, port)
        except OSError as error:
            return _refusal(error)
        for slot in tuple(sockets):
            if _PART_OF[slot] not in kept:
                sockets.pop(slot).close()
        self._keep(lease_id, sockets, kind)
        return "taken"

    def restore(self, lease_id: str, protocol: Protocol, address: str, port: int, kind: HoldKind) -> bool:
        """Bind a hold again; False while a socket of the owner's conflicts. A protocol that the hold does not cover is
        not tested: a shared hold of `both` is restored although the owner's UDP socket is bound."""
        if lease_id in self._held:
            return True
        try:
            sockets = self._bind_all(_kept_parts(protocol, kind), address, port)
        except OSError as error:
            _refusal(error)
            return False
        self._keep(lease_id, sockets, kind)
        return True

    def drop(self, lease_id: str) -> None:
        """Close the lease's hold; nothing happens when it has none."""
        for held in self._held.pop(lease_id, {}).values():
            self._inodes.discard(_inode(held))
            held.close()

    def is_free(self, protocol: Protocol, address: str, port: int, *, whole: bool = False) -> bool:
        """Return whether nobody has the port bound (`whole`: at any address of the host), without keeping it.

        What can't be tried, for want of descriptors or of rights, does not count as free. An address that has left
        this host does: there is nothing to wait for.
        """
        try:
            if whole and address != ANY:  # a bind of `::` proves it by itself
                self._test_number(_PARTS[protocol], port)
            sockets = self._bind_all(_PARTS[protocol], address, port)
        except OSError as error:
            return _refusal(error) == "no_address"
        for bound in sockets.values():
            bound.close()
        return True

    # --- for the handoff, and for what outlives the daemon ---

    def sockets(self, lease_id: str) -> Mapping[Slot, socket.socket]:
        """Return the lease's held sockets, none where it has no hold. They stay the holds': pass on a duplicate."""
        return self._held.get(lease_id, {})

    def pass_on(self, lease_id: str, protocol: Protocol, address: str, port: int) -> Mapping[Slot, socket.socket]:
        """Return the lease's sockets to be passed to its owner: from now on they count as its own.

        What the hold does not keep (UDP, or anything with `none`) is bound now; raises OSError where somebody has it.
        """
        held = self._held.get(lease_id, {})
        missing = self._bind_all([part for part in _PARTS[protocol] if part not in held], address, port)
        if missing:
            held = self._held[lease_id] = {**held, **missing}
        for passed in held.values():
            self._inodes.discard(_inode(passed))
        return held

    def set_open(self, lease_id: str, *, is_open: bool) -> None:
        """Let others that set SO_REUSEADDR bind over the lease's TCP hold, or nobody; it may be called at any time."""
        sockets = self._held.get(lease_id, {})
        for slot in _SLOTS["tcp"]:
            if slot in sockets:
                sockets[slot].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, is_open)

    def adopt(self, lease_id: str, sockets: Iterable[socket.socket]) -> None:
        """Take over bound sockets that outlived another daemon, one of a protocol and address; options stay."""
        assert lease_id not in self._held, f"lease {lease_id} has a hold"
        adopted: Sockets = {}
        for passed in sockets:
            part: Part = "udp" if passed.type == socket.SOCK_DGRAM else "tcp"
            slot = next((slot for slot in _SLOTS[part] if slot not in adopted), None)
            assert slot is not None, f"lease {lease_id} was passed three {part} sockets"
            passed.set_inheritable(False)
            passed.setblocking(False)
            adopted[slot] = passed
        self._register(lease_id, adopted)

    def held(self) -> Iterator[tuple[str, Mapping[Slot, socket.socket]]]:
        """Yield every lease that has a hold, with its sockets."""
        yield from self._held.items()

    def unclaimed(self) -> Iterator[tuple[str, socket.socket]]:
        """Yield the sockets that keep ports, with their leases. UDP sockets that were handed over are not among them:
        they are their owners', and need no keeper."""
        for lease_id, sockets in self._held.items():
            for slot, held in sockets.items():
                if _PART_OF[slot] == "tcp" or _inode(held) in self._inodes:
                    yield lease_id, held

    @property
    def count(self) -> int:
        """Return how many leases have a hold."""
        return len(self._held)

    def inodes(self) -> Collection[int]:
        """Return the sockets that nobody but portd has: those that were handed over are their owners'."""
        return self._inodes

    def close(self) -> None:
        """Close every hold."""
        for lease_id in list(self._held):
            self.drop(lease_id)

    # --- parts ---

    def _keep(self, lease_id: str, sockets: Sockets, kind: HoldKind) -> None:
        if kind == "shared":
            for slot in _SLOTS["tcp"]:
                if slot in sockets:
                    sockets[slot].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        self._register(lease_id, sockets)

    def _register(self, lease_id: str, sockets: Sockets) -> None:
        if sockets:
            self._held[lease_id] = sockets
        self._inodes.update(map(_inode, sockets.values()))

    def _test_number(self, parts: Iterable[Part], port: int) -> None:
        """Raise OSError, EADDRINUSE, where somebody has the number at any address of the host. Costs 5 µs a part."""
        for part in parts:
            if _is_unused(part, port):
                continue
            try:
                self._bind_alone(part, ANY, port).close()
            except OSError as error:
                if _REFUSALS.get(error.errno) != "no_address":
                    raise
                self._bind_alone(part, ANY_V4, port).close()  # no IPv6 on this host

    def _bind_all(self, parts: Iterable[Part], address: str, port: int) -> Sockets:
        """Bind all of the protocols and addresses or none, each as a lock; raises OSError, EADDRINUSE when somebody has
        one. Of `localhost` one family is enough where the host has no other."""
        sockets: Sockets = {}
        addresses = addresses_of(address)
        try:
            for part in parts:
                for slot, one in zip(_SLOTS[part], addresses, strict=False):
                    try:
                        sockets[slot] = self._bind_alone(part, one, port)
                    except OSError as error:
                        is_last = one == addresses[-1] and _SLOTS[part][0] not in sockets
                        if len(addresses) == 1 or is_last or _REFUSALS.get(error.errno) != "no_address":
                            raise
        except BaseException:
            for bound in sockets.values():
                bound.close()
            raise
        return sockets

    def _bind_alone(self, part: Part, address: str, port: int) -> socket.socket:
        """Bind a port that nobody has; raises OSError, EADDRINUSE when somebody does.

        Connections that a server left behind, in TIME_WAIT or still open, forbid a plain bind, though nobody has the
        port any more. A bind with SO_REUSEADDR passes them, and is stopped by a listener. It also passes a socket that
        is bound with the option and does not listen (yet): only the socket table shows that one. The option is taken
        back first, so that none can come in after the check.
        """
        try:
            return _bind(part, address, port, reuse=False)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or part == "udp":
                raise
        bound = _bind(part, address, port, reuse=True)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, False)
        if not self._is_alone(bound, address, port):
            bound.close()
            raise OSError(errno.EADDRINUSE, f"another socket is bound to port {port}")
        return bound

    def _is_alone(self, bound: socket.socket, address: str, port: int) -> bool:
        """Return whether the socket table shows this TCP socket, and none that conflicts with it.

        A table that does not show it (Linux before 6.8), or can't be read, would not show a foreign process's either:
        then nothing is proved, and the port counts as taken until the old connections have ended (TIME_WAIT: a minute).
        """
        try:
            in_table = self._bound_sockets("tcp", port)
        except OSError:
            return False
        own = _inode(bound)
        others = [other for other in in_table if other.inode != own]
        return len(others) < len(in_table) and not any(_is_in_way(other, address) for other in others)


def _is_unused(part: Part, port: int) -> bool:
    """Return whether a plain bind of dual-stack `::` succeeds; False proves nothing: the normal path finds the cause.

    The C module's own socket type saves a sixth of the time that `socket.socket` needs.
    """
    try:
        test = socket.SocketType(socket.AF_INET6, _TYPES[part])
    except OSError:
        return False
    try:
        test.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        test.bind((ANY, port))
    except OSError:
        return False
    finally:
        test.close()
    return True


def _bind(part: Part, address: str, port: int, *, reuse: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    bound = socket.socket(family, _TYPES[part])
    try:
        descriptors.check_unreserved(bound.fileno())
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address != "::")
        if reuse:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        bound.bind((address, port))
    except BaseException:
        bound.close()
        raise
    return bound


def _is_in_way(other: Listener, address: str) -> bool:
    """Return whether a bound socket and a hold exclude each other: `::` with v6only excludes IPv6 alone."""
    if other.address == "::" and other.v6only:
        return ":" in address
    return overlaps(other.address, address)


def _kept_parts(protocol: Protocol, kind: HoldKind) -> tuple[Part, ...]:
    """Return which protocols a hold keeps bound.

    Never an open hold of UDP: of two sockets that set SO_REUSEADDR the later one gets every datagram, so the hold
    would steal from its owner, or anybody from both. There is only the lock, or nothing.
    """
    if kind == "none" or (kind == "shared" and protocol == "udp"):
        return ()
    return ("tcp",) if kind == "shared" else _PARTS[protocol]


def _refusal(error: OSError) -> Taken:
    """Say what an error of bind means; raises it again where it means a mistake of ours."""
    if error.errno not in _REFUSALS:
        raise error
    return _REFUSALS[error.errno]


def _inode(bound: socket.socket) -> int:
    return os.fstat(bound.fileno()).st_ino
