"""What the LAN offers, ours and others' services together: listed once, or followed live.

Listens on an embedded responder's sockets; beside avahi-daemon on sockets of its own, which take multicast alone. Knows
nothing of leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal

from msgspec import Struct
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


class LanChange(Struct, frozen=True, kw_only=True):
    """What a follower is told: an instance that came, changed or went."""

    change: Literal["added", "updated", "removed"]
    service: LanService


class Lan:
    """The LAN as it is seen from here. `ours` tells what this daemon publishes: nobody hears himself."""

    def __init__(self, ours: Callable[[], list[LanService]]) -> None:
        self._ours = ours
        self._view: _View | None = None
        self._followers: set[asyncio.Event] = set()
        self.problem: str | None = None

    @property
    def is_active(self) -> bool:
        """Tell whether anything is browsed now."""
        return self._view is not None and self._view.browser.is_active

    def open(self, responder: Responder, interfaces: Sequence[str]) -> None:
        """Look out beside this responder; where the port can't be shared, only what is ours is seen."""
        self.close()
        self.problem = None
        try:
            self._view = (
                _View(Browser(responder.sockets, lambda: responder.links))
                if isinstance(responder, EmbeddedResponder)
                else _View.beside_avahi(interfaces)
            )
        except OSError as error:
            self.problem = f"can't browse the LAN beside avahi-daemon: {error.strerror}"
            log.warning(self.problem)
        self.wake()

    def close(self) -> None:
        """Look no more; may be called twice."""
        if self._view is not None:
            self._view.close()
            self._view = None

    def hear(self, arrival: Arrival, message: DNSIncoming) -> None:
        """Take in a response that came over the responder's sockets."""
        if self._view is not None:
            self._view.browser.hear(arrival, message)

    def wake(self) -> None:
        """Let followers look again: what is ours has changed, or who looks."""
        for follower in self._followers:
            follower.set()

    async def services(self, type_: str | None) -> list[LanService]:
        """List services, by type and name; raises InvalidRequest for what is no type."""
        type_ = check_lan_type(type_) if type_ is not None else None
        if self._view is not None:
            await self._view.browser.look(type_)
        return self._seen(type_)

    def follow(self, type_: str | None) -> AsyncGenerator[LanChange, None]:
        """Yield every service that is there, then every change; raises InvalidRequest at once for what is no type."""
        return self._follow(check_lan_type(type_) if type_ is not None else None)

    async def _follow(self, type_: str | None) -> AsyncGenerator[LanChange, None]:
        changed = asyncio.Event()
        known: dict[tuple[str, str], LanService] = {}
        view: _View | None = None
        self._followers.add(changed)
        try:
            while True:
                if self._view is not view:  # the responder is another one now
                    view = self._view
                    if view is not None:
                        view.browser.follow(type_, changed.set)
                changed.clear()
                for change in _differences(known, self._seen(type_)):
                    yield change
                await changed.wait()
        finally:
            self._followers.discard(changed)
            if view is not None:
                view.browser.unfollow(changed.set)

    def _seen(self, type_: str | None) -> list[LanService]:
        seen = {
            (service.type, service.name): service
            for service in (self._view.browser.seen(type_) if self._view is not None else ())
        }
        for service in self._ours():
            base = service.type.rpartition("._sub.")[2]
            if type_ in (None, base, service.type):
                key = (type_ or base, service.name)
                heard = seen.get(key)
                seen[key] = replace(service, type=key[0]) if heard is None else replace(heard, ours=True)
        return [service for _, service in sorted(seen.items())]


class _View:
    """A browser, and what it listens with."""

    def __init__(self, browser: Browser, sockets: Sockets | None = None, watch: InterfaceWatch | None = None) -> None:
        self.browser = browser
        self._sockets = sockets
        self._watch = watch

    @classmethod
    def beside_avahi(cls, interfaces: Sequence[str]) -> _View:
        """Listen to multicast alone, so that Avahi keeps what is sent to this host; raises OSError."""

        def receive(arrival: Arrival) -> None:
            message = wire.decode(arrival.data, asyncio.get_running_loop().time() * 1000)
            if message is not None and message.is_response():
                view.browser.hear(arrival, message)

        def change(links: Interfaces, interrupted: frozenset[int]) -> None:
            for link in interrupted:
                sockets.rejoin(link)
            sockets.join(links)

        sockets = Sockets(receive, unicast=False)
        watch = InterfaceWatch(interfaces, change)
        view = cls(Browser(sockets, lambda: watch.current), sockets, watch)
        try:
            sockets.open()
            watch.start()
        except OSError:
            view.close()
            raise
        sockets.join(watch.current)
        return view

    def close(self) -> None:
        """Stop listening; may be called twice."""
        self.browser.close()
        if self._watch is not None:
            self._watch.close()
        if self._sockets is not None:
            self._sockets.close()


def _differences(known: dict[tuple[str, str], LanService], seen: list[LanService]) -> list[LanChange]:
    """Tell what changed, and bring `known` up to date."""
    changes: list[LanChange] = []
    present = {(service.type, service.name): service for service in seen}
    for key, service in present.items():
        before = known.get(key)
        if before is None:
            changes.append(LanChange(change="added", service=service))
        elif before != service:
            changes.append(LanChange(change="updated", service=service))
    changes += [LanChange(change="removed", service=service) for key, service in known.items() if key not in present]
    known.clear()
    known.update(present)
    return changes
