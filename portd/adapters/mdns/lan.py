"""The LAN's services, this daemon's and others' together.

Receives on an embedded responder's sockets; beside avahi-daemon on sockets of its own, for multicast alone. Leases are
not known here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from portd.adapters.mdns import wire
from portd.adapters.mdns.browser import Browser
from portd.adapters.mdns.embedded import EmbeddedResponder
from portd.adapters.mdns.interfaces import Interfaces, InterfaceWatch
from portd.adapters.mdns.responder import Responder
from portd.adapters.mdns.sockets import Arrival, Sockets
from portd.adapters.mdns.wire import DNSIncoming
from portd.core.announcing import LanService, check_lan_type

log = logging.getLogger("portd.mdns")


class LanDirectory:
    """Lists the services of the LAN. `ours` returns what this daemon publishes: its own packets don't come back."""

    def __init__(self, ours: Callable[[], list[LanService]]) -> None:
        self._ours = ours
        self._listener: _Listener | None = None
        self.problem: str | None = None

    @property
    def is_active(self) -> bool:
        """Return whether anything is browsed now."""
        return self._listener is not None and self._listener.browser.is_active

    def open(self, responder: Responder, interfaces: Sequence[str]) -> None:
        """Listen beside this responder; where it shares no port, only this daemon's services are listed."""
        self.close()
        self.problem = None
        try:
            self._listener = (
                _Listener(Browser(responder.sockets, lambda: responder.links))
                if isinstance(responder, EmbeddedResponder)
                else _Listener.beside_avahi(interfaces)
            )
        except OSError as error:
            self.problem = f"can't browse the LAN beside avahi-daemon: {error.strerror}"
            log.warning(self.problem)

    def close(self) -> None:
        """Stop listening; may be called twice."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def receive(self, arrival: Arrival, message: DNSIncoming) -> None:
        """Receive a response that arrived on the responder's sockets."""
        if self._listener is not None:
            self._listener.browser.receive(arrival, message)

    async def services(self, type_: str | None) -> list[LanService]:
        """List services, by type and name; raises InvalidRequest for an invalid type."""
        type_ = check_lan_type(type_) if type_ is not None else None
        if self._listener is not None:
            await self._listener.browser.browse(type_)
        return self._seen(type_)

    def _seen(self, type_: str | None) -> list[LanService]:
        seen = {
            (service.type, service.name): service
            for service in (self._listener.browser.seen(type_) if self._listener is not None else ())
        }
        for service in self._ours():
            base = service.type.rpartition("._sub.")[2]
            if type_ in (None, base, service.type):
                key = (type_ or base, service.name)
                other = seen.get(key)
                seen[key] = replace(service, type=key[0]) if other is None else replace(other, ours=True)
        return [service for _, service in sorted(seen.items())]


class _Listener:
    """A browser and the sockets it receives on."""

    def __init__(self, browser: Browser, sockets: Sockets | None = None, watch: InterfaceWatch | None = None) -> None:
        self.browser = browser
        self._sockets = sockets
        self._watch = watch

    @classmethod
    def beside_avahi(cls, interfaces: Sequence[str]) -> _Listener:
        """Receive multicast alone, so that Avahi still gets what is sent to this host; raises OSError."""

        def receive(arrival: Arrival) -> None:
            message = wire.decode(arrival.data, asyncio.get_running_loop().time() * 1000)
            if message is not None and message.is_response():
                listener.browser.receive(arrival, message)

        def change(links: Interfaces, interrupted: frozenset[int]) -> None:
            for link in interrupted:
                sockets.rejoin(link)
            sockets.join(links)

        sockets = Sockets(receive, unicast=False)
        watch = InterfaceWatch(interfaces, change)
        listener = cls(Browser(sockets, lambda: watch.current), sockets, watch)
        try:
            sockets.open()
            watch.start()
        except OSError:
            listener.close()
            raise
        sockets.join(watch.current)
        return listener

    def close(self) -> None:
        """Stop listening; may be called twice."""
        self.browser.close()
        if self._watch is not None:
            self._watch.close()
        if self._sockets is not None:
            self._sockets.close()
