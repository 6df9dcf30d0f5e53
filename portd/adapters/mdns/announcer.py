"""The entry point of this package: turns lease events into announcements, and lists the services of the LAN.

It decides what is published, when (flapping health is damped), and by which responder: a running avahi-daemon, else
this process. How names are won and what packets look like must not be known here. A failure here reaches the lease's
owner as `announce.problem` alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Literal

from portd.adapters.mdns.avahi import AvahiBus, AvahiResponder
from portd.adapters.mdns.desired import Desired, Instances, announced_service
from portd.adapters.mdns.embedded import EmbeddedResponder
from portd.adapters.mdns.lan import LanDirectory
from portd.adapters.mdns.responder import Responder
from portd.adapters.mdns.zone import Service
from portd.core.announcing import LanService
from portd.core.model import Event, Lease
from portd.core.visibility import serving

ReportAnnounced = Callable[[str, str | None, str | None], None]
"""Reports what became of an announcement: lease id, name it is published as (None: it is not), a problem or None."""
ResponderChoice = Literal["auto", "embedded", "avahi"]

GRACE_S = 5.0
"""How long avahi-daemon may be gone, as during an upgrade, before this process publishes in its stead."""
RETRY_S = 10.0
"""After a failed start: another program has port 5353 exclusively, or the configured avahi-daemon is out of reach."""
BUS_RETRY_S = 60.0
"""Between two tries to connect to D-Bus, where there was none and this process publishes."""
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
        self._instances = Instances()
        self._desired: dict[str, Desired] = {}
        self._stale: list[Service] = []
        self._responder: Responder | None = None
        self._lan = LanDirectory(self._ours)
        self._supervisor: asyncio.Task[None] | None = None
        self._presence_changed = asyncio.Event()
        self._problem: str | None = None
        self._why = "not started"

    # --- from the service ---

    def restore(self, leases: Iterable[Lease]) -> None:
        """Announce the leases that were live before a restart, under the names they had won."""
        leases = list(leases)
        for lease in leases:  # all of an instance first: its endpoints serve together
            self._instances.apply(lease)
        for lease in leases:
            self._update(lease)

    def apply(self, event: Event) -> None:
        """Publish, change or withdraw the service of an event's lease."""
        self._update(event.lease)

    async def start(self) -> None:
        """Start in the background; a failure shows in `condition`, and is retried."""
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise())

    async def close(self, *, takeover: bool = False) -> None:
        """Send all goodbyes and stop; with `takeover` none: a successor announces the same. May be called twice."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        for desired in self._desired.values():
            desired.cancel()
        self._lan.close()
        responder, self._responder = self._responder, None
        if responder is not None:
            await responder.close(takeover=takeover)
        self._bus.disconnect()

    def condition(self) -> dict[str, object]:
        """Return what status shows: the responder, why it was chosen, its interfaces, counts, and a problem if any."""
        found: dict[str, object] = {"responder": None, "announced": 0}
        if self._responder is not None:
            found |= self._responder.condition()
        damped = sum(desired.timer is not None for desired in self._desired.values())
        return found | {
            "why": self._why,
            "wanted": len(self._desired),
            "damped": damped,
            "browsing": self._lan.is_active,
            "problem": self._problem or found.get("problem") or self._lan.problem,
        }

    async def lan(self, type: str | None = None) -> list[LanService]:
        """List the LAN's services of one type, or all; browses for a moment the first time, then reads the cache.

        Raises InvalidRequest for an invalid type.
        """
        return await self._lan.services(type)

    # --- what is desired ---

    def _update(self, lease: Lease) -> None:
        try:
            for changed, is_serving in self._affected(lease):
                self._reconcile(changed, is_serving)
        except Exception as error:
            log.exception("can't announce %s", lease.id)
            self._problem = f"announcing {lease.instance} failed: {error!r}"

    def _affected(self, lease: Lease) -> list[tuple[Lease, bool]]:
        """Return the lease and the leases that appear or disappear with it, each with whether it serves."""
        leases = self._instances.apply(lease)
        if not any(one.announce is not None or one.id in self._desired for one in leases):
            return []
        served = {one.id for one in serving(leases)}
        others = [one for one in leases if one is not lease and one.announce is not None]
        changed = [one for one in others if (one.id in served) != self._is_due(one.id)]
        return [(one, one.id in served) for one in (lease, *changed)]

    def _is_due(self, lease_id: str) -> bool:
        desired = self._desired.get(lease_id)
        return desired is not None and desired.is_due

    def _reconcile(self, lease: Lease, is_serving: bool) -> None:
        """Compare what is published with what the lease wants now."""
        desired = self._desired.get(lease.id)
        if desired is None and lease.announce is None:
            return
        if is_serving and lease.announce is not None:
            self._desire(lease, desired)
        elif lease.state == "ended" or lease.announce is None:
            self._forget(lease, desired)
        elif desired is None:
            self._retract_stale(lease)
        elif desired.is_due:
            self._withdraw(desired)

    def _desire(self, lease: Lease, desired: Desired | None) -> None:
        service, announcement = announced_service(lease), lease.announce
        assert announcement is not None
        if desired is None:
            desired = self._desired[lease.id] = Desired(service, announcement.published_as or announcement.name)
        elif (desired.service.type, desired.service.name) != (service.type, service.name):
            desired.name, desired.published_as = service.name, None
        before, desired.service = desired.service, service
        if not desired.is_due:
            self._begin(desired)
            return
        if before != service:
            self._publish(desired)
        if announcement.published_as is None and desired.published_as is not None:
            # its owner replaced the announcement, and nothing has changed on the LAN
            self._record(desired, desired.published_as, desired.problem)

    def _begin(self, desired: Desired) -> None:
        """Publish what was not published until now: at once, or later if it came and went too often."""
        desired.is_due = True
        loop = asyncio.get_running_loop()
        wait_s = desired.damping.until - loop.time()
        if wait_s <= 0:
            self._publish(desired)
            return
        desired.timer = loop.call_later(wait_s, self._undamp, desired)
        count = desired.damping.flap_count
        self._record(desired, None, f"withdrawn {count} times within a short time: announced again in {wait_s:.0f} s")

    def _withdraw(self, desired: Desired) -> None:
        desired.is_due = False
        desired.damping.note_withdrawal(asyncio.get_running_loop().time())
        desired.cancel()
        if self._responder is not None:
            self._responder.withdraw(desired.service.id)
        self._record(desired, None, None)

    def _forget(self, lease: Lease, desired: Desired | None) -> None:
        """Withdraw for good."""
        if desired is None:
            self._retract_stale(lease)
            return
        desired.cancel()
        del self._desired[lease.id]
        if self._responder is not None:
            self._responder.withdraw(lease.id)

    def _retract_stale(self, lease: Lease) -> None:
        """Send goodbyes for records announced before a restart that no longer apply; a live lease keeps its name."""
        if lease.announce is None or lease.announce.published_as is None:
            return
        self._stale.append(announced_service(lease, lease.announce.published_as))
        self._retract_all_stale()
        if lease.state != "ended":
            desired = self._desired[lease.id] = Desired(announced_service(lease), lease.announce.published_as)
            asyncio.get_running_loop().call_soon(self._record, desired, None, None)

    def _retract_all_stale(self) -> None:
        if self._responder is not None:
            for service in self._stale:
                self._responder.retract(service)
            self._stale.clear()

    def _undamp(self, desired: Desired) -> None:
        desired.timer = None
        self._publish(desired)

    def _publish(self, desired: Desired) -> None:
        if not desired.is_due or desired.timer is not None:
            return
        if self._responder is not None:
            self._responder.publish(desired.service, desired.name)
        elif self._problem is not None:
            self._record(desired, None, self._problem)

    def _on_outcome(self, service_id: str, name: str | None, problem: str | None) -> None:
        """Record a responder's report: the name that was won is the first to try from now on."""
        desired = self._desired.get(service_id)
        if desired is not None and desired.is_due:
            desired.name = name or desired.name
            self._record(desired, name, problem)

    def _record(self, desired: Desired, name: str | None, problem: str | None) -> None:
        desired.published_as, desired.problem = name, problem
        try:
            self._report(desired.service.id, name, problem)
        except Exception:
            log.exception("can't report the announcement of %s", desired.service.id)

    # --- who publishes ---

    def _on_presence(self, is_present: bool) -> None:
        self._presence_changed.set()

    async def _supervise(self) -> None:
        """Choose a responder, and choose again whenever avahi-daemon comes or goes."""
        while True:
            self._presence_changed.clear()
            retry_s: float | None = None
            try:
                await self._choose()
                self._problem = None
            except OSError as error:
                self._problem = f"no announcements: {error}"
                log.warning("%s; trying again in %.0f s", self._problem, RETRY_S)
                self._report_problem(self._problem)
                retry_s = RETRY_S
            except Exception:
                log.exception("announcing failed; trying again in %.0f s", RETRY_S)
                self._problem, retry_s = "announcing failed unexpectedly: see the log", RETRY_S
            if self._choice == "auto" and not self._bus.is_connected:
                retry_s = retry_s or BUS_RETRY_S
            with suppress(TimeoutError):
                await asyncio.wait_for(self._presence_changed.wait(), retry_s)
            if self._choice == "auto" and isinstance(self._responder, AvahiResponder) and not self._bus.is_present:
                await self._wait_for_return()

    async def _wait_for_return(self) -> None:
        end = asyncio.get_running_loop().time() + GRACE_S
        while not self._bus.is_present and (left := end - asyncio.get_running_loop().time()) > 0:
            self._presence_changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._presence_changed.wait(), left)

    async def _choose(self) -> None:
        """Switch to the responder that the configuration and avahi-daemon's presence call for; raises OSError."""
        await self._connect_bus()
        if self._choice == "avahi" and not self._bus.is_present:
            await self._switch(None)
            raise OSError('[mdns] responder is "avahi", but avahi-daemon does not run')
        if self._choice != "embedded" and self._bus.is_present:
            self._why = "avahi: avahi-daemon runs on this host, and a host has one responder (RFC 6762 section 15)"
            # A new avahi-daemon has none of the services that the last one published: a new responder publishes all.
            await self._switch(AvahiResponder(self._bus, self._on_outcome, self._interfaces))
        elif not isinstance(self._responder, EmbeddedResponder):
            if self._choice == "embedded":
                self._why = "embedded: by configuration"
            elif self._bus.is_connected:
                self._why = "embedded: no avahi-daemon runs on this host"
            await self._switch(EmbeddedResponder(self._host, self._on_outcome, self._interfaces, self._lan.receive))

    async def _connect_bus(self) -> None:
        """Connect to D-Bus where avahi-daemon may be used; without a bus, only `responder = "avahi"` raises OSError."""
        if self._choice == "embedded" or self._bus.is_connected:
            return
        try:
            await self._bus.connect()
        except OSError as error:
            if self._choice == "avahi":
                raise
            self._why = f"embedded: {error}"

    async def _switch(self, responder: Responder | None) -> None:
        """Replace the responder: without goodbyes, since the new one announces the same."""
        before, self._responder = self._responder, None
        self._lan.close()
        if before is not None:
            await before.close(takeover=responder is not None)
        if responder is None:
            return
        await responder.start()
        self._responder = responder
        self._lan.open(responder, self._interfaces)
        self._retract_all_stale()
        for desired in list(self._desired.values()):
            self._publish(desired)

    def _report_problem(self, problem: str) -> None:
        for desired in list(self._desired.values()):
            if desired.is_due and desired.problem != problem:
                self._record(desired, None, problem)

    def _ours(self) -> list[LanService]:
        responder = self._responder
        if responder is None:
            return []
        return [
            LanService(
                type=desired.service.type,
                name=desired.published_as,
                host=responder.host_name,
                addresses=(
                    responder.addresses if desired.service.address in ("0.0.0.0", "::") else (desired.service.address,)
                ),
                port=desired.service.port,
                txt=dict(desired.service.txt),
                ours=True,
            )
            for desired in self._desired.values()
            if desired.published_as is not None
        ]
