"""The multicast DNS sockets: one for each address family, for all interfaces, and the pace at which they send.

The interface of a packet, received or sent, is in its ancillary data (ip(7), ipv6(7): PKTINFO), so an interface that
comes or goes opens and closes no socket, and no default route is needed. DNS must not be known here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from portd.adapters.mdns.interfaces import Interfaces

log = logging.getLogger("portd.mdns")

PORT = 5353
GROUP = {socket.AF_INET: "224.0.0.251", socket.AF_INET6: "ff02::fb"}
BURST = 8
"""Packets sent at once. With more, receivers' default buffers (50 to 90 packets) overflow, and they keep ghosts."""
PAUSE_S = 0.020
"""Between two bursts. 8 packets in 10 ms overflowed a busy avahi-daemon's buffer: it got 776 of a thousand goodbyes.
At 20 ms they are 4.5 Mbit/s, what a slow WLAN can carry by multicast."""
RECEIVED_AT_ONCE = 16
"""Packets read before the loop gets its turn: each costs up to 0.2 ms."""
RECEIVE_BYTES = 1 << 20
ECHOES = 512
"""Own packets remembered to recognise them when the kernel loops them back: over a second's worth at full pace."""

_PKTINFO4 = struct.Struct("=i4s4s")
_PKTINFO6 = struct.Struct("=16si")
_IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8)
_IP_MULTICAST_ALL, _IPV6_MULTICAST_ALL = 49, 29


class Target(NamedTuple):
    """Where a packet goes: out of the interface `link`, to the group, or to one address and port."""

    family: socket.AddressFamily
    link: int
    address: str | None = None
    port: int = PORT


class Arrival(NamedTuple):
    """A packet, who sent it, by which interface it came, and whether it was sent to the group."""

    data: bytes
    family: socket.AddressFamily
    link: int
    source: str
    port: int
    is_multicast: bool


class Sockets:
    """The sockets on port 5353. `unicast=False` receives multicast alone: another responder of this host would lose its
    unicast packets (RFC 6762 section 15.4)."""

    def __init__(self, on_arrival: Callable[[Arrival], None], *, unicast: bool) -> None:
        self._on_arrival = on_arrival
        self.takes_unicast = unicast
        self._sockets: dict[socket.AddressFamily, socket.socket] = {}
        self._members: set[tuple[socket.AddressFamily, int]] = set()
        self._links: Interfaces = {}
        self._queue: deque[tuple[bytes, Target]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._own: frozenset[str] = frozenset()
        self._echoes: OrderedDict[tuple[int, bytes], int] = OrderedDict()
        self._idle: asyncio.Future[None] | None = None
        self.sent_packets = self.sent_bytes = self.failed_packets = 0
        self.problem: str | None = None

    def open(self) -> None:
        """Bind; without IPv6 where the host has none. Raises OSError, EADDRINUSE where another responder has the port
        exclusively."""
        loop = asyncio.get_running_loop()
        self._sockets[socket.AF_INET] = _open_ipv4(self.takes_unicast)
        with suppress(OSError):
            self._sockets[socket.AF_INET6] = _open_ipv6(self.takes_unicast)
        for family, opened in self._sockets.items():
            loop.add_reader(opened, self._read, family, opened)

    def close(self) -> None:
        """Close at once; queued packets are lost. May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._queue.clear()
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        for opened in self._sockets.values():
            asyncio.get_running_loop().remove_reader(opened)
            opened.close()
        self._sockets.clear()

    def filenos(self) -> dict[socket.AddressFamily, int]:
        """Return the sockets' descriptors, for the guardian to inherit."""
        return {family: opened.fileno() for family, opened in self._sockets.items()}

    def join(self, links: Interfaces) -> None:
        """Join the group on exactly these interfaces, in the families of their addresses."""
        self._links = links
        self._own = frozenset(str(address.ip) for link in links.values() for address in link.addresses)
        wanted = {
            (family, link.index)
            for link in links.values()
            for family in self._sockets
            if (link.ipv4 if family == socket.AF_INET else link.ipv6)
        }
        for family, index in self._members - wanted:
            with suppress(OSError):  # the interface is gone, and the membership with it
                _membership(self._sockets[family], family, index, join=False)
        self._members &= wanted
        for family, index in sorted(wanted - self._members):
            try:
                _membership(self._sockets[family], family, index, join=True)
            except OSError as error:
                self.problem = f"can't join multicast DNS on interface {links[index].name}: {error.strerror}"
                continue
            self._members.add((family, index))

    def rejoin(self, link: int) -> None:
        """Join again on an interface that was down: the switch may have forgotten the membership."""
        self._members -= {(family, link) for family in self._sockets}
        for family, opened in self._sockets.items():
            with suppress(OSError):
                _membership(opened, family, link, join=False)
        self.join(self._links)

    def groups(self, link: int | None = None) -> list[Target]:
        """Return the targets of multicast: every family of one interface, or of all."""
        return [Target(family, index) for family, index in sorted(self._members) if link in (None, index)]

    def send(self, packets: list[bytes], targets: list[Target]) -> None:
        """Queue packets; they leave in order, paced. Failures are counted, never raised."""
        self._queue.extend((packet, target) for packet in packets for target in targets)
        if self._timer is None and self._queue:
            self._burst()

    async def drained(self) -> None:
        """Wait until all queued packets are sent."""
        if self._timer is not None:
            self._idle = self._idle or asyncio.get_running_loop().create_future()
            await self._idle

    def _burst(self) -> None:
        self._timer = None
        for _ in range(min(BURST * max(1, len(self._members)), len(self._queue))):
            packet, target = self._queue[0]
            try:
                self._send_now(packet, target)
            except BlockingIOError:
                break
            except OSError as error:  # the interface went away, or has no address yet: netlink reports it soon
                self.failed_packets += 1
                self.problem = f"can't send multicast DNS: {error.strerror}"
            self._queue.popleft()
        if self._queue or self._idle is not None:
            # After the last burst too: `drained` includes the receivers' pause.
            self._timer = asyncio.get_running_loop().call_later(PAUSE_S, self._burst)
        if not self._queue and self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    def _send_now(self, packet: bytes, target: Target) -> None:
        opened = self._sockets[target.family]
        if target.address is None:
            self._expect_echo(target.link, packet)
        to = (target.address or GROUP[target.family], target.port)
        if target.family == socket.AF_INET:
            info = _PKTINFO4.pack(target.link, bytes(4), bytes(4))
            opened.sendmsg([packet], [(socket.IPPROTO_IP, _IP_PKTINFO, info)], 0, to)
        else:
            info = _PKTINFO6.pack(bytes(16), target.link)
            opened.sendmsg([packet], [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info)], 0, (*to, 0, target.link))
        self.sent_packets += 1
        self.sent_bytes += len(packet)

    def _read(self, family: socket.AddressFamily, opened: socket.socket) -> None:
        for _ in range(RECEIVED_AT_ONCE):
            try:
                data, ancillary, _, source = opened.recvmsg(9000, 256)
            except OSError:  # nothing left, or an ICMP error for a packet that was sent
                return
            link, destination = _packet_info(family, ancillary)
            sender = source[0].partition("%")[0]
            if link not in self._links or self._is_echo(link, sender, data):
                continue
            try:
                self._on_arrival(Arrival(data, family, link, sender, source[1], destination == GROUP[family]))
            except Exception:  # anybody on the link can send anything
                log.debug("a packet from %s could not be handled: %r", sender, data, exc_info=True)

    def _expect_echo(self, link: int, packet: bytes) -> None:
        self._echoes[link, packet] = self._echoes.pop((link, packet), 0) + 1
        if len(self._echoes) > ECHOES:
            self._echoes.popitem(last=False)

    def _is_echo(self, link: int, sender: str, packet: bytes) -> bool:
        """Return whether the kernel loops back a packet of ours; another process's equal question is not one."""
        if sender not in self._own or (count := self._echoes.get((link, packet), 0)) == 0:
            return False
        if count > 1:
            self._echoes[link, packet] = count - 1
        else:
            del self._echoes[link, packet]
        return True


