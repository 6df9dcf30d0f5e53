"""DNS over UDP: datagrams in, datagrams out, many in one turn of the loop. What they mean is the responder's."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from portd.adapters.dns.message import PLAIN_BYTES, Limits

QUERY_MAX_BYTES: Final = 4096
"""Larger datagrams are cut, and then malformed: a question and its options have a few hundred."""
BATCH: Final = 64
"""Datagrams answered before others on the loop get their turn: under a millisecond."""
BUFFER_BYTES: Final = 1 << 20
"""What is asked of the kernel for queries that wait (it grants at most net.core.rmem_max)."""
LOOPBACK_BYTES: Final = 16384
"""The largest answer on loopback, to those who offer it: packets are whole (MTU 65536), senders are local."""
NETWORK_BYTES: Final = 1232
"""The largest elsewhere: never fragmented (RFC 9715), and little to those who forge their address."""
IP_PKTINFO: Final = 8
"""ip(7); the name is in `socket` only since Python 3.14."""
ANCILLARY_BYTES: Final = 256

Respond = Callable[[bytes, Limits, str | None], bytes | None]
"""Answers a query: its bytes, the limits, and the address at which it came in (None: a loopback one)."""


class UdpListener:
    """Answers on one bound, non-blocking socket, which it owns."""

    def __init__(self, bound: socket.socket, respond: Respond) -> None:
        self._socket = bound
        self._respond = respond
        host = bound.getsockname()[0]
        self._asked_at = asked_address(host)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._read: Callable[[], None] = self._read_plain
        if ipaddress.ip_address(host).is_unspecified:
            self._read = self._read_addressed
            bound.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            if bound.family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)

    def start(self) -> None:
        """Begin to answer."""
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    def close(self) -> None:
        """Stop, and close the socket. May be called twice."""
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    def _read_plain(self) -> None:
        receive, send, respond = self._socket.recvfrom, self._socket.sendto, self._respond
        asked_at = self._asked_at
        limits = _limits(asked_at)
        for _ in range(BATCH):
            try:
                query, peer = receive(QUERY_MAX_BYTES)
            except OSError:  # nothing left to read
                return
            answer = respond(query, limits, asked_at)
            if answer is not None:
                try:
                    send(answer, peer)
                except OSError:  # a full buffer, a port 0: lost, as datagrams may be; the client asks again
                    continue

    def _read_addressed(self) -> None:
        """Read on a socket of all addresses, and answer from the address that was asked: clients accept no other."""
        for _ in range(BATCH):
            try:
                query, ancillary, _flags, peer = self._socket.recvmsg(QUERY_MAX_BYTES, ANCILLARY_BYTES)
            except OSError:
                return
            asked_at = _destination(tuple(ancillary))
            answer = self._respond(query, _limits(asked_at), asked_at)
            if answer is not None:
                self._send(answer, ancillary, peer)

    def _send(self, answer: bytes, ancillary: Any, peer: Any) -> None:
        try:
            self._socket.sendmsg([answer], ancillary, 0, peer)
        except OSError:
            return


def asked_address(host: str) -> str | None:
    """Return the address of an interface as others write it, or None for a loopback one."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return None if address.is_loopback else str(address)


def _limits(asked_at: str | None) -> Limits:
    return _LOOPBACK_LIMITS if asked_at is None else _NETWORK_LIMITS


_LOOPBACK_LIMITS: Final = Limits(PLAIN_BYTES, LOOPBACK_BYTES)
_NETWORK_LIMITS: Final = Limits(PLAIN_BYTES, NETWORK_BYTES)


@lru_cache(maxsize=256)
def _destination(ancillary: tuple[tuple[int, int, bytes], ...]) -> str | None:
    """Return the address that a datagram was sent to, from its control messages: in_pktinfo of ip(7), in6_pktinfo of
    ipv6(7)."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            return asked_address(socket.inet_ntop(socket.AF_INET, data[8:12]))
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            return asked_address(socket.inet_ntop(socket.AF_INET6, data[:16]))
    return None
