"""DNS over UDP: datagrams in, datagrams out, many in one turn of the loop. What they mean is the responder's."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import Any, Final

from portd.adapters.dns.message import PLAIN_BYTES, Limits

QUERY_MAX_BYTES: Final = 4096
"""Larger datagrams are cut, and then malformed: a question and its options take a few hundred."""
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

Respond = Callable[[bytes, Limits], bytes | None]


class UdpListener:
    """Answers on one bound, non-blocking socket, which it owns."""

    def __init__(self, bound: socket.socket, respond: Respond) -> None:
        self._socket = bound
        self._respond = respond
        host = ipaddress.ip_address(bound.getsockname()[0])
        self._limits = Limits(PLAIN_BYTES, LOOPBACK_BYTES if host.is_loopback else NETWORK_BYTES)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._read: Callable[[], None] = self._read_plain
        if host.is_unspecified:
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
        receive, send, respond, limits = self._socket.recvfrom, self._socket.sendto, self._respond, self._limits
        for _ in range(BATCH):
            try:
                query, peer = receive(QUERY_MAX_BYTES)
            except OSError:  # nothing left to read
                return
            answer = respond(query, limits)
            if answer is not None:
                try:
                    send(answer, peer)
                except OSError:  # a full buffer, a port 0: lost, as datagrams may be; the client asks again
                    continue

    def _read_addressed(self) -> None:
        """Read on a socket of all addresses, and answer from the address that was asked: clients take no other."""
        for _ in range(BATCH):
            try:
                query, ancillary, _flags, peer = self._socket.recvmsg(QUERY_MAX_BYTES, ANCILLARY_BYTES)
            except OSError:
                return
            answer = self._respond(query, self._limits)
            if answer is not None:
                self._send(answer, ancillary, peer)

    def _send(self, answer: bytes, ancillary: Any, peer: Any) -> None:
        try:
            self._socket.sendmsg([answer], ancillary, 0, peer)
        except OSError:
            return
