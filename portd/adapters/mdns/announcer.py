"""The door of this package: turns lease events into announcements, and shows what the LAN offers.

It decides what should be published and when (health that flaps is damped), and by whom: a running avahi-daemon, else
this process. How a name is won and packets look is not known here. Nothing that fails here reaches the lease's owner
otherwise than as `announce.problem`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Literal

from portd.adapters.mdns.avahi import AvahiBus, AvahiResponder
from portd.adapters.mdns.embedded import EmbeddedResponder
from portd.adapters.mdns.lan import Lan, LanChange
from portd.adapters.mdns.responder import Responder
from portd.adapters.mdns.zone import Entry, Service
from portd.core.announcing import LanService, is_announceable
from portd.core.model import Event, Lease

ReportAnnounced = Callable[[str, str | None, str | None], None]
"""What became of an announcement: lease id, the name it is published as (None: not at all), a problem or None."""
ResponderChoice = Literal["auto", "embedded", "avahi"]

GRACE_S = 5.0
"""How long avahi-daemon may be gone, as at an upgrade, before this process takes its place."""
RETRY_S = 10.0
"""After a failed start: port 5353 is taken exclusively, or avahi-daemon is wanted and out of reach."""
BUS_RETRY_S = 60.0
"""Until it is looked again for a D-Bus, where there was none and we publish ourselves."""
CALM_S = 60.0
"""Withdrawals further apart than this are no flapping."""
DAMPED_S = 2.0
"""Before the announcement after a second withdrawal; doubled for each further one."""
DAMPED_MOST_S = 60.0

log = logging.getLogger("portd.mdns")


class Announcer:
    """Announces leases and browses. All calls belong on one event loop; `apply` and `restore` never raise or wait."""

    def __init__(
        self,
        host: str,
        report: ReportAnnounced,
        *,
        responder: ResponderChoice = "auto",
        interfaces: Sequence[str] = (),
        bus_address: str | None = None,
    ) -> None:
        self._host = host
        self._report = report
        self._choice = responder
        self._interfaces = interfaces
        self._bus = AvahiBus(bus_address, self._on_presence)
        self._wanted: dict[str, _Wanted] = {}
        self._stale: list[Service] = []
        self._responder: Responder | None = None
        self._lan = Lan(self._ours)
        self._supervisor: asyncio.Task[None] | None = None
        self._turned = asyncio.Event()
        self._problem: str | None = None
        self._why = "not started"

    # --- from the service ---

    def restore(self, leases: Iterable[Lease]) -> None:
        """Take in the leases that were live before a restart: they are announced under the names they had won."""
        for lease in leases:
            self._take(lease)

    def apply(self, event: Event) -> None:
        """Take an event in: publish, change or withdraw what it is about."""
        self._take(event.lease)

    async def start(self) -> None:
        """Begin in the background; a failure shows in `condition`, and is tried again."""
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise())

    async def close(self, *, takeover: bool = False) -> None:
        """Say all goodbyes and stop; with `takeover` say none: a successor announces the same. May be called twice."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        for wanted in self._wanted.values():
            wanted.cancel()
        self._lan.close()
        responder, self._responder = self._responder, None
        if responder is not None:
            await responder.close(takeover=takeover)
        self._bus.disconnect()

    def condition(self) -> dict[str, object]:
        """Tell what status shows: which responder, why, its interfaces and counts, and what is wrong, if anything."""
        found: dict[str, object] = {"responder": None, "announced": 0}
        if self._responder is not None:
            found |= self._responder.condition()
        damped = sum(wanted.timer is not None for wanted in self._wanted.values())
        return found | {
            "why": self._why,
            "wanted": len(self._wanted),
            "damped": damped,
            "browsing": self._lan.is_active,
            "problem": self._problem or found.get("problem") or self._lan.problem,
        }

    async def lan(self, type: str | None = None) -> list[LanService]:
        """List the LAN's services of one type, or all; waits a moment the first time, then answers from the cache.

        Raises InvalidRequest for what is no type.
        """
        return await self._lan.services(type)

    def follow(self, type: str | None = None) -> AsyncGenerator[LanChange, None]:
        """Yield every service that is there, then every change, until it is closed. Raises InvalidRequest at once."""
        return self._lan.follow(type)

    # --- what is wanted ---

    def _take(self, lease: Lease) -> None:
        try:
            self._consider(lease)
        except Exception as error:
            log.exception("can't announce %s", lease.id)
            self._problem = f"announcing {lease.instance} failed: {error!r}"

    def _consider(self, lease: Lease) -> None:
        wanted = self._wanted.get(lease.id)
        if wanted is None and lease.announce is None:
            return
        if is_announceable(lease):
            self._want(lease, wanted)
        elif lease.state == "ended" or lease.announce is None:
            self._forget(lease, wanted)
        elif wanted is None:
            self._disown(lease)
        elif wanted.is_due:
            self._withdraw(wanted)

    def _want(self, lease: Lease, wanted: _Wanted | None) -> None:
        service, announcement = _service(lease), lease.announce
        assert announcement is not None
        if wanted is None:
            wanted = self._wanted[lease.id] = _Wanted(service, announcement.published_as or announcement.name)
        elif (wanted.service.type, wanted.service.name) != (service.type, service.name):
            wanted.name, wanted.published_as = service.name, None
        before, wanted.service = wanted.service, service
        if not wanted.is_due:
            self._begin(wanted)
            return
        if before != service:
            self._publish(wanted)
        if announcement.published_as is None and wanted.published_as is not None:
            self._tell(wanted, wanted.published_as, wanted.problem)  # written anew by its owner, and still published

    def _begin(self, wanted: _Wanted) -> None:
        """Publish what was not published until now: at once, or later if it came and went too often."""
        wanted.is_due = True
        loop = asyncio.get_running_loop()
        wait_s = wanted.damped_until - loop.time()
        if wait_s <= 0:
            self._publish(wanted)
        else:
            wanted.timer = loop.call_later(wait_s, self._undamp, wanted)
            self._tell(
                wanted,
                None,
                f"it went {wanted.flap_count} times within a short time: announced again in {wait_s:.0f} s",
            )

    def _withdraw(self, wanted: _Wanted) -> None:
        wanted.is_due = False
        wanted.flap(asyncio.get_running_loop().time())
        wanted.cancel()
        if self._responder is not None:
            self._responder.withdraw(wanted.service.id)
        self._tell(wanted, None, None)

    def _forget(self, lease: Lease, wanted: _Wanted | None) -> None:
        """Withdraw for good."""
        if wanted is None:
            self._disown(lease)
            return
        wanted.cancel()
        del self._wanted[lease.id]
        if self._responder is not None:
            self._responder.withdraw(lease.id)
        self._lan.wake()

    def _disown(self, lease: Lease) -> None:
        """Take back what only the LAN still knows of: it went while the daemon was down. A live one keeps its name."""
        if lease.announce is None or lease.announce.published_as is None:
            return
        self._stale.append(_service(lease, lease.announce.published_as))
        self._take_stale_back()
        if lease.state != "ended":
            wanted = self._wanted[lease.id] = _Wanted(_service(lease), lease.announce.published_as)
            asyncio.get_running_loop().call_soon(self._tell, wanted, None, None)

    def _undamp(self, wanted: _Wanted) -> None:
        wanted.timer = None
        self._publish(wanted)

    def _publish(self, wanted: _Wanted) -> None:
        if not wanted.is_due or wanted.timer is not None:
            return
        if self._responder is not None:
            self._responder.publish(wanted.service, wanted.name)
        elif self._problem is not None:
            self._tell(wanted, None, self._problem)

    def _settled(self, service_id: str, name: str | None, problem: str | None) -> None:
        """Take a responder's word: the name that was won is the first wish from now on."""
        wanted = self._wanted.get(service_id)
        if wanted is not None and wanted.is_due:
            wanted.name = name or wanted.name
            self._tell(wanted, name, problem)

    def _tell(self, wanted: _Wanted, name: str | None, problem: str | None) -> None:
        wanted.published_as, wanted.problem = name, problem
        self._lan.wake()
        try:
            self._report(wanted.service.id, name, problem)
        except Exception:
            log.exception("what became of the announcement of %s could not be told", wanted.service.id)

    def _take_stale_back(self) -> None:
        responder = self._responder
        if isinstance(responder, EmbeddedResponder):
            for service in self._stale:
                entry = Entry(service, service.name, responder.zone.host)
                if responder.zone.claim(entry.key) is None:
                    responder.repudiate(entry)
        if responder is not None:  # Avahi has forgotten already what was published through it
            self._stale.clear()

    # --- who publishes ---

    def _on_presence(self, is_present: bool) -> None:
        self._turned.set()

    async def _supervise(self) -> None:
        """Choose a responder, and choose again whenever avahi-daemon comes or goes."""
        while True:
            self._turned.clear()
            retry_s: float | None = None
            try:
                await self._choose()
                self._problem = None
            except OSError as error:
                self._problem = f"no announcements: {error}"
                log.warning("%s; trying again in %.0f s", self._problem, RETRY_S)
                self._tell_all(self._problem)
                retry_s = RETRY_S
            except Exception:
                log.exception("announcing failed; trying again in %.0f s", RETRY_S)
                self._problem, retry_s = "announcing failed unexpectedly: see the log", RETRY_S
            if self._choice == "auto" and not self._bus.is_connected:
                retry_s = retry_s or BUS_RETRY_S
            with suppress(TimeoutError):
                await asyncio.wait_for(self._turned.wait(), retry_s)
            if self._choice == "auto" and isinstance(self._responder, AvahiResponder) and not self._bus.is_present:
                await self._await_return()

    async def _await_return(self) -> None:
        end = asyncio.get_running_loop().time() + GRACE_S
        while not self._bus.is_present and (left := end - asyncio.get_running_loop().time()) > 0:
            self._turned.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._turned.wait(), left)

    async def _choose(self) -> None:
        if self._choice != "embedded" and not self._bus.is_connected:
            try:
                await self._bus.connect()
            except OSError as error:
                if self._choice == "avahi":
                    raise
                self._why = f"embedded: {error}"
        if self._choice == "avahi" or (self._choice == "auto" and self._bus.is_present):
            if not self._bus.is_present:
                await self._switch(None)
                raise OSError('[mdns] responder is "avahi", and avahi-daemon does not run')
            self._why = "avahi: avahi-daemon runs on this host, and one responder a host is right (RFC 6762, 15.4)"
            # A new daemon knows nothing of what the last one published for us, so a new responder asks for all again.
            await self._switch(AvahiResponder(self._bus, self._settled, self._interfaces))
        elif not isinstance(self._responder, EmbeddedResponder):
            if self._choice == "embedded":
                self._why = "embedded: by configuration"
            elif self._bus.is_connected:
                self._why = "embedded: no avahi-daemon runs on this host"
            await self._switch(EmbeddedResponder(self._host, self._settled, self._interfaces, self._lan.hear))

    async def _switch(self, responder: Responder | None) -> None:
        """Let one responder take over from another: without goodbyes, since the successor announces the same."""
        before, self._responder = self._responder, None
        self._lan.close()
        if before is not None:
            await before.close(takeover=responder is not None)
        if responder is None:
            return
        await responder.start()
        self._responder = responder
        self._lan.open(responder, self._interfaces)
        self._take_stale_back()
        for wanted in list(self._wanted.values()):
            self._publish(wanted)

    def _tell_all(self, problem: str) -> None:
        for wanted in list(self._wanted.values()):
            if wanted.is_due and wanted.problem != problem:
                self._tell(wanted, None, problem)

    def _ours(self) -> list[LanService]:
        responder = self._responder
        if responder is None:
            return []
        return [
            LanService(
                type=wanted.service.type,
                name=wanted.published_as,
                host=responder.host_name,
                addresses=responder.addresses
                if wanted.service.address in ("0.0.0.0", "::")
                else (wanted.service.address,),
                port=wanted.service.port,
                txt=dict(wanted.service.txt),
                ours=True,
            )
            for wanted in self._wanted.values()
            if wanted.published_as is not None
        ]


class _Wanted:
    """A service that should be announced, the name to try first, and how often it came and went."""

    def __init__(self, service: Service, name: str) -> None:
        self.service = service
        self.name = name
        self.is_due = False
        self.published_as: str | None = None
        self.problem: str | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.flap_count = 0
        self.damped_until = 0.0
        self._last_flap = -CALM_S

    def flap(self, now: float) -> None:
        """Count a withdrawal: the first one is forgiven, each further one makes the next announcement wait longer."""
        self.flap_count = self.flap_count + 1 if now - self._last_flap < CALM_S else 1
        self._last_flap = now
        self.damped_until = (
            now + min(DAMPED_S * 2 ** (self.flap_count - 2), DAMPED_MOST_S) if self.flap_count > 1 else 0.0
        )

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def _service(lease: Lease, name: str | None = None) -> Service:
    """Make what a lease wants announced, under its own name or another."""
    announcement = lease.announce
    assert announcement is not None
    return Service(
        id=lease.id,
        type=announcement.type,
        name=name or announcement.name,
        port=lease.port,
        txt=tuple(announcement.txt.items()),
        address=lease.address,
    )
