"""The kernel's socket table, by NETLINK_SOCK_DIAG (sock_diag(7)).

A dump costs 2 µs a listener, one exact query 5 µs, whatever the number of sockets. No privilege is needed for either.
This module must not know processes: an inode is all it has of one.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from typing import Final, Literal

from portd.core.model import Listener
from portd.core.netlink import (
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    attribute,
    attributes,
    encode,
    error_code,
    messages,
)
from portd.leasing.seams import PortSocket, SocketKind

NETLINK_SOCK_DIAG: Final = 4
SOCK_DIAG_BY_FAMILY: Final = 20
INET_DIAG_REQ_BYTECODE: Final = 1
INET_DIAG_SKV6ONLY: Final = 11
INET_DIAG_BC_S_EQ: Final = 11
"""Compare the source port (Linux 4.16)."""
TCP_CLOSE, TCP_LISTEN = 7, 10
"""States, as tcp(7) numbers them. A UDP socket that is bound and not connected is in TCP_CLOSE."""
TCP_BOUND_INACTIVE: Final = 13
"""Bound, neither listening nor connected: what a hold is (Linux 6.8; an older kernel ignores it in a mask)."""
ALL_STATES: Final = 0xFFFFFFFF
NO_COOKIE: Final = 0xFFFFFFFFFFFFFFFF
DUMP_TRIES: Final = 4
RECEIVE_BYTES: Final = 1 << 18
TIMEOUT_S: Final = 2
"""The kernel answers at once; this only keeps a mistake from hanging the loop. By SO_RCVTIMEO: no poll() before each
read."""

_REQUEST = struct.Struct("=BBBxI")  # inet_diag_req_v2: family, protocol, extensions, states; then the socket id
_SOCKET_ID = struct.Struct("!HH16s16sIQ")  # inet_diag_sockid: ports, addresses, interface, cookie
_ANSWER = struct.Struct("=BB2x2s2s16s16s12x12xII")  # inet_diag_msg: family, state, ports, addresses, uid, inode
_V4_MAPPED: Final = bytes(10) + b"\xff\xff"

KernelProtocol = Literal["tcp", "udp"]
_NUMBERS: Final[dict[KernelProtocol, int]] = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)


class SocketDiag:
    """Asks the kernel; for one thread. `own_inodes` gives the sockets that nobody but portd has: its holds."""

    def __init__(self, own_inodes: Callable[[], Collection[int]] = tuple) -> None:
        self._own_inodes = own_inodes
        self._socket: socket.socket | None = None

    def close(self) -> None:
        """Close the netlink socket; may be called twice, and the next question opens it again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def listeners(self, port: int | None = None) -> list[Listener]:
        """List listening TCP and bound, unconnected UDP sockets, of one port or of all. Raises OSError.

        A hold never listens, so every TCP listener counts, one that was handed over too though portd keeps a copy;
        of UDP, where bound is all there is, portd's own are left out.
        """
        tcp = [listener for family in _FAMILIES for listener in self._dump("tcp", family, 1 << TCP_LISTEN, port)]
        own = self._own_inodes()
        return tcp + [
            listener
            for family in _FAMILIES
            for listener in self._dump("udp", family, 1 << TCP_CLOSE, port)
            if listener.inode not in own
        ]

    def bound(self, protocol: KernelProtocol, port: int) -> list[Listener]:
        """List what is bound to a port without a connection: listeners, and what may become one, portd's own too."""
        states = 1 << TCP_CLOSE if protocol == "udp" else 1 << TCP_LISTEN | 1 << TCP_BOUND_INACTIVE
        return [found for family in _FAMILIES for found in self._dump(protocol, family, states, port)]

    def on_port(self, port: int) -> list[PortSocket]:
        """List every socket of a local port, in whatever state, but those that are only the rest of one (TIME_WAIT and
        orphans, inode 0) and portd's holds. Raises OSError."""
        own = self._own_inodes()
        return [
            PortSocket(found, kind)
            for protocol in _NUMBERS
            for family in _FAMILIES
            for found, kind in self._dump_states(protocol, family, port)
            if found.inode not in own or kind == "listening"
        ]

    def exact(self, local: tuple[str, int], remote: tuple[str, int]) -> tuple[int, int] | None:
        """Return (uid, inode) of the socket at the other end of a TCP connection on this host.

        `local` and `remote` are the ends as this side sees them. None when there is no such socket, or when it is an
        orphan or in TIME_WAIT: those answer uid 0 and inode 0, and would read as root.
        """
        family = socket.AF_INET6 if ":" in remote[0] else socket.AF_INET
        ends = _SOCKET_ID.pack(remote[1], local[1], _packed(family, remote[0]), _packed(family, local[0]), 0, NO_COOKIE)
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, ALL_STATES) + ends
        try:
            [answer] = self._ask(request, NLM_F_REQUEST)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        _, state, _, _, _, _, uid, inode = _ANSWER.unpack_from(answer)
        # Where the connection is gone the kernel answers with whoever *listens* on that port: a caller that breaks
        # its connection off from a port on which root listens would pass for root.
        return (uid, inode) if inode and state != TCP_LISTEN else None

    # --- netlink ---

    def _dump(self, protocol: KernelProtocol, family: int, states: int, port: int | None) -> Iterator[Listener]:
        request = _REQUEST.pack(family, _NUMBERS[protocol], 0, states) + bytes(_SOCKET_ID.size)
        if port is not None:
            request += _port_filter(port)
        for answer in self._ask_again(request):
            listener = _listener(protocol, answer)
            if listener.inode and port in (None, listener.port):
                yield listener

    def _dump_states(self, protocol: KernelProtocol, family: int, port: int) -> Iterator[tuple[Listener, SocketKind]]:
        request = _REQUEST.pack(family, _NUMBERS[protocol], 0, ALL_STATES) + bytes(_SOCKET_ID.size)
        for answer in self._ask_again(request + _port_filter(port)):
            found, state = _listener.__wrapped__(protocol, answer), answer[1]  # connections come and go: not cached
            if found.inode and found.port == port:
                yield found, _kind(protocol, state)

    def _ask_again(self, request: bytes) -> list[bytes]:
        """Dump until the answer is whole; a table that never stands still raises OSError(EINTR) at last."""
        for _ in range(DUMP_TRIES - 1):
            try:
                return list(self._ask(request, NLM_F_REQUEST | NLM_F_DUMP))
            except OSError as error:
                if error.errno not in (errno.EINTR, errno.ENOBUFS, errno.EAGAIN):
                    raise
        return list(self._ask(request, NLM_F_REQUEST | NLM_F_DUMP))

    def _ask(self, request: bytes, flags: int) -> Iterator[bytes]:
        """Send a request and yield the bodies of its answer; raises OSError, EINTR for an inconsistent dump."""
        connection = self._connect()
        try:
            connection.send(encode(SOCK_DIAG_BY_FAMILY, flags, request))
            is_whole = True
            while True:
                for kind, answer_flags, body in messages(connection.recv(RECEIVE_BYTES)):
                    is_whole = is_whole and not answer_flags & NLM_F_DUMP_INTR
                    if kind == NLMSG_DONE:
                        if not is_whole:
                            raise OSError(errno.EINTR, "the socket table changed during its dump")
                        return
                    if kind == NLMSG_ERROR:
                        code = error_code(body)
                        raise OSError(code, f"sock_diag: {os.strerror(code)}")
                    yield body
                    if not flags & NLM_F_DUMP:
                        return
        except OSError as error:
            if error.errno != errno.ENOENT:
                self.close()  # what is left of this answer must not be taken for the next one's
            raise

    def _connect(self) -> socket.socket:
        if self._socket is None:
            connection = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", TIMEOUT_S, 0))
            self._socket = connection
        return self._socket


