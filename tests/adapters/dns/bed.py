"""A DNS server on a thread of its own, so that a test and the programs it starts can ask it, and leases to show."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, Self, TypeVar

import dns.message
import dns.query
import uvloop

from portd.adapters.dns.server import DnsServer
from portd.core.model import Event, Lease, Owner, ReportCheck

T = TypeVar("T")
DEADLINE_S = 20.0
ZONE = "portd.internal."
CHECK = ReportCheck()


def lease(service: str = "orders", number: int = 1, endpoint: str = "main", **more: Any) -> Lease:
    """Return a lease; by default a plain TCP service without a check, on an address of its own."""
    instance = more.pop("instance", f"{service}-{number}")
    fields = {
        "id": f"{instance}.{endpoint}",
        "service": service,
        "instance": instance,
        "endpoint": endpoint,
        "protocol": "tcp",
        "address": f"127.77.{number // 250}.{number % 250 + 1}",
        "port": 20000 + number,
        "pool": "default",
        "hold": "shared",
        "state": "bound",
        "lifetime": "process",
        "owner": Owner(known_by="peercred"),
        "host": "here",
        "created_at": 0.0,
    }
    return Lease(**{**fields, **more})


def ask_for(name: str, rdtype: str, **more: Any) -> dns.message.QueryMessage:
    """Return a query for a name below the zone ("" is the zone itself), or for a whole one that ends in a dot."""
    whole = name if name.endswith(".") else f"{name}.{ZONE}".lstrip(".")
    return dns.message.make_query(whole, rdtype, **more)


def wait_for(condition: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Ask until the answer is true, and return it; fails at the deadline, and says what was waited for."""
    end = time.monotonic() + deadline_s
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < end, f"not within {deadline_s} s: {what} (last: {answer!r})"
        time.sleep(0.02)


class Station:
    """A DnsServer that runs while the `with` block does."""

    def __init__(self, *listen: tuple[str, int], loop: str = "uvloop", passed: Any = (), **options: Any) -> None:
        self._passed = passed
        self.server = DnsServer(listen or [("127.0.0.1", 0)], **options)
        self._loop = uvloop.new_event_loop() if loop == "uvloop" else asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._revision = 0

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.run(self.server.start(self._passed))
        except BaseException:
            self._stop()
            raise
        self.host, self.port = self.server.addresses[0]
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.run(self.server.close())
        finally:
            self._stop()

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE_S)

    def apply(self, *leases: Lease) -> None:
        """Let the server follow an event for each lease, and return when it has."""

        async def follow() -> None:
            for each in leases:
                self._revision += 1
                self.server.apply(Event(self._revision, "updated", 0.0, each))

        self.run(follow())

    def udp(self, name: str, rdtype: str, host: str | None = None, **more: Any) -> dns.message.Message:
        """Ask over UDP."""
        return dns.query.udp(ask_for(name, rdtype, **more), host or self.host, DEADLINE_S, self.port)

    def tcp(self, name: str, rdtype: str, **more: Any) -> dns.message.Message:
        """Ask over TCP."""
        return dns.query.tcp(ask_for(name, rdtype, **more), self.host, DEADLINE_S, self.port)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