def _open_ipv4(unicast: bool) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        _prepare(opened)
        opened.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        opened.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 255)
        opened.bind(("" if unicast else GROUP[socket.AF_INET], PORT))
    except OSError:
        opened.close()
        raise
    return opened


def _open_ipv6(unicast: bool) -> socket.socket:
    opened = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        _prepare(opened)
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_MULTICAST_ALL, 0)
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 255)
        # Bound without a scope, for every interface: Linux needs a scope for link-local unicast alone.
        opened.bind(("::" if unicast else GROUP[socket.AF_INET6], PORT))
    except OSError:
        opened.close()
        raise
    return opened


def _prepare(opened: socket.socket) -> None:
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    with suppress(OSError):  # SO_RCVBUFFORCE needs CAP_NET_ADMIN; without it, rmem_max bounds the buffer
        opened.setsockopt(socket.SOL_SOCKET, 33, RECEIVE_BYTES)


def _membership(opened: socket.socket, family: socket.AddressFamily, link: int, *, join: bool) -> None:
    group = socket.inet_pton(family, GROUP[family])
    if family == socket.AF_INET:
        option = socket.IP_ADD_MEMBERSHIP if join else socket.IP_DROP_MEMBERSHIP
        opened.setsockopt(socket.IPPROTO_IP, option, group + bytes(4) + struct.pack("=i", link))
    else:
        option = socket.IPV6_JOIN_GROUP if join else socket.IPV6_LEAVE_GROUP
        opened.setsockopt(socket.IPPROTO_IPV6, option, group + struct.pack("=i", link))


def _packet_info(family: socket.AddressFamily, ancillary: list[tuple[int, int, bytes]]) -> tuple[int, str]:
    for level, kind, data in ancillary:
        if family == socket.AF_INET and (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            link, _, destination = _PKTINFO4.unpack(data)
            return link, socket.inet_ntop(family, destination)
        if family == socket.AF_INET6 and (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            destination, link = _PKTINFO6.unpack(data)
            return link, socket.inet_ntop(family, destination)
    return 0, ""