def _kind(protocol: KernelProtocol, state: int) -> SocketKind:
    """Return what a socket's state means. A UDP socket that is bound and not connected receives from anybody."""
    if state == TCP_LISTEN or (protocol == "udp" and state == TCP_CLOSE):
        return "listening"
    return "bound" if state in (TCP_CLOSE, TCP_BOUND_INACTIVE) else "connected"


@functools.lru_cache(maxsize=16_384)
def _listener(protocol: KernelProtocol, answer: bytes) -> Listener:
    """Parse an answer; cached, since the state watch sees almost nothing but what it saw a moment ago."""
    family, _, port, _, source, _, uid, inode = _ANSWER.unpack_from(answer)
    address = _address(family, source)
    v6only = address != "::" or _v6only(answer)
    return Listener(protocol, address, int.from_bytes(port, "big"), uid, inode, v6only)


@functools.lru_cache(maxsize=1024)
def _address(family: int, packed: bytes) -> str:
    """Write an address as whoever binds it does; an IPv4-mapped one (RFC 4291 section 2.5.5.2) is the IPv4 one that it
    stands for, with which alone it collides: Java binds that way."""
    if family == socket.AF_INET6 and packed.startswith(_V4_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(family, packed[:4] if family == socket.AF_INET else packed)


def _v6only(answer: bytes) -> bool:
    return any(kind == INET_DIAG_SKV6ONLY and value[:1] > b"\0" for kind, value in attributes(answer, _ANSWER.size))


def _port_filter(port: int) -> bytes:
    """Make the attribute that lets the kernel pick sockets of one source port (inet_diag bytecode)."""
    # One comparison of 8 bytes: where it holds, go on at its end (take the socket), else jump beyond it (leave it).
    code = struct.pack("=BBHBBH", INET_DIAG_BC_S_EQ, 8, 12, 0, 0, port)
    return attribute(INET_DIAG_REQ_BYTECODE, code)


def _packed(family: int, address: str) -> bytes:
    return socket.inet_pton(family, address.partition("%")[0]).ljust(16, b"\0")
