"""The DNS server: sockets of both kinds over one table of names. It only follows events; it undoes nothing.

Events are applied lazily, on the next query, once for each lease: the answer is as new as ever, and a host where nobody
asks, or a lease that came and went between two queries, pays nothing for DNS. This module must not know what messages
look like.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from portd.adapters.dns.message import Limits, Responder
from portd.adapters.dns.tcp import TcpListener
from portd.adapters.dns.udp import UdpListener
from portd.adapters.dns.zone import WhenAllCriticalOf, Zone
from portd.core.bindings import ANY, ANY_V4
from portd.core.model import Event, Lease

LOOPBACK: Final = ("127.0.0.1", "::1")
ANY_PORT_TRIES: Final = 16
"""Port 0: the kernel chooses for TCP, and UDP must have the same number free. Tests only; a few tries are plenty."""
COMPLAIN_S: Final = 10.0
"""Failed queries are logged at most this often: whoever can make one can make thousands."""

log = logging.getLogger(__name__)


class DnsServer:
    """Serves the instances of this host under a zone, over UDP and TCP.

    `ttl` is in seconds; with 0, the default, nobody keeps an answer, so that no instance is called after its end: a
    query costs microseconds, a wrong answer a failed call. `passed` are bound sockets of the service manager; an
    address of `listen` that one of them has is not bound again. `when_all_critical` says what a service gives when all
    its instances are critical. `on_query` is called with type and outcome. Raises ValueError for an impossible zone.
    """

    def __init__(
        self,
        listen: Sequence[tuple[str, int]],
        zone: str = "portd.internal.",
        ttl: int = 0,
        on_query: Callable[[str, str], None] | None = None,
        when_all_critical: WhenAllCriticalOf = lambda service: "none",
    ) -> None:
        self._listen = listen
        self._zone_name = zone
        self._ttl = ttl
        self._zone = Zone(zone, ttl, _reached_at(listen), when_all_critical)
        self._responder = Responder(self._zone, on_query)
        self._news: dict[str, Lease] = {}  # by id, in the order of first changes: a name's last lease leaves before
        self._revision = 0  # its next one comes
        self._udp: list[UdpListener] = []
        self._tcp: list[TcpListener] = []
        self._addresses: list[tuple[str, int]] = []
        self._problem: str | None = None
        self._failures = 0
        self._may_complain_at = 0.0

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Return where it listens, with the ports that the kernel chose for 0; empty while it does not."""
        return self._addresses

    def restore(self, leases: Iterable[Lease], revision: int = 0) -> None:
        """Enter the live leases of before the start, and the newest revision where it is known."""
        for lease in leases:
            self._news[lease.id] = lease
            revision = max(revision, lease.revision)
        self._revision = revision
        self._catch_up()

    def apply(self, event: Event) -> None:
        """Follow an event: the next query sees it. Never raises."""
        lease = event.lease
        self._revision = event.revision
        if lease.state == "ended" and lease.id not in self._zone:
            self._news.pop(lease.id, None)
        else:
            self._news[lease.id] = lease

    def forget_answers(self) -> None:
        """Make every answer anew: what `when_all_critical` says has changed."""
        self._zone.forget_answers()

    async def start(self, passed: Iterable[socket.socket] = ()) -> None:
        """Listen; raises OSError that says where it can't, and leaves nothing open then.

        `passed` are bound sockets of the service manager, TCP and UDP, which it owns from now on: while the daemon
        restarts, queries wait in them. Where the pair of an address is there, it is not bound again.
        """
        for one in (passed := list(passed)):
            one.setblocking(False)
        given = {(one.getsockname()[0], one.getsockname()[1], one.type): one for one in passed}
        try:
            for host, port in self._listen:
                tcp = given.pop((host, port, socket.SOCK_STREAM), None)
                udp = given.pop((host, port, socket.SOCK_DGRAM), None)
                await self._start_on(host, port, tcp, udp)
        except OSError as error:
            await self.close()
            self._problem = str(error)
            raise
        finally:
            for unused in given.values():
                unused.close()
        self._problem = None

    async def close(self) -> None:
        """Stop listening, and cut off who is connected. May be called twice."""
        udp, tcp = self._udp, self._tcp
        self._udp, self._tcp, self._addresses = [], [], []
        for listener in udp:
            listener.close()
        for connected in tcp:
            await connected.close()

    def condition(self) -> dict[str, object]:
        """Return what status shows."""
        self._catch_up()
        return {
            "listen": [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self._addresses],
            "zone": self._zone_name,
            "ttl": self._ttl,
            "services": self._zone.service_count,
            "names": len(self._zone),
            "connections": sum(len(listener) for listener in self._tcp),
            "failed_queries": self._failures,
            "problem": self._problem,
        }

    def _catch_up(self) -> None:
        """Apply what has happened since the last query: microseconds for each lease that has changed."""
        self._zone.renumber(self._revision)
        if self._news:
            news, self._news = self._news, {}
            for lease in news.values():
                self._apply_lease(lease)

    def _apply_lease(self, lease: Lease) -> None:
        try:
            self._zone.apply(lease)
        except Exception:
            log.exception("dns does not show lease %s of %s on port %d", lease.id, lease.instance, lease.port)

    async def _start_on(
        self, host: str, port: int, tcp: socket.socket | None = None, udp: socket.socket | None = None
    ) -> None:
        try:
            if tcp is None and udp is None:
                tcp, udp = _bind_both(host, port)
            elif tcp is None:
                tcp = _bind(host, port, socket.SOCK_STREAM)
            elif udp is None:
                udp = _bind(host, port, socket.SOCK_DGRAM)
            assert tcp is not None
            assert udp is not None
        except OSError as error:
            for one in (tcp, udp):
                if one is not None:
                    one.close()
            raise OSError(
                error.errno,
                f"dns can't listen on {host} port {port}: {error.strerror}; change [dns] listen, or end what has it",
            ) from error
        self._tcp.append(listener := TcpListener(tcp, self._respond))
        self._udp.append(answerer := UdpListener(udp, self._respond))
        await listener.start()
        answerer.start()
        self._addresses.append(tcp.getsockname()[:2])

    def _respond(self, query: bytes, limits: Limits, asked_at: str | None) -> bytes | None:
        try:
            self._catch_up()
            return self._responder.respond(query, limits, asked_at)
        except Exception:
            self._failures += 1
            now = asyncio.get_running_loop().time()
            if now >= self._may_complain_at:
                self._may_complain_at = now + COMPLAIN_S
                log.exception("dns failed at a query (%d so far): %s", self._failures, query[:512].hex())
            return self._responder.fail(query)


def _reached_at(listen: Sequence[tuple[str, int]]) -> list[str]:
    """Return the addresses under which callers on this host reach the server."""
    found: list[str] = []
    for host, _ in listen:
        parsed = ipaddress.ip_address(host)
        found += LOOPBACK if parsed.is_loopback or host in (ANY, ANY_V4) else (host,)
    return list(dict.fromkeys(found))


def _bind_both(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """Bind one port number for TCP and UDP."""
    for tries_left in reversed(range(ANY_PORT_TRIES)):
        tcp = _bind(host, port, socket.SOCK_STREAM)
        try:
            return tcp, _bind(host, tcp.getsockname()[1], socket.SOCK_DGRAM)
        except OSError as error:
            tcp.close()
            if port or not tries_left or error.errno != errno.EADDRINUSE:
                raise
    raise AssertionError("the last try returned or raised")


def _bind(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    try:
        bound.setblocking(False)
        if kind == socket.SOCK_STREAM:  # a restart must not wait for TIME_WAIT; UDP would let two have one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
